"""Containers and attributes that threads share without a lock, so that each access is a step of its own.

An access declares what it touches: one key of a dict or element of a set (a slot of the container's range; two keys
whose slots collide only seem to depend), or the whole. Python makes each such access one indivisible operation, so it
also orders the threads: in the trace a change is a signal, and a later look an await. In a thread that is not
controlled, and inside :func:`plain`, nothing is declared.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from zlib import crc32

from anabranch import _sync
from anabranch.explore import _conductor, _locks
from anabranch.explore._actor import controlled, fresh, observable, plain
from anabranch.explore._dependence import ADD, READ, WRITE, Touch

_WHOLE = (0, 1 << 33)


class Place:
    """Something shared: its name, and who was told of a change of which part of it."""

    __slots__ = ("changed", "id", "name")

    def __init__(self, kind: str, name: str, *, is_unique: bool = True) -> None:
        self.id = fresh(kind) if is_unique else kind
        self.name = f"{self.id}:{name}" if name else self.id
        self.changed: set[int] = set()

    def touch(self, what: str, mode: int, slot: int | None = None) -> None:
        """The calling thread's next step: ``what`` it does to the slot (None: to all of it)."""
        if controlled() is None:
            return
        conductor = _conductor.active
        assert conductor is not None
        lo, hi = _WHOLE if slot is None else (slot, slot + 1)
        touch: Touch = (f"var:{self.id}", lo, hi, mode)
        conductor.point("var", f"{what} {self.name}", [touch])
        for other in sorted(self.changed) if slot is None else (slot, -1):
            conductor.awaited(f"{self.id}[{other}]")
        if mode != READ:
            part = -1 if slot is None else slot
            self.changed.add(part)
            conductor.signal(f"{self.id}[{part}]")


def _slot(key: object) -> int:
    """The same for equal keys, in every schedule; addresses must not get in, nor the numbers of threads."""
    if type(key) is int and key > 1 << 32 and _conductor.active is not None:
        key = _conductor.active.thread_named(key) or key
    if isinstance(key, (str, int, bytes, float, type(None))):
        return crc32(repr(key).encode("utf-8", "surrogatepass"))
    if isinstance(key, tuple):
        return crc32(repr([_slot(part) for part in key]).encode())
    return crc32(type(key).__qualname__.encode())


class Var:
    """One shared value: the smallest thing that threads can race for. For programs that are explored."""

    def __init__(self, value: Any = 0, name: str = "") -> None:
        self._place = Place("var", name)
        self._value = value

    def get(self) -> Any:
        self._place.touch("read", READ)
        return self._value

    def set(self, value: Any) -> None:
        self._place.touch("write", WRITE)
        self._value = value

    def add(self, amount: Any = 1) -> None:
        """One indivisible addition; additions commute, so no order of theirs is explored."""
        self._place.touch("add to", ADD)
        self._value += amount


def _method(base: type, method: str, mode: int, slotted: bool) -> Callable[..., Any]:
    plain_method = getattr(base, method)
    what = f"{'look at' if mode == READ else 'change'} ({method.strip('_')})"
    lazy = method in ("__iter__", "keys", "values", "items")

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._place.touch(what, mode, _slot(args[0]) if slotted and args else None)
        answer = plain_method(self, *args, **kwargs)
        # A view or an iterator would look again later, unseen: it looks at a copy.
        if lazy and controlled() is not None:
            return iter(list(answer)) if method == "__iter__" else list(answer)
        return answer

    wrapped.__name__ = method
    return wrapped


def _observable(base: type, slotted: dict[str, int], whole: dict[str, int]) -> type:
    body: dict[str, Any] = {"__slots__": ("_place",), "__hash__": None}
    for methods, has_slot in ((slotted, True), (whole, False)):
        for method, mode in methods.items():
            if hasattr(base, method):
                body[method] = _method(base, method, mode, has_slot)

    def init(self: Any, name: str = "") -> None:
        base.__init__(self)  # type: ignore[misc]
        self._place = Place(base.__name__, name)

    def reduce(self: Any, protocol: int) -> Any:
        # A copy is the copier's own: a plain container.
        self._place.touch("look at (copy)", READ)
        return base, (dict(dict.items(self)) if base is dict else list(base.__iter__(self)),)  # type: ignore[attr-defined]

    body["__init__"] = init
    body["__reduce_ex__"] = reduce
    return type(f"Observable{base.__name__.title()}", (base,), body)


_LOOKS: tuple[str, ...] = (
    "__iter__",
    "__len__",
    "__eq__",
    "__reversed__",
    "copy",
    "count",
    "index",
    "keys",
    "values",
    "items",
)
_LOOKS += ("__or__", "__and__", "__sub__", "__le__", "__lt__", "__ge__", "__gt__", "isdisjoint", "issubset")
_CHANGES: tuple[str, ...] = (
    "append",
    "appendleft",
    "pop",
    "popleft",
    "extend",
    "extendleft",
    "insert",
    "remove",
    "clear",
    "rotate",
)
_CHANGES += ("reverse", "sort", "popitem", "update", "__ior__", "__iadd__")
_whole = {**dict.fromkeys(_LOOKS, READ), **dict.fromkeys(_CHANGES, WRITE)}
_items = {"__getitem__": READ, "__setitem__": WRITE, "__delitem__": WRITE, "__contains__": READ}

Dict: Any = _observable(
    dict,
    {**_items, "get": READ, "pop": WRITE, "setdefault": WRITE},
    {k: v for k, v in _whole.items() if k != "pop"},
)
Set: Any = _observable(
    set,
    {"add": WRITE, "discard": WRITE, "remove": WRITE, "__contains__": READ},
    {k: v for k, v in _whole.items() if k != "remove"},
)
List: Any = _observable(list, {}, {**_whole, **_items})
Deque: Any = _observable(deque, {}, {**_whole, **_items})


class Tally(_sync.Tally):
    def __init__(self, name: str, keys: Iterable[str]) -> None:
        with plain():
            super().__init__(keys)
        self._place = Place("tally", name)

    def add(self, *keys: str) -> None:
        self._place.touch("add to", ADD)
        with plain():
            super().add(*keys)

    def read(self) -> dict[str, int]:
        self._place.touch("read", READ)
        with plain():
            return super().read()


class _Atomic:
    """An attribute of instances of ``owner``: a data descriptor over where its value was kept before."""

    def __init__(self, owner: type, name: str) -> None:
        self._slot = owner.__dict__.get(name)
        if not hasattr(self._slot, "__set__"):
            self._slot = None
        self._default = getattr(owner, name, None)
        self._owner = owner.__name__
        self._name = name
        self._places: dict[int, Place] = {}

    def _place(self, instance: object) -> Place | None:
        return self._places.get(id(instance))

    def _adopt(self, instance: object, *, is_new: bool) -> Place:
        key, name = id(instance), f"{self._owner}.{self._name}"
        # Of an object that was made unobserved, whoever comes first in this schedule would give its name to it. So all
        # such objects of a class share one name: two of them only seem to depend.
        named = is_new or controlled() is None
        place = self._places[key] = Place("attr", name) if named else Place(f"attr:{name}", "", is_unique=False)
        # Without weak references the name may pass on to the next object at this address.
        with suppress(TypeError):
            weakref.finalize(instance, self._places.pop, key, None).atexit = False
        return place

    def _has_value(self, instance: Any) -> bool:
        if self._slot is None:
            return self._name in instance.__dict__
        try:
            self._slot.__get__(instance, type(instance))
        except AttributeError:
            return False
        return True

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self._default if self._slot is None else self
        (self._place(instance) or self._adopt(instance, is_new=False)).touch("read", READ)
        if self._slot is not None:
            return self._slot.__get__(instance, owner)
        try:
            return instance.__dict__[self._name]
        except KeyError:
            if self._default is not None:
                return self._default
            raise AttributeError(f"{self._owner!r} object has no attribute {self._name!r}") from None

    def __set__(self, instance: Any, value: Any) -> None:
        place = self._place(instance)
        if place is None and not self._has_value(instance):
            # The first store is its maker's: nobody else has the object yet.
            self._adopt(instance, is_new=True)
        else:
            (place or self._adopt(instance, is_new=False)).touch("write", WRITE)
        if self._slot is not None:
            self._slot.__set__(instance, value)
        else:
            instance.__dict__[self._name] = value


class Observer:
    """What the native runtime's locks, events and atomics are while they are observed; see its ``sync.h``."""

    def make(self, kind: int, name: str) -> Any:
        with observable():
            if kind == 0:
                return _locks.Lock(name)
            return _locks.Event(name) if kind == 1 else _NativePlace("atomic", name)


class _NativePlace(Place):
    def touch(self, what: str, mode: int, slot: int | None = None) -> None:
        super().touch(what, (READ, WRITE, ADD)[mode], slot)


class Factories(_sync.Factories):
    """Makes the observable objects for the product's declarations."""

    def lock(self, name: str) -> Any:
        # Also where a forked child makes its locks anew, which the standard library must do with plain ones.
        with observable():
            return _locks.Lock(name)

    def rlock(self, name: str) -> Any:
        with observable():
            return _locks.RLock(name)

    def event(self, name: str) -> Any:
        with observable():
            return _locks.Event(name)

    def dict_(self, name: str) -> Any:
        return Dict(name)

    def deque_(self, name: str) -> Any:
        return Deque(name)

    def list_(self, name: str) -> Any:
        return List(name)

    def set_(self, name: str) -> Any:
        return Set(name)

    def tally(self, name: str, keys: Iterable[str]) -> Any:
        return Tally(name, keys)

    def observer(self) -> Observer:
        return Observer()

    def atomics(self, owner: type, names: tuple[str, ...]) -> None:
        for name in names:
            if not isinstance(owner.__dict__.get(name), _Atomic):
                setattr(owner, name, _Atomic(owner, name))
