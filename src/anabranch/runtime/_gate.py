"""Shared and exclusive use of process-wide state."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Many may hold it shared, or one exclusively. Whoever wants it exclusively goes before new sharers.

    ``torch.export`` turns cuDNN and oneDNN off for the whole process while it traces, and an operator that another
    thread queues meanwhile would run other kernels. So exports hold the gate exclusively, and calls that queue
    operators which read such flags hold it shared. A thread may take it shared again while it has it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._exclusive = 0  # holders and those who wait to be
        self._held = False
        self._mine = threading.local()

    @contextmanager
    def shared(self) -> Iterator[None]:
        depth = getattr(self._mine, "depth", 0)
        if not depth:
            with self._changed:
                while self._exclusive:
                    self._changed.wait()
                self._sharing += 1
        self._mine.depth = depth + 1
        try:
            yield
        finally:
            self._mine.depth = depth
            if not depth:
                with self._changed:
                    self._sharing -= 1
                    if not self._sharing:
                        self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._changed:
            self._exclusive += 1
            try:
                while self._sharing or self._held:
                    self._changed.wait()
                self._held = True
            except BaseException:
                self._exclusive -= 1
                self._changed.notify_all()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._held = False
                self._exclusive -= 1
                self._changed.notify_all()
