"""Shapes of a range under every interleaving: direct at once, captured aside, and given up while they are called."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from contract.support import in_time

PROGRAMS = "shapes"


@pytest.mark.parametrize("runtime", ["python", "native"])
@pytest.mark.parametrize(
    "program",
    [
        "a_new_shape_while_another_is_captured",
        "a_graph_leaves_while_a_call_is_about_to_take_it",
        "a_wait_for_the_device_while_a_shape_is_captured",
    ],
)
@pytest.mark.parametrize("calls", [1, 2])
def test_every_interleaving(programs: Any, program: str, runtime: str, calls: int) -> None:
    from anabranch.sim import explore

    verdict = explore(getattr(programs, program), args=(runtime, calls), schedules=4000)
    assert not verdict.failed, verdict.report()
    assert verdict.kind == "exhaustive"


@pytest.mark.parametrize(
    ("mutant", "runtime"),
    [
        ("with_a_graph_that_is_found_for_another_shape", "python"),
        ("with_a_graph_that_is_found_for_another_shape", "native"),
        ("with_memory_that_goes_at_once", "python"),
        ("with_waits_that_take_no_turns", "python"),
        ("with_waits_that_take_no_turns", "native"),
    ],
)
def test_what_is_broken_is_found(programs: Any, mutant: str, runtime: str) -> None:
    from anabranch.sim import explore

    assert explore(getattr(programs, mutant), args=(runtime,), schedules=1000).failed


@pytest.mark.parametrize("runtime", ["python", "native"])
def test_a_call_goes_on_where_no_thread_can_be_started(
    programs: Any, runtime: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, refused = threading.Thread.start, list[str]()

    def no_more(thread: threading.Thread) -> None:
        if thread.name != "anabranch builds":
            return start(thread)
        refused.append(thread.name)
        raise RuntimeError("can't start new thread")

    engine, outputs = programs.make(runtime, 2), dict[Any, Any]()
    with monkeypatch.context() as short_of_threads:
        short_of_threads.setattr(threading.Thread, "start", no_more)
        for n in (3, 4):
            programs.call(engine, n, programs.STREAMS[0], range(2), outputs)  # the second asks for a graph
        assert in_time(engine._shapes.wait)
    programs.check(outputs)
    assert len(refused) == 2, "who asked, and who waited; what 3 has asked for is not done, so 4 has not asked"
    (warning,) = (record for record in caplog.records if record.name == "anabranch")
    assert "can't start new thread" in warning.getMessage()
    assert engine.stats().captures == 0

    engine._shapes.wait()
    assert engine.stats().captures == 1, "of 3, which was asked for"
    programs.call(engine, 4, programs.STREAMS[0], range(2), outputs)
    engine._shapes.wait()
    assert engine.stats().captures == 2
    programs.check(outputs)
    engine.close()


@pytest.mark.parametrize("runtime", ["python", "native"])
def test_shapes_in_turn_keep_their_graphs_and_one_that_is_called_more_takes_one(programs: Any, runtime: str) -> None:
    engine, inputs = programs.make(runtime, 2), programs.INPUTS

    def call(*sizes: int) -> None:
        for n in sizes:
            engine(inputs[n][0])
            engine._shapes.wait()

    call(3, 3, 4, 4)
    assert engine.stats().captures == 2
    call(*(3, 4, 5) * 20)
    assert engine.stats().captures == 2, "5 is called as often as they are"
    call(*[5] * 40)
    stats = engine.stats()
    assert (stats.captures, stats.contexts) == (3, 2)
    before = stats.graph_calls
    call(5, 5)
    assert engine.stats().graph_calls == before + 2
    # What nobody calls any more goes in time, whatever it was called before.
    call(*[5] * 200, *[3, 4] * 500)
    before = engine.stats().graph_calls
    call(3, 4)
    assert engine.stats().graph_calls == before + 2
    engine.close()
