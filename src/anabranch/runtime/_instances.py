"""Kernels that have state: each direct call in flight, and each graph of a caller's, has an instance of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from anabranch import _activity, _sync
from anabranch.backends import Instance, Stateful
from anabranch.devices import Device
from anabranch.runtime._context import free_after
from anabranch.runtime._pool import ContextPool, Limits, Reservation
from anabranch.runtime._process import neutral, process
from anabranch.runtime._unit import Unit


class Member:
    """An instance with its memory. As with a context, each use waits for ``done`` first and records it last."""

    def __init__(
        self,
        device: Device,
        index: int,
        run: Instance,
        nbytes: int,
        forget: Callable[[], None],
        holding: ExitStack,
    ) -> None:
        """``forget``, ``holding``: as of a context."""
        self.nbytes = nbytes
        self.used_on: int | None = None
        self.done = device.event()
        #: Do not count it among the instances any more. May be repeated.
        self.forget = forget
        #: The only reference to the instance: it goes where these are cleared, not where the member goes.
        self._parts = [run, self.done]
        free_after(device, index, self, self._parts, forget, holding)

    @property
    def run(self) -> Any:
        return self._parts[0]


class Instances:
    """Kernels for any thread and stream, made of instances for one run at a time.

    Threads: any. Direct calls have at most ``most`` instances; beyond them a call shares the least recently used one
    and waits for it on the device, and one that finds all of them in other threads' hands waits until a thread has
    queued its work. ``_building`` is held while one is built, so that who finds none waits for that one; lock order:
    after the process's build lock, before the pool's. Streams: work is queued on the calling thread's current stream.
    The host waits where an instance is built, for that instance's own stream.

    Those that callers' graphs are going to keep are apart, and no direct call uses them: a graph may be launched on any
    stream, and captured while a direct call is in flight for which neither it nor the host could wait.
    """

    def __init__(self, unit: Unit, kernels: Stateful, of_range: Instances | None = None) -> None:
        """``of_range``: those for many sizes, which serve direct calls of these as well."""
        self._of_range = of_range
        self._unit, self._device, self._kernels = unit, unit.device, kernels
        self._most: int = unit.limits.max_contexts
        self._limits = Limits(self._most, None)
        self._pool: ContextPool[Member] = ContextPool(self._limits)
        self._spare: list[Member] = _sync.list_("spare instances")
        self._building = _sync.rlock("instances")
        process.register(self)

    def after_fork(self) -> None:
        self._building = _sync.rlock("instances")

    def __len__(self) -> int:
        return len(self._pool)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that those of direct calls hold."""
        return self._pool.estimate * len(self._pool)

    def prepare(self, n: int) -> int:
        """Build until direct calls have ``n``, or as many as they may; returns how many they have."""
        if self._of_range is not None:
            return self._of_range.prepare(n)
        with self._building:
            while len(self._pool) < min(n, self._most):
                reservation = self._limits.book(0)
                if reservation is None:
                    break
                member = self._build(reservation)
                self._pool.add(member)
                self._pool.release(member)
        return len(self._pool)

    @property
    def spare(self) -> int:
        """How many there are for graphs that callers capture."""
        return len(self._spare)

    def prepare_spare(self, n: int) -> None:
        """Build until there are ``n`` for graphs that callers capture."""
        with self._building:
            while len(self._spare) < n:
                self._spare.append(self._build(None))

    def take(self) -> Member | None:
        """An instance for good that nothing has used; None if there is none."""
        try:
            return self._spare.pop()
        except IndexError:
            return None

    def trim(self) -> None:
        """Give up those that are idle."""
        self._pool.drain()
        while self.take() is not None:
            pass

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if self._of_range is not None:
            return self._of_range(inputs)
        stream = self._device.current_stream(self._unit.index)
        member = self._acquire(stream.stream_id)
        try:
            stream.wait_event(member.done)
            results = member.run(inputs)
            member.done.record(stream)
        except BaseException:
            self._pool.discard_used(member, stream)
            raise
        member.used_on = stream.stream_id
        self._pool.release(member)
        return results

    def _acquire(self, stream: int) -> Member:
        member = self._pool.take_ready(stream)
        if member is not None:
            return member
        with self._building:
            choice = self._pool.acquire(stream, lambda: True)
            if isinstance(choice, Member):
                return choice
            # None: all that there may be are gone and not forgotten, with threads that a forked child does not have, or
            # held by an exception that somebody keeps. They do not come back, so this one is not counted.
            member = self._build(choice)
            self._pool.add(member)
            return member

    def _build(self, reservation: Reservation | None) -> Member:
        """One more, nobody's yet. Called with ``_building`` held. ``reservation``: if it is one of a limited number."""
        device, index = self._device, self._unit.index
        lane, memory = device.acquire_lane(index), device.memory(index)
        holding = ExitStack()  # see Context.build
        holding.callback(device.release_memory, memory)
        holding.callback(device.release_lane, lane)
        run: Any = None
        forget = (lambda: None) if reservation is None else reservation.cancel
        try:
            with neutral(device, index), device.relaxed(), _activity.building():
                # In memory of the lane's own: it stays when the instance's memory goes to another owner.
                if self._unit.workspaces:
                    lane.load_workspaces()
                with device.on_stream(lane.stream), memory.using():
                    run = self._kernels.instance(lane.stream, self._unit.program.values)
                    # What is set up at a first run may wait for the device, or must not happen inside a capture.
                    run(self._unit.examples())
                    run.prepare_direct()
                lane.stream.synchronize()
            member = Member(device, index, run, memory.nbytes(), forget, holding)
        except BaseException:
            forget()
            with device.on_device(index), device.relaxed(), _activity.building():
                lane.stream.synchronize()
                run = None
                holding.close()
            raise
        if reservation is not None:
            reservation.confirm(member.nbytes)
        return member
