"""``torch.export`` a model into a flat graph: tensors in, newly computed tensors out, nothing hidden."""

from __future__ import annotations

import copy
import importlib
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from anabranch.errors import InputError, UnsupportedModel
from anabranch.export._signature import register_dataclasses

# torch.export copies tree specs of its own in a way that PyTorch deprecates; whoever sees it can do nothing about it.
warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning, module="copyreg")

_aten = torch.ops.aten

#: Tagged random, but only with a positive dropout probability: (op, position of p or train, value that is not random).
_RANDOM_IF = {
    _aten.scaled_dot_product_attention.default: ("dropout_p", 4, 0.0, 0.0),
    _aten._scaled_dot_product_flash_attention.default: ("dropout_p", 3, 0.0, 0.0),
    _aten._scaled_dot_product_efficient_attention.default: ("dropout_p", 5, 0.0, 0.0),
    _aten._scaled_dot_product_cudnn_attention.default: ("dropout_p", 5, 0.0, 0.0),
    _aten._scaled_dot_product_flash_attention_for_cpu.default: ("dropout_p", 3, 0.0, 0.0),
    _aten._scaled_dot_product_attention_math.default: ("dropout_p", 4, 0.0, 0.0),
    _aten.dropout.default: ("train", 2, None, False),
    _aten.native_dropout.default: ("train", 2, None, False),
}


@dataclass(frozen=True)
class ComputedOutput:
    """The graph computes it: result ``index`` of the module."""

    index: int


@dataclass(frozen=True)
class AliasOutput:
    """An input or a parameter of the model, or a view of one: handed back as eager would.

    ``position`` counts inputs (``weight is None``) ; ``weight`` is the model's own tensor. ``view`` recomputes the view
    from it; None means the tensor itself.
    """

    position: int
    weight: torch.Tensor | None
    view: fx.GraphModule | None


@dataclass(frozen=True)
class ConstantOutput:
    """A number, a string, None."""

    value: Any


Output = ComputedOutput | AliasOutput | ConstantOutput


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
    #: Why the graph must not be captured (random or data-dependent ops, by name), or None.
    direct_only: str | None = None
    #: Of those, whether its result's shapes or its control flow depend on data.
    data_dependent: bool = False

    @property
    def is_empty(self) -> bool:
        """Nothing is computed: each output is an input, a parameter or a constant."""
        return not any(isinstance(o, ComputedOutput) for o in self.outputs)


class _Forward(torch.nn.Module):
    """The model as ``torch.export`` sees it: dataclass outputs registered, precision changed at the border."""

    def __init__(self, model: torch.nn.Module, precision: torch.dtype | None, dtypes: list[Any]) -> None:
        super().__init__()
        self.model = model
        self._precision = precision
        self._dtypes = dtypes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._precision is None:
            result = self.model(*args, **kwargs)
            register_dataclasses(result)
            return result

        originals: dict[int, torch.Tensor] = {}

        def enter(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype is self._precision:
                return x
            cast = x.to(self._precision)
            originals[id(cast)] = x
            return cast

        entered = pytree.tree_map(enter, (args, kwargs))
        args, kwargs = entered
        result = self.model(*args, **kwargs)
        # An input that is handed back is the caller's own, not a rounded copy.
        result = pytree.tree_map(lambda y: originals.get(id(y), y), result)
        register_dataclasses(result)
        leaves, structure = pytree.tree_flatten(result)
        leaves = [
            x.to(d) if isinstance(x, torch.Tensor) and d else x for x, d in zip(leaves, self._dtypes, strict=True)
        ]
        return pytree.tree_unflatten(leaves, structure)


def export_program(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    precision: torch.dtype | None = None,
    cast: torch.nn.Module | None = None,
) -> Program:
    """Export ``model`` for these inputs; with ``precision``, its copy ``cast`` whose parameters have that type.

    Each input tensor must have memory of its own: what shares a storage is taken for one value.

    Raises :class:`InputError` where the model rejects the inputs and :class:`UnsupportedModel` where an engine could
    not reproduce it: a buffer or an input that it changes in place, control flow that depends on data.
    """
    module = model.module() if isinstance(model, ExportedProgram) else model
    originals = dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )
    dtypes: list[Any] = []
    if precision is not None:
        dtypes = _output_dtypes(_export(_Forward(module, None, []), args, kwargs))
        assert cast is not None
        module = cast
        originals = {}
    exported = _export(_Forward(module, precision, dtypes), args, kwargs)
    with torch.no_grad(), keep_backends_enabled():
        exported = exported.run_decompositions({})
    return _flatten(exported, {f"model.{name}": t for name, t in originals.items()})


def _export(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExportedProgram:
    try:
        with torch.no_grad():
            # By name, as flatten_call() orders a call's leaves: the graph's inputs follow the order given here.
            with keep_backends_enabled(), _fake_tensor_errors_unlogged():
                return torch.export.export(module, tuple(args), dict(sorted(kwargs.items())), strict=False)
    except Exception as e:
        text = str(e).strip().splitlines()
        first = next((line for line in text if line.strip()), type(e).__name__)
        if type(e).__module__.startswith(("torch._dynamo", "torch.fx.experimental")) or "data-dependent" in str(e):
            raise UnsupportedModel(
                f"torch.export cannot capture this model: {first} An engine needs a graph whose control flow does not"
                " depend on the values of tensors; torch.cond expresses a branch that does."
            ) from e
        raise InputError(
            f"the model does not accept these inputs ({_describe(args, kwargs)}): {type(e).__name__}: {first}. Expected"
            " inputs that model(*inputs) runs on; try that first."
        ) from e


@contextmanager
def keep_backends_enabled() -> Iterator[None]:
    """Stop torch.export from turning cuDNN, oneDNN and NNPACK off, for all threads, while it traces.

    Other threads' operators would run other kernels meanwhile, ours and strangers' alike. It does so to keep composite
    operators from being taken apart for one library, and nothing is taken apart here. Where a PyTorch version has no
    such hook, calls that this would disturb find the flags changed and raise. Called with the build lock held.
    """
    # Loads half of the compiler, so not at import.
    tracer: Any = importlib.import_module("torch.export._trace")
    original = getattr(tracer, "_ignore_backend_decomps", None)
    tracer._ignore_backend_decomps = nullcontext
    try:
        yield
    finally:
        if original is None:
            del tracer._ignore_backend_decomps
        else:
            tracer._ignore_backend_decomps = original


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


def _describe(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    def leaf(x: Any) -> str:
        if isinstance(x, torch.Tensor):
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
        return repr(x)

    items = [leaf(x) for x in pytree.tree_leaves(tuple(args))]
    items += [f"{name}={leaf(x)}" for name, v in kwargs.items() for x in pytree.tree_leaves(v)]
    return ", ".join(items) or "none"


def _output_dtypes(exported: ExportedProgram) -> list[Any]:
    output = exported.graph_module.graph.output_node()
    n = len(exported.graph_signature.output_specs) - len(exported.graph_signature.user_outputs)
    values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in output.args[0][n:]]
    return [v.dtype if isinstance(v, torch.Tensor) and v.is_floating_point() else None for v in values]


def source_of(node: fx.Node) -> str:
    """``file.py:12`` of the model's line that made the node, where export kept it."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if 'File "' in line]
    if not trace:
        return ""
    file, line, *_ = trace[-1].removeprefix('File "').split('", line ')
    return f"{file.rsplit('/', 1)[-1]}:{line.split(',')[0]}"


def _flatten(exported: ExportedProgram, originals: Mapping[str, torch.Tensor]) -> Program:
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
    placeholders = gm.graph.find_nodes(op="placeholder")
    tensors: dict[str, torch.Tensor] = {**exported.state_dict, **exported.constants}
    weights: dict[fx.Node, tuple[str, torch.Tensor]] = {}
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
            weights[node] = (name, originals.get(name, tensors[name]))
        else:
            raise UnsupportedModel(
                f"the model uses {spec.target!r}, a {spec.kind.name.lower()}; expected tensors only. Hold it"
                " outside the model."
            )

    direct_only, data_dependent = _uncapturable(gm.graph)
    _propagate(gm, data_dependent)
    _pin_default_dtype(gm.graph)
    outputs = _classify_outputs(gm, inputs, weights)

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
        weights=[t.detach() for _, t in weights.values()],
        weight_names=[name.removeprefix("model.") for name, _ in weights.values()],
        outputs=outputs,
        structure=exported.call_spec.out_spec,
        direct_only=direct_only,
        data_dependent=data_dependent,
    )


def _results(graph: fx.Graph) -> list[Any]:
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def _uncapturable(graph: fx.Graph) -> tuple[str | None, bool]:
    """Why the graph must run uncaptured, and whether because of data. A captured random op would replay one draw."""
    random: list[str] = []
    dependent: list[str] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = f"{node.target} ({source_of(node)})" if source_of(node) else str(node.target)
        if not isinstance(node.target, torch._ops.OpOverload):
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                dependent.append(name)
            continue
        tags = node.target.tags
        if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
            dependent.append(name)
        elif is_random(node):
            random.append(name)
    if dependent:
        return "data-dependent: " + ", ".join(dependent), True
    if random:
        return "random: " + ", ".join(random), False
    return None, False


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers, with the arguments that it has."""
    if not isinstance(node.target, torch._ops.OpOverload) or (
        torch.Tag.nondeterministic_seeded not in node.target.tags
    ):
        return False
    rule = _RANDOM_IF.get(node.target)
    if rule is None:
        return True
    name, position, default, deterministic = rule
    value = node.kwargs.get(name, node.args[position] if len(node.args) > position else default)
    return bool(value != deterministic)


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


def _pin_default_dtype(graph: fx.Graph) -> None:
    """Write today's default dtype into the graph where an operator would ask for it at each call.

    ``torch.ones(3)`` does, and so does an integer tensor times 2.5. The default is process-wide: another thread that
    builds a model in half precision must not change what a call returns.
    """
    default = torch.get_default_dtype()
    for node in list(graph.nodes):
        value, op = node.meta.get("val"), node.target
        if not isinstance(op, torch._ops.OpOverload) or not isinstance(value, torch.Tensor) or value.dtype != default:
            continue
        takes_dtype = any(a.name == "dtype" for a in op._schema.arguments)
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if not tensors and takes_dtype:
            node.update_kwarg("dtype", node.kwargs.get("dtype") or default)
        elif torch.Tag.pointwise in op.tags and not takes_dtype and op.overloadpacket is not _aten.where:
            if any(n.meta["val"].is_floating_point() or n.meta["val"].is_complex() for n in tensors):
                continue
            for n in tensors:  # as type promotion would
                with graph.inserting_before(node):
                    cast = graph.call_function(_aten._to_copy.default, (n,), {"dtype": default})
                cast.meta = {**n.meta, "val": n.meta["val"].to(default)}
                node.replace_input_with(n, cast)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _classify_outputs(
    gm: fx.GraphModule, inputs: Sequence[fx.Node], weights: Mapping[fx.Node, tuple[str, torch.Tensor]]
) -> list[Output]:
    """Say what each output is, and leave only computed ones, each once, in the graph."""
    output = gm.graph.output_node()
    roots = {_storage(n): n for n in (*inputs, *weights)}
    computed: dict[fx.Node, int] = {}
    result: list[Output] = []
    for value in output.args[0]:  # type: ignore[union-attr]
        if not isinstance(value, fx.Node):
            result.append(ConstantOutput(value))
            continue
        root = value if value in weights or value in inputs else roots.get(_storage(value))
        if root is None:
            result.append(ComputedOutput(computed.setdefault(value, len(computed))))
            continue
        view = None if value is root else _view_chain(value, root)
        if root in weights:
            result.append(AliasOutput(-1, weights[root][1], view))
        else:
            result.append(AliasOutput(inputs.index(root), None, view))
    output.args = (tuple(computed),)
    return result


def _view_chain(value: fx.Node, root: fx.Node) -> fx.GraphModule:
    """The views that lead from ``root`` to ``value``, as a module of one input."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {root: graph.placeholder("base")}

    def clone(node: fx.Node) -> fx.Node:
        if node not in copied:
            for n in node.all_input_nodes:
                clone(n)
            copied[node] = graph.node_copy(node, lambda n: copied[n])
            if copied[node].target is _aten.view.default:
                # The caller's tensor may have other strides than the canonical ones, and then eager copies.
                copied[node].target = _aten.reshape.default
        return copied[node]

    if any(n.op == "placeholder" and n is not root for n in _ancestors(value)):
        raise UnsupportedModel(
            f"output {value.name!r} is a view of {root.name!r} whose shape depends on another tensor; return a copy"
        )
    graph.output(clone(value))
    return fx.GraphModule(torch.nn.Module(), graph)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            stack.extend(n.all_input_nodes)
    return seen
