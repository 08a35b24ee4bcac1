"""Counters of one engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from anabranch import _sync
from anabranch.runtime._process import process


@dataclass
class Stats:
    """What an engine has done so far. ``bytes`` is device memory held by execution contexts, workspaces included.

    ``dataclasses.asdict`` makes a dict of it.
    """

    calls: int = 0
    graph_calls: int = 0
    direct_calls: int = 0
    calls_in_captures: int = 0
    #: Calls that had to wait on the device for a context last used on another stream.
    waits: int = 0
    #: Calls in which something was compiled or captured, or that waited for another thread to do so.
    waits_for_build: int = 0
    #: CUDA graphs captured; contexts given up by trim() or by an error stay counted.
    captures: int = 0
    #: Signatures compiled.
    specializations: int = 0
    #: Execution contexts alive now.
    contexts: int = 0
    bytes: int = 0


@_sync.atomics("_parts")
class Parted:
    """Counters of an engine, with parts for the pieces of its calls. Threads: any may read; who builds adds parts."""

    def __init__(self) -> None:
        #: Each with what it had counted before calls came, and whether a call counts as its call does.
        self._parts: tuple[tuple[Parted, dict[str, int], bool], ...] = ()

    def add(self, *names: str) -> None:
        """One more of each."""
        raise NotImplementedError

    def read(self) -> dict[str, int]:
        """All counts but for those of parts."""
        raise NotImplementedError

    def include(self, parts: Sequence[Parted]) -> None:
        """Count what these do from now on, one for each piece of the calls of one signature.

        A call of several pieces counts once, as that of the first of ``parts`` does. With the build lock held.
        """
        made = ((part, {**part.read(), "captures": 0}, i == 0) for i, part in enumerate(parts))
        self._parts = (*self._parts, *made)

    def snapshot(self) -> Stats:
        counts = self.read()
        for part, before, is_first in self._parts:
            now = part.read()
            once = ("calls", "graph_calls", "direct_calls") if is_first else ()
            for name in ("waits", "waits_for_build", "captures", *once):
                counts[name] += now[name] - before[name]
        return Stats(**counts)


class Counters(Parted):
    """The live counters behind :class:`Stats`. Threads: any; one lock, never held while anything else is called."""

    def __init__(self) -> None:
        super().__init__()
        self._tally = _sync.tally("counters", [f.name for f in fields(Stats)])
        #: ``add(*names)``: one more of each.
        self.add = self._tally.add  # type: ignore[method-assign]
        process.register(self)

    def read(self) -> dict[str, int]:
        return self._tally.read()

    def after_fork(self) -> None:
        self._tally.renew_lock()
