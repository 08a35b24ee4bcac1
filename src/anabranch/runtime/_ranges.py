"""Which sizes of an engine's inputs have varied, and the specializations that serve many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from anabranch import _sync
from anabranch.errors import InputError, UnsupportedModel
from anabranch.export import SPECIAL, Dim, layouts_of

#: Ranges of calls that are otherwise alike, over the same sizes. Each is compiled where those before it are not right
#: for a call's sizes.
MOST_RANGES = 4
#: Ranges that could not be compiled, after which no more are tried: a model may need to know one size, or all.
_MOST_FAILED = 2
#: Shapes of which is remembered what serves them.
_MOST_KNOWN = 4096

#: Input among the leaves of a call, and dimension.
Place = tuple[int, int]


class NotInRange(UnsupportedModel):
    """There is no range for a call's sizes, and there is to be no specialization for them alone. Nothing was queued."""


@dataclass
class _Alike:
    """Calls that differ in the sizes of their inputs alone. Written with the build lock held; read without."""

    #: Shapes of the first call, by leaf.
    first: dict[int, tuple[int, ...]]
    #: Sizes that vary from call to call.
    varied: frozenset[Place] = frozenset()
    #: Those of them that the user has declared.
    declared: Mapping[Place, Dim] = field(default_factory=dict)
    #: What serves ranges of sizes. The first that is right for a shape serves it for good, so that its bits stay.
    made: tuple[Any, ...] = ()
    #: Ranges that could not be.
    failed: int = 0
    #: Why the last one could not.
    why_failed: str = ""
    #: Why there is no range more, or nothing.
    why_none: str = ""


class Ranges:
    """The sizes of one engine's inputs.

    The first value of a size is a part of its call's signature. When it has a second one, a specialization is made for
    all its values, but for those that the model or its compiler treat otherwise: 0 and 1, and whatever they asked of
    sizes. A call that no range is right for has a specialization of its own.

    Threads: ``find`` any; the others with the build lock held.
    """

    def __init__(self, dynamic: bool | None) -> None:
        """``dynamic``: whether sizes may vary at all; True: all do, from the first call on."""
        self._dynamic = dynamic
        #: Whether calls that no range is right for are refused.
        self.is_strict = False
        self._alike: dict[Any, _Alike] = _sync.dict_("sizes that vary")
        self._known: dict[Any, Any] = _sync.dict_("shapes of ranges")

    def declare(self, key: Any, dims: Mapping[Place, Dim]) -> None:
        """These sizes of calls like ``key`` vary, and within these bounds."""
        loose = _loose(key)
        if loose is not None and dims:
            self._alike[loose] = _Alike(shapes_in(key), frozenset(dims), dict(dims))

    def vary(self, key: Any, places: frozenset[Place]) -> None:
        """These sizes of calls like ``key`` vary. What no range serves raises :class:`NotInRange` from now on."""
        self.is_strict = True
        loose = _loose(key)
        if loose is not None:
            self._alike[loose] = _Alike(shapes_in(key), places)

    @property
    def may_vary(self) -> bool:
        """Whether sizes may vary at all."""
        return self._dynamic is not False

    def declared(self, key: Any) -> Mapping[Place, Dim]:
        """The sizes of calls like this one that were declared."""
        alike = self._alike.get(_loose(key))
        return alike.declared if alike is not None else {}

    def is_declared(self, key: Any) -> bool:
        return bool(self.declared(key))

    def check_declared(self, key: Any, why: str) -> None:
        """Raises :class:`~anabranch.errors.UnsupportedModel` if sizes were declared, which cannot vary; ``why``."""
        if self.is_declared(key):
            names = ", ".join(sorted({repr(dim.name) for dim in self._alike[_loose(key)].declared.values()}))
            raise UnsupportedModel(
                f"sizes were declared to vary ({names}), and the model does not let them: {why}. Give numbers in their"
                " place, or have the model compute with the sizes of its inputs."
            )

    def find(self, key: Any, leaves: Sequence[Any]) -> Any | None:
        """What serves a call of these sizes among others, if it is there.

        Raises :class:`~anabranch.errors.InputError` where sizes are not as they were declared, and :class:`NotInRange`
        where nothing ever will serve it.
        """
        if not self._alike:
            return None
        found = self._known.get(key)
        if found is None:
            alike = self._alike.get(_loose(key))
            if alike is None:
                return None
            if alike.declared:
                _check_declared(alike, key)
            shapes = list(shapes_in(key).values())
            found = next((m for m in alike.made if not m.program.sizes.refuses(shapes)), None)
            if found is None:
                if self.is_strict and (alike.why_none or layouts_of(leaves) is not None):
                    raise NotInRange(alike.why_none or "inputs are not dense")
                return None
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = found
        # A model that looks at how its inputs lie in memory was asked about dense ones.
        return None if found.program.reads_layout and layouts_of(leaves) is not None else found

    def to_free(self, key: Any) -> frozenset[Place]:
        """The sizes that are to be symbols in a specialization for a call like this one and others; none: no such."""
        loose = _loose(key)
        if loose is None or self._dynamic is False:
            return frozenset()
        alike, shapes = self._alike.get(loose), shapes_in(key)
        if alike is not None and alike.why_none:
            return frozenset()
        # A batch of one has a range of its own, over lengths.
        return frozenset((i, d) for i, d in self._varied(alike, shapes) if shapes[i][d] not in SPECIAL)

    def _varied(self, alike: _Alike | None, shapes: Mapping[int, tuple[int, ...]]) -> frozenset[Place]:
        # What is special at this call is no second value of a size.
        every = ((i, d, n) for i, shape in shapes.items() for d, n in enumerate(shape) if n not in SPECIAL)
        if alike is None:
            return frozenset((i, d) for i, d, _ in every) if self._dynamic else frozenset()
        return alike.varied | {(i, d) for i, d, n in every if n != alike.first[i][d]}

    def add(self, key: Any, made: Any | None, why: str = "") -> None:
        """Calls like this one can be served: by ``made``, which is for a range; None: by a specialization for this
        shape alone, and ``why`` there is no range, if there was to be one."""
        loose = _loose(key)
        if loose is None:
            return
        shapes = shapes_in(key)
        alike = self._alike.get(loose)
        if alike is None:
            alike = self._alike.setdefault(loose, _Alike(shapes))
        alike.varied = self._varied(alike, shapes) | (self._varied(None, shapes) if made is not None else frozenset())
        alike.failed += bool(why)
        alike.why_failed = why or alike.why_failed
        if alike.failed >= _MOST_FAILED:
            alike.why_none = alike.why_none or why
        if made is not None:
            alike.made = (*alike.made, made)
            free = made.program.sizes.free
            if sum(m.program.sizes.free == free for m in alike.made) >= MOST_RANGES:
                alike.why_none = f"{MOST_RANGES} ranges are not right for all sizes that were met"

    def __iter__(self) -> Any:
        return iter([m for alike in list(self._alike.values()) for m in alike.made])

    def clear(self) -> None:
        self._alike.clear()
        self._known.clear()

    def explain(self) -> list[str]:
        """What is done with sizes that vary, and why some are compiled one by one, a line each."""
        lines = []
        for alike in list(self._alike.values()):
            for dim in dict.fromkeys(dim for dim in alike.declared.values() if dim.pad_to):
                *some, last = map(str, dim.pad_to)
                sizes = f"{', '.join(some)} or {last}" if some else last
                lines.append(f"{dim.name!r} is rounded up to {sizes}, where a range serves it")
            if alike.why_none:
                lines.append(f"sizes vary ({_describe(alike)}), and each is compiled by itself: {alike.why_none}")
            elif alike.why_failed:
                lines.append(
                    f"sizes vary ({_describe(alike)}), and of some one is compiled by itself: {alike.why_failed}"
                )
        return lines


def resized(leaves: Sequence[Any], dims: Mapping[Place, Dim], sizes: Mapping[str, int]) -> list[Any]:
    """Leaves like these, where the sizes of these names are others; without values."""
    made = list(leaves)
    for (i, d), dim in dims.items():
        if dim.name in sizes:
            shape = list(made[i].shape)
            shape[d] = sizes[dim.name]
            made[i] = made[i].new_zeros(shape)
    return made


def shapes_in(key: Any) -> dict[int, tuple[int, ...]]:
    """The shape of each tensor in the key of a call, by its place among the leaves."""
    parts = key if _is_flat(key) else key[1:]
    return {i: tuple(part[0]) for i, part in enumerate(parts) if isinstance(part[0], torch.Size)}


def _is_flat(key: Any) -> bool:
    return not key or isinstance(key[0], tuple)


def _loose(key: Any) -> Any:
    """What calls have in common that differ in sizes alone; None where sizes are not to vary."""
    parts = []
    for part in key:
        if isinstance(part, tuple) and isinstance(part[0], torch.Size):
            if len(part) > 3:
                return None  # lazy conjugates and negatives
            order = tuple(sorted(range(len(part[0])), key=lambda d: (-part[2][d], d))) if len(part) == 3 else None
            part = (len(part[0]), part[1], order)
        parts.append(part)
    return tuple(parts)


def _describe(alike: _Alike) -> str:
    return ", ".join(f"{d} of input {i}" for i, d in sorted(alike.varied))


def _check_declared(alike: _Alike, key: Any) -> None:
    """Raises :class:`~anabranch.errors.InputError` where sizes are not as they were declared."""
    shapes = shapes_in(key)
    if any(
        n != alike.first[i][d]
        for i, shape in shapes.items()
        for d, n in enumerate(shape)
        if (i, d) not in alike.declared
    ):
        return  # calls of another kind, of which nothing was declared
    seen: dict[str, tuple[Place, int]] = {}
    for (i, d), dim in alike.declared.items():
        size = shapes[i][d]
        if not dim.takes(size):
            raise InputError(
                f"size {d} of input {i} is {size}; {dim.name!r} was declared as {dim.bounds}. Pass inputs within"
                " the bounds, or compile with wider ones."
            )
        (other, e), equal = seen.setdefault(dim.name, ((i, d), size))
        if equal != size:
            raise InputError(
                f"size {d} of input {i} is {size}, and size {e} of input {other} is {equal}; both were declared as"
                f" {dim.name!r}, so they must be equal. Give them two names if they need not be."
            )
