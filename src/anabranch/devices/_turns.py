"""Waits for a whole device, and captures of graphs: while the one goes on, the other has to wait.

CUDA lets nobody wait for a device (``torch.cuda.synchronize()``) while anything on it is being captured, whatever the
capture's mode and in whatever thread: the wait raises, and the capture is lost. A user cannot know when an engine
captures, so the two take turns. What waits by CUDA's own calls, past PyTorch, is not seen here.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from anabranch import _sync
from anabranch.errors import NotCapturable

#: Seconds that a build waits for other threads' waits.
_PATIENCE = 60.0
#: By which names of ``torch._C`` PyTorch waits for a device.
_WAITS = ("_cuda_synchronize", "_accelerator_synchronizeDevice")


class DeviceBusy(NotCapturable):
    """Nothing can be captured now: other threads wait for the device."""


class _Thread(threading.local):
    at_once = False


_thread = _Thread()


class Turns:
    """Threads: any. Several may wait for a device at once, and several may capture.

    Who does what is kept as a set of threads, which each enters and leaves in one block: an interrupt (Ctrl-C) in
    between leaves nobody counted who is gone.
    """

    def __init__(self) -> None:
        self._lock = _sync.lock("turns")
        self._waits: set[int] = set()
        self._captures: set[int] = set()
        self._no_waits, self._no_captures = _sync.event("no waits for a device"), _sync.event("no captures")
        self._no_waits.set()
        self._no_captures.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for the device. It begins when nothing is being captured."""
        here = threading.get_ident()
        if here in self._captures or here in self._waits:
            yield  # amid a capture of its own CUDA's error says what is wrong
            return
        try:
            while not self._begin(self._waits, self._no_waits, self._captures):
                self._no_captures.wait()
            yield
        finally:
            self._end(self._waits, self._no_waits)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The block captures. It begins when nobody waits for the device; see :func:`at_once` for who cannot wait.

        Raises :class:`DeviceBusy`.
        """
        if threading.get_ident() in self._captures:
            yield
            return
        try:
            while not self._begin(self._captures, self._no_captures, self._waits):
                if _thread.at_once or not self._no_waits.wait(timeout=_PATIENCE):
                    raise DeviceBusy(
                        "other threads wait for the whole device (torch.cuda.synchronize), and CUDA allows no capture"
                        " meanwhile. Wait for a stream or an event instead, or build before."
                    )
            yield
        finally:
            self._end(self._captures, self._no_captures)

    def _begin(self, mine: set[int], none_of_mine: threading.Event, others: set[int]) -> bool:
        """Whether it is this thread's turn."""
        with self._lock:
            if others:
                return False
            mine.add(threading.get_ident())
            none_of_mine.clear()
            return True

    def _end(self, mine: set[int], none_left: threading.Event) -> None:
        with self._lock:
            mine.discard(threading.get_ident())
            if not mine:
                none_left.set()


turns = Turns()


@contextmanager
def at_once() -> Iterator[None]:
    """In the block this thread does not wait for its turn to capture: it serves a call."""
    before, _thread.at_once = _thread.at_once, True
    try:
        yield
    finally:
        _thread.at_once = before


def taking_turns(wait: Callable[..., Any]) -> Callable[..., Any]:
    """``wait``, which waits for a whole device, in its turn."""

    @functools.wraps(wait)
    def in_turn(*args: Any, **kwargs: Any) -> Any:
        with turns.waiting():
            return wait(*args, **kwargs)

    in_turn.takes_turns = True  # type: ignore[attr-defined]
    return in_turn


def watch_pytorch() -> None:
    """From now on PyTorch's waits for a device take turns with captures. May be repeated."""
    for name in _WAITS:
        wait = getattr(torch._C, name, None)
        if wait is not None and not hasattr(wait, "takes_turns"):
            setattr(torch._C, name, taking_turns(wait))


def _renew() -> None:
    global turns
    turns = Turns()


_sync.on_renew(_renew)
# Threads of the parent's that waited or captured are not in the child.
os.register_at_fork(after_in_child=_renew)
