"""Arguments and results as trees: what ``torch.utils._pytree`` does, where a ``torch.Size`` stays one.

PyTorch takes a size apart into its numbers, and puts a tuple in its place.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from anabranch.export._containers import is_dataclass, is_users_dict, items_of


def has_sizes(structure: pytree.TreeSpec) -> bool:
    """Whether there is a ``torch.Size`` in it."""
    return structure.type is torch.Size or any(map(has_sizes, structure.children()))


def unflatten(leaves: Sequence[Any], structure: pytree.TreeSpec) -> Any:
    """The tree of these leaves."""
    if not has_sizes(structure):
        return pytree.tree_unflatten(leaves, structure)
    if structure.type is torch.Size:
        return torch.Size(leaves)
    rest = iter(leaves)
    parts = [unflatten([next(rest) for _ in range(child.num_leaves)], child) for child in structure.children()]
    return pytree.SUPPORTED_NODES[structure.type].unflatten_fn(parts, structure.context)


def map_leaves(fn: Callable[[Any], Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """``tree`` with ``fn`` of each leaf in its place. ``is_leaf``: what else is taken as one."""
    leaves, structure = pytree.tree_flatten(tree, is_leaf)
    return unflatten(list(map(fn, leaves)), structure)


def map_tensors(fn: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """``tree`` with ``fn`` of each tensor in its place."""
    return map_leaves(lambda x: fn(x) if isinstance(x, torch.Tensor) else x, tree)


class Contents:
    """What lists, dicts and dataclasses among arguments hold, to see whether a call changes that."""

    def __init__(self, tree: Any) -> None:
        self._held: list[tuple[Any, list[Any]]] = []
        self._note(tree)

    def _note(self, x: Any) -> None:
        is_mutable = type(x) in _MUTABLE or is_dataclass(x) or is_users_dict(x)
        if is_mutable:
            self._held.append((x, _items(x)))
        for item in _items(x) if is_mutable or type(x) is tuple else ():
            self._note(item)

    def changed(self) -> bool:
        """Whether one of them has lost, got or exchanged something since."""
        return any(list(map(id, _items(x))) != list(map(id, items)) for x, items in self._held)


_MUTABLE = (list, dict, collections.OrderedDict, collections.defaultdict, collections.deque)


def _items(x: Any) -> list[Any]:
    if is_dataclass(x):
        return [getattr(x, f.name, None) for f in dataclasses.fields(x)] + list(getattr(x, "__dict__", {}).values())
    if is_users_dict(x):
        attributes = getattr(x, "__dict__", {})
        held = items_of(x)
        return [*held, *held.values(), *(() if attributes is x else attributes.values())]
    return [*x, *x.values()] if isinstance(x, dict) else list(x)
