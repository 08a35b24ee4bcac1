"""Which operators TensorRT runs, and the graph with each run of them in one piece."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase
from torch.utils.flop_counter import FlopCounterMode

from anabranch.backends.tensorrt._layout import Layout
from anabranch.backends.tensorrt._rewrite import quantized_with_rounding, saturates
from anabranch.export import NARROW, Program, is_random, shape_at, source_of
from anabranch.export._sizes import is_of_data, plain_size

#: What a TensorRT engine computes with as PyTorch does. Its parser takes float64 too, and computes in float32.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool)
_DEPENDS_ON_MEMORY = ("as_strided", "set_", "resize_")
_ORDERS = (
    *("aten::topk", "aten::sort", "aten::sort.stable", "aten::argsort", "aten::argsort.stable"),
    *("aten::argmax", "aten::argmin", "aten::max.dim", "aten::min.dim"),
)
_REMAINDERS = tuple(f"aten::{op}.{kind}" for op in ("fmod", "remainder") for kind in ("Scalar", "Tensor"))
_LINEAR = tuple(f"aten::upsample_{kind}" for kind in ("linear1d", "bilinear2d", "trilinear3d", "bicubic2d"))


@dataclass(frozen=True)
class Fallback:
    """An operator that another backend runs. ``node``: its name in the graph."""

    node: str
    op: str
    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}{f' ({self.source})' if self.source else ''}"


#: How many operators are named for one reason.
_NAMED = 3


def by_reason(fallbacks: Sequence[Fallback]) -> list[str]:
    """A line for each reason: the operators, each with the model's line, the first few by name, and the reason."""
    groups: dict[str, list[str]] = {}
    for f in fallbacks:
        groups.setdefault(f.reason, []).append(str(f))
    lines = []
    for reason, operators in groups.items():
        times = {name: operators.count(name) for name in operators}  # a loop, or a module that is used twice
        named = [f"{name}{f' x{n}' if n > 1 else ''}" for name, n in list(times.items())[:_NAMED]]
        left = len(operators) - sum(list(times.values())[:_NAMED])
        lines.append(f"{', '.join(named)}{f' and {left} more' if left else ''}: {reason}")
    return lines


@dataclass
class Segment:
    """A piece of the graph for one engine. ``module(*arguments)`` returns a tuple; weights are inside, as constants.

    ``arguments``: of each argument its place among ``inputs``, or an expression of symbols, which stand for sizes that
    vary; None: the inputs themselves. Of an input that is no argument the engine takes the sizes only.
    """

    name: str
    module: fx.GraphModule
    inputs: list[Layout]
    outputs: list[Layout]
    #: Names of the nodes, in the graph that was partitioned.
    nodes: list[str]
    arguments: list[Any] | None = None

    def example(self, device: torch.device) -> list[torch.Tensor]:
        """Inputs of its shapes and types, in the order of their memory."""
        return [torch.zeros(x.physical, dtype=x.dtype, device=device) for x in self.inputs]


@dataclass
class Partition:
    """``top(*weights, *inputs)`` calls a segment where there was a run of operators, and all others as before."""

    top: fx.GraphModule
    segments: dict[str, Segment]


def why_not(node: fx.Node) -> str:
    """Why TensorRT cannot be asked for this operator, or nothing: what its parser would not notice."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return "" if node.target is operator.getitem else "not an operator"
    if not _tensors(node):
        return "it makes no tensor"
    if any(word in node.target.name() for word in _DEPENDS_ON_MEMORY):
        return "it depends on how its input lies in memory"
    if is_random(node):
        return "it draws random numbers"
    if (reason := _other_result(node)) is not None:
        return reason
    quantizes = node.target.namespace == "quantized_decomposed" or node.target.name() == "aten::_to_copy"
    quantizes |= not computes(node)
    for value in (*_used(node), *(v for n in node.all_input_nodes for v in _used(n))):
        if value.dtype not in _DTYPES and not (quantizes and value.dtype in NARROW):
            return f"TensorRT has no {str(value.dtype).removeprefix('torch.')}"
        if any(map(is_of_data, value.shape)):
            return "its shapes depend on data"
        if 0 in shape_at(value.shape):
            return "a tensor without elements"
    # float64 in the middle of an operator is a float64 argument.
    if any(a in (torch.float64, torch.complex64, torch.complex128) for a in (*node.args, *node.kwargs.values())):
        return "TensorRT has no float64"
    return ""


def _dtype_of(node: fx.Node) -> torch.dtype | None:
    """Of its first result, if that is a floating one."""
    return next((v.dtype for v in _tensors(node) if v.dtype.is_floating_point), None)


def _other_result(node: fx.Node) -> str | None:
    """Why TensorRT would take it and compute something else, or nothing."""
    name = node.target.name()  # type: ignore[union-attr]
    if name == "aten::atan2":
        return "its ONNX turns NaN into 0"
    if name.startswith("aten::avg_pool") and len(node.args) > 6 and node.args[6] is not None:
        return "its ONNX ignores divisor_override"
    if name.startswith("aten::avg_pool") and _dtype_of(node) in (torch.float32, torch.bfloat16):
        return "TensorRT divides before it adds: numbers whose sum overflows in eager do not there"
    if name.startswith(_LINEAR) and _dtype_of(node) is not None:
        return "its ONNX leaves out infinities whose weight is 0, of which eager makes NaN"
    if name in _ORDERS and any(v.dtype.is_floating_point for v in _given(node)):
        return "TensorRT's leaves NaN out"
    if name in _REMAINDERS and _dtype_of(node) is not None:
        return "TensorRT's has no remainder of, or by, numbers that are infinite or far apart"
    if name == "aten::logit":
        return "TensorRT makes infinity of NaN there"
    if quantized_with_rounding(node):
        return (
            "PyTorch rounds to whole numbers before float8 there; a division, clamp(-448, 448) and"
            " .to(torch.float8_e4m3fn) do not"
        )
    if name == "aten::_to_copy" and node.kwargs.get("dtype") is torch.float8_e4m3fn and not saturates(node.args[0]):
        return "a cast to float8 without clamp(-448, 448) before it: TensorRT saturates, where PyTorch may give NaN"
    if name == "aten::_to_copy" and torch.int8 in (node.kwargs.get("dtype"), *(v.dtype for v in _given(node))):
        return "TensorRT has int8 in torch.ops.quantized_decomposed only"
    return None


def _given(node: fx.Node) -> list[Any]:
    return [v for n in node.all_input_nodes for v in _tensors(n)]


def partition(program: Program, excluded: Mapping[str, str], worth: Collection[str] | None = None) -> Partition:
    """Cut the graph of ``program`` into segments of all nodes but those named in ``excluded``.

    ``worth``: names; a run of operators that has none of them is not worth an engine, and is no segment.
    """
    graph_module = fx.GraphModule(program.module, _copy(program.module.graph))
    graph = graph_module.graph
    owner_names = {symbol: node.name for symbol, node in _sizes_first(graph).items()}
    excluded = {**excluded, **dict.fromkeys(_trailing_views(graph), "")}

    class Support(OperatorSupportBase):
        def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
            is_number = isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)
            return node.op == "call_function" and node.name not in excluded and not is_number

    partitioner = CapabilityBasedPartitioner(graph_module, Support(), allows_single_node_partition=True)
    runs = [p for p in partitioner.propose_partitions() if any(computes(n) for n in p.nodes)]
    if worth is not None:
        runs = [p for p in runs if any(n.name in worth for n in p.nodes)]
    members = [[n.name for n in p.nodes] for p in runs]
    values = {n.name: n.meta.get("val") for n in graph.nodes}
    top = partitioner.fuse_partitions(runs, prefix="tensorrt_")
    weights = set(top.graph.find_nodes(op="placeholder")[: len(program.weights)])
    constants = dict(zip(top.graph.find_nodes(op="placeholder"), program.weights, strict=False))

    placeholders = {n.name: n for n in top.graph.find_nodes(op="placeholder")}
    owners = {symbol: placeholders[name] for symbol, name in owner_names.items()}

    segments: dict[str, Segment] = {}
    calls = [n for n in top.graph.nodes if n.op == "call_module"]
    for call in calls:
        name = str(call.target)
        module = getattr(top, name)
        assert isinstance(module, fx.GraphModule)
        fed: list[fx.Node] = []
        arguments: list[Any] = []
        for placeholder, given in zip(module.graph.find_nodes(op="placeholder"), list(call.args), strict=True):
            assert isinstance(given, fx.Node)
            if given not in weights:
                is_tensor = isinstance(given.meta.get("val", values.get(given.name)), torch.Tensor)
                arguments.append(len(fed) if is_tensor else given.meta["val"].node.expr)
                fed += [given] * is_tensor
                continue
            # Constants are the engine's own: TensorRT folds and rearranges them.
            attribute = f"weight_{placeholder.name}"
            module.register_buffer(attribute, constants[given], persistent=False)
            with module.graph.inserting_before(placeholder):
                constant = module.graph.get_attr(attribute)
            placeholder.replace_all_uses_with(constant)
            module.graph.erase_node(placeholder)
        results = module.graph.output_node().args[0]
        leaves = list(results) if isinstance(results, tuple | list) else [results]
        module.graph.output_node().args = (tuple(leaves),)
        module.graph.lint()
        module.recompile()
        fed += missing_owners(arguments, [n.meta["val"] if "val" in n.meta else values[n.name] for n in fed], owners)
        call.args = tuple(fed)
        inside = {n.name for n in module.graph.nodes}
        nodes = next((m for m in members if inside.issuperset(m)), sorted(inside))
        outputs = [values[n.name] for n in leaves]  # type: ignore[union-attr]
        inputs = [values[n.name] if n.name in values else n.meta["val"] for n in fed]
        segments[name] = Segment(
            name, module, [Layout.of(v) for v in inputs], [Layout.of(v) for v in outputs], nodes, arguments
        )
        call.meta["val"] = outputs if isinstance(results, tuple | list) else outputs[0]
        call.meta["single"] = not isinstance(results, tuple | list)
    for node in reversed(list(top.graph.nodes)):
        is_number = isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat)
        if node.op == "call_function" and is_number and not node.users:
            top.graph.erase_node(node)
    top.graph.lint()
    top.recompile()
    return Partition(top, segments)


def missing_owners(arguments: Sequence[Any], values: Sequence[Any], owners: Mapping[Any, Any]) -> list[Any]:
    """Of those that have a size by itself, the ones that are needed beside ``values`` to compute ``arguments``."""
    there = {plain_size(n) for v in values for n in v.shape}
    needed = [s for a in arguments if not isinstance(a, int) for s in sorted(a.free_symbols, key=str)]
    return list(dict.fromkeys(owners[s] for s in needed if s not in there))


def _sizes_first(graph: fx.Graph) -> dict[Any, fx.Node]:
    """Have numbers that depend on sizes computed of the inputs' own, ahead of everything: so no run of operators is
    cut for one. Returns the input that has each symbol as a size by itself."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    places: dict[Any, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        for d, n in enumerate(node.meta["val"].shape if isinstance(node.meta.get("val"), torch.Tensor) else ()):
            if isinstance(n, torch.SymInt) and n.node.expr.is_Symbol:
                places.setdefault(n.node.expr, (node, d))
    computed = [
        n
        for n in graph.nodes
        if n.op == "call_function"
        and isinstance(n.meta.get("val"), torch.SymInt | torch.SymFloat)
        and n.meta["val"].node.expr.free_symbols
        and n.meta["val"].node.expr.free_symbols <= places.keys()
    ]
    if not computed:
        return {symbol: node for symbol, (node, _) in places.items()}
    first = next(n for n in graph.nodes if n.op != "placeholder")
    tracer = fx.proxy.GraphAppendingTracer(graph)
    with graph.inserting_before(first):
        sizes: dict[Any, Any] = {}
        for symbol, (node, d) in places.items():
            made = graph.call_function(torch.ops.aten.sym_size.int, (node, d))
            made.meta["val"] = node.meta["val"].shape[d]
            sizes[symbol] = fx.Proxy(made, tracer)
        known: dict[Any, fx.Node] = {}
        for node in computed:
            expr = node.meta["val"].node.expr
            if expr not in known:
                known[expr] = sympy_interp(PythonReferenceAnalysis, sizes, expr).node
    for node in graph.nodes:
        if node is first:
            break
        if "val" not in node.meta:
            node.meta["val"] = node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]))
    for node in computed:
        node.replace_all_uses_with(known[node.meta["val"].node.expr])
        graph.erase_node(node)
    for node in [n for n in graph.nodes if n.target is torch.ops.aten.sym_size.int and not n.users]:
        graph.erase_node(node)
    return {symbol: node for symbol, (node, _) in places.items()}


def fallback(program: Program, name: str, reason: str) -> Fallback:
    """A :class:`Fallback` for the node of that name."""
    node = next(n for n in program.module.graph.nodes if n.name == name)
    return Fallback(name, str(node.target), source_of(node), reason)


def flops(node: fx.Node) -> int:
    """Floating-point operations of a node's products and convolutions, as PyTorch's flop counter counts them."""

    def value(x: Any) -> Any:
        v = x.meta["val"] if isinstance(x, fx.Node) else x
        if isinstance(v, torch.Tensor):  # as in the call that the program was exported for
            return torch.empty_strided(shape_at(v.shape), shape_at(v.stride()), dtype=v.dtype, device="meta")
        return v.node.hint if isinstance(v, torch.SymInt | torch.SymFloat) else v

    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), value)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "meta"}
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            node.target(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # no shapes without data: then it is no product either
        return 0
    return int(counter.get_total_flops())


def counted(program: Program) -> list[fx.Node]:
    """The operators that compute something: no views, and no picking of a result out of several."""
    return [n for n in program.module.graph.nodes if n.op == "call_function" and computes(n)]


def _copy(graph: fx.Graph) -> fx.Graph:
    """With the same names and values: fake tensors are not for copying."""
    new = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapped[node] = new.node_copy(node, lambda n: mapped[n])
        mapped[node].meta = dict(node.meta)
    return new


def _tensors(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    values: Sequence[Any] = value if isinstance(value, tuple | list) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _used(node: fx.Node) -> list[Any]:
    """Its results that somebody takes. (Batch normalization has some without elements that nobody does.)"""
    picked = [n for n in node.users if n.target is operator.getitem]
    if isinstance(node.meta.get("val"), tuple | list) and len(picked) == len(node.users):
        return [v for n in picked for v in _tensors(n)]
    return _tensors(node)


def computes(node: fx.Node) -> bool:
    """Whether it makes a tensor of its own, and is no view."""
    if not isinstance(node.target, torch._ops.OpOverload) or not _tensors(node):
        return False
    return not any(r.alias_info is not None for r in node.target._schema.returns)


def _trailing_views(graph: fx.Graph) -> list[str]:
    """Views that only lead to results: they cost nothing, and results that share memory in PyTorch still do so."""
    trailing: list[str] = []
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or computes(node) or node.target is operator.getitem:
            continue
        if all(u.op == "output" or u.name in trailing for u in node.users):
            trailing.append(node.name)
    return trailing
