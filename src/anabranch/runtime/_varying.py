"""Which numbers of an engine's calls have varied, and what is kept for which of their values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from anabranch import _sync

#: Specializations that are kept for single values of a number, of calls that are otherwise alike.
MOST_VALUES = 64
#: What a specialization for all values has in its key, in the place of a value.
_ANY = "any"
_ticks = itertools.count()


@dataclass
class _Alike:
    """Calls that differ in numbers alone. Written with the build lock held; read without."""

    #: The key of the first one.
    first: tuple[Any, ...]
    #: Positions of the numbers that have had a second value.
    varied: frozenset[int] = frozenset()
    #: Of those: why a value is a part of the signature all the same.
    pinned: dict[int, str] = field(default_factory=dict)
    #: The specializations for them, by their keys.
    kept: dict[Any, Any] = field(default_factory=dict)
    #: How many were given up.
    gone: int = 0


class Varying:
    """The numbers of one engine's calls.

    The first value of a number is a part of its call's signature. When it has a second one, a specialization is made
    that takes it as an input, and serves all further values. Where that cannot be, each value has a specialization of
    its own, and the one that was called longest ago is given up beyond :data:`MOST_VALUES`.

    Threads: ``key_of`` and ``used`` any; the others with the build lock held.
    """

    def __init__(self) -> None:
        self._alike: dict[Any, _Alike] = _sync.dict_("numbers that vary")

    def key_of(self, key: Any) -> Any:
        """The key of the specialization that serves a call, whatever its varying numbers are; None: there is none."""
        alike = self._alike.get(_loose(key)) if has_numbers(key) else None
        if alike is None or not alike.varied - alike.pinned.keys():
            return None
        return _with_any(key, alike.varied - alike.pinned.keys())

    def to_carry(self, key: Any) -> frozenset[int]:
        """Positions among the leaves of a call of the numbers that shall be inputs of a specialization for it."""
        if not has_numbers(key):
            return frozenset()
        alike = self._alike.get(_loose(key))
        if alike is None:
            varied = self._varied_elsewhere(key)
            if varied:
                self._alike[_loose(key)] = _Alike(key, varied)
            return varied
        differ = {p for p, (a, b) in enumerate(zip(alike.first[1:], key[1:], strict=True)) if a != b}
        alike.varied |= differ
        for p in differ:
            if key[p + 1][0] is complex:
                alike.pinned = {**alike.pinned, p: "it is complex"}
        return alike.varied - alike.pinned.keys()

    def _varied_elsewhere(self, key: Any) -> frozenset[int]:
        """The numbers that are inputs in calls of other shapes: they need not vary again."""
        kinds = [part[0] if _is_number(part) else None for part in key[1:]]
        others = [
            other
            for other in self._alike.values()
            if other.first[0] == key[0] and [p[0] if _is_number(p) else None for p in other.first[1:]] == kinds
        ]
        varied = frozenset(p for other in others for p in other.varied)
        return varied - {p for other in others for p in other.pinned}

    def pin(self, key: Any, reasons: dict[int, str]) -> None:
        """These numbers stay a part of the signature."""
        alike = self._alike[_loose(key)]
        alike.pinned = {**alike.pinned, **reasons}

    def values_of(self, key: Any) -> Iterator[Any]:
        """Specializations for single values, of calls that differ from this one in numbers that are inputs alone."""
        wanted = self.key_of(key)
        for other, made in self._alike[_loose(key)].kept.items():
            if made.program.numbers is None and self.key_of(other) == wanted:
                yield made

    def add(self, key: Any, made: Any) -> list[Any]:
        """A specialization was made, for single values or for all; returns the ones to give up."""
        if not has_numbers(key):
            return []
        alike = self._alike.setdefault(_loose(key), _Alike(key))
        made.last_call = next(_ticks)
        alike.kept[key] = made
        by_age = sorted(alike.kept, key=lambda k: alike.kept[k].last_call)
        gone = by_age[: max(0, len(by_age) - MOST_VALUES)]
        alike.gone += len(gone)
        return [alike.kept.pop(k) for k in gone]

    def clear(self) -> None:
        self._alike.clear()

    def explain(self) -> list[str]:
        """A line for each number of which single values have specializations."""
        lines = []
        for alike in list(self._alike.values()):
            for p, why in alike.pinned.items():
                kind = alike.first[p + 1][0].__name__
                given_up = f", {alike.gone} were given up" if alike.gone else ""
                lines.append(
                    f"input {p} ({kind}) varies, and each value is compiled by itself: {why}. The last {MOST_VALUES}"
                    f" values are kept{given_up}"
                )
        return lines


def has_numbers(key: Any) -> bool:
    """Whether a call has numbers: a call of tensors alone has no structure in its key."""
    return bool(key) and not isinstance(key[0], tuple) and any(_is_number(part) for part in key[1:])


def used(made: Any) -> None:
    """A call has come to a specialization."""
    made.last_call = next(_ticks)


def _is_number(part: Any) -> bool:
    return part[0] in (int, float, complex)


def _loose(key: Any) -> Any:
    return (key[0], *((part[0], _ANY) if _is_number(part) else part for part in key[1:]))


def _with_any(key: Any, positions: frozenset[int]) -> Any:
    return (key[0], *((part[0], _ANY) if p in positions else part for p, part in enumerate(key[1:])))
