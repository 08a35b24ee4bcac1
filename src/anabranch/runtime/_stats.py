"""Counters of one engine."""

from __future__ import annotations

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
    #: CUDA graphs captured; contexts given up by trim() or by an error stay counted.
    captures: int = 0
    #: Signatures compiled.
    specializations: int = 0
    #: Execution contexts alive now.
    contexts: int = 0
    bytes: int = 0


class Counters:
    """The live counters behind :class:`Stats`. Threads: any; one lock, never held while anything else is called."""

    def __init__(self) -> None:
        self._tally = _sync.tally("counters", [f.name for f in fields(Stats)])
        #: ``add(*names)``: one more of each.
        self.add = self._tally.add
        process.register(self)

    def snapshot(self) -> Stats:
        return Stats(**self._tally.read())

    def after_fork(self) -> None:
        self._tally.renew_lock()
