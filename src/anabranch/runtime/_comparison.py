"""Whether compiled kernels compute what PyTorch's operators do: looked at once, when they are made.

Compilers have faults that no error tells of: a temporary that is read by strides that it does not have gives numbers,
and other ones. So new kernels run on made-up inputs, beside the program's own operators. What rounding explains passes;
to see what it explains, the operators run once more, in float64. And a fault shows on other values too: where a model
chooses between two that are nearly alike, rounding may decide, and the results are far apart.

The host waits for the current stream. Values that nobody can compare pass: random ones, and integers, where near ties
fall either way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from anabranch import _judge
from anabranch.backends import Instance, Kernels, Options, get_backend
from anabranch.export import Program, first_line, is_quantization, writes_of

_log = logging.getLogger("anabranch")

#: How far results may differ before anybody asks why, relative to the largest value of a tensor. Wide: these are faults
#: that are looked for, not digits.
BOUNDS = {torch.float16: 5e-2, torch.bfloat16: 0.25, torch.float32: 1e-2, torch.float64: 1e-4}
BOUNDS |= {torch.complex32: 5e-2, torch.complex64: 1e-2, torch.complex128: 1e-4}
#: Of models that quantize: one that is rounded to the next step is no fault.
_OF_STEPS = 0.25
#: How many times farther than the operators from what float64 gives.
_FACTOR = 8
_WIDE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}
_WIDE |= {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}

_VIEW, _RESHAPE = torch.ops.aten.view.default, torch.ops.aten.reshape.default

#: An error of the operators' own from which on nothing is left to compare with.
_LOST = 0.5
#: So many roundings of a value near one are no fault, however small the results are.
_ROUNDINGS = 4
#: Of the values on which a fault has to show again.
SEEDS = (1, 2)

_Tensors = Sequence[torch.Tensor]


def why_off(program: Program, kernels: Kernels | Instance, inputs: _Tensors, named: str) -> str:
    """Why ``kernels`` do not compute what ``program`` says, or nothing. They must have run before.

    ``named``: what messages call the inputs.
    """
    if program.is_random:
        return ""
    kernels = telling_writes(program, kernels)
    why = _off(program, kernels, inputs, named)
    for seed in SEEDS:
        why = why and _off(program, kernels, redrawn(inputs, seed), named)
    return why


def _off(program: Program, kernels: Kernels | Instance, inputs: _Tensors, named: str) -> str:
    operators: Any = get_backend("eager").lower(program, [], Options())
    got, wanted = kernels(inputs), telling_writes(program, operators)(inputs)
    places = [i for i, e in enumerate(wanted) if e.dtype in BOUNDS]
    least = _OF_STEPS if any(map(is_quantization, program.module.graph.nodes)) else 0.0
    bounds = {i: max(BOUNDS[wanted[i].dtype], least) for i in places}
    far = {i: _error(got[i], wanted[i], wanted[i].dtype) for i in places}
    if all(far[i] <= bounds[i] for i in places):
        return ""
    figures = f"off by {max(far.values()):.1e} of the largest value, of {named}"
    exact, alone = _in_float64(_with_writes(program), _to_write(program, inputs))
    if exact is None or alone:
        # What it is compared with has been rounded as the program's steps round, which is more than its results tell.
        narrow = max((BOUNDS[d] for d in _dtypes(program) if d in BOUNDS), default=0.0)
        if all(far[i] <= max(bounds[i], narrow) for i in places):
            return ""
    if exact is None:
        return f"compiled kernels are {figures}"
    for i in places:
        dtype = wanted[i].dtype
        own, theirs = (_error(results[i], exact[i], dtype) for results in (wanted, got))
        # Where nothing is left of it in this dtype anyway, nobody can tell.
        if own < _LOST and not theirs <= max(_FACTOR * own, bounds[i]):
            return f"compiled kernels are {figures}, and farther from what float64 gives than PyTorch's operators"
    return ""


def _with_writes(program: Program) -> Program:
    """``program``, which returns what it writes, too, as a computation: nothing may be written in place in it."""
    if not program.written:
        return program
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    results = graph.graph_copy(program.module.graph, copied)
    inputs = graph.find_nodes(op="placeholder")[len(program.weights) :]
    writes = {n.args[0]: n for n in writes_of(graph)}
    graph.output((*results, *(writes[inputs[i]] for i in sorted(program.written))))  # type: ignore[misc]
    return replace(program, module=fx.GraphModule(program.module, graph))


def _to_write(program: Program, inputs: _Tensors) -> _Tensors:
    """``inputs`` for a run of ``program``, which leaves them as they are."""
    return [x.clone() if i in program.written else x for i, x in enumerate(inputs)]


def telling_writes(program: Program, kernels: Kernels | Instance) -> Kernels:
    """``kernels``, which return what they write, too, and leave what they are given as it was."""

    def run(inputs: _Tensors) -> _Tensors:
        own = _to_write(program, inputs)
        results = kernels(own)
        return [*results, *(own[i] for i in sorted(program.written))]

    return run


def _error(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """Relative to the largest value that is expected. Of results so small that values near one leave as much in this
    dtype when they cancel out, relative to that."""
    return _judge.error(actual, expected, least=_ROUNDINGS * torch.finfo(dtype).eps / BOUNDS[dtype])


def redrawn(inputs: _Tensors, seed: int) -> list[torch.Tensor]:
    """Other values where they are floating; what may be indices stays."""
    made = []
    for x in inputs:
        if x.is_floating_point() and x.element_size() >= 2:
            seed += len(SEEDS)
            generator = torch.Generator(device=x.device).manual_seed(seed)
            x = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
            x.uniform_(0, 1, generator=generator)
        made.append(x)
    return made


def near(inputs: _Tensors, seed: int) -> list[torch.Tensor]:
    """Other values near these where they are floating."""
    share = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    return [moved(x, share) if x.is_floating_point() and x.element_size() >= 2 else x for x in inputs]


def moved(x: torch.Tensor, share: float) -> torch.Tensor:
    """Values near those of ``x``, which is floating; ``share``: how far, between 0 and 1."""
    return x * (1 - 0.2 * share) + 0.05 * share


def _in_float64(program: Program, inputs: _Tensors) -> tuple[_Tensors | None, list[str]]:
    """The program's results, each step computed in float64, and which operators have no kernels for that; None where
    it cannot be run so."""
    wide = _Wide(program.module)
    try:
        results: _Tensors = wide.run(*program.weights_for_eager(), *inputs)
    except Exception as e:
        _log.info("compiled kernels cannot be compared with float64: %s: %s", type(e).__name__, first_line(e))
        return None, wide.alone
    return results, wide.alone


def _dtypes(program: Program) -> set[torch.dtype]:
    """Of what the program's steps give."""
    values = [x for n in program.module.graph.nodes for x in pytree.tree_leaves(n.meta.get("val"))]
    return {x.dtype for x in values if isinstance(x, torch.Tensor)}


class _Wide(fx.Interpreter):
    """Runs a graph with every floating dtype replaced by the widest, weights for as long as they are used: all at once
    might not fit. An operator that has no kernel for that gets what it has in the graph."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.alone: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        try:
            # Results of float64's kernels may have other strides: not everything that is a view is one of them.
            target = _RESHAPE if n.target is _VIEW else n.target
            return self.call_function(target, *pytree.tree_map(_widened, (args, kwargs)))
        except RuntimeError as e:
            _log.debug("%s in float64: %s", n.target, first_line(e))
            self.alone.append(str(n.target))
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), self._as_in_graph)
        return self.call_function(n.target, args, kwargs)

    def _as_in_graph(self, n: fx.Node) -> Any:
        value, known = self.env[n], n.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(known, torch.Tensor):
            value = value.to(known.dtype)
        return value


def _widened(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return _WIDE.get(x, x)
    return x.to(_WIDE[x.dtype]) if isinstance(x, torch.Tensor) and x.dtype in _WIDE else x
