"""Operators that keep a graph from being captured, and the lines of the model that they come from."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

from anabranch.export._constants import copies_from_cpu, is_on_cpu
from anabranch.export._indices import has_mask
from anabranch.export._random import is_random
from anabranch.export._sizes import is_of_data

#: The models' lines are elsewhere.
_PACKAGE = str(Path(__file__).parents[1])


#: Why an operator cannot be captured.
READS_ON_HOST, ON_CPU = "reads on the host", "works on the CPU"


class Uncaptured(NamedTuple):
    """An operator that keeps a graph from being captured: ``why`` is ``data-dependent``, ``random``, ``reads on the
    host`` (it waits for values there, whatever its result's sizes), ``input on the CPU`` (it reads one), ``works on the
    CPU`` (in a model of another device), or ``number``: it takes a number of the call that cannot be a tensor."""

    why: str
    operator: str
    #: ``file.py:12``, the model's line, or nothing.
    source: str


def uncapturable(nodes: Iterable[fx.Node]) -> tuple[Uncaptured, ...]:
    """Why a graph must run uncaptured; nothing where it need not. A captured random op would replay one draw."""
    found = []
    for node in nodes:
        if node.op != "call_function":
            continue
        why = ""
        if not isinstance(node.target, torch._ops.OpOverload):
            why = "data-dependent" if isinstance(node.target, torch._ops.HigherOrderOperator) else ""
        elif depends_on_data(node):
            # Not what only comes of another one.
            why = "" if any(is_unbacked(n.meta.get("val")) for n in node.all_input_nodes) else "data-dependent"
        elif is_random(node):
            why = "random"
        elif reads_on_host(node):
            why = READS_ON_HOST
        if why:
            found.append(Uncaptured(why, str(node.target), source_of(node)))
    return tuple(found)


def direct_only(uncaptured: Sequence[Uncaptured]) -> str | None:
    """For messages, the reason that weighs more."""
    for why in ("data-dependent", "random", READS_ON_HOST, "input on the CPU", ON_CPU):
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
    return has_mask(node.target, node.args) or is_unbacked(node.meta.get("val"))


def reads_on_host(node: fx.Node) -> bool:
    """Whether the host waits for values of an argument, though every size is known.

    PyTorch's grouped product has a kernel that reads where groups begin on the device, for bfloat16 on newer GPUs; else
    the host reads it, and makes a product for each group. So does what transformers has in its place.
    """
    target, value = node.target, node.meta.get("val")
    if not isinstance(target, torch._ops.OpOverload) or "grouped_mm" not in target.name() or "scaled" in target.name():
        return False
    if not isinstance(value, torch.Tensor) or value.device.type == "cpu":
        return False
    if target.namespace != "aten" or value.device.type != "cuda" or value.dtype is not torch.bfloat16:
        return True
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(value.device)[0] < 9


def is_unbacked(value: Any) -> bool:
    """Whether it is a number that depends on data, or a tensor of such sizes, or has one of them."""
    return any(
        any(map(is_of_data, x.shape)) if isinstance(x, torch.Tensor) else is_of_data(x)
        for x in pytree.tree_leaves(value)
    )


def reading(graph: fx.Graph, on_cpu: Iterable[fx.Node]) -> list[Uncaptured]:
    """Operators that read these inputs on the CPU, or what is computed of them there."""
    found, on_cpu = [], set(on_cpu)
    for node in graph.nodes:
        if node.op == "call_function" and not on_cpu.isdisjoint(node.all_input_nodes):
            if node.target is not operator.getitem:
                found.append(Uncaptured("input on the CPU", str(node.target), source_of(node)))
            if is_on_cpu(node):
                on_cpu.add(node)
    return found


def working_on_cpu(graph: fx.Graph) -> list[Uncaptured]:
    """Operators of a graph of another device that the host runs, or whose tensors it copies from there."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            given = [n for n in node.all_input_nodes if is_on_cpu(n)]
            if is_on_cpu(node) or any(copies_from_cpu(node, n) for n in given):
                found.append(Uncaptured(ON_CPU, str(node.target), source_of(node)))
    return found


def source_of(node: fx.Node) -> str:
    """``file.py:12`` of the model's line that made the node, where export kept it."""
    lines = (line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if 'File "' in line)
    trace = [line for line in lines if _PACKAGE not in line]
    if not trace:
        return ""
    file, line, *_ = trace[-1].removeprefix('File "').split('", line ')
    return f"{file.rsplit('/', 1)[-1]}:{line.split(',')[0]}"


def with_line(node: fx.Node) -> str:
    """An operator with the model's line."""
    return f"{node.target} ({source_of(node)})" if source_of(node) else str(node.target)
