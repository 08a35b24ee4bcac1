"""Calls of models in fragments under every interleaving: graphs with Python between, and a model in its own engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(scope="module")
def fragments() -> Any:
    sys.path.insert(0, str(PROGRAMS))
    import fragments

    return fragments


@pytest.mark.parametrize("runtime", ["python", "native"])
@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize(
    "program", ["broken_threads1_calls3", "recursive_threads1_calls2", "recursive_threads2_calls1"]
)
def test_every_interleaving(fragments: Any, runtime: str, program: str, limit: int) -> None:
    from anabranch.sim import explore

    verdict = explore(getattr(fragments, program), args=(runtime, limit), schedules=2000)
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"
    assert len(verdict.outcomes) == 1
