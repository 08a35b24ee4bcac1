"""What a call costs, one way or another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from anabranch.devices import Stream

#: Runs a call on made-up inputs.
Way = Callable[[Sequence[torch.Tensor]], Any]
#: Latencies that differ by less than this share of them are alike.
_ALIKE = 0.1


@dataclass(frozen=True)
class Cost:
    """Of a call, in microseconds: until its results are there, and until it returned to the host."""

    us: float
    host_us: float

    def is_better(self, other: Cost) -> bool:
        """Whose results are there first; of two that differ by no more than such figures do, who returns first."""
        if abs(self.us - other.us) > _ALIKE * min(self.us, other.us):
            return self.us < other.us
        return self.host_us <= other.host_us

    def __str__(self) -> str:
        return f"{self.us:.0f} us (host {self.host_us:.1f})"


def measure(
    ways: Sequence[Way], inputs: Sequence[Sequence[torch.Tensor]], stream: Stream, rounds: int = 24
) -> list[Cost]:
    """Medians for each of ``ways`` to run a call on ``stream``, which is current; the host waits for it.

    ``inputs``: two sets. They and results are at other addresses each time, as callers' are. In turn: a host's clock
    may change between one tenth of a second and the next.
    """
    samples: list[list[tuple[float, float]]] = [[] for _ in ways]
    results: list[Any] = [None] * len(ways)
    for i in range(rounds):
        for k, run in enumerate(ways):
            start = time.perf_counter()
            before, results[k] = results[k], run(inputs[i % 2])
            returned = time.perf_counter()
            stream.synchronize()
            samples[k].append((time.perf_counter() - start, returned - start))
            del before
    return [Cost(*(statistics.median(column) * 1e6 for column in zip(*s[rounds // 4 :], strict=True))) for s in samples]
