"""Calls of three pieces under every interleaving: one shared engine, on streams of two threads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(scope="module")
def pieces() -> Any:
    sys.path.insert(0, str(PROGRAMS))
    import pieces

    return pieces


# How many schedules are not equivalent; see `test_runtime.py`. Each captured piece has a pool of its own, and draws
# have the generator's lock in common. With a limit of one context the last piece runs direct.
@pytest.mark.parametrize("runtime", ["python", "native"])
@pytest.mark.parametrize(
    ("program", "limit", "schedules"),
    [
        ("draws_threads1_calls3", 1, {"python": 1, "native": 1}),
        ("draws_threads1_calls3", 2, {"python": 1, "native": 1}),
        ("draws_threads2_calls1", 1, {"python": 8, "native": 16}),
        ("draws_threads2_calls1", 2, {"python": 32, "native": 128}),
        ("looks_threads2_calls1", 1, {"python": 4, "native": 8}),
        ("looks_threads2_calls1", 2, {"python": 16, "native": 64}),
        ("looks_threads2_calls2", 1, {"python": 28, "native": 582}),
        pytest.param("looks_threads2_calls2", 2, {"python": 472}, marks=pytest.mark.slow),
    ],
)
def test_every_interleaving(pieces: Any, runtime: str, program: str, limit: int, schedules: dict[str, int]) -> None:
    from anabranch.explore._oracles import ORACLES
    from anabranch.sim import explore

    # The host waits where it looks how many there are, as it does in eager. It has no context in hand then.
    oracles = [o for o in ORACLES if o != "host-wait" or not program.startswith("looks")]
    verdict = explore(getattr(pieces, program), args=(runtime, limit), schedules=20000, oracles=oracles)
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"
    assert verdict.schedules == schedules[runtime]
    assert len(verdict.outcomes) == 1
