"""The build lock and the state in which things are built."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from anabranch.devices import Device


class _Process:
    """What a fork changes: locks that another thread of the parent may have held, and who we are."""

    def __init__(self) -> None:
        self.generation = 0
        self.build_lock = threading.RLock()
        #: Whatever else of an engine's has a lock that a CPU engine takes in a forked child.
        self.locked: weakref.WeakSet[Any] = weakref.WeakSet()

    def after_fork(self) -> None:
        self.generation += 1
        self.build_lock = threading.RLock()
        for owner in list(self.locked):
            owner._lock = threading.Lock()


#: One per process. ``build_lock`` is the outermost lock: compiling and capturing happen one at a time, because
#: Inductor's autotuning and a library's first use are not meant for two threads. No pool lock is held when it is taken.
process = _Process()
os.register_at_fork(after_in_child=process.after_fork)


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
        torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device.kind) or device.current_index() != index
    )
