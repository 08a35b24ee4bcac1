"""``torch.export`` a model into a flat graph: tensors in, newly computed tensors out, nothing hidden."""

from __future__ import annotations

import copy
import functools
import logging
import operator
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from anabranch.errors import UnsupportedModel
from anabranch.export import _functional, _packed
from anabranch.export._bystanders import undisturbed
from anabranch.export._constants import compute_constants, is_on_cpu
from anabranch.export._default_dtype import pin_default_dtype
from anabranch.export._diagnosis import copy_of, diagnose
from anabranch.export._indices import has_mask
from anabranch.export._layout import LayoutWatch, aliases, keep_copies
from anabranch.export._leaks import Watch
from anabranch.export._numbers import NumberInput, Numbers, Recorder, TakesNumbers, bind
from anabranch.export._outputs import ComputedOutput, Output, Returned, classify, storage_of
from anabranch.export._precision import Cast, HalfPrecision
from anabranch.export._random import is_random
from anabranch.export._recurrent import call_cudnn, weights_apart
from anabranch.export._signature import TensorSpec
from anabranch.export._snapshot import Fresh, Snapshot, check_global_hooks
from anabranch.export._trial import Trial, needs_trial, try_out

# torch.export copies tree specs of its own in a way that PyTorch deprecates; whoever sees it can do nothing about it.
warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning, module="copyreg")
# Of recurrent layers: it replaces their list of weights while it traces, and takes that for a change by the model.
warnings.filterwarnings("ignore", message=".*_flat_weights.* assigned during export", category=UserWarning)

_aten = torch.ops.aten
#: The models' lines are elsewhere.
_PACKAGE = str(Path(__file__).parents[1])


class Uncaptured(NamedTuple):
    """An operator that keeps a graph from being captured: ``why`` is ``data-dependent``, ``random``, ``input on the
    CPU`` (it reads one), or ``number``: it takes a number of the call that cannot be a tensor."""

    why: str
    operator: str
    #: ``file.py:12``, the model's line, or nothing.
    source: str


@dataclass
class Program:
    """A model for one signature, as a flat graph.

    ``module(*weights, *inputs)`` returns a tuple of newly computed tensors; ``inputs`` are the call's tensor leaves in
    order. Nodes carry fake tensors under ``meta["val"]``. Immutable after export; may be run by any thread.
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
    #: What a user should know of the export, a line each.
    notes: tuple[str, ...] = ()
    #: The call's numbers that it takes after the tensors.
    numbers: Numbers | None = None

    def weights_for_eager(self) -> list[torch.Tensor]:
        """The weights as PyTorch's own operators have to be given them, with autograd off.

        Some look whether a tensor requires a gradient, even then: ``matmul`` chooses by it among kernels that round
        otherwise.
        """
        return [
            w.detach().requires_grad_() if required else w
            for w, required in zip(self.weights, self.requires_grad, strict=True)
        ]

    @property
    def takes_numbers(self) -> bool:
        """Whether operators take numbers of the call as they are, so that PyTorch has to run them."""
        return self.numbers is not None and bool(self.numbers.as_numbers)

    @property
    def is_random(self) -> bool:
        return any(u.why == "random" for u in self.uncaptured)

    @property
    def is_empty(self) -> bool:
        """Nothing is computed: each output is an input, a parameter or a constant."""
        return not any(isinstance(o, ComputedOutput) for o in self.outputs)


class _Seen:
    """What was seen while the model ran. No attributes of the module: torch.export puts those back as they were."""

    #: What the model returned.
    returned: Returned
    #: Whether it looked at how its inputs lie in memory.
    reads_layout = False
    #: The stand-ins for tensors that it computed with.
    watch: Watch | None = None
    #: What it did with the numbers that are inputs.
    recorder: Recorder | None = None

    def __init__(self) -> None:
        #: Where tensors lie that require a gradient and are no parameters of the model: torch.export forgets it.
        self.requires_grad: set[Any] = set()


class _GradientWatch(TorchFunctionMode):
    """While it is on, notes which tensors of operators require a gradient."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            for x in (*args, *kwargs.values()):
                if type(x) in (torch.Tensor, torch.nn.Parameter) and x.requires_grad:
                    self._seen.requires_grad |= {_place(x)} - {None}
        return func(*args, **kwargs)


def _place(x: torch.Tensor) -> Any:
    """None for what is no dense tensor."""
    try:
        return x.data_ptr(), tuple(x.shape), x.stride(), x.dtype
    except (NotImplementedError, RuntimeError):
        return None


class _Forward(torch.nn.Module):
    """The model as ``torch.export`` sees it: plain tensors in memory go in, tensors in a flat tuple come out.

    Lazy bits are put on its inputs here, and precision is changed at the border.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        specs: Sequence[TensorSpec],
        precision: torch.dtype | None = None,
        dtypes: Sequence[Any] = (),
        *,
        numbers: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        self.model = model
        self.seen = _Seen()
        if numbers:
            self.seen.recorder = Recorder(numbers)
        self._specs = specs
        self._precision = precision
        self._dtypes = dtypes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.watch = Watch(pytree.tree_leaves((args, kwargs)))
        if any(spec.is_lazy for spec in self._specs):
            specs = iter(self._specs)
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: next(specs).in_memory(x), (args, kwargs))
        watch = LayoutWatch(pytree.tree_leaves((args, kwargs)))
        if self.seen.recorder is not None:
            args, kwargs = self.seen.recorder.enter((args, kwargs))
        if self._precision is None:
            with watch, _GradientWatch(self.seen):
                result = self._call_model(args, kwargs)
            return tuple(self._note(result, watch))

        originals: dict[int, torch.Tensor] = {}

        def enter(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype is self._precision:
                return x
            cast = x.to(self._precision)
            originals[id(cast)] = x
            return cast

        args, kwargs = pytree.tree_map(enter, (args, kwargs))
        with watch, _GradientWatch(self.seen), HalfPrecision(self._precision):
            result = self._call_model(args, kwargs)
        # An input that is handed back is the caller's own, not a rounded copy.
        result = pytree.tree_map(lambda y: originals.get(id(y), y), result)
        return tuple(
            x.to(d) if isinstance(x, torch.Tensor) and d else x
            for x, d in zip(self._note(result, watch), self._dtypes, strict=True)
        )

    def _call_model(self, args: Any, kwargs: Any) -> Any:
        recorder = self.seen.recorder
        if recorder is None:
            return self.model(*args, **kwargs)
        try:
            with TakesNumbers():
                result = self.model(*args, **kwargs)
            recorder.check()
            recorder.check_result(result)
        except Exception as e:
            recorder.check(e)
            raise
        return result

    def _note(self, result: Any, watch: LayoutWatch) -> list[Any]:
        self.seen.returned, values = Returned.of(result)
        self.seen.reads_layout = watch.was_read
        return values


def export_program(
    model: torch.nn.Module | ExportedProgram | Snapshot,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    cast: Cast | None = None,
    given: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
    aside: Callable[..., Any] = lambda call, lasting=False: call(),
    numbers: frozenset[int] = frozenset(),
) -> Program:
    """Export a copy of ``model`` for these inputs; with ``cast``, in that precision.

    ``numbers``: positions of those among the leaves that become inputs of the program, in place of a part of it; see
    :attr:`Program.numbers`. Raises :class:`NotCarried` where one cannot.

    Each input tensor must have memory of its own: what shares a storage is taken for one value. The program's inputs
    are what lies in memory of them, with canonical strides (see :class:`TensorSpec`). Their values are not read;
    ``given`` are such inputs with values, on which the model is tried where it cannot be exported. Weights share the
    model's memory. ``aside`` makes a call where its work on the device holds up nobody (``lasting=True``: and what it
    makes is kept): the model is called once with made-up values before it is traced. Called with the build lock held.

    Raises :class:`InputError` where the model rejects the inputs and :class:`UnsupportedModel` where an engine could
    not reproduce it: a buffer or an input that it changes in place, control flow that depends on data, state of
    Python's that its results depend on.
    """
    check_global_hooks()
    snapshot = model if isinstance(model, Snapshot) else Snapshot.of(model, values=False)
    exporter = _Exporter(args, kwargs, given or (args, kwargs), aside, numbers)
    options: tuple[Any, ...] = ()
    if cast is not None:
        exported, *_ = exporter.export(snapshot, decompose=False)
        options = (cast.precision, _output_dtypes(exported))
    exported, traced, seen = exporter.export(cast.snapshot if cast is not None else snapshot, *options)
    program = _flatten(exported, traced, cast, exporter.specs, seen, aside, pytree.tree_leaves((args, kwargs)))
    program.reads_layout = seen.reads_layout
    del exported, traced
    program.notes = exporter.notes()
    return program


class _Exporter:
    """Exports copies of a model for one signature."""

    def __init__(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        given: Any,
        aside: Callable[..., Any],
        numbers: frozenset[int],
    ) -> None:
        self._numbers = numbers
        self._args = tuple(args)
        self._kwargs = dict(kwargs)
        self._given = given[0], {name: given[1][name] for name in kwargs}
        self._aside = aside
        self.specs = [TensorSpec.of(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self._state: dict[str, None] = {}
        self._watches: list[Watch | None] = []

    def export(self, snapshot: Snapshot, *options: Any, decompose: bool = True) -> tuple[ExportedProgram, Fresh, _Seen]:
        """And the copy that was traced, with what was seen. ``options``: of :class:`_Forward`."""
        traced = snapshot.fresh()
        if not needs_trial(traced.module):
            exported, seen = self._trace(traced, options, decompose)
            return exported, traced, seen
        first = self._try(traced, options)
        if not first.finished:
            traced = snapshot.fresh()  # the call may have left it in any state
        # What the first call changes may be a cache that it fills.
        later = self._try(traced, options) if first.changes else first
        exported, seen = self._trace(traced, options, decompose)
        state = [*first.draws, *later.changes]
        if state:
            # Does it matter? What was drawn is drawn anew by another copy; what is counted goes on.
            other = snapshot.fresh() if first.draws else traced
            for _ in range(3 if other is not traced else 1):
                self._try(other, options)
            again, _ = self._trace(other, options, decompose)
            if not _alike(exported, again):
                raise UnsupportedModel(
                    f"the model's results depend on state of Python's: a call {', '.join(state)}. An engine would"
                    " repeat what it was at compile. Make it an input, or draw with torch.rand and the like."
                )
            self._state.update(dict.fromkeys(state))
        return exported, traced, seen

    def _trace(self, traced: Fresh, options: Any, decompose: bool) -> tuple[ExportedProgram, _Seen]:
        forward = _Forward(traced.module, self.specs, *options, numbers=self._numbers)
        try:
            exported = _export(forward, self._args, self._kwargs, self._given, decompose)
        finally:
            if forward.seen.recorder is not None:
                forward.seen.recorder.is_over = True
        self._watches.append(forward.seen.watch)
        return exported, forward.seen

    def _try(self, traced: Fresh, options: Any) -> Trial:
        """One real call on inputs like these, with made-up values; on the CPU with the values that were given."""
        forward = _Forward(traced.module, self.specs, *options)

        def made(x: torch.Tensor) -> torch.Tensor:
            spec = TensorSpec.of(x)
            return copy_of(spec.in_memory(x)) if x.device.type == "cpu" else spec.synthesize(x.device)

        def attempt() -> Trial:
            args, kwargs = pytree.tree_map_only(torch.Tensor, made, self._given)
            return try_out(functools.partial(forward, *args, **kwargs), traced)

        result = [Trial(False)]
        try:
            self._aside(lambda: result.append(attempt()))
        except Exception:
            return Trial(False)  # what the device found wrong later, with values that were made up
        return result[-1]

    def notes(self) -> tuple[str, ...]:
        """What a user should know. With everything dropped that was traced."""
        notes = []
        if self._state:
            notes.append(f"the model {', '.join(self._state)}; calls do not, and its results did not depend on it")
        cleared = dict.fromkeys(where for w in self._watches if w is not None for where in w.clear())
        if cleared:
            notes.append(f"the model puts tensors into {', '.join(cleared)}; calls do not")
        return tuple(notes)


def _alike(a: ExportedProgram, b: ExportedProgram) -> bool:
    """Whether two traces of a model are the same computation."""

    def codes(exported: ExportedProgram) -> list[str]:
        return [m.code for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]

    def same(x: Any, y: Any) -> bool:
        if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
            return type(x) is type(y)
        return x.shape == y.shape and x.dtype is y.dtype and torch.equal(x, y)

    return (
        codes(a) == codes(b)
        and a.constants.keys() == b.constants.keys()
        and all(same(x, b.constants[name]) for name, x in a.constants.items())
    )


def _export(
    module: _Forward, args: Sequence[Any], kwargs: Mapping[str, Any], given: Any, decompose: bool = True
) -> ExportedProgram:
    """``given``: positional and keyword inputs with values, to find out by whose fault it fails."""
    exported: ExportedProgram | None = None
    try:
        with torch.no_grad():
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: TensorSpec.of(x).in_memory(x), (args, kwargs))
            # The graph's inputs follow the order of keywords given here.
            with (
                undisturbed(),
                _fake_tensor_errors_unlogged(),
                weights_apart(module.model),
                _packed.traced(module.model),
            ):
                exported = torch.export.export(module, tuple(args), dict(kwargs), strict=False)
                if decompose:
                    _inline_grad_modes(exported)
                    _functional.prepare(exported, source_of)
                    if not _functional.is_functional(exported):
                        with _functional.kept_whole():
                            exported = exported.run_decompositions({})
    except Exception as e:
        if module.seen.recorder is not None:
            module.seen.recorder.check(e)
        if isinstance(e, UnsupportedModel) and exported is not None:
            raise
        refusal = getattr(module.seen, "returned", None) and module.seen.returned.refusal
        raise (
            UnsupportedModel(refusal) if refusal else diagnose(e, module, given[0], given[1], _transform(exported))
        ) from e
    if module.seen.returned.refusal:
        raise UnsupportedModel(module.seen.returned.refusal)
    return exported


@contextmanager
def _fake_tensor_errors_unlogged() -> Iterator[None]:
    """Keep PyTorch from logging, with a traceback, an operator's refusal of its inputs that we raise by name anyway.

    It is not for the eye only: whatever keeps log records would keep the traceback's frames, and with them the memory
    of the tensors that were exported on. Other threads' records pass.
    """
    logger, here = logging.getLogger("torch._subclasses.fake_tensor"), threading.get_ident()

    def by_others(record: logging.LogRecord) -> bool:
        return threading.get_ident() != here or record.levelno < logging.ERROR

    logger.addFilter(by_others)
    try:
        yield
    finally:
        logger.removeFilter(by_others)


def _output_dtypes(exported: ExportedProgram) -> list[Any]:
    output = exported.graph_module.graph.output_node()
    n = len(exported.graph_signature.output_specs) - len(exported.graph_signature.user_outputs)
    values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in output.args[0][n:]]
    return [v.dtype if isinstance(v, torch.Tensor) and v.is_floating_point() else None for v in values]


def source_of(node: fx.Node) -> str:
    """``file.py:12`` of the model's line that made the node, where export kept it."""
    lines = (line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if 'File "' in line)
    trace = [line for line in lines if _PACKAGE not in line]
    if not trace:
        return ""
    file, line, *_ = trace[-1].removeprefix('File "').split('", line ')
    return f"{file.rsplit('/', 1)[-1]}:{line.split(',')[0]}"


def _transform(exported: ExportedProgram | None) -> str:
    """The model's line with the first transform of torch.func in a program that could not be decomposed."""
    nodes = exported.graph_module.graph.nodes if exported is not None else ()
    return next((source_of(n) for n in nodes if "functorch" in str(n.target)), "")


def _inline_grad_modes(exported: ExportedProgram) -> None:
    """Put what runs under ``torch.enable_grad()`` and the like into the graph itself.

    torch.export makes a subgraph of it, which it cannot decompose. The mode makes no difference, because no tensor
    requires grad here; but to transforms of torch.func that are still to be decomposed.
    """
    gm = exported.graph_module
    modules = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    transforms = any("functorch" in str(n.target) for m in modules for n in m.graph.nodes)
    with gm._set_replace_hook(exported.graph_signature.get_replace_hook()):
        _inline(gm, transforms)


def _inline(gm: fx.GraphModule, keep_mode: bool) -> None:
    for node in list(gm.graph.nodes):
        if node.op == "get_attr":
            part = getattr(gm, str(node.target), None)
            if isinstance(part, fx.GraphModule):
                _inline(part, keep_mode)
        if node.op != "call_function" or node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            continue
        mode, piece, *given = node.args
        part = getattr(gm, str(piece.target))
        values: dict[fx.Node, fx.Node] = dict(zip(part.graph.find_nodes(op="placeholder"), given, strict=True))
        with gm.graph.inserting_before(node):
            if keep_mode:
                gm.graph.call_function(torch._C._set_grad_enabled, (mode,))
            for inner in part.graph.nodes:
                if inner.op == "get_attr":
                    name = f"{piece.target}_{inner.target}".replace(".", "_")
                    setattr(gm, name, getattr(part, inner.target))
                    values[inner] = gm.graph.get_attr(name)
                elif inner.op not in ("placeholder", "output"):
                    values[inner] = gm.graph.node_copy(inner, values.__getitem__)
            if keep_mode:
                gm.graph.call_function(torch._C._set_grad_enabled, (not mode,))
        results = part.graph.output_node().args[0]
        for user in list(node.users):
            assert user.target is operator.getitem, user
            user.replace_all_uses_with(values[results[user.args[1]]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        if not piece.users:
            gm.graph.erase_node(piece)
    gm.recompile()


def _flatten(
    exported: ExportedProgram,
    traced: Fresh,
    cast: Cast | None,
    specs: Sequence[TensorSpec],
    seen: _Seen,
    aside: Callable[..., Any],
    leaves: Sequence[Any],
) -> Program:
    returned = seen.returned
    signature = exported.graph_signature
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            what = str(spec.kind).rsplit(".", 1)[-1].lower().replace("_", " ")
            target = (spec.target or "").removeprefix("model.")
            hint = " Call model.eval() first?" if spec.kind is OutputKind.BUFFER_MUTATION else ""
            raise UnsupportedModel(
                f"the model changes {target!r} in place ({what}); an engine is immutable and cannot keep that change."
                f" Make it an output of the model instead.{hint}"
            )

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
            if tensors[name].requires_grad or (seen.requires_grad and _place(tensors[name]) in seen.requires_grad):
                require_grad.add(node)
        else:
            raise UnsupportedModel(
                f"the model uses {spec.target!r}, a {spec.kind.name.lower()}; expected tensors only. Hold it"
                " outside the model."
            )

    literals = {n: t for n, (name, t) in weights.items() if name.rsplit(".", 1)[-1].startswith("lifted_tensor")}
    _functional.fold_literals(gm.graph, literals)
    original = traced.original
    if cast is not None:
        cast.fold(gm, weights, traced, aside)
        original = functools.partial(cast.original, traced)
    call_cudnn(gm, weights, aside)
    _packed.put_back(gm.graph)
    # A graph for one signature has the types that it was traced with. Compilers check these notes again where they have
    # computed a value in another type, and fail.
    for node in gm.graph.find_nodes(op="call_function", target=_aten._assert_tensor_metadata.default):
        gm.graph.erase_node(node)
    uncaptured = _uncapturable(gm.graph)
    data_dependent = any(u.why == "data-dependent" for u in uncaptured)
    _propagate(gm, data_dependent)
    asks = pin_default_dtype(gm)
    device = _device(inputs, weights)
    on_cpu = {n for n in inputs if is_on_cpu(n)} if device is not None and device.type != "cpu" else set()
    known = {u.operator for u in uncaptured}
    uncaptured = (*uncaptured, *(u for u in _reading(gm.graph, on_cpu) if u.operator not in known))
    if device is not None and not data_dependent:
        compute_constants(gm, weights, device, storage_of, aside)
    for node, spec in zip(inputs, specs, strict=True):
        node.meta["lazy"] = {_aten._conj.default: spec.conj, _aten._neg_view.default: spec.neg}
    absolute = _absolute(gm.graph, inputs, specs)
    outputs = returned.outputs(classify(gm, inputs, weights, source_of, original))
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
    assert _results(gm.graph) == computed
    gm.recompile()
    return Program(
        module=gm,
        # Compiled kernels read what lies in memory.
        weights=[t.detach().resolve_conj().resolve_neg() for _, t in weights.values()],
        weight_names=[name.removeprefix("model.") for name, _ in weights.values()],
        requires_grad=tuple(n in require_grad for n in weights),
        outputs=outputs,
        structure=returned.structure,
        direct_only=_direct_only(uncaptured) or ("given an input on the CPU" if on_cpu else None),
        on_cpu=bool(on_cpu),
        data_dependent=data_dependent,
        uncaptured=uncaptured,
        asks_default_dtype=tuple(_named(n) for n in asks),
        absolute=absolute,
        numbers=Numbers(tuple(map(NumberInput, numbers)), tuple(sorted(seen.recorder.positions)))
        if seen.recorder is not None
        else None,
    )


def _device(inputs: Sequence[fx.Node], weights: Mapping[fx.Node, tuple[str, torch.Tensor]]) -> torch.device | None:
    """Where the work of a graph is: the device of its inputs, or of its weights if there are none."""
    found = [n.meta["val"].device for n in inputs]
    found += [t.device for _, t in weights.values() if t.device.type != "cpu"]
    return next((d for d in found if d.type != "cpu"), found[0] if found else None)


def _reading(graph: fx.Graph, on_cpu: Iterable[fx.Node]) -> list[Uncaptured]:
    """Operators that read these inputs on the CPU, or what is computed of them there."""
    found, on_cpu = [], set(on_cpu)
    for node in graph.nodes:
        if node.op == "call_function" and not on_cpu.isdisjoint(node.all_input_nodes):
            if node.target is not operator.getitem:
                found.append(Uncaptured("input on the CPU", str(node.target), source_of(node)))
            if is_on_cpu(node):
                on_cpu.add(node)
    return found


def _results(graph: fx.Graph) -> list[Any]:
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def _uncapturable(graph: fx.Graph) -> tuple[Uncaptured, ...]:
    """Why the graph must run uncaptured; nothing where it need not. A captured random op would replay one draw."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        why = ""
        if not isinstance(node.target, torch._ops.OpOverload):
            why = "data-dependent" if isinstance(node.target, torch._ops.HigherOrderOperator) else ""
        elif depends_on_data(node):
            # Not what only comes of another one.
            why = "" if any(_is_unbacked(n.meta.get("val")) for n in node.all_input_nodes) else "data-dependent"
        elif is_random(node):
            why = "random"
        if why:
            found.append(Uncaptured(why, str(node.target), source_of(node)))
    return tuple(found)


def _direct_only(uncaptured: Sequence[Uncaptured]) -> str | None:
    """For messages, the reason that weighs more."""
    for why in ("data-dependent", "random", "input on the CPU"):
        named = [f"{u.operator} ({u.source})" if u.source else u.operator for u in uncaptured if u.why == why]
        if named:
            return f"{why}: {', '.join(named)}"
    return None


def depends_on_data(node: fx.Node) -> bool:
    """Whether the host has to look at values to run an operator of an exported graph, or something that comes of it.

    Decided by what export found: a result of a size that it does not know, or a number. An operator's tag says less:
    the one for ``index`` is for masks, and most indices are integers. Masks that are written through (``index_put``)
    have results of a known size, and the host looks at them all the same.
    """
    return has_mask(node.target, node.args) or _is_unbacked(node.meta.get("val"))


def _is_unbacked(value: Any) -> bool:
    return any(
        isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool)
        or (isinstance(x, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in x.shape))
        for x in pytree.tree_leaves(value)
    )


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
    with mode, torch.no_grad():
        Propagate(gm).run(*args, enable_io_processing=False)


def _named(node: fx.Node) -> str:
    """An operator with the model's line."""
    return f"{node.target} ({source_of(node)})" if source_of(node) else str(node.target)


def _absolute(graph: fx.Graph, inputs: Sequence[fx.Node], specs: Sequence[TensorSpec]) -> tuple[tuple[int, str], ...]:
    """The inputs that the model reads from the beginning of their storage, not from their own first element."""
    found = []
    roots = {storage_of(n): i for i, n in enumerate(inputs)}
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or "as_strided" not in node.target.name():
            continue
        position = roots.get(storage_of(node.args[0]))
        if position is None:
            continue
        if specs[position].layout:
            raise UnsupportedModel(
                f"the model reads the memory of input {position} past its shape ({_named(node)}), and was given one"
                " that is not dense. Pass x.contiguous(), or index it in the model."
            )
        given = node.args[3] if len(node.args) > 3 else node.kwargs.get("storage_offset")
        if given is not None:
            found.append((position, _named(node)))
    return tuple(found)
