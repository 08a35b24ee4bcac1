"""Sessions under every interleaving: two of one engine, or one on two streams or in two threads."""

from __future__ import annotations

from typing import Any

import pytest

PROGRAMS = "sessions"


# How many schedules are not equivalent: as many as in `test_runtime.py`, as what sessions do besides has nothing in
# common. Where a session goes, its memory may come back before the next is asked for, or behind it.
@pytest.mark.parametrize("contexts", [0, 1, 2])
@pytest.mark.parametrize("runtime", ["python", "native"])
@pytest.mark.parametrize(
    ("program", "schedules"),
    [
        ("sessions2_threads1_by_turns", 1),
        ("session1_streams2_by_turns", 1),
        ("session1_state_saved_and_loaded", 1),
        ("session_dropped_in_flight", 4),
    ],
)
def test_every_schedule_of_one_thread(programs: Any, program: str, runtime: str, contexts: int, schedules: int) -> None:
    assert_all_are_right(getattr(programs, program), runtime, contexts, schedules)


@pytest.mark.parametrize(
    ("program", "runtime", "contexts", "schedules"),
    [
        ("sessions2_made_by_threads2", "python", 0, 1),
        ("sessions2_made_by_threads2", "python", 1, 4),
        ("sessions2_made_by_threads2", "python", 2, 6),
        ("sessions2_made_by_threads2", "native", 0, 1),
        ("sessions2_made_by_threads2", "native", 1, 8),
        ("sessions2_made_by_threads2", "native", 2, 4),
        ("sessions2_threads2_calls2", "python", 0, 1),
        ("sessions2_threads2_calls2", "python", 1, 28),
        ("sessions2_threads2_calls2", "python", 2, 70),
        ("sessions2_threads2_calls2", "native", 0, 1),
        pytest.param("sessions2_threads2_calls2", "native", 1, 582, marks=pytest.mark.slow),
        ("sessions2_threads2_calls2", "native", 2, 8),
    ],
)
def test_every_interleaving_of_two_threads(
    programs: Any, program: str, runtime: str, contexts: int, schedules: int
) -> None:
    assert_all_are_right(getattr(programs, program), runtime, contexts, schedules)


def assert_all_are_right(program: Any, runtime: str, contexts: int, schedules: int) -> None:
    from anabranch.sim import explore

    verdict = explore(program, args=(runtime, contexts))
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"
    assert verdict.schedules == schedules
    assert len(verdict.outcomes) == 1


@pytest.mark.parametrize("contexts", [0, 1, 2])
@pytest.mark.parametrize("runtime", ["python", "native"])
def test_one_of_two_threads_is_turned_away_or_comes_second(programs: Any, runtime: str, contexts: int) -> None:
    from anabranch.sim import explore

    verdict = explore(programs.session1_threads2, args=(runtime, contexts))
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"
    assert len(verdict.outcomes) == 3, "both are served, or either is not"


@pytest.mark.parametrize("oracle", ["race", "values"])
@pytest.mark.parametrize(
    ("mutant", "runtime"),
    [
        ("calls_that_do_not_wait", "python"),  # the native runtime's is planted: test_native_mutants.py
        *((m, "python") for m in ("shared_state", "reset_that_does_not_wait", "busy_is_ignored", "freed_at_once")),
        *((m, "native") for m in ("shared_state", "reset_that_does_not_wait", "busy_is_ignored", "freed_at_once")),
    ],
)
def test_what_is_broken_is_found(programs: Any, mutant: str, runtime: str, oracle: str) -> None:
    from anabranch.sim import explore

    verdict = explore(getattr(programs, mutant), args=(runtime,), oracles=[oracle])
    assert verdict.failed, f"{mutant}: {verdict}"
    assert verdict.oracles == {oracle}
