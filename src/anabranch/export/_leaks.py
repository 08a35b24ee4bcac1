"""Stand-ins that a traced model left behind in what outlives the trace: caches, global variables, other objects."""

from __future__ import annotations

import collections
import functools
import gc
import sys
import types
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import fx

from anabranch.errors import UnsupportedModel

#: Of an input that nobody but torch.export holds: its own note of it, a variable here, and the call that counts.
_REFERENCES = 3
_REAL = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_CACHE = type(functools.lru_cache(int))


class Watch:
    """The stand-ins of one trace. Holds none of them alive."""

    def __init__(self, inputs: Iterable[Any]) -> None:
        """``inputs``: leaves of the call. Made within the traced call."""
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        mode: Any = get_proxy_mode()
        #: Every tensor that the trace knows, weakly.
        self._tracked: Any = getattr(getattr(mode, "tracer", None), "tensor_tracker", {})
        self._inputs = {id(x) for x in inputs}

    def alive(self) -> bool:
        """Whether any may be left; what torch.export itself keeps is not counted."""
        left = self._stand_ins()
        while left:
            x = left.pop()
            if id(x) not in self._inputs or sys.getrefcount(x) > _REFERENCES:
                return True
        return False

    def _stand_ins(self) -> list[Any]:
        # A tensor that the model holds is tracked as well once it is written in place: it is no stand-in.
        return [x for x in self._tracked if type(x) not in _REAL]

    def clear(self) -> list[str]:
        """Take what is left out of caches; returns where it was. With everything of the trace's own dropped.

        Raises :class:`UnsupportedModel`, which names the holder, where it is not in a cache.
        """
        if not self.alive():
            return []
        gc.collect()
        cleared: dict[str, None] = {}
        if self.alive():
            left = self._stand_ins()
            # What is frozen, as servers do before they fork, is not found as a holder.
            frozen = gc.get_freeze_count() > 0
            if frozen:
                gc.unfreeze()
            try:
                for x in left:
                    _take_out(x, {id(left)}, cleared)
            finally:
                if frozen:
                    gc.freeze()
        return list(cleared)


def _take_out(x: Any, ours: set[int], cleared: dict[str, None], depth: int = 0) -> None:
    """``ours``: ids of lists of this module that hold ``x`` as well."""
    holders = gc.get_referrers(x)
    for holder in holders:
        if id(holder) in ours or isinstance(holder, types.FrameType) or _is_pytorchs(holder):
            continue
        if isinstance(holder, _CACHE):
            holder.cache_clear()
            cleared[f"the cache of {getattr(holder, '__qualname__', holder)}()"] = None
        elif isinstance(holder, dict) and _cache_of(holder) is not None:
            cache = _cache_of(holder)
            cache.cache_clear()
            cleared[f"the cache of {getattr(cache, '__qualname__', cache)}()"] = None
        elif isinstance(holder, dict | list) and _is_of_a_node(holder):
            continue  # the graph is ours, and says of a value what it looks like
        elif isinstance(holder, dict):
            owner = _namespace(holder)
            if owner is not None:
                keys = _keys(holder, x)
                if keys and owner:
                    _kept(f"{owner}.{keys[0]}")
                continue
            for k in _keys(holder, x):
                holder.pop(k, None)
                cleared[_named(holder)] = None
        elif isinstance(holder, list | collections.deque):
            for i in _positions(holder, x):
                del holder[i]
                cleared[_named(holder)] = None
        elif isinstance(holder, set):
            holder.discard(x)
            cleared[_named(holder)] = None
        elif isinstance(holder, tuple):
            if depth < 4:
                _take_out(holder, ours | {id(holders)}, cleared, depth + 1)
        elif isinstance(holder, types.CellType):
            _kept("a variable of a function around the model's code")
        elif not isinstance(holder, types.GeneratorType | types.FunctionType | types.MethodType | types.ModuleType):
            keys = _keys(getattr(holder, "__dict__", {}), x) or ["(an attribute)"]
            _kept(f"{type(holder).__module__}.{type(holder).__qualname__}.{keys[0]}")


# Functions of their own: what a comprehension compares with would be in a cell, which refers to it as well.


def _keys(space: Any, x: Any) -> list[Any]:
    return [k for k, v in list(space.items()) if v is x or k is x]


def _cache_of(space: dict[Any, Any]) -> Any:
    """The function whose cache without a limit keeps its results in this dict, or None."""
    return next((owner for owner in gc.get_referrers(space) if isinstance(owner, _CACHE)), None)


def _positions(items: Any, x: Any) -> list[int]:
    """From the last to the first."""
    return [i for i, v in enumerate(list(items)) if v is x][::-1]


def _kept(where: str) -> NoReturn:
    raise UnsupportedModel(
        f"the model keeps a tensor that it computes in {where}, outside of itself, where a call of an engine would not"
        " put it. Return it, keep it in an attribute of the module, or compute it before compile."
    )


def _is_pytorchs(x: Any) -> bool:
    """Whether an object is one that PyTorch traces with."""
    return type(x).__module__.startswith("torch.") and not isinstance(x, torch.nn.Module)


def _is_of_a_node(container: dict[Any, Any] | list[Any]) -> bool:
    """Whether it is what a node of a graph notes of its value, or a list there."""
    owners = gc.get_referrers(container)
    if isinstance(container, list):
        return any(isinstance(owner, dict) and _is_of_a_node(owner) for owner in owners)
    return any(isinstance(owner, fx.Node) and owner.meta is container for owner in owners)


def _namespace(space: dict[str, Any]) -> str | None:
    """Whose variables a dict holds: a module's, an object's, a class's. None: it is data. Empty: PyTorch's own."""
    name = space.get("__name__")
    if isinstance(name, str) and vars(sys.modules.get(name, types)) is space:
        return name
    for owner in gc.get_referrers(space):
        if not isinstance(owner, type | types.FrameType | dict | list) and getattr(owner, "__dict__", None) is space:
            return "" if _is_pytorchs(owner) else f"{type(owner).__module__}.{type(owner).__qualname__}"
    if "__dict__" in space and "__module__" in space:
        return str(space["__module__"])
    return None


def _named(container: Any) -> str:
    """A container with the name of what holds it, where that is a variable."""
    for space in gc.get_referrers(container):
        if isinstance(space, dict):
            owner = _namespace(space)
            keys = _keys(space, container)
            if owner and keys:
                return f"{owner}.{keys[0]}"
        elif hasattr(space, "__dict__") and not isinstance(space, types.FrameType | torch.nn.Module):
            keys = _keys(vars(space), container)
            if keys:
                return f"{type(space).__qualname__}.{keys[0]}"
    return f"a {type(container).__name__}"
