"""Kernels that have state on the simulated device: which call has which instance, and when one goes.

Every order of calls: ``test_runtime_stateful.py``. Faults: ``test_faults.py``.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import anabranch
from contract import stateful
from contract.stateful import ScratchInstance
from contract.support import PATHS, ROUNDING, Make, Mlp, Rig, assert_same, on_threads

#: Those that other tests of this process keep: programs for the explorer make engines when they are imported.
_others: list[ScratchInstance] = []


@pytest.fixture(autouse=True)
def with_state(rig: Rig) -> Iterator[None]:
    stateful.install(rig.seam)
    rig.defaults = {"backend": stateful.NAME}
    instances(rig)
    _others.extend(ScratchInstance.alive)
    yield
    _others.clear()


def instances(rig: Rig) -> int:
    """How many this test has, once what is done was freed."""
    gc.collect()
    rig.seam.collect()
    gc.collect()
    return len(set(ScratchInstance.alive) - set(_others))


def captured(rig: Rig, engine: Any, like: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A call in a graph of the caller's, with its input and its output."""
    x = torch.full_like(like, float("nan"))
    rig.module.synchronize()
    graph = rig.new_graph()
    with rig.capture(graph):
        y = engine(x)
    return graph, x, y


@PATHS
def test_each_graph_of_a_caller_has_an_instance(rig: Rig, compiled: Make, graphs: bool) -> None:
    sources = [rig.random(4, 256) for _ in range(3)]
    engine = compiled(Mlp(), sources[0], cuda_graphs=graphs, max_contexts=1)
    expected = [rig.load_kernels(engine, x) for x in sources]
    engine.warm(captures=3)  # more than direct calls may have
    captures = [captured(rig, engine, sources[0]) for _ in range(3)]
    streams = [rig.stream() for _ in range(3)]
    latch = rig.latch(*streams[:2])
    for (graph, x, _), source, stream in zip(captures, sources, streams, strict=True):
        with rig.module.stream(stream):
            x.copy_(source)
            graph.replay()
    streams[2].synchronize()  # waits for none of the others
    assert_same(captures[2][2], expected[2])
    latch.open()
    rig.module.synchronize()
    for (_, _, y), e in zip(captures, expected, strict=True):
        assert_same(y, e)


def test_a_capture_without_a_spare_instance_is_refused_by_name_and_stays_good(rig: Rig, compiled: Make) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=False)
    expected = rig.load_kernels(engine, x)
    kept = captured(rig, engine, x)  # takes the one that there always is
    other = compiled(Mlp(), x, cuda_graphs=False)
    graph = rig.new_graph()
    with rig.capture(graph):
        with pytest.raises(anabranch.NotCapturable, match=r"stateful.*engine\.warm\(captures=N\)"):
            engine(x)
        y = other(x)
    graph.replay()
    rig.module.synchronize()
    assert_same(y, expected)
    assert_same(engine(x), expected)  # direct calls have their own
    engine.warm()
    graph, x2, y = captured(rig, engine, x)
    x2.copy_(x)
    graph.replay()
    rig.module.synchronize()
    assert_same(y, expected)
    del kept


def test_calls_of_one_capture_share_an_instance_on_a_stream_and_not_between_streams(rig: Rig, compiled: Make) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=False)
    expected = rig.load_kernels(engine, x)
    engine.warm(captures=2)
    spare = engine._first().calls.direct.kernels
    graph, side = rig.new_graph(), rig.stream()
    with rig.capture(graph):
        first = engine(x)
        second = engine(x)
        assert spare.spare == 1
        main = rig.module.current_stream()
        side.wait_event(main.record_event())
        with rig.module.stream(side):
            third = engine(x)
        fourth = engine(x)
        main.wait_event(side.record_event())
        assert spare.spare == 0
    graph.replay()
    rig.module.synchronize()
    for y in (first, second, third, fourth):
        assert_same(y, expected)


def test_an_instance_in_a_graph_goes_with_the_graph(rig: Rig, compiled: Make) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=False)
    rig.load_kernels(engine, x)
    engine.warm(captures=2)
    before = instances(rig)
    capture = captured(rig, engine, x)
    capture[0].replay()
    rig.module.synchronize()
    assert instances(rig) == before
    del capture
    assert instances(rig) == before - 1
    with contextlib.suppress(ZeroDivisionError), rig.capture(rig.new_graph()):
        engine(x)
        raise ZeroDivisionError
    assert instances(rig) == before - 2, "a capture that never became a graph keeps it"
    engine.trim()
    assert instances(rig) == 0
    engine.warm(captures=2)
    assert engine._first().calls.direct.kernels.spare == 2


@PATHS
def test_many_threads_call_and_capture(rig: Rig, compiled: Make, graphs: bool) -> None:
    sources = [rig.random(4, 64) for _ in range(16)]
    engine = compiled(Mlp(64), sources[0], cuda_graphs=graphs, max_contexts=3)
    expected = [rig.load_kernels(engine, x) for x in sources]
    engine.warm(captures=3)
    kernels = engine._first().calls.direct.kernels

    def work(i: int) -> None:
        with rig.module.stream(rig.stream()):
            if i < 3:
                x = torch.full_like(sources[0], float("nan"))
                graph = rig.new_graph()
                with rig.capture(graph, "thread_local"):
                    y = engine(x)
                for k in range(20):
                    x.copy_(sources[(i + k) % 16])
                    graph.replay()
                    assert_same(y, expected[(i + k) % 16])
            else:
                for k in range(20):
                    assert_same(engine(sources[(i + k) % 16]), expected[(i + k) % 16])

    on_threads(12, work)
    assert len(kernels) <= 3
    assert kernels.spare == 0


def test_threads_wait_for_the_one_instance_that_is_being_built(rig: Rig, compiled: Make) -> None:
    x = rig.random(4, 64)
    engine = compiled(Mlp(64), x, cuda_graphs=False, max_contexts=1)
    expected = rig.load_kernels(engine, x)
    engine.trim()
    assert instances(rig) == 0
    outputs: list[Any] = [None] * 8

    def work(i: int) -> None:
        with rig.module.stream(rig.stream()):
            outputs[i] = engine(x)

    on_threads(8, work)
    rig.module.synchronize()
    for y in outputs:
        assert_same(y, expected)
    assert instances(rig) == 1


def test_explain_says_what_there_is(rig: Rig, compiled: Make) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=False)
    assert engine.warm(contexts=3, captures=2) == 3
    assert "2 results pass through a scratch tensor of 4096 bytes" in engine.explain()
    assert "instances of direct calls: 3, " in engine.explain()
    assert "instances for callers' graphs: 2 left" in engine.explain()


@PATHS
def test_a_range_has_one_pool_of_instances_for_all_shapes(rig: Rig, compiled: Make, graphs: bool) -> None:
    sources = [rig.random(n, 64) for n in (2, 3, 5, 8, 13, 21, 34, 55)]
    engine = compiled(Mlp(64), sources[2], dynamic=True, cuda_graphs=graphs, max_contexts=3)
    expected = [rig.load_kernels(engine, x) for x in sources]

    def work(i: int) -> None:
        with rig.module.stream(rig.stream()):
            for k in range(24):
                assert_same(engine(sources[(i + k) % 8]), expected[(i + k) % 8])

    on_threads(8, work)
    engine._shapes.wait()
    assert engine.stats().specializations == 1, "something was compiled within the range"
    (of_range,) = engine._table.ranges
    pool = of_range.calls.direct.instances
    assert 1 <= len(pool) <= 3
    shapes = [made for made in engine._table if made is not of_range]
    assert bool(shapes) is graphs
    for made in shapes:
        made.retire()  # as where another shape gets its contexts: calls run direct
        n = made.signature.given[0].shape[0]
        k = next(k for k, x in enumerate(sources) if len(x) == n)
        assert_same(engine(sources[k]), expected[k])
        assert not len(made.calls.direct.instances), "a shape has instances of its own for direct calls"
    assert len(pool) <= 3
    # What is captured for one shape is as large as that shape needs.
    small = {x.nbytes for x in set(ScratchInstance.alive) - set(_others)} - {of_range.choice.kernels.nbytes_at(None)}
    assert bool(small) is graphs


def test_beyond_what_a_range_was_lowered_for_there_is_another(rig: Rig, compiled: Make) -> None:
    engine = compiled(Mlp(64), rig.random(4, 64), dynamic=True, cuda_graphs=False)
    for n in (stateful.LARGEST, stateful.LARGEST + 1):
        x = rig.random(n, 64)
        assert_same(engine(x), torch.cat([engine(row) for row in x.split(1)]), rounding=ROUNDING)
    assert engine.stats().specializations == 3, "two ranges, and what is of size 1"


def test_a_shape_of_a_range_has_to_run_before_it_is_captured(rig: Rig, compiled: Make) -> None:
    x, other = rig.random(4, 64), rig.random(6, 64)
    engine = compiled(Mlp(64), x, dynamic=True, cuda_graphs=True)
    expected = rig.load_kernels(engine, other)
    graph = rig.new_graph()
    with rig.capture(graph):
        with pytest.raises(anabranch.NotCapturable, match=r"stateful has to run on inputs of its shapes once before"):
            engine(other)
        y = engine(x)
    graph.replay()
    rig.module.synchronize()
    assert_same(y, engine(x))
    engine.warm([other])
    graph, x2, y2 = captured(rig, engine, other)
    x2.copy_(other)
    graph.replay()
    rig.module.synchronize()
    assert_same(y2, expected)


@PATHS
def test_kernels_with_a_fault_are_found_and_operators_run_instead(
    rig: Rig, compiled: Make, graphs: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = stateful._Hold.__call__
    monkeypatch.setattr(stateful._Hold, "__call__", lambda hold, x: held(hold, x) * 1.5)
    model = Mlp()
    x = rig.random(4, 256)
    engine = compiled(model, x, cuda_graphs=graphs)
    assert "a fault of 'stateful'. PyTorch's operators run the model instead" in caplog.text
    assert engine.summary()["signatures"][0]["backend"] == "eager"
    expected = compiled(model, x, backend="eager", cuda_graphs=graphs)(x)
    assert_same(engine(x), expected)
    with pytest.raises(anabranch.BuildError, match=r"a fault of 'stateful'"):
        compiled(model, x, cuda_graphs=graphs, require_full=True)
