"""Direct calls of kernels that have state: each call in flight has an instance that no other has."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from anabranch.backends import Instance, Stateful
from anabranch.devices import Device, Lane, Memory
from anabranch.runtime._build import neutral
from anabranch.runtime._pool import ContextPool, Limits, Reservation


class Member:
    """An instance with its memory. As with a context, each use waits for ``done`` first and records it last."""

    def __init__(
        self, device: Device, run: Instance, lane: Lane, memory: Memory, nbytes: int, forget: Callable[[], None]
    ) -> None:
        self.run: Any = run
        self.nbytes = nbytes
        self.used_on: int | None = None
        self.done = device.event()
        #: Do not count it among the instances any more. May be repeated.
        self.forget = forget
        remains: list[Any] = [run, self.done]

        def decompose() -> None:
            remains.clear()
            device.release_lane(lane)
            device.release_memory(memory)

        def bury(done: Any) -> None:
            forget()
            device.bury([done], remains, decompose)

        weakref.finalize(self, bury, self.done).atexit = False


class Instances:
    """Kernels for any thread and stream, made of instances for one run at a time.

    Threads: any. There are at most ``most`` instances; beyond them a call shares the least recently used one and waits
    for it on the device, and one that finds all of them in other threads' hands waits until a thread has queued its
    work. Streams: work is queued on the calling thread's current stream. The host waits where an instance is built,
    for that instance's own stream.
    """

    def __init__(
        self, device: Device, index: int, kernels: Stateful, most: int, examples: Callable[[], Sequence[torch.Tensor]]
    ) -> None:
        self._device, self._index, self._kernels, self._examples = device, index, kernels, examples
        self._most = most
        self._limits = Limits(most, None)
        self._pool: ContextPool[Member] = ContextPool(self._limits)

    def __len__(self) -> int:
        return len(self._pool)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that they hold."""
        return self._pool.estimate * len(self._pool)

    def prepare(self, n: int) -> int:
        """Build until there are ``n``, or as many as there may be; returns how many there are."""
        while len(self._pool) < min(n, self._most):
            reservation = self._limits.book(0)
            if reservation is None:
                break
            self._pool.release(self._build(reservation))
        return len(self._pool)

    def take(self) -> Member | None:
        """An idle instance for good, which counts among these no more; None if there is none."""
        member = self._pool.take_idle()
        if member is not None:
            member.forget()
        return member

    def trim(self) -> None:
        """Give up those that are idle."""
        self._pool.drain()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        stream = self._device.current_stream(self._index)
        member = self._acquire(stream.stream_id)
        try:
            stream.wait_event(member.done)
            results = member.run(inputs)
            member.done.record(stream)
        except BaseException:
            # Part of it may be queued: it is freed after that, and used by no other call.
            self._pool.discard(member)
            try:
                member.done.record(stream)
            except BaseException:
                _never_freed.append(member)  # nothing says when the device is done with it
            raise
        member.used_on = stream.stream_id
        self._pool.release(member)
        return results

    def _acquire(self, stream: int) -> Member:
        while True:
            choice = self._pool.acquire(stream, lambda: True)
            if isinstance(choice, Reservation):
                return self._build(choice)
            if choice is not None:
                return choice

    def _build(self, reservation: Reservation) -> Member:
        """One more, in the caller's hands."""
        device, index = self._device, self._index
        lane, memory = device.acquire_lane(index), device.memory(index)
        run: Any = None
        try:
            with neutral(device, index), device.building():
                with device.on_stream(lane.stream), memory.using():
                    run = self._kernels.instance(lane.stream)
                    # What is set up at a first run may wait for the device, or must not happen inside a capture.
                    run(self._examples())
                lane.stream.synchronize()
            member = Member(device, run, lane, memory, memory.nbytes(), reservation.cancel)
        except BaseException:
            reservation.cancel()
            lane.stream.synchronize()
            run = None
            device.release_lane(lane)
            device.release_memory(memory)
            raise
        reservation.confirm(member.nbytes)
        self._pool.add(member)
        return member


#: Instances of which nothing says when the device is done with them.
_never_freed: list[Any] = []
