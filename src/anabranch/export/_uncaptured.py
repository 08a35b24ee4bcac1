"""Operators that keep a graph from being captured, and the lines of the model that they come from."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

from anabranch.export._constants import is_on_cpu
from anabranch.export._indices import has_mask
from anabranch.export._random import is_random

#: The models' lines are elsewhere.
_PACKAGE = str(Path(__file__).parents[1])


class Uncaptured(NamedTuple):
    """An operator that keeps a graph from being captured: ``why`` is ``data-dependent``, ``random``, ``input on the
    CPU`` (it reads one), or ``number``: it takes a number of the call that cannot be a tensor."""

    why: str
    operator: str
    #: ``file.py:12``, the model's line, or nothing.
    source: str


def uncapturable(graph: fx.Graph) -> tuple[Uncaptured, ...]:
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


def direct_only(uncaptured: Sequence[Uncaptured]) -> str | None:
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
