"""Medians with their spread, and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least ``q`` (0 to 1) of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(q * 1e6) * len(ordered) // 1_000_000) - 1))]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """``{"median", "low", "high", "rounds"}`` over the rounds of a run."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "rounds": len(values),
    }


def ratio(value: float, best: float | None, more_is_better: bool) -> float | None:
    """How many times as good as ``best`` ``value`` is: 2.0 is twice the throughput, or half the latency."""
    if best is None or value <= 0 or best <= 0:
        return None
    return value / best if more_is_better else best / value
