"""What devices with streams have in common: lanes and memory that are used again, and what is freed later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from anabranch import _sync
from anabranch.devices._deferred import DeferredFrees
from anabranch.devices._device import Lane, Memory, Scratch
from anabranch.devices._stream import Event, Stream

_T = TypeVar("_T")


class Spares(Generic[_T]):
    """Things of one kind that nobody uses now, by device. Threads: any, by single list and dict operations."""

    def __init__(self, name: str, make: Callable[[int], _T]) -> None:
        self._name, self._make = name, make
        self._by_device: dict[int, list[_T]] = _sync.dict_(f"spare {name}")

    def take(self, index: int) -> _T:
        """One that nobody uses, or a new one."""
        try:
            return self._by_device[index].pop()
        except (KeyError, IndexError):
            return self._make(index)

    def give(self, index: int, item: _T) -> None:
        """Nobody uses it any more."""
        self._by_device.setdefault(index, _sync.list_(self._name)).append(item)

    def drain(self) -> Iterator[_T]:
        """Take out those that there are now."""
        for items in list(self._by_device.values()):
            for _ in range(len(items)):
                try:
                    yield items.pop()
                except IndexError:
                    break


class StreamDevice(ABC):
    """See :class:`anabranch.devices.Device`.

    Garbage collections call :meth:`release_lane`, :meth:`retire` and :meth:`defer_free` in the middle of anything, so
    no method of a device takes a lock: what threads share is changed by single list and dict operations.
    """

    kind: str

    def __init__(self) -> None:
        self.lanes: Spares[Lane] = Spares("lanes", self.new_lane)
        self.memories: Spares[Memory] = Spares("memory", self.new_memory)
        #: Of each device one that waits for last uses of weights.
        self._retiring: dict[int, Stream] = _sync.dict_("streams that retire")
        self._deferred = DeferredFrees(self._are_done, self.relaxed)

    # -- each device's own

    @abstractmethod
    def new_lane(self, index: int) -> Lane: ...
    @abstractmethod
    def new_memory(self, index: int) -> Memory: ...
    @abstractmethod
    def stream(self, index: int) -> Stream: ...
    @abstractmethod
    def current_index(self) -> int: ...
    @abstractmethod
    def current_stream(self, index: int) -> Stream: ...
    @abstractmethod
    def on_stream(self, stream: Stream) -> AbstractContextManager[Any]: ...
    @abstractmethod
    def on_device(self, index: int) -> AbstractContextManager[Any]: ...
    @abstractmethod
    def relaxed(self) -> AbstractContextManager[None]: ...
    @abstractmethod
    def is_capturing(self, stream: Stream) -> bool: ...
    @abstractmethod
    def lost(self) -> str | None: ...

    @abstractmethod
    def leak(self, *what: Any) -> None:
        """The device is lost: ``what`` can be given back to nobody."""

    # -- used again

    def acquire_lane(self, index: int) -> Lane:
        return self.lanes.take(index)

    def release_lane(self, lane: Lane) -> None:
        self.lanes.give(lane.index, lane)

    def memory(self, index: int, fresh: bool = False) -> Memory:
        return self.new_memory(index) if fresh else self.memories.take(index)

    def release_memory(self, memory: Memory) -> None:
        # Not freed here: that waits for the whole device, and this runs in finalizers.
        self.memories.give(memory.index, memory)

    def scratch(self, index: int) -> Scratch:
        return Scratch(self.on_stream, self.acquire_lane(index), self.memory(index))

    def release_scratch(self, scratch: Scratch) -> None:
        self.release_lane(scratch.lane)
        self.release_memory(scratch.memory)

    # -- freed later

    def prepare_retire(self, index: int) -> None:
        if index not in self._retiring:
            self._retiring.setdefault(index, self.stream(index))

    def retire(self, events: Sequence[Event], tensors: Sequence[torch.Tensor]) -> None:
        # A stream that a caller used may be gone by now, so no tensor is recorded on it. One stream of ours waits for
        # all last uses, and the tensors are recorded on that one: their blocks come back after every last use.
        if self.lost():
            # In a forked child, or on a broken device, even destroying an event can abort the process.
            self.leak(events, tensors)
            return
        ours = [t for t in tensors if t.device.type == self.kind]
        if not events or not ours:
            return
        stream = self._retiring[ours[0].device.index]
        for event in events:
            stream.wait_event(event)
        with _real_tensors():
            for t in ours:
                t.record_stream(stream)

    def defer_free(self, index: int, events: Sequence[Event], kept: Any, free: Callable[[], None]) -> None:
        self._deferred.defer(events, kept, self._on_its_device(index, free))

    def collect(self) -> None:
        self._deferred.collect()

    def defer_free_code(self, index: int, free: Callable[[], None]) -> None:
        self._deferred.defer_code(self._on_its_device(index, free))

    def free_code(self) -> None:
        if not self.lost() and not self._is_capturing_here():
            self._deferred.free_code()

    def _is_capturing_here(self) -> bool:
        return self.is_capturing(self.current_stream(self.current_index()))

    def _are_done(self, events: Sequence[Event]) -> bool:
        # Nothing is freed in the midst of a capture, which that might end; of other threads' captures nobody knows.
        if self.lost() or self._is_capturing_here():
            return False
        # Asking an event is forbidden while a global-mode capture is under way, and would invalidate that capture.
        with self.relaxed():
            return all(event.query() for event in events)

    def _on_its_device(self, index: int, free: Callable[[], None]) -> Callable[[], None]:
        """``free``, to be called with device ``index`` current whatever is; what was current is so again afterwards."""

        def call() -> None:
            with self.on_device(index):
                free()

        return call


@contextmanager
def _real_tensors() -> Iterator[None]:
    """For finalizers: a garbage collection may come amid an export, whose modes take every tensor for theirs."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield
