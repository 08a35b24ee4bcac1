"""Which uses of its weights an engine waits for before their memory is used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anabranch.devices import get_device
from anabranch.runtime._last_uses import LastUses


@pytest.fixture
def device() -> Any:
    import anabranch.sim  # noqa: F401  # registers itself

    return get_device("sim")


def test_a_streams_event_stays_when_it_is_done_and_a_context_is_added(device: Any) -> None:
    """The native runtime goes on recording it: forgotten, it would be waited for by nobody."""
    uses = LastUses(device, 0, [])
    stream = device.stream(0)
    of_stream, one_more = uses.of_stream(stream.stream_id), uses.one_more(stream.stream_id)
    for event in (of_stream, one_more):
        event.record(stream)
    torch.sim.synchronize()  # type: ignore[attr-defined]
    assert of_stream.query()
    assert one_more.query()
    uses.add_context(device.event(), set())
    kept = {id(event) for event in uses._events.values()}
    assert {id(of_stream), id(one_more)} <= kept


def test_contexts_that_are_gone_and_done_are_forgotten(device: Any) -> None:
    uses = LastUses(device, 0, [])
    gone, alive, held = device.event(), device.event(), device.event()
    latch, stream = device.latch(), device.stream(0)
    for event in (gone, alive, held):
        uses.add_context(event, {id(gone), id(alive), id(held)})
    gone.record(stream)
    alive.record(stream)
    torch.sim.synchronize()  # type: ignore[attr-defined]
    latch.hold(stream)
    held.record(stream)
    try:
        uses.add_context(device.event(), {id(alive)})
        kept = {id(event) for event in uses._events.values()}
        assert id(gone) not in kept
        assert {id(alive), id(held)} <= kept
    finally:
        latch.open()
        torch.sim.synchronize()  # type: ignore[attr-defined]
