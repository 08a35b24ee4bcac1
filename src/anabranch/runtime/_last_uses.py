"""When the weights of a specialization were used last, for the day when they are freed."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import torch

from anabranch import _sync
from anabranch.devices import Device, Event

_serial = itertools.count()


class LastUses:
    """Events of what may still read the weights. When this goes, their memory is used again only after them.

    Whoever may queue work that reads the weights keeps this, and records an event here before letting go of it.

    By stream: the last direct call's event; grows with the number of stream handles that ever called, which the driver
    re-uses. Two threads on one stream may record in either order: both records come after both threads' work, or after
    the other record. And by context (as a string): its ``done``. Threads: any.
    """

    def __init__(self, device: Device, index: int, weights: Sequence[torch.Tensor]) -> None:
        self._device = device
        self._events: dict[int | str, Event] = _sync.dict_("last uses")
        if device.has_streams:
            device.prepare_retire(index)
        weakref.finalize(self, _retire, device, list(weights), self._events).atexit = False

    def of_stream(self, stream: int) -> Event:
        """The event of direct calls on a stream."""
        event = self._events.get(stream)
        return event if event is not None else self._events.setdefault(stream, self._device.event())

    def one_more(self, stream: int) -> Event:
        """A new event of a stream's: for whoever has one for each of the threads that share the stream."""
        return self._events.setdefault(f"stream {stream}, {next(_serial)}", self._device.event())

    def add_context(self, done: Event, alive: set[int]) -> None:
        """A context was made. ``alive``: identities of the events of those that there are: the others are forgotten
        once they are done."""
        for key, event in list(self._events.items()):
            if isinstance(key, str) and key.startswith("context") and id(event) not in alive and event.query():
                self._events.pop(key, None)
        self._events[f"context {next(_serial)}"] = done


def _retire(device: Device, weights: list[torch.Tensor], events: dict[int | str, Event]) -> None:
    device.retire(list(events.values()), weights)
