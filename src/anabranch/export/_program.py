"""``torch.export`` a model into a flat graph: tensors in, newly computed tensors out, nothing hidden."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument
from torch.utils import _pytree as pytree

from anabranch.errors import UnsupportedModel
from anabranch.export import _functional, _packed
from anabranch.export._attention import take_any_length
from anabranch.export._constants import compute_constants, is_on_cpu
from anabranch.export._default_dtype import pin_default_dtype
from anabranch.export._diagnosis import NotExported
from anabranch.export._exporter import Exporter
from anabranch.export._forward import Seen, place
from anabranch.export._hooks import check_global_hooks
from anabranch.export._in_eager import ModelInEager
from anabranch.export._layout import aliases, keep_copies
from anabranch.export._mixing import Choices, Mixing
from anabranch.export._numbers import NumberInput, Numbers
from anabranch.export._outputs import ComputedOutput, Output, classify, storage_of
from anabranch.export._precision import Cast
from anabranch.export._recurrent import call_cudnn
from anabranch.export._reinplace import copied_bytes, reinplace
from anabranch.export._signature import TensorSpec
from anabranch.export._sizes import Sizes
from anabranch.export._snapshot import Fresh, Snapshot
from anabranch.export._stand_ins import bind
from anabranch.export._state import (
    State,
    check_seen,
    drop_unused,
    hand_back,
    new_values,
    notes_of,
    put_after,
    results_of,
    set_apart,
    take_states,
    write_back,
    writes_of,
)
from anabranch.export._uncaptured import (
    Uncaptured,
    direct_only,
    reading,
    source_of,
    uncapturable,
    with_line,
    working_on_cpu,
)
from anabranch.export._writes import check_cast

_aten = torch.ops.aten


@dataclass
class Program:
    """A model for one signature, as a flat graph.

    ``module(*weights, *inputs, *states, *numbers)`` returns a tuple of newly computed tensors; ``inputs`` are the
    call's tensor leaves in order. What it writes, it writes last: the graph ends with an ``aten.copy_`` into the
    placeholder of each input and state that it changes. Nodes carry fake tensors under ``meta["val"]``. Immutable after
    export; may be run by any thread.
    """

    module: fx.GraphModule
    weights: list[torch.Tensor]
    weight_names: list[str]
    outputs: list[Output]
    structure: pytree.TreeSpec
    #: Of each weight, whether it requires a gradient.
    requires_grad: tuple[bool, ...] = ()
    #: Why the graph must not be captured (random or data-dependent ops, by name), or None.
    direct_only: str | None = None
    #: Of those, whether its result's shapes or its control flow depend on data.
    data_dependent: bool = False
    #: Whether inputs are on the CPU, beside a device.
    on_cpu: bool = False
    #: Which operators these are.
    uncaptured: tuple[Uncaptured, ...] = ()
    #: Operators that take the process's default dtype at each call, by name.
    asks_default_dtype: tuple[str, ...] = ()
    #: Whether the model looks at how its inputs lie in memory: another layout needs a program of its own.
    reads_layout: bool = False
    #: Inputs whose storage is read from its very beginning, with the operator that does it.
    absolute: tuple[tuple[int, str], ...] = ()
    #: Which of its tensor inputs it writes: positions among the call's own, and then its states.
    written: frozenset[int] = frozenset()
    #: Buffers that this program writes, or another of the engine, and this one reads: its inputs after the call's own.
    state: tuple[State, ...] = ()
    #: What a user should know of the export, a line each.
    notes: tuple[str, ...] = ()
    #: The call's numbers that it takes after the tensors.
    numbers: Numbers | None = None
    #: Of a program for many sizes of its inputs.
    sizes: Sizes | None = None
    #: Of one for single sizes that was made for many: what the symbols in its graph stand for.
    values: Mapping[Any, int] | None = None
    #: In mixed precision: which operators are in which, and why.
    choices: Choices | None = None
    #: The model itself.
    in_eager: ModelInEager | None = None

    def at(self, shapes: Sequence[Sequence[int]]) -> Program:
        """Of a program for many sizes: the same for these alone. It has the same graph, weights and kernels."""
        assert self.sizes is not None
        return replace(self, sizes=None, values=self.sizes.values(shapes))

    @functools.cached_property
    def in_place(self) -> fx.GraphModule:
        """:attr:`module` for who runs it operator by operator: it writes what it writes where that lies, if that is
        right, and copies nothing."""
        return reinplace(self.module) if self.written else self.module

    @property
    def copied_bytes(self) -> int:
        """How many bytes a call by operators copies only because they do not write in place."""
        return copied_bytes(self.in_place) if self.written else 0

    @functools.cached_property
    def why_not_by_shape(self) -> str:
        """Of a program for many sizes: why it cannot be captured for any of them, or nothing."""
        tensors = all(isinstance(n.meta.get("val"), torch.Tensor) for n in _results(self.module.graph))
        return self.direct_only or ("" if tensors else "sizes are among its results")

    def weights_for_eager(self) -> list[torch.Tensor]:
        """The weights as PyTorch's own operators have to be given them, with autograd off.

        Some look whether a tensor requires a gradient, even then: ``matmul`` chooses by it among kernels that round
        otherwise.
        """
        return [
            w.detach().requires_grad_() if required else w
            for w, required in zip(self.weights, self.requires_grad, strict=True)
        ]

    def find_work_on_cpu(self) -> None:
        """Have what works on the CPU keep a program of another device from being captured."""
        known = {u.operator for u in self.uncaptured}
        found = () if self.data_dependent else working_on_cpu(self.module.graph)
        self.uncaptured = (*self.uncaptured, *(u for u in found if u.operator not in known))
        self.direct_only = direct_only(self.uncaptured) or self.direct_only

    @property
    def takes_numbers(self) -> bool:
        """Whether operators take numbers of the call as they are, so that PyTorch has to run them."""
        return self.numbers is not None and bool(self.numbers.as_numbers)

    @property
    def is_random(self) -> bool:
        return any(u.why == "random" for u in self.uncaptured)

    @property
    def is_empty(self) -> bool:
        """Nothing is computed: each output is an input, a parameter or a constant, and nothing is written."""
        return not self.written and not any(isinstance(o, ComputedOutput) for o in self.outputs)


def export_program(
    model: torch.nn.Module | ExportedProgram | Snapshot,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    cast: Cast | Mixing | None = None,
    given: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
    aside: Callable[..., Any] = lambda call, lasting=False: call(),
    numbers: frozenset[int] = frozenset(),
    free: frozenset[tuple[int, int]] = frozenset(),
    state: frozenset[str] = frozenset(),
) -> Program:
    """Export a copy of ``model`` for these inputs; with ``cast``, in that precision.

    ``free``: position among the tensors and dimension of each size that varies; see :attr:`Program.sizes` for which of
    them the model does not need to know.
    ``numbers``: positions of those among the leaves that become inputs of the program, in place of a part of it; see
    :attr:`Program.numbers`. Raises :class:`NotCarried` where one cannot.
    ``state``: names of buffers that other programs of the engine write; where the model reads one, it is an input, too.

    Each input tensor must have memory of its own: what shares a storage is taken for one value. The program's inputs
    are what lies in memory of them, with canonical strides (see :class:`TensorSpec`). Their values are not read;
    ``given`` are such inputs with values, on which the model is tried where it cannot be exported. Weights share the
    model's memory. ``aside`` makes a call where its work on the device holds up nobody (``lasting=True``: and what it
    makes is kept): the model is called once with made-up values before it is traced. Called with the build lock held.

    Raises :class:`InputError` where the model rejects the inputs and :class:`UnsupportedModel` where an engine could
    not reproduce it: a parameter that it changes in place, control flow that depends on data, state of Python's that
    its results depend on.
    """
    check_global_hooks()
    if any(isinstance(x, torch.Generator) for x in pytree.tree_leaves((args, kwargs))):
        raise NotExported(
            "the model is given a torch.Generator, which is no part of a graph. In one graph it must draw from"
            " PyTorch's default generator, which torch.manual_seed seeds."
        )
    snapshot = model if isinstance(model, Snapshot) else Snapshot.of(model, values=False)
    exporter = Exporter(args, kwargs, given or (args, kwargs), aside, numbers, free)
    options: tuple[Any, ...] = ()
    if isinstance(cast, Cast):
        exported, _, plain = exporter.export(snapshot, decompose=False)
        options = (cast.precision, _output_dtypes(exported))
    snapshot = cast.snapshot if cast is not None else snapshot
    exported, traced, seen = exporter.export(snapshot, *options)
    if isinstance(cast, Cast):
        check_cast(plain.writes, seen.writes, cast.precision)
    leaves = pytree.tree_leaves((args, kwargs))
    program = _flatten(exported, traced, cast, exporter.specs, seen, aside, leaves, state)
    program.reads_layout = seen.reads_layout
    program.in_eager = ModelInEager(snapshot, exporter.specs, options, args, kwargs)
    if free:
        take_any_length(program.module)
        placeholders = program.module.graph.find_nodes(op="placeholder")[len(program.weights) :]
        own = [n.meta["val"] for n in placeholders if "state" not in n.meta]
        program.sizes = Sizes(own, exporter.lines)
    del exported, traced
    program.notes = (*exporter.notes(), *program.notes)
    return program


def _output_dtypes(exported: ExportedProgram) -> list[Any]:
    output = exported.graph_module.graph.output_node()
    n = len(exported.graph_signature.output_specs) - len(exported.graph_signature.user_outputs)
    values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in output.args[0][n:]]
    return [v.dtype if isinstance(v, torch.Tensor) and v.is_floating_point() else None for v in values]


def _flatten(
    exported: ExportedProgram,
    traced: Fresh,
    cast: Cast | Mixing | None,
    specs: Sequence[TensorSpec],
    seen: Seen,
    aside: Callable[..., Any],
    leaves: Sequence[Any],
    others: frozenset[str],
) -> Program:
    returned = seen.returned
    signature = exported.graph_signature
    gm = fx.GraphModule(exported.graph_module, copy.deepcopy(exported.graph_module.graph))
    numbers = bind(gm, seen.recorder, leaves) if seen.recorder is not None else []
    placeholders = gm.graph.find_nodes(op="placeholder")
    placeholders = placeholders[: len(placeholders) - len(numbers)]
    tensors: dict[str, torch.Tensor] = {**exported.state_dict, **exported.constants}
    for named in (traced.module.named_parameters, traced.module.named_buffers):
        tensors.update((f"model.{name}", t) for name, t in named(remove_duplicate=False))
    weights: dict[fx.Node, tuple[str, torch.Tensor]] = {}
    require_grad: set[fx.Node] = set()
    inputs: list[fx.Node] = []
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, TensorArgument):
                inputs.append(node)
            elif isinstance(spec.arg, ConstantArgument):
                # A constant is part of the signature; export has already put its value where it is used.
                node.replace_all_uses_with(spec.arg.value) if node.users else None
                gm.graph.erase_node(node)
            else:
                raise UnsupportedModel(
                    f"input {spec.arg.name!r} is a {type(spec.arg).__name__}; expected a tensor or a constant"
                )
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            name = str(spec.target)
            weights[node] = (name, tensors[name])
            if tensors[name].requires_grad or (seen.requires_grad and place(tensors[name]) in seen.requires_grad):
                require_grad.add(node)
        elif isinstance(exported.constants.get(str(spec.target)), torch.Generator):
            where = next((f" ({with_line(user)})" for user in node.users), "")
            raise NotExported(
                f"the model draws from a torch.Generator of its own{where}, which is no part of a graph. In one graph"
                " it must draw from PyTorch's default generator, which torch.manual_seed seeds."
            )
        else:
            raise UnsupportedModel(
                f"the model uses {spec.target!r}, a {spec.kind.name.lower()}; expected tensors only. Hold it"
                " outside the model."
            )

    new = new_values(gm.graph, dict(zip(placeholders, signature.input_specs, strict=True)), signature)
    check_seen(new, inputs, weights, seen.writes)
    states = take_states(weights, new, traced, others)
    put_after([*weights, *inputs], list(states))
    write_back(gm.graph, new)
    views = hand_back(gm.graph, inputs, seen.writes)

    literals = {n: t for n, (name, t) in weights.items() if name.rsplit(".", 1)[-1].startswith("lifted_tensor")}
    _functional.fold_literals(gm.graph, literals)
    original = traced.original
    choices = None
    if isinstance(cast, Mixing):
        choices = cast.fold(gm, weights, traced, aside, inputs, {n: s.initial for n, s in states.items()})
    elif cast is not None:
        cast.fold(gm, weights, traced, aside)
        original = functools.partial(cast.original, traced)
    call_cudnn(gm, weights, aside)
    _packed.put_back(gm.graph)
    # A graph for one signature has the types that it was traced with. Compilers check these notes again where they have
    # computed a value in another type, and fail.
    for node in gm.graph.find_nodes(op="call_function", target=_aten._assert_tensor_metadata.default):
        gm.graph.erase_node(node)
    uncaptured = uncapturable(gm.graph.nodes)
    data_dependent = any(u.why == "data-dependent" for u in uncaptured)
    _propagate(gm, data_dependent)
    asks = pin_default_dtype(gm)
    device = _device(inputs, (*(t for _, t in weights.values()), *(s.initial for s in states.values())))
    on_cpu = {n for n in inputs if is_on_cpu(n)} if device is not None and device.type != "cpu" else set()
    known = {u.operator for u in uncaptured}
    uncaptured = (*uncaptured, *(u for u in reading(gm.graph, on_cpu) if u.operator not in known))
    if device is not None and not data_dependent:
        compute_constants(gm, weights, device, storage_of, aside)
    for node, spec in zip(inputs, specs, strict=True):
        node.meta["lazy"] = {_aten._conj.default: spec.conj, _aten._neg_view.default: spec.neg}
    absolute = _absolute(gm.graph, inputs, specs, states)
    set_apart(gm.graph, states, views, results_of(seen.writes, states))
    made = classify(gm, inputs, weights, source_of, original)
    for i, view in views.items():
        made[i] = replace(made[i], view=view)  # type: ignore[arg-type]
    outputs = returned.outputs(made)
    if any(spec.layout for spec in specs) and not data_dependent:
        fresh = {n for n in gm.graph.nodes if n.op == "call_function"} - aliases(gm.graph)
        for node, spec in zip(inputs, specs, strict=True):
            with node.meta["val"].fake_mode:
                node.meta["val"] = spec.empty(node.meta["val"].device)
        _propagate(gm, data_dependent)
        keep_copies(gm, fresh)

    computed = _results(gm.graph)
    gm.graph.eliminate_dead_code()
    # Unused weights would be passed at each call for nothing.
    for node in [n for n in weights if not n.users]:
        gm.graph.erase_node(node)
        del weights[node]
    states = drop_unused(states)
    assert _results(gm.graph) == computed
    gm.recompile()
    writes = {n.args[0] for n in writes_of(gm.graph)}
    program = Program(
        module=gm,
        # Compiled kernels read what lies in memory.
        weights=[t.detach().resolve_conj().resolve_neg() for _, t in weights.values()],
        weight_names=[name.removeprefix("model.") for name, _ in weights.values()],
        requires_grad=tuple(n in require_grad for n in weights),
        outputs=outputs,
        structure=returned.structure,
        direct_only=direct_only(uncaptured) or ("given an input on the CPU" if on_cpu else None),
        on_cpu=bool(on_cpu),
        data_dependent=data_dependent,
        uncaptured=uncaptured,
        asks_default_dtype=tuple(with_line(n) for n in asks),
        absolute=absolute,
        written=frozenset(i for i, n in enumerate((*inputs, *states)) if n in writes),
        state=tuple(states.values()),
        notes=notes_of(seen.writes, states),
        numbers=Numbers(tuple(map(NumberInput, numbers)), tuple(sorted(seen.recorder.positions)))
        if seen.recorder is not None
        else None,
        choices=choices,
    )
    if device is not None and device.type != "cpu" and seen.recorder is None:  # else numbers may become tensors first
        program.find_work_on_cpu()
    return program


def _device(inputs: Sequence[fx.Node], held: Iterable[torch.Tensor]) -> torch.device | None:
    """Where the work of a graph is: the device of its inputs, or of what the model holds if there are none."""
    found = [n.meta["val"].device for n in inputs]
    found += [t.device for t in held if t.device.type != "cpu"]
    return next((d for d in found if d.type != "cpu"), found[0] if found else None)


def _results(graph: fx.Graph) -> list[Any]:
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def _propagate(gm: fx.GraphModule, data_dependent: bool) -> None:
    """Run the graph on fake tensors, so that ``meta["val"]`` tells which values share a storage."""
    if data_dependent:
        return
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            mode = node.meta["val"].fake_mode
            break
    else:
        mode = FakeTensorMode()
    env: dict[fx.Node, Any] = {}

    class Propagate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            env[n] = result
            n.meta["val"] = result
            return result

    args = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    # What PyTorch has for symbols in sizes is in Python: the C++ of operators made of others asks for numbers.
    of_symbols = enable_python_dispatcher() if _has_symbols(args) else contextlib.nullcontext()
    with mode, torch.no_grad(), of_symbols:
        Propagate(gm).run(*args, enable_io_processing=False)


def _has_symbols(values: Iterable[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in x.shape) for x in values)


def _absolute(
    graph: fx.Graph, inputs: Sequence[fx.Node], specs: Sequence[TensorSpec], states: Mapping[fx.Node, State]
) -> tuple[tuple[int, str], ...]:
    """The inputs that the model reads from the beginning of their storage, not from their own first element."""
    found = []
    roots = {storage_of(n): i for i, n in enumerate(inputs)}
    kept = {storage_of(n): state for n, state in states.items()}
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or "as_strided" not in node.target.name():
            continue
        position = roots.get(storage_of(node.args[0]))
        state = kept.get(storage_of(node.args[0]))
        if state is not None and state.initial.nbytes != state.initial.untyped_storage().nbytes():
            raise UnsupportedModel(
                f"the model reads the memory of its state {state.name!r} past its shape ({with_line(node)}), and an"
                " engine keeps no more than the state itself. Register its .clone(), or index it in the model."
            )
        if position is None:
            continue
        if specs[position].layout:
            raise UnsupportedModel(
                f"the model reads the memory of input {position} past its shape ({with_line(node)}), and was given one"
                " that is not dense. Pass x.contiguous(), or index it in the model."
            )
        given = node.args[3] if len(node.args) > 3 else node.kwargs.get("storage_offset")
        if given is not None:
            found.append((position, with_line(node)))
    return tuple(found)
