"""The simulated device behind the seam, beyond the contract's clauses: backends, forks, lost devices, memory."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import threading
from typing import Any

import pytest
import torch

import anabranch
import anabranch.sim
from anabranch._judge import differences
from contract.support import PATHS, Chain, Make, Mlp, Rig, assert_same


def test_the_default_backend_is_eager_and_inductor_says_what_to_do(rig: Rig, compiled: Make) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x)
    assert engine.plan.backend == "eager"
    assert "backend eager instead" not in engine.explain()
    assert "sim:0, eager" in repr(engine)
    with pytest.raises(anabranch.InputError, match=r"'inductor' given, which cannot compile for device 'sim'.*'eager'"):
        compiled(Mlp(), x, backend="inductor")


def test_a_model_without_a_choice_of_device_may_live_on_either(rig: Rig, runtime: str) -> None:
    for index in (0, 1):
        device = rig.device(index)
        x = rig.random(4, 256, index=index)
        model = Mlp().eval().requires_grad_(False).to(device)
        with anabranch.compile(model, [x], runtime=runtime) as engine:
            assert engine.device == device
            y = engine(x)
        rig.module.synchronize(index)
        assert_same(y.cpu(), model(x).cpu())


def test_where_there_is_time_a_graph_and_a_direct_call_are_measured_in_turn(
    rig: Rig, compiled: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(rig.seam), "has_time", True)
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x)
    assert re.fullmatch(
        r"measured \d+ us \(host [\d.]+\) as a graph, \d+ us \(host [\d.]+\) direct", engine.plan.reason
    )
    expected = rig.load_kernels(engine, x)
    before = engine.stats().graph_calls  # those that were measured
    assert_same(engine(x), expected)
    assert (engine.stats().graph_calls > before) is engine.plan.captured
    assert engine.stats().waits == 0  # what measured is no caller


def test_a_summary_tells_what_a_graph_holds_and_what_capturing_took(rig: Rig, compiled: Make) -> None:
    x = rig.random(4, 256)
    for graphs in (True, False):
        engine = compiled(Mlp(), x, cuda_graphs=graphs)
        engine.warm(contexts=3)
        (one,) = engine.summary()["signatures"]
        flops = sum(2 * 4 * w.numel() for w in Mlp().parameters() if w.ndim == 2)
        ways = ("captured", "direct") if graphs else ("direct", "captured")
        assert one["captured"] is graphs
        assert [one["flops"][way] for way in ways] == [flops, 0]
        assert [one["operators"][way] > 0 for way in ways] == [True, False]
        assert one["flops"]["share_captured"] == one["operators"]["share_captured"] == float(graphs)
        assert (one["seconds"]["capture"] > 0) is graphs
        assert one["seconds"]["warm-up"] > 0
        assert one["contexts"] == (3 if graphs else 0)
        assert one["bytes"] == engine.stats().bytes
        assert (one["bytes_per_context"] > 0) is (one["bytes"] > 0) is graphs


@PATHS
def test_a_forked_child_goes_on_with_engines_of_its_parent(rig: Rig, compiled: Make, graphs: bool) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=graphs)
    expected = rig.load_kernels(engine, x).cpu()
    pid = os.fork()
    if pid == 0:
        status = 1
        signal.alarm(60)
        torch.set_num_threads(1)  # the parent's OpenMP threads are not there
        try:
            streams = [rig.stream() for _ in range(3)]
            outputs = []
            for stream in streams:
                with rig.module.stream(stream):
                    outputs.append(engine(x))
                    other = engine(x[:2])  # a signature that only the child compiles
            rig.module.synchronize()
            same = not any(differences(y.cpu(), expected) for y in outputs) and other.shape == (2, 256)
            engine.trim()
            status = 0 if same and engine.stats().specializations == 2 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert_same(engine(x).cpu(), expected)
    assert engine.stats().specializations == 1, "the parent's own"


def test_queued_work_that_fails_loses_the_device_until_it_is_reset(rig: Any, compiled: Make) -> None:
    import anabranch.sim

    x = rig.random(4, 256)
    engine = compiled(Mlp(), x)

    def bad(t: torch.Tensor) -> None:
        raise ValueError("planted")

    anabranch.sim.launch("bad", bad, writes=[torch.empty_like(x)])
    try:
        with pytest.raises(RuntimeError, match="planted"):
            rig.module.synchronize()
        for _ in range(2):
            with pytest.raises(anabranch.DeviceLost, match="planted"):
                engine(x)
    finally:
        rig.core.reset()
    assert_same(engine(x).cpu(), rig.load_kernels(engine, x).cpu())


def test_the_list_of_shapes_may_change_while_a_call_asks_whether_the_device_is_lost(
    rig: Any, compiled: Make, runtime: str
) -> None:
    engine, b = compiled(Mlp(), rig.random(4, 256), dynamic=False), rig.random(6, 256)
    expected = rig.load_kernels(engine, b)
    first = next(made for made in engine._table if made.signature.given[0].shape[0] == 4)
    key = next(key for key, made in engine._table._specializations.items() if made is first)
    begun, go, comes, answers = threading.Event(), threading.Event(), threading.Event(), []

    def hold(_: torch.Tensor) -> None:
        begun.set()
        go.wait(60)

    def call() -> None:
        comes.set()
        answers.append(engine(b))

    anabranch.sim.launch("held", hold, reads=[b])
    machine = threading.Thread(target=rig.module.synchronize, args=(0,))
    caller = threading.Thread(target=call)
    switches = sys.getswitchinterval()
    gc.disable()
    try:
        machine.start()
        assert begun.wait(60)  # from here on whoever asks the machine waits, without the GIL
        sys.setswitchinterval(60)  # and so this thread goes on when the caller does that, not before
        caller.start()
        assert comes.wait(60)
        engine._removed(first)
        engine._added(key, first)  # now the last of two, where the other one was
    finally:
        go.set()
        sys.setswitchinterval(switches)
        gc.enable()
    machine.join()
    caller.join()
    rig.module.synchronize(0)
    assert_same(answers[0], expected)


@pytest.mark.parametrize("kind", ["alloc", "launch", "copy", "graph", "record", "wait", "capture", "end of capture"])
def test_any_one_failure_while_contexts_are_built_and_used_leaves_the_engine_usable(
    rig: Any, compiled: Make, kind: str
) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=True, max_contexts=3)
    expected = rig.load_kernels(engine, x).cpu()
    for nth in range(1, 12):
        rig.core.fail(kind, nth)
        try:
            with rig.module.stream(rig.stream()):
                engine(x)
                engine.trim()
                engine.warm(contexts=2)
                engine(x)
        except (RuntimeError, anabranch.AnabranchError):
            pass
        finally:
            rig.core.fail(kind, 0)
        y = engine(x)
        rig.module.synchronize()
        assert_same(y.cpu(), expected, f"{kind} {nth}")
        assert engine.stats().contexts <= 3


def test_a_failed_capture_leaves_the_stream_free(rig: Any) -> None:
    seam = rig.seam
    lane, memory = seam.acquire_lane(0), seam.memory(0)

    def fails() -> None:
        torch.ones(3, device=rig.device())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seam.capture(lane, memory, fails)
    assert not seam.is_capturing(lane.stream)
    x = rig.random(4)
    graph, y = seam.capture(lane, memory, lambda: x + 1)
    graph.launch(lane.stream)
    lane.stream.synchronize()
    assert_same(y.cpu(), x.cpu() + 1)
    graph.destroy()


def test_streams_nest_and_are_restored_in_each_thread(rig: Any) -> None:
    seam = rig.seam
    a, b = rig.stream(), seam.stream(1)
    before = seam.current_stream(0), seam.current_stream(1), seam.current_index()
    with seam.on_stream(a):
        with seam.on_stream(a), seam.on_stream(b):
            assert seam.current_index() == 1
            assert seam.current_stream(1) == b
            assert seam.current_stream(0) == a
        assert (seam.current_stream(0), seam.current_index()) == (a, 0)
    assert (seam.current_stream(0), seam.current_stream(1), seam.current_index()) == before


def test_trim_gives_memory_back(rig: Any, compiled: Make) -> None:
    x = rig.random(256, 1024)
    engine = compiled(Chain(), x, cuda_graphs=True)
    expected = rig.load_kernels(engine, x).cpu()
    engine.trim()
    rig.module.empty_cache()
    before = rig.module.memory_reserved()
    engine.warm(contexts=4)
    grown = rig.module.memory_reserved()
    assert grown - before >= 4 * x.nbytes
    assert engine.stats().bytes >= 4 * x.nbytes
    engine.trim()
    rig.module.empty_cache()
    assert rig.module.memory_reserved() - before < (grown - before) // 4
    assert engine.stats().contexts == 0
    assert_same(engine(x).cpu(), expected)


def test_trim_frees_each_pool_that_can_be_freed(rig: Any) -> None:
    def pool() -> tuple[Any, torch.Tensor]:
        memory = rig.seam.memory(0, fresh=True)
        with memory.using():
            return memory, torch.empty(64, device=rig.device())

    rig.seam.trim()
    (first, x), (second, kept) = pool(), pool()
    del x
    rig.seam.release_memory(first)
    rig.seam.release_memory(second)
    rig.seam.trim()
    assert first.nbytes() == 0
    assert second.nbytes() > 0
    del kept
    rig.seam.trim()
    assert second.nbytes() == 0


def test_many_calls_do_not_grow(rig: Any, compiled: Make) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=True)
    streams = [rig.stream() for _ in range(4)]

    def calls(n: int) -> None:
        for i in range(n):
            with rig.module.stream(streams[i % 4]):
                engine(x)
            if i % 8 == 7:
                rig.module.synchronize()

    calls(64)
    reserved = rig.module.memory_reserved()
    calls(200)
    gc.collect()
    assert rig.module.memory_reserved() == reserved
