"""Integers that stand for a call's where a model is run on made-up values: its indices must be valid for them.

On a GPU an index that is out of range costs the process its device. Zero is valid nearly everywhere, but not in
``embedding(ids - 1)`` or ``gather(x, 1, lengths - 1)``. So what the program computes from its integer inputs alone is
computed here, on the CPU, for one integer after another.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from anabranch.export._signature import TensorSpec
from anabranch.export._sizes import shape_at

#: Operators that read or write at indices, by name.
_INDEXING = frozenset(
    (
        *("embedding", "embedding_bag", "embedding_bag_forward_only", "index", "index_select", "gather", "take"),
        *("take_along_dim", "scatter", "scatter_add", "scatter_reduce", "index_put", "unsafe_index", "put"),
        *("index_add", "index_copy", "index_fill", "index_reduce", "nll_loss", "nll_loss_forward"),
        *("nll_loss2d", "nll_loss2d_forward", "nll_loss_nd", "unsafe_masked_index"),
    )
)
#: They make integers of floating values.
_CONVERTING = frozenset(("to_copy", "to", "type_as", "view"))
#: With both bounds, or a divisor, their results lie in a range.
_BOUNDED = frozenset(("clamp", "remainder"))
_TRIED = (*range(17), *(2**n for n in range(5, 21)))
#: Elements: what is larger is not computed here, and counts as unknown.
_LARGEST = 1 << 22


def is_indexing(func: Any) -> bool:
    """Whether an operator reads or writes at indices that are tensors."""
    return func._schema.name.rsplit("::")[-1].strip("_") in _INDEXING


def has_mask(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operator takes a mask among its indices: the host counts how many elements it chooses.

    ``args`` are tensors, or nodes of a graph that carry them under ``meta["val"]``.
    """
    if not isinstance(func, torch._ops.OpOverload) or not is_indexing(func) or len(args) < 2:
        return False
    indices = args[1] if isinstance(args[1], list | tuple) else ()
    values = (i.meta.get("val") if isinstance(i, fx.Node) else i for i in indices)
    return any(isinstance(v, torch.Tensor) and v.dtype in (torch.bool, torch.uint8) for v in values)


def valid_integer(
    graph: fx.Graph, inputs: Sequence[TensorSpec], values: Mapping[Any, int] | None = None
) -> tuple[int, str]:
    """An integer with which every integer input may be filled: indices and divisors made from them are valid.

    Or 0, and why there seems to be none.

    ``graph`` takes weights, and then tensors of these specs; its nodes carry fake tensors under ``meta["val"]``;
    ``values``: of symbols in their sizes. What depends on weights or on other inputs is not looked at.
    """
    # Numbers, if any, come last.
    placeholders = [n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.Tensor)]
    given = dict(zip(placeholders[len(placeholders) - len(inputs) :], inputs, strict=True))
    given = {n: s for n, s in given.items() if _is_integer(s.dtype) and math.prod(s.shape) <= _LARGEST}
    # The values of state, which nobody makes up.
    kept = {n: s.values.cpu() for n, s in given.items() if s.values is not None}
    given = {n: s for n, s in given.items() if n not in kept}
    if not given:
        return 0, ""
    nodes = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)]
    why = ""
    for value in _TRIED:
        # A wider type may hold what a narrow one cannot.
        fits = all(s.dtype is torch.bool or value <= torch.iinfo(s.dtype).max for s in given.values())
        filled = {n: torch.full(s.shape, value, dtype=s.dtype) for n, s in given.items()} if fits else {}
        # Copies: a graph writes state at its end.
        why = _fails(nodes, filled | {n: x.clone() for n, x in kept.items()}, values) if fits else why
        if not why:
            return value, ""
    return 0, why


def indexed_by_floats(nodes: Mapping[fx.Node, bool], weights: Container[fx.Node]) -> list[fx.Node]:
    """Operators of a piece that index with integers made of floating values, which may be any where those are made up.

    ``nodes``: of the piece, in order; those that it is given, or False. ``weights`` have their own values.
    """
    floating: set[fx.Node] = set()
    unsure: set[fx.Node] = set()
    found = []
    for node, is_inside in nodes.items():
        values = [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)]
        is_float = any(x.is_floating_point() or x.is_complex() for x in values)
        if not is_inside:
            if is_float and node not in weights:
                floating.add(node)
            continue
        given = node.all_input_nodes
        if is_float and not floating.isdisjoint(given):
            floating.add(node)
        name = node.target._schema.name.rsplit("::")[-1] if isinstance(node.target, torch._ops.OpOverload) else ""
        if name and is_indexing(node.target) and not unsure.isdisjoint(given):
            found.append(node)
        converts = not is_float and not floating.isdisjoint(given) and name.strip("_") in _CONVERTING
        bounds = name in _BOUNDED and None not in node.args and len(node.args) == (3 if name == "clamp" else 2)
        has_integers = any(_is_integer(x.dtype) and x.dtype is not torch.bool for x in values)
        # Positions that an operator finds (argmax, say) are valid whatever the values are.
        if has_integers and not bounds and (converts or not unsure.isdisjoint(given)):
            unsure.add(node)
    return found


def _fails(nodes: Iterable[fx.Node], known: dict[fx.Node, Any], values: Mapping[Any, int] | None) -> str:
    """Why these values are not valid, or nothing."""
    for node in nodes:
        # What is made of nothing (arange, say) is as good as known.
        is_known = all(n in known for n in node.all_input_nodes)
        checks = is_indexing(node.target)
        if not is_known and not (checks and _has_known_index(node, known)):
            continue
        if not _is_small(node, checks, values):
            continue
        try:
            with torch.no_grad():
                arguments = _on_cpu(node.args, known, node, values), _on_cpu(node.kwargs, known, node, values)
                result = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
        except Exception as e:
            if _is_of_values(e):
                return (str(e).splitlines() or [type(e).__name__])[0]
            continue  # the CPU cannot do it at all: what it gives is unknown
        if is_known:
            known[node] = result
    return ""


def _is_of_values(error: Exception) -> bool:
    """Whether values are at fault: an index that is out of range, a division by zero."""
    text = str(error).lower()
    if isinstance(error, NotImplementedError):
        return False
    return isinstance(error, IndexError | ZeroDivisionError) or any(
        words in text for words in ("out of range", "out of bounds", "zerodivision", "index")
    )


def _has_known_index(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    return any(_is_integer(v.dtype) for n in node.all_input_nodes if isinstance(v := known.get(n), torch.Tensor))


def _is_small(node: fx.Node, checks: bool, sizes: Mapping[Any, int] | None) -> bool:
    """Whether it costs next to nothing to compute; of what is only looked into, the memory is not there."""
    if node.target is torch.ops.aten.embedding.default:
        return True
    values = [n.meta.get("val") for n in (node, *(node.all_input_nodes if not checks else ()))]
    found = [x for v in values for x in pytree.tree_leaves(v) if isinstance(x, torch.Tensor)]
    try:
        return bool(found) and all(
            math.prod(shape_at(x.shape, sizes)) <= _LARGEST
            and x.layout is torch.strided
            and (checks or _is_integer(x.dtype))
            for x in found
        )
    except (RuntimeError, TypeError):
        return False  # its size depends on data


def _on_cpu(arguments: Any, known: dict[fx.Node, Any], node: fx.Node, sizes: Mapping[Any, int] | None) -> Any:
    def of(x: Any) -> Any:
        if isinstance(x, fx.Node):
            if x in known:
                return known[x]
            # Zeros of that shape, in the memory of one element; of a table of vectors, vectors of one element.
            shape = shape_at(x.meta["val"].shape, sizes)
            shape = (shape[0], 1) if node.target is torch.ops.aten.embedding.default and len(shape) == 2 else shape
            return torch.zeros((), dtype=x.meta["val"].dtype).expand(shape)
        return torch.device("cpu") if isinstance(x, torch.device) else x

    return fx.node.map_aggregate(arguments, of)


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex
