"""Streams under the explorer: each oracle on the device's side, and programs whose numbers of schedules are known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.explore import explore, fifo, lazy, random


@pytest.fixture(scope="module")
def streams() -> Any:
    from programs import streams

    return streams


@pytest.mark.parametrize(
    ("program", "schedules"),
    [("side_by_side", 1), ("waited_for", 1), ("chain", 1), ("event_recorded_again", 1), ("two_threads", 1)],
)
def test_ordered_programs_have_one_schedule(streams: Any, program: str, schedules: int) -> None:
    assert str(explore(getattr(streams, program))) == f"exhaustive({schedules} schedule)"


def test_a_race_is_found_in_a_schedule_that_comes_out_right(streams: Any) -> None:
    verdict = explore(streams.missing_wait, reference=torch.full((4,), 2.0))
    assert verdict.oracles == {"race"}
    assert verdict.schedules == 1
    assert "missing" in verdict.report()


def test_and_by_its_values_alone_in_another(streams: Any) -> None:
    verdict = explore(streams.missing_wait, reference=torch.full((4,), 2.0), oracles=("values",))
    assert verdict.failure is not None
    assert "differs from the reference in 4 of 4 elements" in verdict.failure.message
    assert "(0,): 1.0, not 2.0" in verdict.failure.message


def test_the_trace_is_one_that_the_race_checker_reads(streams: Any, tmp_path: Path) -> None:
    from anabranch.race import check_trace

    verdict = explore(streams.missing_wait)
    verdict.save_trace(tmp_path / "trace.jsonl")
    result = check_trace(tmp_path / "trace.jsonl")
    assert result.verdict == "race"
    assert verdict.failure is not None
    assert str(result.reports[0]) in verdict.failure.report


def test_memory_freed_too_early_comes_out_poisoned_or_new(streams: Any) -> None:
    verdict = explore(streams.freed_too_early, oracles=("poison",), keep_going=True)
    assert verdict.oracles == {"poison"}
    assert len(verdict.outcomes) == 3
    assert explore(streams.freed_with_record_stream, reference=torch.ones(4)).kind == "exhaustive"


def test_polling_ends(streams: Any) -> None:
    for scheduler in ("exhaustive", fifo(), lazy(), random(1)):
        assert not explore(streams.polled, scheduler=scheduler, schedules=10, reference=torch.ones(4)).failed


def test_what_a_query_answers_is_an_outcome(streams: Any) -> None:
    assert len(explore(streams.asked).outcomes) == 2


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("waits", "waits for the device"),
        ("asks", "queries the device"),
        ("waits_at_last", "waits for the device"),
        ("builds", ""),
        ("outside", ""),
    ],
)
def test_a_call_must_not_wait_for_the_device(program: str, message: str) -> None:
    from programs import hostwait

    verdict = explore(getattr(hostwait, program))
    assert verdict.failed == bool(message)
    if verdict.failure is not None:
        assert verdict.failure.oracle == "host-wait"
        assert message in verdict.failure.message
        assert ", at hostwait.py:" in verdict.failure.message


@pytest.mark.parametrize("runtime", ["python", "native"])
def test_an_engines_call_that_waits_is_found_and_one_that_builds_may_wait(runtime: str) -> None:
    from programs import hostwait

    verdict = explore(hostwait.in_a_call_of, args=(runtime,), scheduler=fifo(), reference=hostwait.X.cpu() * 2)
    assert verdict.oracles == {"host-wait"}
    assert verdict.failure is not None
    assert "waits for the device" in verdict.failure.message
    assert ", at hostwait.py:" in verdict.failure.message
    x = hostwait.X.cpu()
    verdict = explore(hostwait.in_a_call_that_compiles, args=(runtime,), scheduler=fifo(), reference=x[:2])
    assert not verdict.failed, verdict.report()
    for what in ("contexts", "instances"):
        # Nothing runs before it has to: the first call is still in flight when the second comes.
        verdict = explore(hostwait.in_a_call_that_builds, args=(runtime, what), scheduler=lazy(), reference=x)
        assert not verdict.failed, verdict.report()


def test_the_example_fails_with_a_stale_stream_and_not_with_an_engine() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import any_stream
    import stale_stream

    from anabranch.sim import explore

    assert explore(stale_stream.main).oracles == {"race", "poison"}
    verdict = explore(stale_stream.main, oracles=["values"], reference=torch.ones(1, 3, 5))
    assert verdict.oracles == {"values"}
    assert explore(any_stream.main).kind == "exhaustive"
