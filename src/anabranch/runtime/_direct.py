"""Kernels without a graph of ours: on the caller's stream, or in the graph that the caller is capturing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anabranch.backends import Instance, Kernels, Stateful
from anabranch.devices import Lane, Stream
from anabranch.errors import FlagsChanged, NotCapturable
from anabranch.export import READS_ON_HOST
from anabranch.runtime._instances import Instances, Member
from anabranch.runtime._last_uses import LastUses
from anabranch.runtime._unit import Unit


class Direct:
    """Calls that launch the kernels one by one. Both runtimes have it for what they have no faster way for.

    Threads: any. Streams: a call queues everything on the caller's stream ``s``, in this order:

    ======================  ===========================================================================
    direct path             ``s`` waits for the event of its last direct call; the kernels; the event is
                            recorded (for the day when the weights are freed)
    in a caller's capture   a lane is forked from ``s``; the kernels run on it; it is joined to ``s``
    ======================  ===========================================================================
    """

    def __init__(self, unit: Unit) -> None:
        self._unit, self._device = unit, unit.device
        self.last_uses = LastUses(unit.device, unit.index, unit.program.weights)
        #: Of one for many sizes that has the kernels for these: what serves direct calls of all of them.
        self.of_range: Instances | None = None
        #: Set while the specialization is built.
        self.kernels: Kernels
        self._backend: str

    def set_kernels(self, kernels: Kernels | Stateful, backend: str) -> None:
        """What calls run from now on. With the build lock held."""
        self.kernels = Instances(self._unit, kernels, self.of_range) if isinstance(kernels, Stateful) else kernels
        self._backend = backend

    @property
    def instances(self) -> Instances | None:
        """Those of kernels that have state."""
        return self.kernels if isinstance(self.kernels, Instances) else None

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Run one call on the calling thread's current stream."""
        device, counters = self._device, self._unit.counters
        if not device.has_streams:
            results = self.run(inputs)
        else:
            stream = device.current_stream(self._unit.index)
            # A thread that never ran a kernel makes its libraries' handles now, also inside a capture.
            with device.relaxed():
                if device.is_capturing(stream):
                    results = self._in_capture(inputs, stream)
                    counters.add("calls", "calls_in_captures")
                    return results
                results = self._queue(inputs, stream)
        counters.add("calls", "direct_calls")
        return results

    def run(self, inputs: Sequence[torch.Tensor], kernels: Kernels | Instance | None = None) -> Sequence[torch.Tensor]:
        """Queue the kernels on the current stream, under the flags that the engine was compiled with.

        Other threads may set flags while the kernels are queued (``torch.export`` does, for as long as it traces): so
        the flags are looked at before and after, and a run in which they changed is thrown away.
        """
        kernels, unit = kernels or self.kernels, self._unit
        watch = unit.watch
        if unit.written:
            return self._run_writing(inputs, kernels)
        if not watch.reads_any:
            return kernels(self.canonical(inputs))
        for _ in range(3):
            watch.check()
            results = kernels(self.canonical(inputs))
            if watch.unchanged():
                return results
        raise FlagsChanged(
            "numerics flags changed again and again during a call, in another thread; set them once, before the calls"
        )

    def _run_writing(self, inputs: Sequence[torch.Tensor], kernels: Kernels | Instance) -> Sequence[torch.Tensor]:
        """As :meth:`run`, of a program that writes into what it is given: what was written cannot be thrown away."""
        unit = self._unit
        if unit.watch.reads_any:
            unit.watch.check()
        used = self.canonical(inputs)
        results = kernels(used)
        unit.write_back(inputs, used)
        if unit.watch.reads_any and not unit.watch.unchanged():
            written = ", ".join(map(unit.name_of, unit.written))
            raise FlagsChanged(
                f"numerics flags changed during a call, in another thread, and what it wrote ({written}) may be of"
                " other precision; set them once, before the calls",
                wrote=True,
            )
        return results

    def _queue(self, inputs: Sequence[torch.Tensor], stream: Stream) -> Sequence[torch.Tensor]:
        event = self.last_uses.of_stream(stream.stream_id)
        # The stream may be a new one under the handle of one that died: what that one still runs stays covered.
        stream.wait_event(event)
        try:
            return self.run(inputs)
        finally:
            event.record(stream)

    def _in_capture(self, inputs: Sequence[torch.Tensor], stream: Stream) -> Sequence[torch.Tensor]:
        # Not on the caller's stream itself: two graphs that a caller captures on one stream would have that stream's
        # cuBLAS workspace in common, and their replays on two streams would race for it. A lane has its own.
        device, unit = self._device, self._unit
        if unit.program.data_dependent:
            raise NotCapturable(
                f"this call is inside a CUDA graph capture, and the model is {unit.program.direct_only}, which needs"
                " the host to look at results. Call the engine outside the capture."
            )
        if any(u.why == READS_ON_HOST for u in unit.program.uncaptured):
            raise NotCapturable(
                f"this call is inside a CUDA graph capture, and an operator of the model {unit.program.direct_only},"
                " which needs the host to wait. Call the engine outside the capture."
            )
        if unit.program.on_cpu:
            raise NotCapturable(
                f"this call is inside a CUDA graph capture, and the model is {unit.program.direct_only}: a graph would"
                " keep the values of this call. Call the engine outside the capture, or compile another one with all"
                f" inputs on {unit.torch_device}."
            )
        if unit.program.is_empty:
            return []
        unit.watch.check()  # before anything enters the capture
        lane = device.join_capture(stream, unit.index, keep=self)
        run = self._for_capture(stream, lane)
        # On the mere suspicion: memory that the lane first got inside the capture would be the caller's pool's.
        if unit.watch.reads_any:
            lane.load_workspaces()
        fork, join = device.event(), device.event()
        fork.record(stream)
        lane.stream.wait_event(fork)
        try:
            with device.on_stream(lane.stream):
                results = self.run(inputs, run)
            device.hand_over(results, stream)
            return results
        finally:
            # Also after an error: a lane left forked would invalidate the caller's capture as a whole.
            join.record(lane.stream)
            stream.wait_event(join)

    def _for_capture(self, stream: Stream, lane: Lane) -> Kernels | Instance:
        """What a call may run on ``lane``, in the capture under way on ``stream``, for as long as its graph lives."""
        if not isinstance(self.kernels, Instances):
            return self.kernels
        if self._unit.signature.is_range:
            raise NotCapturable(
                f"this call is inside a CUDA graph capture, and {self._backend} has to run on inputs of its shapes"
                " once before. Before the capture call engine.warm(inputs) with inputs of these shapes, unless"
                " cuda_graphs=False was given; or compile with dynamic=False."
            )
        for kept in self._device.kept_by_capture(stream):
            if isinstance(kept, _Kept) and kept.owner is self and kept.lane is lane:
                return kept.member.run  # calls of one capture and stream follow each other
        member = self.kernels.take()
        if member is None:
            # Built now, it would load code, which invalidates a capture in the global mode.
            raise NotCapturable(
                f"this call is inside a CUDA graph capture, and no execution context of {self._backend} is left for"
                " it: each captured graph keeps one, of each stream that calls come on in it. Before the captures call"
                " engine.warm(captures=N), N being how many graphs you capture."
            )
        kept = _Kept(self, lane, member)
        self._device.join_capture(stream, self._unit.index, keep=kept)
        return kept.member.run

    def canonical(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Inputs as the kernels take them."""
        # On the CPU PyTorch's operators take any layout, and give eager's bits for it. Where there are graphs a call
        # has the same bits with one and without.
        if self._backend == "eager" and not self._device.has_streams:
            return list(inputs)
        return self._unit.canonical(inputs)


class _Kept:
    """An instance that the calls of ``owner`` on ``lane`` use in a caller's graph: the graph's, until it is gone."""

    def __init__(self, owner: Direct, lane: Lane, member: Member) -> None:
        self.owner = owner
        self.lane = lane
        self.member = member
