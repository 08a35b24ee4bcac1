"""Where the time of a build goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

#: What a build does, in order. ``other``: copying the model, proofs, waiting for the device.
PHASES = ("export", "lowering", "warm-up", "capture", "measuring", "other")


class Clock:
    """Seconds of one build, by phase; each moment counts for one phase. Owner: the thread that builds."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase = "other"
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs in here counts for ``name``, and not for the phase around it."""
        before = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def read(self) -> dict[str, float]:
        """Seconds so far."""
        self._switch(self._phase)
        return dict(self._seconds)

    def _switch(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = name, now


def describe(seconds: Mapping[str, float]) -> str:
    """``built in 2.31 s: export 1.20 s, lowering 1.11 s``; what took no time is left out."""
    parts = ", ".join(f"{name} {s:.2f} s" for name, s in seconds.items() if s >= 0.005)
    return f"built in {sum(seconds.values()):.2f} s" + (f": {parts}" if parts else "")
