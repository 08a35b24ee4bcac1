"""Threads of a measurement, which all start together; number 0 is the main one."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Threads:
    """The main thread, in which this is made, and others."""

    def __init__(self) -> None:
        self._others: list[_Thread] = []

    def grow(self, n: int) -> None:
        """See that there are ``n``."""
        while len(self._others) < n - 1:
            self._others.append(_Thread(len(self._others) + 1))

    def each(self, who: Sequence[int], work: Callable[[int], Any]) -> float:
        """``work(i)`` for each ``i``, in its thread, all starting together; seconds until the last one's end."""
        start = threading.Barrier(len(who))
        times: list[tuple[float, float]] = []
        errors: list[BaseException] = []

        def run(i: int) -> None:
            try:
                start.wait()
                before = time.perf_counter()
                work(i)
                times.append((before, time.perf_counter()))
            except BaseException as e:
                errors.append(e)

        for i in who:
            if i:
                self._others[i - 1].start(functools.partial(run, i))
        if 0 in who:
            run(0)
        for i in who:
            if i:
                self._others[i - 1].join()
        if errors:
            raise errors[0]
        return max(t[1] for t in times) - min(t[0] for t in times)


class _Thread:
    """A thread that lives as long as the process: libraries keep what they set up for it."""

    def __init__(self, i: int) -> None:
        self.todo: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.cores = torch.get_num_threads()
        threading.Thread(target=self._run, name=f"bench-{i}", daemon=True).start()

    def _run(self) -> None:
        # A new thread would take as many cores as there are.
        torch.set_num_threads(self.cores)
        while True:
            self.todo.get()()
            self.done.put(None)

    def start(self, work: Callable[[], None]) -> None:
        self.todo.put(work)

    def join(self) -> None:
        self.done.get()
