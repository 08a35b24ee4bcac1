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
    captures = 0
    at_once = False


_thread = _Thread()


class Turns:
    """Threads: any. Several may wait for a device at once, and several may capture."""

    def __init__(self) -> None:
        self._lock = _sync.lock("turns")
        self._waits = self._captures = 0
        self._no_waits, self._no_captures = _sync.event("no waits for a device"), _sync.event("no captures")
        self._no_waits.set()
        self._no_captures.set()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for the device. It begins when nothing is being captured."""
        if _thread.captures:
            yield  # CUDA's own error says what is wrong
            return
        while True:
            self._no_captures.wait()
            with self._lock:
                if not self._captures:
                    self._waits += 1
                    self._no_waits.clear()
                    break
        try:
            yield
        finally:
            with self._lock:
                self._waits -= 1
                if not self._waits:
                    self._no_waits.set()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The block captures. It begins when nobody waits for the device; see :func:`at_once` for who cannot wait.

        Raises :class:`DeviceBusy`.
        """
        while True:
            with self._lock:
                if not self._waits:
                    self._captures += 1
                    self._no_captures.clear()
                    break
            if _thread.at_once or not self._no_waits.wait(timeout=_PATIENCE):
                raise DeviceBusy(
                    "other threads wait for the whole device (torch.cuda.synchronize), and CUDA allows no capture"
                    " meanwhile. Wait for a stream or an event instead, or build before."
                )
        _thread.captures += 1
        try:
            yield
        finally:
            _thread.captures -= 1
            with self._lock:
                self._captures -= 1
                if not self._captures:
                    self._no_captures.set()


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
