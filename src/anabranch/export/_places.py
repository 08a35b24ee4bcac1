"""What operators do with memory: which write in place what others return, where a view lies, what shares memory.

All of it is told from schemas and from the fake tensors that a graph's nodes carry under ``meta["val"]``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from anabranch.export import _functional
from anabranch.export._trial import written

_aten = torch.ops.aten
#: Views that show no element twice, so that a write through them is what it seems.
_VIEWS = {
    *("view", "_unsafe_view", "select", "slice", "narrow", "permute", "transpose", "t", "movedim", "swapaxes"),
    *("squeeze", "unsqueeze", "diagonal", "split", "split_with_sizes", "chunk", "unbind", "alias", "detach"),
}
#: Each with the view that it writes.
SCATTERS = {
    _aten.slice_scatter.default: _aten.slice.Tensor,
    _aten.select_scatter.default: _aten.select.int,
    _aten.diagonal_scatter.default: _aten.diagonal.default,
}
#: They depend on where in which storage a tensor lies, and not on its elements alone.
_BY_STORAGE = {"as_strided", "as_strided_scatter", "as_strided_copy", "_reshape_alias", "sym_stride", "stride"} | {
    *("sym_storage_offset", "storage_offset", "sym_is_contiguous", "is_contiguous"),
}


def base_of(node: fx.Node, clones: bool) -> fx.Node | None:
    """The node in whose memory this one's value lies, or could be computed."""
    if node.op != "call_function":
        return None
    maker = node.args[0] if node.target is operator.getitem else node
    if not isinstance(maker, fx.Node) or not maker.args or not isinstance(maker.args[0], fx.Node):
        return None
    target = maker.target
    known = is_view(node) or target in SCATTERS or (clones and target is _aten.clone.default)
    return maker.args[0] if known or (maker is node and in_place(target) is not None) else None


def is_view(node: fx.Node) -> bool:
    """Whether it is a view that may be written through."""
    maker = node.args[0] if node.target is operator.getitem else node
    target = maker.target if isinstance(maker, fx.Node) else None
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" and _name(target) in _VIEWS


@functools.cache
def in_place(target: Any) -> torch._ops.OpOverload | None:
    """The overload that writes what ``target`` returns into its first argument, if there is one."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    schema, name = target._schema, f"{_name(target)}_"
    packet = getattr(_aten, name, None)
    if packet is None or name in _functional._NO_WRITES or name.startswith("_") or "sparse" in name:
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None  # what is random goes by the order in memory
    if schema.is_mutable or len(schema.returns) != 1 or schema.returns[0].alias_info:
        return None

    def signature(schema: Any) -> list[tuple[str, str, bool]]:
        return [(x.name, str(x.type), x.kwarg_only) for x in schema.arguments]

    for overload in packet.overloads():
        found = getattr(packet, overload)
        written = [x.alias_info is not None and x.alias_info.is_write for x in found._schema.arguments]
        if signature(found._schema) == signature(schema) and written[0] and not any(written[1:]):
            return found
    return None


def _name(target: torch._ops.OpOverload) -> str:
    return target._schema.name.rsplit("::")[-1]


def value_of(node: Any) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, FakeTensor) and value.layout is torch.strided else None


def run(target: Any, value: torch.Tensor, args: Any, kwargs: Any) -> Any:
    """An operator on a fake tensor. None if it refuses that, or assumes of sizes what was not assumed before."""
    if not isinstance(value, FakeTensor):
        return None
    mode = value.fake_mode
    args, kwargs = fx.map_arg((args, kwargs), lambda x: x.meta["val"])
    assumed = len(mode.shape_env.guards) if mode.shape_env is not None else 0
    try:
        with ExitStack() as stack:
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
            stack.enter_context(mode)
            result = target(value, *args, **kwargs)
    except Exception:
        return None
    return result if mode.shape_env is None or len(mode.shape_env.guards) == assumed else None


def _equal(a: Iterable[Any], b: Iterable[Any]) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def same_layout(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return a is b
    return _equal((*a.shape, *a.stride()), (*b.shape, *b.stride()))


def same_place(a: Any, b: Any) -> bool:
    """Whether two views of the same memory are the same elements of it, in the same order."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    alike = a.dtype is b.dtype and a.is_conj() == b.is_conj() and a.is_neg() == b.is_neg()
    return alike and same_layout(a, b) and _equal([a.storage_offset()], [b.storage_offset()])


def fits(memory: Any, value: Any) -> bool:
    """Whether values like ``value`` are of the type and the size of this memory: operators may have promoted them."""
    ours, theirs = pytree.tree_leaves(memory), pytree.tree_leaves(value)
    return len(ours) == len(theirs) and all(
        isinstance(x, torch.Tensor)
        and isinstance(y, torch.Tensor)
        and (x.dtype, x.device) == (y.dtype, y.device)
        and _equal(x.shape, y.shape)
        for x, y in zip(ours, theirs, strict=True)
    )


def _storages(node: fx.Node) -> set[int]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {x.untyped_storage()._cdata for x in leaves if isinstance(x, torch.Tensor) and x.layout is torch.strided}


def share_memory(a: fx.Node, b: fx.Node) -> bool:
    return not _storages(a).isdisjoint(_storages(b))


def declares_alias(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and any(r.alias_info for r in target._schema.returns)


def may_alias(node: fx.Node, given: fx.Node) -> bool:
    """Whether a node's value may lie in the memory of one that it is given, and does not write."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        return False  # it lies in what is written
    if not any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(node.meta.get("val"))):
        return False
    if not isinstance(target, torch._ops.OpOverload) or declares_alias(target) or share_memory(node, given):
        return True
    # Made of others, one of which may be a view. (Those that are kept whole are not.)
    return target._can_decompose() and target not in _functional._KEPT


def only_views(node: fx.Node) -> bool:
    """Whether what may alias something reads none of it: ``reshape``, which says that it is a view, may copy."""
    if node.target is operator.getitem:
        return True
    return declares_alias(node.target) and any(share_memory(node, x) for x in node.all_input_nodes)


def depends_on_storage(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and _name(node.target) in _BY_STORAGE


def others(node: fx.Node) -> list[fx.Node]:
    """What a write is given beside the memory that it writes."""
    found: dict[fx.Node, None] = {}
    fx.map_arg((node.args[1:], node.kwargs), lambda x: found.setdefault(x))
    return list(found)


def written_by(node: fx.Node) -> set[fx.Node]:
    """The nodes into whose memory an operator writes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return set()
    leaves = pytree.tree_leaves(list(written(node.target, node.args, node.kwargs)))
    return {x for x in leaves if isinstance(x, fx.Node)}


def has_effects(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        drawn = torch.Tag.nondeterministic_seeded in target.tags
        return drawn or not target._schema.returns or bool(written_by(node))
    numbers = not any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(node.meta.get("val")))
    return not (target is operator.getitem or (numbers and node.op == "call_function" and "val" in node.meta))
