"""A segment as an ONNX file, by PyTorch's own exporter."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

from anabranch.backends.tensorrt._decompositions import decompose
from anabranch.backends.tensorrt._layout import Layout
from anabranch.backends.tensorrt._profile import Profile
from anabranch.backends.tensorrt._rewrite import rewrite
from anabranch.errors import BuildError
from anabranch.export import undisturbed
from anabranch.export._sizes import function_of, plain_size


class Unconvertible(BuildError):
    """The exporter has no ONNX for an operator; the message is its own."""


class _Physical(torch.nn.Module):
    """``module`` on tensors as they lie in memory: the permutations become part of the network. And on numbers that
    depend on their sizes, which are computed there, too."""

    def __init__(
        self,
        module: torch.nn.Module,
        inputs: Sequence[Layout],
        outputs: Sequence[Layout],
        arguments: Sequence[Any] | None = None,
    ) -> None:
        """``arguments``: see :class:`~anabranch.backends.tensorrt._partition.Segment`."""
        super().__init__()
        self.module = module
        self._inputs, self._outputs = inputs, outputs
        self._arguments = range(len(inputs)) if arguments is None else arguments
        #: Where each symbol is a size by itself; and the other sizes that are known of these.
        self._own: dict[Any, tuple[int, int]] = {}
        varied = [(i, d, n) for i, x in enumerate(inputs) for d, n in enumerate(x.sizes) if not isinstance(n, int)]
        for i, d, n in varied:
            if n.is_Symbol:
                self._own.setdefault(n, (i, d))
        known = [(i, d, n) for i, d, n in varied if self._own.get(n) != (i, d) and n.free_symbols <= self._own.keys()]
        self._known = [(i, d, self._computed(n)) for i, d, n in known]
        self._computed_arguments = [a if isinstance(a, int) else self._computed(a) for a in self._arguments]

    def _computed(self, expr: Any) -> Callable[[Sequence[torch.Tensor]], Any]:
        symbols = sorted(expr.free_symbols, key=str)
        function, places = function_of(expr, symbols), [self._own[s] for s in symbols]
        return lambda tensors: function(*(tensors[i].shape[d] for i, d in places))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        entered = [
            x if layout.is_identity else x.permute(layout.inverse)
            for x, layout in zip(tensors, self._inputs, strict=True)
        ]
        for i, d, computed in self._known:
            torch._check(entered[i].shape[d] == computed(entered))
        results = self.module(*(entered[a] if isinstance(a, int) else a(entered) for a in self._computed_arguments))
        return tuple(
            y if layout.is_identity else y.permute(layout.order)
            for y, layout in zip(results, self._outputs, strict=True)
        )


def input_names(n: int) -> list[str]:
    return [f"input_{i}" for i in range(n)]


def output_names(n: int) -> list[str]:
    return [f"output_{i}" for i in range(n)]


def named(inputs: Sequence[Layout], outputs: Sequence[Layout]) -> dict[str, Layout]:
    """Inputs and outputs by their names in the file."""
    names = (*input_names(len(inputs)), *output_names(len(outputs)))
    return dict(zip(names, (*inputs, *outputs), strict=True))


def export(
    module: fx.GraphModule,
    inputs: Sequence[Layout],
    outputs: Sequence[Layout],
    examples: Sequence[torch.Tensor],
    path: Path,
    arguments: Sequence[Any] | None = None,
    profile: Profile | None = None,
) -> Path:
    """Write ``module`` as ONNX to ``path``, its weights beside it; ``examples`` lie in memory as ``inputs`` say.

    ``arguments``: of the module; ``profile``: of the sizes in ``inputs`` that vary. The file is right for all of it.
    Raises :class:`Unconvertible` with the exporter's message.
    """
    try:
        with torch.no_grad(), undisturbed(), _quiet():
            physical = _Physical(rewrite(module), inputs, outputs, arguments)
            free = tuple({d: torch.export.Dim.AUTO for d, n in enumerate(x.bound) if n < 0} for x in inputs)
            shapes = (free,) if any(free) else None
            exported = torch.export.export(physical, tuple(examples), dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(
                decompose(exported),
                dynamo=True,
                input_names=input_names(len(inputs)),
                output_names=output_names(len(outputs)),
                verbose=False,
            )
            assert program is not None
            if shapes is not None:
                assert profile is not None
                _check_assumed(exported, inputs, profile)
            # Weights outside the message: one message holds 2 GB at most.
            program.save(str(path), external_data=True)
            # The exporter's optimizer keeps the last graph that it looked at, and with it all weights, on their device.
            for value in program.model.graph.initializers.values():
                value.const_value = None
    except Unconvertible:
        raise
    except Exception as e:
        raise Unconvertible(f"no ONNX for it: {_innermost(e)}") from None
    return path


def _check_assumed(exported: torch.export.ExportedProgram, inputs: Sequence[Layout], profile: Profile) -> None:
    """Raise :class:`Unconvertible` where the exporter assumes more of sizes than the program does."""
    names = set(exported.graph_signature.user_inputs)
    given = [n.meta["val"] for n in exported.graph.find_nodes(op="placeholder") if n.name in names]
    sympy: Any = importlib.import_module("sympy")  # which has no types
    ours: dict[Any, Any] = {}
    pairs: list[tuple[Any, Any]] = []
    for i, (x, layout) in enumerate(zip(given, inputs, strict=True)):
        for d, (n, size) in enumerate(zip(x.shape, layout.physical_sizes, strict=True)):
            if isinstance(size, int):
                continue
            found = plain_size(n)
            if isinstance(found, int):
                raise Unconvertible(f"no ONNX for it: the exporter fixes size {d} of its input {i} to {found}")
            pairs.append((found, size))
            if found.is_Symbol:
                ours.setdefault(found, size)
    env = next(n.node.shape_env for x in given for n in x.shape if isinstance(n, torch.SymInt))
    assumed = [sympy.Eq(found, size) for found, size in pairs]
    for symbol in ours:
        bounds = env.var_to_range[symbol]
        assumed += [sympy.Ge(symbol, bounds.lower), sympy.Le(symbol, bounds.upper)]
    for expr in (*assumed, *(env.replace(guard.expr) for guard in env.guards)):
        # Not in one step: a symbol of ours may have the name of one of theirs.
        stand_ins = {s: sympy.Dummy(integer=True) for s in ours}
        of_ours = expr.xreplace(stand_ins)
        of_ours = of_ours.xreplace({stand_ins[s]: size for s, size in ours.items()})
        if not profile.implies(of_ours):
            raise Unconvertible(f"no ONNX for it: for all sizes the exporter takes that {expr} holds")


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", text)
    return f"PyTorch has none for {'.'.join(operator.groups())}" if operator else f"{type(error).__name__}: {text}"


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of each of its steps, and of packages that are not installed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
