"""Waits for a whole device, and captures: while the one goes on, the other waits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import anabranch.sim
from anabranch.devices import _turns
from anabranch.sim import _module
from contract.support import in_time

core = _module.core


@pytest.fixture
def capturing() -> Any:
    """A capture under way in another thread: call what comes to end it; True if it was not lost."""
    anabranch.devices.get_device("sim")  # before it there is no engine that could capture
    begun, end, lost = threading.Event(), threading.Event(), list[BaseException]()
    stream = torch.Stream("sim:0")

    def capture() -> None:
        def body() -> None:
            torch.ones(2, device="sim")
            begun.set()
            end.wait(60)

        try:
            with stream, _turns.turns.capturing():
                core.capture(stream.stream_id, 0, "thread_local", body)
        except BaseException as e:
            lost.append(e)

    thread = threading.Thread(target=capture)
    thread.start()
    assert begun.wait(60)

    def ended() -> bool:
        end.set()
        thread.join()
        return not lost

    yield ended
    ended()


def test_the_device_permits_no_wait_amid_a_capture_of_any_thread(capturing: Any) -> None:
    with pytest.raises(RuntimeError, match="while one of its streams is under capture"):
        core.synchronize(0)
    assert not capturing()


@pytest.mark.parametrize("wait", [torch.accelerator.synchronize, _module.synchronize], ids=["accelerator", "module"])
def test_a_wait_begins_when_the_capture_has_ended(capturing: Any, wait: Any) -> None:
    done = threading.Event()
    thread = threading.Thread(target=lambda: (wait(), done.set()))
    thread.start()
    assert not done.wait(0.2), "it waits for its turn"
    assert capturing()
    thread.join()
    assert done.is_set()


def test_a_capture_begins_when_the_wait_has_ended() -> None:
    order: list[str] = []

    def capture() -> None:
        with _turns.turns.capturing():
            order.append("capture")

    with _turns.turns.waiting():
        thread = threading.Thread(target=capture)
        thread.start()
        thread.join(0.1)
        order.append("wait")
        with (
            _turns.at_once(),
            pytest.raises(_turns.DeviceBusy, match=r"torch\.cuda\.synchronize"),
            _turns.turns.capturing(),
        ):
            raise AssertionError("a call does not wait")
    assert in_time(thread.join)
    assert order == ["wait", "capture"]


def test_several_may_wait_and_several_may_capture() -> None:
    for way in (_turns.turns.waiting, _turns.turns.capturing):
        together = threading.Barrier(3)

        def work(way: Any = way, together: threading.Barrier = together) -> None:
            with way():
                together.wait(60)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not together.broken


def test_a_call_that_finds_others_waiting_runs_direct_and_a_later_one_has_its_context() -> None:
    model = torch.nn.ReLU().eval()
    x = torch.randn(7).to("sim")
    engine = anabranch.compile(model, [x], cuda_graphs=True)
    held, other = torch.Stream("sim:0"), torch.Stream("sim:0")
    with held:
        engine(x)
    before = engine.stats()
    with _turns.turns.waiting(), other:
        y = engine(x)
    assert engine.stats().captures == before.captures
    other.synchronize()
    assert torch.equal(y.cpu(), x.cpu().relu())
    third = torch.Stream("sim:0")
    with third:
        engine(x)
    assert engine.stats().captures > before.captures
    engine.close()
