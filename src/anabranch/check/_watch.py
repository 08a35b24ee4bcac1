"""On the simulated device: one interleaving, the same in every run, and the race checker over what was done in it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anabranch.race import Detector, Report


@contextmanager
def interleaved(device: str, seed: int) -> Iterator[None]:
    """Conduct the calling thread, and those that it starts, by the random scheduler of ``seed``; on ``sim`` only."""
    if device != "sim":
        yield
        return
    from anabranch.explore import controlled, random

    # Collections come when they come, and finalizers ask the device: only between rows, so that two runs are equal.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with controlled(random(seed)):
            yield
    finally:
        if collecting:
            gc.enable()


class Watch:
    """Records a trace of what happens in its block, and judges it at the end; does nothing on other devices."""

    def __init__(self, device: str) -> None:
        self._core: Any = None
        if device == "sim":
            import anabranch.sim

            self._core = anabranch.sim.core
        #: Findings at different places in the program, and the first of them with what would repair it.
        self.races = 0
        self.report = ""

    def __enter__(self) -> Watch:
        if self._core is not None:
            gc.collect()
            self._core.trace(True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._core is None:
            return
        traces = [self._core.take_trace(), *self._core.take_captures()]
        self._core.trace(False)
        reports: list[Report] = []
        for trace in traces:
            detector = Detector()
            detector.feed_bytes(trace)
            reports += detector.finish().reports
        self.races = len({(r.verdict, r.first and r.first.site.source, r.second.site.source) for r in reports})
        self.report = str(reports[0]) if reports else ""
