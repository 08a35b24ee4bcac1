"""Describe a program's run as a plan."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from anabranch.export import Program, TensorSpec, size_at, source_of, written_by
from anabranch.plan._plan import Access, Buffer, Plan, Step

#: ATen ops that use no cuBLAS workspace. Everything else is assumed to, so that a new op errs on the safe side.
_NO_BLAS = (
    *("conv", "pool", "cat", "upsample", "pixel_shuffle", "::pad", "softmax", "prelu", "hardswish"),
    *("batch_norm", "layer_norm", "group_norm", "instance_norm"),
)


def uses_workspace(program: Program) -> bool:
    """Whether a step may use a library's per-stream workspace (cuBLAS): a hidden resource of its lane."""
    return any(_uses_workspace(n) for n in program.module.graph.nodes if n.op == "call_function")


def _uses_workspace(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is not operator.getitem
    if torch.Tag.pointwise in target.tags or _aliases(node) or torch.Tag.reduction in target.tags:
        return False
    # A user's own op may be called anything; and conv_tbc is one matrix product after another, as every convolution is
    # where cuDNN does not do it.
    name = target.name()
    if target.namespace != "aten" or "conv_tbc" in name or ("conv" in name and not torch.backends.cudnn.enabled):
        return True
    return not any(word in target.name() for word in _NO_BLAS)


def _aliases(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    return any(r.alias_info is not None and not r.alias_info.is_write for r in node.target._schema.returns)


def called(position: int, given: int, states: Sequence[str]) -> tuple[str, str]:
    """Label and kind of the buffer of a tensor that a program is given: ``given`` of a call, then its states."""
    is_state = 0 <= position - given < len(states)
    return (f"state {states[position - given]}", "state") if is_state else (f"input {position}", "input")


class Planned(NamedTuple):
    """A plan, and where each of the program's results lies at its end; nothing for a number."""

    plan: Plan
    results: tuple[tuple[Access, ...], ...]


def build_plan(program: Program, inputs: Sequence[TensorSpec], **options: Any) -> Plan:
    """As :func:`plan_program`, the plan alone."""
    return plan_program(program, inputs, **options).plan


def plan_program(
    program: Program,
    inputs: Sequence[TensorSpec],
    *,
    name: str,
    device: torch.device,
    backend: str,
    captured: bool,
    reason: str,
    notes: Mapping[str, str],
    graph: fx.Graph | None = None,
) -> Planned:
    """The plan of ``program``: one lane, on which each step follows the one before it.

    ``eager`` shows each operator. A compiled backend's kernels are one step: what it does inside is its own, and
    memory inside comes from the lane it runs on. A captured plan copies inputs into the context's memory first and
    outputs out of it last, and inputs that it has written; a direct plan reads and writes the caller's tensors.

    ``graph``: the program's as its backend runs it, where that is several pieces and operators between them; its
    inputs and results are the program's own.
    """
    lane = "main"
    buffers: dict[str, Buffer] = {}
    steps: list[Step] = []
    has_workspaces = device.type != "cpu"

    def buffer(label: str, kind: str, value: Any) -> Access:
        spec = value if isinstance(value, TensorSpec) else TensorSpec(_ints(value.shape, program), (), value.dtype)
        dtype = str(spec.dtype).removeprefix("torch.")
        # Of a size that nobody knows yet it may have memory, and so be in a race.
        known = isinstance(value, TensorSpec) or all(isinstance(n, int) for n in value.shape)
        nbytes = spec.nbytes if known else max(spec.nbytes, spec.dtype.itemsize)
        buffers.setdefault(label, Buffer(label, nbytes, kind, dtype=dtype, shape=spec.shape))
        return Access(label)

    in_pieces = graph is not None
    if graph is None:
        graph = (program.in_place if backend == "eager" else program.module).graph
    placeholders = graph.find_nodes(op="placeholder")
    split = len(program.weights)
    of: dict[fx.Node, tuple[Access, ...]] = {}
    for node, weight_name in zip(placeholders[:split], program.weight_names, strict=True):
        of[node] = (buffer(f"weight {weight_name}", "weight", node.meta["val"]),)
    numbers = len(program.numbers.inputs) if program.numbers is not None else 0
    given = len(placeholders) - split - len(program.state) - numbers
    tensors = [n for n in placeholders[split:] if isinstance(n.meta.get("val"), torch.Tensor)]  # and numbers
    sources: list[Access] = []
    for i, (node, spec) in enumerate(zip(tensors, inputs, strict=True)):
        source = buffer(*called(i, given, [s.name for s in program.state]), spec)
        sources.append(source)
        if captured:
            static = buffer(f"static input {i}", "static", spec)
            steps.append(Step(f"copy in {i}", lane, (source,), (static,), "copy", "copy_"))
            of[node] = (static,)
        else:
            of[node] = (source,)

    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    kind_of_result = "static" if captured else "output"
    workspace: tuple[Access, ...] = ()
    if has_workspaces and uses_workspace(program):
        # Its size is the library's business; one byte stands for all of it.
        buffers["workspace main"] = Buffer("workspace main", 1, "workspace")
        workspace = (Access("workspace main"),)

    def label_of(node: fx.Node) -> tuple[str, str]:
        if node in results:
            prefix = "static output" if captured else "output"
            return f"{prefix} {results.index(node)}", kind_of_result
        return f"%{node.name}", "temporary"

    if backend == "eager" or in_pieces:
        for node in graph.nodes:
            if node.op not in ("call_function", "call_module"):
                continue
            reads = _unique(a for n in node.all_input_nodes for a in of.get(n, ()))
            if _aliases(node):
                base = of.get(node.all_input_nodes[0], ())
                which = node.args[1] if node.target is operator.getitem else None
                of[node] = (base[which],) if isinstance(which, int) and which < len(base) > 1 else base
                steps.append(Step(node.name, lane, (), (), "view", str(node.target), source_of(node)))
                continue
            targets = [n for n in node.all_input_nodes if n in written_by(node)]
            if targets and all(n in of for n in targets):
                writes = _unique(a for n in targets for a in of[n])
                of[node] = of[targets[0]]
                extra = workspace if _uses_workspace(node) else ()
                steps.append(Step(node.name, lane, reads, (*writes, *extra), "op", str(node.target), source_of(node)))
                continue
            values = node.meta.get("val")
            parts = values if isinstance(values, list | tuple) else [values]
            label, kind = label_of(node)
            writes = tuple(
                buffer(label if len(parts) == 1 else f"{label}.{i}", kind, v)
                for i, v in enumerate(parts)
                if isinstance(v, torch.Tensor)
            )
            of[node] = writes
            if node.op == "call_module":
                # Its workspace is the context's; one byte stands for all of it.
                buffers.setdefault("workspace of pieces", Buffer("workspace of pieces", 1, "workspace"))
                touched = (*writes, Access("workspace of pieces"))
                steps.append(Step(node.name, lane, reads, touched, "kernels", f"{backend}: one engine"))
                continue
            extra = workspace if _uses_workspace(node) else ()
            steps.append(Step(node.name, lane, reads, (*writes, *extra), "op", str(node.target), source_of(node)))
    elif not program.is_empty:
        reads = _unique(a for n in placeholders for a in of.get(n, ()))
        writes = tuple(buffer(*label_of(n), n.meta["val"]) for n in dict.fromkeys(results))
        for n, w in zip(dict.fromkeys(results), writes, strict=True):
            of[n] = (w,)
        count = sum(n.op == "call_function" for n in graph.nodes)
        in_place = tuple(a for i in sorted(program.written) for a in of[tensors[i]])
        touched = (*writes, *in_place, *workspace)
        steps.append(Step("kernels", lane, reads, touched, "kernels", f"{backend}: {count} ops"))
    if captured:
        for i in sorted(program.written):
            steps.append(Step(f"copy back {i}", lane, of[tensors[i]], (sources[i],), "copy", "copy_"))
        for i, node in enumerate(results):
            out = buffer(f"output {i}", "output", node.meta["val"])
            steps.append(Step(f"copy out {i}", lane, of[node], (out,), "copy", "copy_"))
            of[node] = (out,)
    plan = Plan(
        name=name,
        device=str(device),
        backend=backend,
        lanes=(lane,),
        buffers=tuple(buffers.values()),
        steps=tuple(steps),
        captured=captured,
        reason=reason,
        notes=dict(notes),
    )
    return Planned(plan, tuple(of.get(node, ()) for node in results))


def _ints(shape: Sequence[Any], program: Program) -> tuple[int, ...]:
    """Sizes; of one that varies, what it was at export; 0 for one that is known only once the data is."""
    return tuple(size_at(n, program.values) or 0 for n in shape)


def _unique(accesses: Any) -> tuple[Access, ...]:
    return tuple(dict.fromkeys(accesses))
