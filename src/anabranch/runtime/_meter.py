"""How long Python takes between the graphs of a model in fragments."""

from __future__ import annotations

import threading
import time
from typing import Any

from anabranch.runtime._fragment import Fragment


class Meter(threading.local):
    """Of the calling thread: what is measured of Python between fragments."""

    is_on = False
    #: The graph that ended last, and when.
    last: Fragment | None = None
    since = 0.0


class Timed:
    """A fragment as Dynamo's code calls it; tells how long Python took since the last one, while that is measured."""

    def __init__(self, fragment: Fragment, meter: Meter) -> None:
        self._fragment, self._meter = fragment, meter

    def __call__(self, *given: Any) -> Any:
        meter = self._meter
        now = time.perf_counter() if meter.is_on else 0.0
        if meter.is_on and meter.last is not None:
            meter.last.python_us = round((now - meter.since) * 1e6, 1)
        results = self._fragment(*given)
        if meter.is_on:
            meter.last, meter.since = self._fragment, time.perf_counter()
        return results
