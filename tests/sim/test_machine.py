"""What is modelled of a device, each feature by a program that is right with it and one that is wrong without."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

SIM = "sim:0"
X = [1.0, 2.0, 3.0, 4.0]


@pytest.fixture(autouse=True)
def sim() -> Any:
    import anabranch.sim

    yield anabranch.sim
    anabranch.sim.core.reset()
    anabranch.sim.core.limit(0, 0)


def explore(program: Callable[[], Any], **options: Any) -> Any:
    from anabranch.sim import explore

    return explore(program, **options)


def is_right(program: Callable[[], Any], expected: list[float]) -> None:
    verdict = explore(program, reference=lambda: torch.tensor(expected))
    assert verdict.kind == "exhaustive", verdict.report()


def is_wrong(program: Callable[[], Any], expected: list[float], report: str) -> None:
    """By values alone, and by the race checker alone."""
    verdict = explore(program, reference=lambda: torch.tensor(expected), oracles=["values"])
    assert verdict.failed, str(verdict)
    verdict = explore(program, oracles=["race"])
    assert verdict.failed, str(verdict)
    assert report in verdict.report()


# -- order -------------------------------------------------------------------------------------------------------------


def test_the_legacy_stream_waits_for_blocking_streams_and_they_for_it(sim: Any) -> None:
    def program(blocking: bool) -> torch.Tensor:
        stream = sim.Stream(blocking=blocking)
        with stream:
            x = torch.tensor(X).to(SIM, non_blocking=True) * 2
        y = x + 1  # on the legacy stream
        with stream:
            z = y * 10
        stream.synchronize()
        return z.cpu()

    is_right(lambda: program(True), [30.0, 50.0, 70.0, 90.0])
    is_wrong(lambda: program(False), [30.0, 50.0, 70.0, 90.0], "stream `legacy` has waited for no work of stream")


def test_a_wait_binds_to_the_record_before_it(sim: Any) -> None:
    def program(again: bool) -> torch.Tensor:
        a, b, event = torch.Stream(SIM), torch.Stream(SIM), torch.Event(SIM)
        with a:
            x = torch.ones(4, device=SIM)
            event.record(a)
        b.wait_event(event)
        with a:
            x.mul_(3)
            event.record(a)
        if again:
            b.wait_event(event)
        with b:
            y = x + 1
        b.synchronize()
        return y.cpu()

    is_right(lambda: program(True), [4.0] * 4)
    is_wrong(lambda: program(False), [4.0] * 4, "only up to its item")


def test_a_query_tells_of_the_device(sim: Any) -> None:
    def program() -> bool:
        event = torch.Event(SIM)
        torch.ones(4, device=SIM)
        event.record()
        done = event.query()
        torch.accelerator.synchronize()
        assert event.query()
        return done

    assert len(explore(program).outcomes) == 2


def test_copies_between_devices_are_ordered_on_both_streams(sim: Any) -> None:
    def program() -> torch.Tensor:
        x = torch.ones(4, device="sim:0") * 3
        y = x.to("sim:1")
        x.zero_()
        with sim._module.device(1):
            z = y + 1
        return z.cpu()

    is_right(program, [4.0] * 4)


def test_an_asynchronous_copy_reads_pinned_memory_when_it_runs(sim: Any) -> None:
    def program(wait: bool) -> torch.Tensor:
        host = torch.ones(4).pin_memory()
        x = torch.empty(4, device=SIM)
        x.copy_(host, non_blocking=True)
        if wait:
            torch.accelerator.synchronize()
        host.fill_(5)
        return x.cpu()

    assert len(explore(lambda: program(True)).outcomes) == 1
    assert len(explore(lambda: program(False)).outcomes) == 2


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_freed_block_belongs_to_its_stream_and_comes_back_poisoned(sim: Any) -> None:
    def program(record: bool) -> torch.Tensor:
        a, b = torch.Stream(SIM), torch.Stream(SIM)
        with a:
            x = torch.ones(4, device=SIM) * 7
            event = a.record_event()
        b.wait_event(event)
        with b:
            y = x + 1
        if record:
            x.record_stream(b)
        del x
        with a:
            torch.full((4,), 9.0, device=SIM)
        b.synchronize()
        return y.cpu()

    is_right(lambda: program(True), [8.0] * 4)
    is_wrong(lambda: program(False), [8.0] * 4, "record_stream")


def test_a_block_may_be_freed_before_its_stream_waits_for_another_that_reads_it(sim: Any) -> None:
    def program(wait: bool) -> torch.Tensor:
        a, b = torch.Stream(SIM), torch.Stream(SIM)
        with a:
            x = torch.ones(4, device=SIM)
        b.wait_event(a.record_event())
        with b:
            y = x + 1
        del x
        if wait:
            a.wait_event(b.record_event())
        with a:
            torch.full((4,), 9.0, device=SIM)
        b.synchronize()
        return y.cpu()

    is_right(lambda: program(True), [2.0] * 4)
    is_wrong(lambda: program(False), [2.0] * 4, "record_stream")


def test_fresh_memory_is_poison_in_every_float_type(sim: Any) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.empty(100, dtype=dtype, device=SIM)
        torch.accelerator.synchronize()
        assert sim.core.poisoned(x) == 100
        assert x.cpu().isnan().all()
        x.fill_(1)
        torch.accelerator.synchronize()
        assert sim.core.poisoned(x) == 0


def test_out_of_memory_is_pytorchs_error_and_frees_nothing(sim: Any) -> None:
    held = sim._module.memory_reserved(0)
    sim.core.limit(0, held + 4096)
    with pytest.raises(torch.OutOfMemoryError, match="sim out of memory: 1000000 bytes"):
        torch.empty(1_000_000, dtype=torch.uint8, device=SIM)
    sim.core.limit(0, 0)
    torch.empty(1_000_000, dtype=torch.uint8, device=SIM)


def test_a_workspace_belongs_to_its_stream_and_two_users_of_one_spoil_it(sim: Any) -> None:
    """Two graphs captured on one stream have its workspace in common: replays on two streams race for it."""

    def program(shared: bool) -> torch.Tensor:
        first, second = torch.Stream(SIM), torch.Stream(SIM)
        x = torch.ones(2, 2, device=SIM)
        graphs, results = [], []
        torch.accelerator.synchronize()
        for stream in (first, first if shared else second):
            graphs.append(sim.Graph())
            with sim.graph(graphs[-1], stream=stream, mode="thread_local"):
                results.append(x @ x)
        a, b = torch.Stream(SIM), torch.Stream(SIM)
        with a:
            graphs[0].replay()
        with b:
            graphs[1].replay()
        torch.accelerator.synchronize()
        return torch.stack([y.cpu().flatten() for y in results]).sum(0)

    is_right(lambda: program(False), [4.0] * 4)
    is_wrong(lambda: program(True), [4.0] * 4, "race")


# -- captures ----------------------------------------------------------------------------------------------------------


def test_lanes_of_a_graph_run_side_by_side_and_launches_one_after_the_other(sim: Any) -> None:
    def program(join: bool) -> torch.Tensor:
        main, side = torch.Stream(SIM), torch.Stream(SIM)
        x = torch.tensor(X, device=SIM)
        graph = sim.Graph()
        torch.accelerator.synchronize()
        with sim.graph(graph, stream=main, mode="thread_local"):
            side.wait_event(main.record_event())
            with side:
                y = x * 2
                joined = side.record_event()
            z = x + 1
            if join:
                main.wait_event(joined)
            z.add_(y)
            if not join:
                main.wait_event(joined)
        other = torch.Stream(SIM)
        graph_streams = (main, other)
        for stream in graph_streams:
            with stream:
                graph.replay()
        torch.accelerator.synchronize()
        return z.cpu()

    is_right(lambda: program(True), [4.0, 7.0, 10.0, 13.0])
    verdict = explore(lambda: program(False), reference=lambda: torch.tensor([4.0, 7.0, 10.0, 13.0]))
    assert verdict.failed


def test_what_a_capture_does_not_allow(sim: Any) -> None:
    before = torch.Event(SIM)
    before.record()

    def forget_to_join(stream: torch.Stream) -> None:
        side = torch.Stream(SIM)
        side.wait_event(stream.record_event())
        with side:
            torch.ones(1, device=SIM)

    cases: list[tuple[Callable[[Any], Any], str]] = [
        (lambda s: torch.ones(1, device=SIM).item(), "not permitted"),
        (lambda s: torch.accelerator.synchronize(), "not permitted"),
        (lambda s: s.query(), "not permitted"),
        (lambda s: s.wait_event(before), "recorded outside the capture"),
        (forget_to_join, "unjoined"),
    ]
    for act, message in cases:
        stream = torch.Stream(SIM)

        def capture(act: Callable[[Any], Any] = act, stream: torch.Stream = stream) -> None:
            with sim.graph(sim.Graph(), stream=stream, mode="thread_local"):
                act(stream)

        with pytest.raises(RuntimeError, match="sim: .*" + message):
            capture()
        with stream:  # the stream is free again
            assert torch.ones(1, device=SIM).item() == 1
    with pytest.raises(RuntimeError, match="legacy default stream cannot be captured"):
        with sim.graph(sim.Graph(), stream=sim._module.default_stream()):
            pass


def test_a_capture_in_global_mode_forbids_other_threads_what_one_in_thread_local_mode_does_not(sim: Any) -> None:
    for mode, refused in (("global", True), ("thread_local", False), ("relaxed", False)):
        errors: list[str] = []

        def ask(errors: list[str] = errors) -> None:
            try:
                torch.accelerator.current_stream().synchronize()
            except RuntimeError as e:
                errors.append(str(e))

        def capture(mode: str = mode, ask: Callable[[], None] = ask) -> None:
            with sim.graph(sim.Graph(), mode=mode):
                thread = threading.Thread(target=ask)
                thread.start()
                thread.join()

        if refused:
            with pytest.raises(RuntimeError, match="invalidated"):
                capture()
        else:
            capture()
        assert bool(errors) == refused


def test_a_graph_keeps_its_addresses(sim: Any) -> None:
    x = torch.zeros(4, device=SIM)
    graph = sim.Graph()
    with pytest.raises(RuntimeError, match="was not captured"):
        graph.replay()
    with sim.graph(graph):
        y = x * 2 + 1
    torch.accelerator.synchronize()
    assert sim.core.poisoned(y) == 4  # captured, not run
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [value * 2 + 1] * 4


# -- kernels and errors ------------------------------------------------------------------------------------------------


def test_kernels_that_are_not_operators(sim: Any) -> None:
    def program(wait: bool) -> torch.Tensor:
        a, b = torch.Stream(SIM), torch.Stream(SIM)
        with a:
            x = torch.tensor(X).to(SIM)
            y = torch.empty(4, device=SIM)
            sim.launch("triple", lambda x, y: y.copy_(x * 3), reads=[x], writes=[y])
        if wait:
            b.wait_event(a.record_event())
        with b:
            z = y + 1
        b.synchronize()
        a.synchronize()
        return z.cpu()

    is_right(lambda: program(True), [4.0, 7.0, 10.0, 13.0])
    is_wrong(lambda: program(False), [4.0, 7.0, 10.0, 13.0], "only up to its item 1")


def test_an_error_in_queued_work_shows_at_the_next_wait_and_lasts(sim: Any) -> None:
    def broken() -> None:
        raise ValueError("a kernel went wrong")

    x = torch.ones(4, device=SIM)
    torch.accelerator.synchronize()
    sim.launch("broken", broken)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"device error in queued work: broken: .*a kernel went wrong"):
            torch.accelerator.synchronize()
    with pytest.raises(RuntimeError, match="device error"):
        x + 1
    assert "a kernel went wrong" in sim.core.lost()
    sim.reset()  # what DeviceLost says to do
    assert (x + 1).tolist() == [2.0] * 4


def test_work_behind_a_closed_latch_waits(sim: Any) -> None:
    core = sim.core
    latch = core.latch_new()
    stream = torch.Stream(SIM)
    core.latch_hold(latch, stream.stream_id, 0)
    with stream:
        y = torch.ones(4, device=SIM) * 2
    torch.accelerator.current_stream().synchronize()
    assert not stream.query()
    core.latch_open(latch)
    stream.synchronize()
    assert y.tolist() == [2.0] * 4
