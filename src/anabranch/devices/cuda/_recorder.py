"""Makes recordings. :func:`record` captures a program twice and compares (:mod:`anabranch.devices.cuda._relocation`):
the result says which words of which kernels' parameters are addresses of inputs and outputs. What was found is tried
out (:mod:`anabranch.devices.cuda._trial`)."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.devices._device import Scratch
from anabranch.devices.cuda._captured import Captured, Log, Source, capture_on_lane, wait
from anabranch.devices.cuda._device import CudaDevice
from anabranch.devices.cuda._lane import CudaLane
from anabranch.devices.cuda._memory import CudaMemory
from anabranch.devices.cuda._nodes import Unreadable, is_device
from anabranch.devices.cuda._recording import Recording
from anabranch.devices.cuda._relocation import compare, verify
from anabranch.devices.cuda._trial import prove
from anabranch.export import TensorSpec

#: Alignments, in bytes, that the captures are tried with. A call's tensors have the first one at least.
_ALIGNMENTS = (16, 256)


def record(
    device: CudaDevice,
    lane: CudaLane,
    memory: CudaMemory,
    scratch: Scratch,
    source: Source,
    specs: Sequence[TensorSpec],
    workspaces: bool,
    log: Log,
) -> Recording | str:
    """Capture what ``source`` gives on the lane into the memory, so that it can be bound; or say why not.

    ``scratch``, where it is captured a second time and tried, is needed meanwhile only: when this returns, nothing that
    was queued here on it is unfinished and nothing that was put here into it is in use. The host waits for both lanes.
    ``workspaces``, the build lock, the thread's state, and that the kernels must have run before, are as for
    ``Context.build``.
    """
    first: Captured | None = None
    keep = False
    try:
        first = capture_on_lane(device, lane, memory, scratch, source, specs, workspaces, log, 0)
        reason = ""
        for alignment in _ALIGNMENTS:
            # At an address that is aligned no better than a call's need be: whatever was chosen for more would show.
            second = capture_on_lane(
                device, _lane(scratch), scratch.memory, scratch, source, specs, workspaces, log, alignment
            )
            try:
                table = compare(first.capture, second.capture, is_device)
                if isinstance(table, str):
                    reason = table  # of the best alignment that there is
                    continue
                recording = first.bind(table, table.noise, alignment)
                wait(lane, scratch.lane)  # what warmed up wrote where it was captured
                reason = prove(recording, scratch, first.kernels, specs, workspaces, [first, second], rounds=2)
                keep = not reason
                return reason or recording
            finally:
                wait(lane, scratch.lane)
                second.graph.destroy()
                del second
        return reason
    except Unreadable as e:
        return str(e)
    finally:
        wait(lane, scratch.lane)
        if first is not None and not keep:
            first.graph.destroy()


def record_again(
    known: Recording,
    device: CudaDevice,
    lane: CudaLane,
    memory: CudaMemory,
    scratch: Scratch,
    source: Source,
    specs: Sequence[TensorSpec],
    workspaces: bool,
    log: Log,
) -> Recording | str:
    """A further capture of the program that ``known`` is a recording of: one capture, held against what is known."""
    captured: Captured | None = None
    keep = False
    try:
        captured = capture_on_lane(device, lane, memory, scratch, source, specs, workspaces, log, 0)
        noise = verify(known.table, captured.capture, is_device)
        if isinstance(noise, str):
            return noise
        recording = captured.bind(known.table, noise, known.alignment)
        wait(lane)  # what warmed up wrote where it was captured
        reason = prove(recording, scratch, captured.kernels, specs, workspaces, [captured], rounds=1)
        keep = not reason
        return reason or recording
    except Unreadable as e:
        return str(e)
    finally:
        wait(lane, scratch.lane)
        if captured is not None and not keep:
            captured.graph.destroy()


def _lane(scratch: Scratch) -> CudaLane:
    assert isinstance(scratch.lane, CudaLane)
    return scratch.lane
