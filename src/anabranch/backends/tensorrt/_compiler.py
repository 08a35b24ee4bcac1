"""From a program to engines: partition, export, build, each step remembered in the cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import operator
import re
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from anabranch._version import __version__
from anabranch.backends.tensorrt import _onnx
from anabranch.backends.tensorrt._builder import Rejected, Target, build, check_target
from anabranch.backends.tensorrt._cache import Cache
from anabranch.backends.tensorrt._layout import Layout
from anabranch.backends.tensorrt._library import Library
from anabranch.backends.tensorrt._partition import (
    Fallback,
    Partition,
    Segment,
    by_reason,
    counted,
    fallback,
    flops,
    missing_owners,
    partition,
    why_not,
)
from anabranch.backends.tensorrt._profile import Profile
from anabranch.backends.tensorrt._tf32 import in_tf32
from anabranch.errors import BuildError
from anabranch.export import Program, is_quantization, source_of
from anabranch.export._sizes import plain_size

_log = logging.getLogger("anabranch.tensorrt")

#: Why an operator that TensorRT has is not in an engine: where a run needs a product to be one, and where it does not.
_ALONE = {
    True: "no product or convolution around it runs in TensorRT",
    False: "nothing around it runs in TensorRT",
}


@dataclass
class Compiled:
    """A program as engines and the operators between them. ``engines``: serialized, by the segment's name."""

    library: Library
    partition: Partition
    engines: dict[str, bytes]
    #: What each engine was built from, and for: where things that belong to it are kept.
    keys: dict[str, dict[str, object]]
    fallbacks: list[Fallback]
    #: Operators that compute something: in engines, and in all.
    operators: tuple[int, int]
    #: Floating-point operations of products and convolutions: in engines, and in all.
    flops: tuple[int, int]
    #: Engines that were in the cache.
    reused: int = 0
    cache: Cache = field(default_factory=Cache)
    #: Of the sizes that vary.
    profile: Profile | None = None

    def report(self) -> list[str]:
        """What runs where, a line each."""
        (inside, everything), (done, total) = self.operators, self.flops
        n = len(self.engines)
        share = f", {100 * done / total:.1f}% of FLOPs" if total else ""
        lines = [
            f"{self.library.name} {self.library.version}: {inside} of {everything} operators{share}, in {n}"
            f" engine{'s' * (n != 1)}{f', {self.reused} from the cache' if self.reused else ''}"
        ]
        if self.profile is not None:
            lines.append(f"  one optimization profile: {self.profile}")
        return lines + [f"  not in TensorRT: {line}" for line in by_reason(self.fallbacks)]


def compile_program(
    library: Library,
    program: Program,
    target: Target,
    *,
    require_full: bool,
    cache: Cache | None = None,
    rebuild: bool = False,
) -> Compiled:
    """Turn ``program`` into engines for ``target``.

    Operators that the exporter, the parser or the builder refuse are left out, as few as possible: first everything is
    tried at once, and only if that fails each operator by itself. With ``require_full``,
    :class:`~anabranch.errors.BuildError` names them instead. ``rebuild``: whatever is in the cache.
    """
    check_target(library, target)
    cache = cache or Cache()
    device = program.weights[0].device if program.weights else _device(program)
    profile = Profile.of(program.sizes)
    nodes = {n.name: n for n in program.module.graph.nodes if n.op == "call_function"}
    excluded = {name: why for name, n in nodes.items() if (why := why_not(n))}
    base = _key(library, program, target, profile)
    known = cache.load("partition", base)
    orders: dict[str, Any] = {}
    if known is not None:
        found = json.loads(known)
        excluded, orders = found["excluded"], found["orders"]
    everything = counted(program)
    work = {n: flops(n) for n in everything}
    while True:
        worth = None
        if not library.keeps_float32:
            wide = in_tf32(program.module.graph, target.tf32, excluded)
            excluded = {**wide, **excluded}
            # Between products that run elsewhere, an engine of a few pointwise operators costs more than it saves.
            worth = {n.name for n in everything if work[n]} if wide else None
        cut = partition(program, excluded, worth)
        for name, segment in cut.segments.items():
            _lay_out(segment, orders.get(name))
        engines: dict[str, bytes] = {}
        keys: dict[str, dict[str, object]] = {}
        refused: dict[str, str] = {}
        reused = 0
        for name, segment in cut.segments.items():
            key = {**base, "nodes": segment.nodes, "orders": _orders(segment)}
            stored = None if rebuild else cache.load("engine", key)
            if stored is None:
                try:
                    label = f"{name.strip(chr(95))} ({len(segment.nodes)} operators)"
                    stored = _serialize(library, segment, label, target, device, True, profile)
                except (_onnx.Unconvertible, Rejected) as e:
                    _log.info("%s (%s) as a whole: %s", name, sources(program, segment), e)
                    refused |= _guilty(library, program, segment, target, device, str(e), profile)
                    continue
                cache.store("engine", key, stored)
            else:
                reused += 1
            engines[name], keys[name] = stored, key
        if not refused:
            break
        excluded |= refused
    chosen = {"excluded": excluded, "orders": {name: _orders(segment) for name, segment in cut.segments.items()}}
    if (content := json.dumps(chosen, sort_keys=True).encode()) != known:
        cache.store("partition", base, content)
    inside = {name for s in cut.segments.values() for name in s.nodes}
    fallbacks = [
        fallback(program, n.name, excluded.get(n.name) or _ALONE[worth is not None])
        for n in everything
        if n.name not in inside
    ]
    if require_full and fallbacks:
        listed = "; ".join(by_reason(fallbacks))
        raise BuildError(
            f"require_full=True given, and {len(fallbacks)} of {len(everything)} operators cannot run in"
            f" {library.name} {library.version}: {listed}. Change the model, or let another backend run them:"
            " require_full=False."
        )
    within = [n for n in everything if n.name in inside]
    return Compiled(
        library,
        cut,
        engines,
        keys,
        fallbacks,
        (len(within), len(everything)),
        (sum(work[n] for n in within), sum(work.values())),
        reused,
        cache,
        profile,
    )


def _device(program: Program) -> torch.device:
    for node in program.module.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            return node.meta["val"].device
    return torch.device("cpu")


def _serialize(
    library: Library,
    segment: Segment,
    label: str,
    target: Target,
    device: torch.device,
    show: bool,
    profile: Profile | None = None,
) -> bytes:
    """Build. ``profile``: of sizes that vary. Raises :class:`Rejected` or :class:`_onnx.Unconvertible`."""
    inputs, outputs, arguments = segment.inputs, segment.outputs, segment.arguments
    names = zip(_onnx.input_names(len(inputs)), inputs, strict=True)
    shapes = None
    if profile is not None:
        shapes = {name: profile.shapes(x.physical_sizes) for name, x in names}
        for y in outputs:
            profile.shapes(y.physical_sizes)  # how large it can get has to be known
    with tempfile.TemporaryDirectory(prefix="anabranch-onnx-") as folder:
        path = Path(folder) / "segment.onnx"
        _onnx.export(segment.module, inputs, outputs, segment.example(device), path, arguments, profile)
        return build(library, path, _onnx.named(inputs, outputs), label, target, show, shapes)


# -- who is to blame ----------------------------------------------------------------------------------------------


def _guilty(
    library: Library,
    program: Program,
    segment: Segment,
    target: Target,
    device: torch.device,
    why: str,
    profile: Profile | None,
) -> dict[str, str]:
    """The operators of ``segment`` that cannot be built alone; all of them, for the reason given, if each can."""
    nodes = [n for n in program.module.graph.nodes if n.name in segment.nodes and n.op == "call_function"]
    weights = dict(zip(program.module.graph.find_nodes(op="placeholder"), program.weights, strict=False))
    kinds: dict[str, list[fx.Node]] = {}
    for node in nodes:
        kinds.setdefault(_kind(node), []).append(node)
    guilty: dict[str, str] = {}

    def search(group: list[list[fx.Node]]) -> None:
        # One build for many, since the exporter takes half a second however little it is given.
        try:
            _try(library, [alike[0] for alike in group], weights, target, device, profile)
        except (_onnx.Unconvertible, Rejected) as e:
            if len(group) > 1:
                search(group[: len(group) // 2])
                search(group[len(group) // 2 :])
            else:
                guilty.update({n.name: str(e) for n in group[0]})

    search([alike for alike in kinds.values() if _is_tensor(alike[0])])
    # Whoever picks one result of several goes where that operator goes.
    for node in nodes:
        if not isinstance(node.target, torch._ops.OpOverload) and node.all_input_nodes[0].name in guilty:
            guilty[node.name] = guilty[node.all_input_nodes[0].name]
    if guilty:
        return guilty
    # Versions differ in which int8 and fp8 kernels they have: without the quantizations the rest may still do.
    blamed = [n for n in nodes if is_quantization(n)] or nodes
    return {n.name: f"no single operator, but all from {sources(program, segment)} together: {why}" for n in blamed}


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _kind(node: fx.Node) -> str:
    """Nodes of one kind are accepted or refused alike."""

    def value(x: Any) -> str:
        v = x.meta["val"]
        tensors = [t for t in (v if isinstance(v, tuple | list) else [v]) if isinstance(t, torch.Tensor)]
        return str([(str(t.dtype), t.dim()) for t in tensors])

    args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
    return f"{node.target} {args} {kwargs}"


def _try(
    library: Library,
    nodes: Sequence[fx.Node],
    weights: dict[fx.Node, torch.Tensor],
    target: Target,
    device: torch.device,
    profile: Profile | None,
) -> None:
    """Build a network of these operators side by side, each with inputs of its own."""
    graph, root = fx.Graph(), torch.nn.Module()
    inputs: list[Any] = []
    arguments: list[Any] = []
    known: list[dict[fx.Node, fx.Node]] = []
    for node in nodes:
        known.append({})
        for n in node.all_input_nodes:
            if n not in weights:
                known[-1][n] = graph.placeholder(f"x{len(arguments)}")
                value = known[-1][n].meta["val"] = n.meta["val"]
                is_tensor = isinstance(value, torch.Tensor)
                arguments.append(len(inputs) if is_tensor else value.node.expr)
                inputs += [value] * is_tensor
    owners = {
        plain_size(size): n.meta["val"]
        for n in (nodes[0].graph.find_nodes(op="placeholder") if nodes else ())
        for size in (n.meta["val"].shape if isinstance(n.meta.get("val"), torch.Tensor) else ())
    }
    inputs += missing_owners(arguments, inputs, owners)
    results: list[fx.Node] = []
    outputs: list[Any] = []
    for k, node in enumerate(nodes):
        for i, n in enumerate(node.all_input_nodes):
            if n in weights:
                root.register_buffer(f"w{k}_{i}", weights[n], persistent=False)
                known[k][n] = graph.get_attr(f"w{k}_{i}")
        made = graph.node_copy(node, known[k].__getitem__)
        value = node.meta["val"]
        parts: list[Any] = [*enumerate(value)] if isinstance(value, tuple | list) else [(None, value)]
        for i, v in parts:
            if isinstance(v, torch.Tensor):
                results.append(made if i is None else graph.call_function(operator.getitem, (made, i)))
                outputs.append(v)
    graph.output(tuple(results))
    # Contiguous, whatever they are in the model: the permutations are not on trial.
    plain, written = ([Layout.of(v).reordered(range(v.dim())) for v in vs] for vs in (inputs, outputs))
    module = fx.GraphModule(root, graph)
    segment = Segment("trial", module, plain, written, [n.name for n in nodes], arguments)
    _serialize(library, segment, "", target, device, False, profile)


# -- what an engine depends on ------------------------------------------------------------------------------------


def _orders(segment: Segment) -> list[list[list[int]]]:
    """In which order the dimensions of each input and each result lie in memory."""
    return [[list(x.order) for x in layouts] for layouts in (segment.inputs, segment.outputs)]


def _lay_out(segment: Segment, orders: list[list[list[int]]] | None) -> None:
    """Take the orders that engines were built for before, perhaps on a machine whose PyTorch would choose others."""
    if orders is None:
        return
    current = _orders(segment)
    if [[sorted(o) for o in side] for side in orders] == [[sorted(o) for o in side] for side in current]:
        segment.inputs, segment.outputs = (
            [x.reordered(o) for x, o in zip(layouts, side, strict=True)]
            for layouts, side in zip((segment.inputs, segment.outputs), orders, strict=True)
        )


def _key(library: Library, program: Program, target: Target, profile: Profile | None = None) -> dict[str, object]:
    """The same on a machine without a GPU and on the one with it: nothing here depends on PyTorch's device."""
    versions = {name: _version(name) for name in ("torch", "onnx", "onnxscript", "onnx-ir")}
    # Ours too: another version may cut a model otherwise, or make other ONNX of it.
    versions["anabranch"] = __version__
    of_range = {} if profile is None else {"profile": profile.key()}
    return {
        **of_range,
        "model": _model_hash(program, profile),
        "library": f"{library.name} {library.version}",
        "compute_capability": list(target.compute_capability),
        "tf32": asdict(target.tf32),
        "platform": sysconfig.get_platform(),
        "versions": versions,
        "conversion": _conversion(),
    }


@cache
def _conversion() -> str:
    """Of the code that turns graphs into engines: what another version of it made is another engine."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _version(package: str) -> str:
    try:
        # Without what tells PyTorch's builds for different CUDA versions, or for none, apart.
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _model_hash(program: Program, profile: Profile | None = None) -> str:
    """Of the graph, of its inputs' shapes, strides and types, and of the bytes of the weights; not of where they are.

    Shapes and types of other values follow from these. Their strides do not: they depend on the device.
    """
    digest = hashlib.sha256()
    # Symbols have other names in other processes.
    describe = str if profile is None else profile.describe
    for node in program.module.graph.nodes:
        values = node.meta.get("val") if node.op == "placeholder" else None
        shapes = [
            (str(v.dtype), tuple(map(describe, v.shape)), tuple(map(describe, v.stride())))
            for v in (values if isinstance(values, tuple | list) else [values])
            if isinstance(v, torch.Tensor)
        ]
        text = f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {shapes}\n"
        digest.update(re.sub(r"device\(type='\w+'(, index=\d+)?\)", "device", text).encode())
    for name, weight in zip(program.weight_names, program.weights, strict=True):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {weight.stride()}\n".encode())
        flat = weight.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def sources(program: Program, segment: Segment) -> str:
    """The model's lines that a segment comes from, the first and the last of them."""
    lines = [s for n in program.module.graph.nodes if n.name in segment.nodes and (s := source_of(n))]
    return " to ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else "lines that PyTorch did not keep"
