"""Shapes of a range under every interleaving: direct at once, captured aside, and given up while they are called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(scope="module")
def shapes() -> Any:
    sys.path.insert(0, str(PROGRAMS))
    import shapes

    return shapes


@pytest.mark.parametrize("runtime", ["python", "native"])
@pytest.mark.parametrize(
    "program", ["a_new_shape_while_another_is_captured", "a_graph_leaves_while_a_call_is_about_to_take_it"]
)
@pytest.mark.parametrize("calls", [1, 2])
def test_every_interleaving(shapes: Any, program: str, runtime: str, calls: int) -> None:
    from anabranch.sim import explore

    verdict = explore(getattr(shapes, program), args=(runtime, calls), schedules=4000)
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"


@pytest.mark.parametrize(
    ("mutant", "runtime"),
    [
        ("with_a_graph_that_is_found_for_another_shape", "python"),
        ("with_a_graph_that_is_found_for_another_shape", "native"),
        ("with_memory_that_goes_at_once", "python"),
    ],
)
def test_what_is_broken_is_found(shapes: Any, mutant: str, runtime: str) -> None:
    from anabranch.sim import explore

    assert explore(getattr(shapes, mutant), args=(runtime,), schedules=1000).failed
