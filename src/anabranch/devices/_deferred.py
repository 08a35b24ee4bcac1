"""Graphs and memory that nobody refers to any more but that queued work may still use.

The host never waits for them. They are looked at again when something is built, trimmed or dropped, and at each garbage
collection, and freed once their events are done. Code that libraries have loaded is apart: it goes only where the host
may wait.
"""

from __future__ import annotations

import atexit
import gc
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from anabranch import _sync
from anabranch.devices._stream import Event


@_sync.atomics("_closed")
class DeferredFrees:
    """Threads: any.

    No lock is taken, because a garbage collection can call :meth:`defer` and :meth:`collect` in a thread that holds
    one; ``deque.append`` and ``popleft`` are atomic, and an entry is in the hands of one thread at a time.
    """

    def __init__(
        self,
        query: Callable[[Sequence[Any]], bool],
        freeing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """``query``: whether all of these events are done. ``freeing``: what to enter while something is freed, which a
        garbage collection may do anywhere."""
        self._query, self._freeing = query, freeing
        self._entries: deque[tuple[Sequence[Any], Any, Callable[[], None]]] = _sync.deque_("deferred frees")
        #: What makes the host wait where it is freed.
        self._code: deque[Callable[[], None]] = _sync.deque_("deferred frees of code")
        #: Something else to look at in each collection.
        self.also: Callable[[], None] = lambda: None
        self._closed = False
        gc.callbacks.append(self._on_gc)
        # At exit the driver frees everything at once; asking it about events would only get in its way.
        atexit.register(self.close)

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and not self._closed:
            self.collect()

    def close(self) -> None:
        """Stop collecting for good: the device cannot be used in this process."""
        self._closed = True

    def defer(self, events: Sequence[Event], kept: Any, free: Callable[[], None]) -> None:
        self._entries.append((events, kept, free))
        if not self._closed:
            self.collect()

    def defer_code(self, free: Callable[[], None]) -> None:
        self._code.append(free)

    def free_code(self) -> None:
        """What there is by now; the host may wait."""
        if self._closed:
            return
        for _ in range(len(self._code)):
            try:
                free = self._code.popleft()
            except IndexError:
                return
            with self._freeing():
                free()

    def collect(self) -> None:
        if self._closed:
            return
        self.also()
        for _ in range(len(self._entries)):
            try:
                entry = self._entries.popleft()
            except IndexError:
                return
            events, _, free = entry
            done = False
            try:
                done = self._query(events)
            finally:
                if not done:
                    self._entries.append(entry)
            if done:
                with self._freeing():
                    free()
