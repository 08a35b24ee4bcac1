"""Calls of three pieces under every interleaving: one shared engine, on streams of two threads."""

from __future__ import annotations

from typing import Any

import pytest

PROGRAMS = "pieces"


# How many schedules are not equivalent; see `test_runtime.py`. Each captured piece has a pool of its own, and draws
# have the generator's lock in common. With a limit of one context the last piece runs direct.
@pytest.mark.parametrize(
    ("program", "runtime", "limit", "schedules"),
    [
        *(("draws_threads1_calls3", runtime, limit, 1) for runtime in ("python", "native") for limit in (1, 2)),
        ("draws_threads2_calls1", "python", 1, 8),
        ("draws_threads2_calls1", "python", 2, 32),
        ("draws_threads2_calls1", "native", 1, 16),
        ("draws_threads2_calls1", "native", 2, 128),
        ("looks_threads2_calls1", "python", 1, 4),
        ("looks_threads2_calls1", "python", 2, 16),
        ("looks_threads2_calls1", "native", 1, 8),
        ("looks_threads2_calls1", "native", 2, 64),
        ("looks_threads2_calls2", "python", 1, 28),
        ("draws_threads2_calls2", "python", 1, 104),
        pytest.param("looks_threads2_calls2", "python", 2, 472, marks=pytest.mark.slow),
        pytest.param("looks_threads2_calls2", "native", 1, 582, marks=pytest.mark.slow),
    ],
)
def test_every_interleaving(programs: Any, program: str, runtime: str, limit: int, schedules: int) -> None:
    from anabranch.sim import explore

    verdict = explore(getattr(programs, program), args=(runtime, limit), schedules=2000, oracles=oracles_of(program))
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"
    assert verdict.schedules == schedules
    assert len(verdict.outcomes) == 1


# More than 12,000 schedules are not equivalent.
@pytest.mark.parametrize("program", ["looks_threads2_calls2", "draws_threads2_calls2"])
def test_two_pools_of_the_native_runtime_at_random(programs: Any, program: str) -> None:
    from anabranch.sim import explore, random

    verdict = explore(
        getattr(programs, program), args=("native", 2), scheduler=random(0), schedules=150, oracles=oracles_of(program)
    )
    assert not verdict.failed, verdict.report()
    assert str(verdict) == "bounded(150 schedules, 150)"


def oracles_of(program: str) -> list[str]:
    """The host waits where it looks how many there are, as it does in eager: it has no context in hand then."""
    from anabranch.explore._oracles import ORACLES

    return [o for o in ORACLES if o != "host-wait" or not program.startswith("looks")]
