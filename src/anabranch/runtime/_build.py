"""The build lock and the state in which things are built."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch

from anabranch.devices import Device


class _Process:
    """What a fork changes: locks that another thread of the parent may have held, and who we are."""

    def __init__(self) -> None:
        self.generation = 0
        self.build_lock = threading.RLock()
        #: The thread that ends the interpreter, once it does.
        self.exiting_on: int | None = None
        #: Code of the methods in which a user's thread may run kernels.
        self.calls: set[CodeType] = set()
        #: Whatever else of an engine's has a lock that a CPU engine takes in a forked child.
        self.locked: weakref.WeakSet[Any] = weakref.WeakSet()

    def after_fork(self) -> None:
        self.generation += 1
        self.build_lock = threading.RLock()
        for owner in list(self.locked):
            owner._lock = threading.Lock()

    def at_exit(self) -> None:
        """Let no thread be inside PyTorch when the interpreter goes: CPython ends a daemon thread where it next takes
        the GIL, and from inside C++ that is std::terminate. Calls under way finish; later ones are parked.
        """
        self.exiting_on = threading.get_ident()
        self.generation += 1  # every engine's next call takes the slow way, and finds exiting_on there
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(
            _is_calling(frame) for ident, frame in sys._current_frames().items() if ident != self.exiting_on
        ):
            time.sleep(0.001)

    def park_if_exiting(self) -> None:
        """At interpreter exit, hold the calling thread for good, unless it is the one that exits."""
        if self.exiting_on not in (None, threading.get_ident()):
            threading.Event().wait()


def _is_calling(frame: FrameType | None) -> bool:
    """Whether a thread with this innermost frame is in an engine's call (and not parked)."""
    while frame is not None and frame.f_code is not _Process.park_if_exiting.__code__:
        if frame.f_code in process.calls:
            return True
        frame = frame.f_back
    return False


#: One per process. ``build_lock`` is the outermost lock: compiling and capturing happen one at a time, because
#: Inductor's autotuning and a library's first use are not meant for two threads. No pool lock is held when it is taken.
process = _Process()
os.register_at_fork(after_in_child=process.after_fork)
atexit.register(process.at_exit)


@contextmanager
def neutral(device: Device, index: int) -> Iterator[None]:
    """The caller's modes off (autograd, inference mode, autocast) and the engine's device current.

    Tensors made here are ordinary ones, and the same operators run whatever the caller is in the middle of.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.kind, enabled=False):
        with device.on_device(index):
            yield


def is_neutral(device: Device, index: int) -> bool:
    """Whether a call may run without :func:`neutral`. Autograd may stay on: no tensor here requires grad."""
    return not (
        torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled(device.kind)
        or device.current_index() != index
    )
