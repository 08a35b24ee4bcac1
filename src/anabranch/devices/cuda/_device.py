"""CUDA behind the seam."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch

from anabranch import _sync
from anabranch.devices._device import Graph, Lane, Latch, Memory, Scratch, on_its_device, real_tensors
from anabranch.devices._graveyard import Graveyard
from anabranch.devices._stream import Event, Stream
from anabranch.devices.cuda._callers import CallerCaptures
from anabranch.devices.cuda._calls import NOT_CAPTURING, RELAXED, STICKY, CudaCallError, checked, rt
from anabranch.devices.cuda._driver import handle
from anabranch.devices.cuda._graph import CudaGraph, WholeKernels, capture_on, capture_work, instantiated
from anabranch.devices.cuda._lane import CudaLane, CudaLatch, new_stream
from anabranch.devices.cuda._memory import CudaMemory, OrdinaryMemory
from anabranch.errors import DeviceLost


@_sync.atomics("_lost")
class CudaDevice:
    """See :class:`anabranch.devices.Device`.

    Garbage collections call :meth:`release_lane`, :meth:`retire` and :meth:`bury` in the middle of anything, so no
    method of this class takes a lock: what threads share is changed by single list and dict operations.
    """

    kind = "cuda"
    has_streams = True
    survives_fork = False
    has_time = True
    backends: tuple[str, ...] = ("inductor", "eager", "tensorrt")

    def __init__(self) -> None:
        self._free_lanes: dict[int, list[Lane]] = _sync.dict_("free lanes")
        self._free_memory: dict[int, list[Memory]] = _sync.dict_("free memory")
        # Apart from lanes of contexts: what is freed stays with the stream, and shall do so with one stream only.
        self._free_scratch: dict[int, list[Scratch]] = _sync.dict_("free scratch")
        self._reapers: dict[int, Stream] = _sync.dict_("reapers")
        self._graveyard = Graveyard(self._query, self.building)
        self._captured_by_callers = CallerCaptures(self.release_lane)
        self._lost: str | None = None
        self._leaked: list[Any] = _sync.list_("leaked")
        self._nvtx = os.environ.get("ANABRANCH_NVTX", "") not in ("", "0")
        self._graveyard.also = self._captured_by_callers.reap
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        # The child cannot use the parent's CUDA context. Nothing of it may be destroyed there, so it is leaked.
        self._lost = "this process was forked from one that used CUDA"
        ours = (self._graveyard, self._captured_by_callers, self._free_lanes, self._free_memory, self._free_scratch)
        for obj in (*ours, self._leaked):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(obj))
        self._graveyard.close()

    def index(self, device: torch.device) -> int:
        return torch.cuda.current_device() if device.index is None else device.index

    def current_index(self) -> int:
        return torch.cuda.current_device()

    def current_stream(self, index: int) -> Stream:
        return torch.cuda.current_stream(index)

    def on_stream(self, stream: Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(cast("torch.cuda.Stream", stream))

    def on_device(self, index: int) -> AbstractContextManager[Any]:
        return torch.cuda.device(index)

    def stream(self, index: int) -> Stream:
        return new_stream(index)

    def latch(self) -> Latch:
        return CudaLatch()

    def event(self) -> Event:
        return torch.Event(device=self.kind)  # PyTorch's device-generic one, which the native runtime can use

    def is_capturing(self, stream: Stream) -> bool:
        # torch.cuda.is_current_stream_capturing asks about the current *device*, which need not be the stream's.
        if stream.device_index == torch.cuda.current_device():
            return torch.cuda.is_current_stream_capturing()
        return bool(checked("cudaStreamIsCapturing", rt.cudaStreamIsCapturing(handle(stream))) != NOT_CAPTURING)

    @contextmanager
    def building(self) -> Iterator[None]:
        before = checked("cudaThreadExchangeStreamCaptureMode", rt.cudaThreadExchangeStreamCaptureMode(RELAXED))
        try:
            yield
        finally:
            checked("cudaThreadExchangeStreamCaptureMode", rt.cudaThreadExchangeStreamCaptureMode(before))

    def acquire_lane(self, index: int) -> Lane:
        try:
            return self._free_lanes[index].pop()
        except (KeyError, IndexError):
            return CudaLane(index)

    def release_lane(self, lane: Lane) -> None:
        assert isinstance(lane, CudaLane)
        self._free_lanes.setdefault(lane.index, _sync.list_("lanes")).append(lane)

    def memory(self, index: int, fresh: bool = False) -> Memory:
        if fresh:
            return CudaMemory(index)
        try:
            return self._free_memory[index].pop()
        except (KeyError, IndexError):
            return CudaMemory(index)

    def release_memory(self, memory: Memory) -> None:
        # Not freed here: freeing a pool calls cudaFree, which waits for the whole device, and this runs in finalizers.
        assert isinstance(memory, CudaMemory)
        self._free_memory.setdefault(memory.index, _sync.list_("memory")).append(memory)

    def scratch(self, index: int) -> Scratch:
        try:
            return self._free_scratch[index].pop()
        except (KeyError, IndexError):
            return Scratch(self, self.acquire_lane(index), OrdinaryMemory())

    def release_scratch(self, scratch: Scratch) -> None:
        self._free_scratch.setdefault(scratch.lane.index, _sync.list_("scratch")).append(scratch)

    def trim(self) -> None:
        self.reap()
        self.free_code()
        for pools in list(self._free_memory.values()):
            pools.clear()
        for unused in list(self._free_scratch.values()):
            while unused:
                try:
                    self.release_lane(unused.pop().lane)
                except IndexError:
                    break
        torch.cuda.empty_cache()

    def capture(self, lane: Lane, memory: Memory, fn: Callable[[], Any]) -> tuple[Graph, Any]:
        graph, result = self.capture_source(lane, memory, fn)
        rt.cudaGraphDestroy(graph.source)
        graph.source = None
        return graph, result

    def capture_source(self, lane: Lane, memory: Memory, fn: Callable[[], Any]) -> tuple[CudaGraph, Any]:
        """:meth:`capture`, with the nodes kept for as long as the graph: they name what is to be patched."""
        stream = lane.stream
        with self.on_stream(stream), memory.using():
            source, result = capture_work(stream, fn)
            captured = instantiated(source)
            try:
                checked("cudaGraphUpload", rt.cudaGraphUpload(captured.executable, handle(stream)))
            except BaseException:
                captured.destroy()
                raise
        return captured, result

    def whole_kernels(self, stream: Stream, queue: Callable[[Stream], None]) -> WholeKernels:
        """A library's work so that no kernel starts before the one ahead of it has ended."""
        return WholeKernels(self, stream, queue)

    def graph_under_capture(self, stream: Stream) -> int:
        """The handle of the graph that the capture on ``stream`` adds to."""
        return int(capture_on(stream)[1])

    def join_capture(self, stream: Stream, index: int, keep: Any) -> Lane:
        tie = self._captured_by_callers.of(stream)
        if keep not in tie.kept:
            tie.kept.append(keep)
        lane = tie.lanes.get(handle(stream))
        if lane is None:
            lane = tie.lanes.setdefault(handle(stream), self.acquire_lane(index))
        return lane

    def kept_by_capture(self, stream: Stream) -> list[Any]:
        return list(self._captured_by_callers.of(stream).kept)

    def hand_over(self, tensors: Sequence[torch.Tensor], stream: Stream) -> None:
        # The allocator need not know. Their blocks can come back only to the lane, in this capture's pool, and all that
        # is ever queued on the lane there waits for the caller's stream first.
        pass

    def prepare_retire(self, index: int) -> None:
        if index not in self._reapers:
            self._reapers.setdefault(index, new_stream(index))

    def retire(self, events: Sequence[Event], tensors: Sequence[torch.Tensor]) -> None:
        # A stream that a caller used may be gone by now, so no tensor is recorded on it. One stream of ours waits for
        # all last uses, and the tensors are recorded on that one: their blocks come back after every last use.
        cuda = [t for t in tensors if t.is_cuda]
        if self._lost:
            # In a forked child, or on a broken device, even destroying an event can abort the process.
            self._leaked.append((events, tensors))
            return
        if not events or not cuda:
            return
        reaper = self._reapers[cuda[0].device.index]
        for event in events:
            reaper.wait_event(event)
        with real_tensors():
            for t in cuda:
                t.record_stream(reaper)

    def bury(self, index: int, events: Sequence[Event], remains: Any, then: Callable[[], None]) -> None:
        self._graveyard.bury(events, remains, on_its_device(self, index, then))

    def reap(self) -> None:
        self._graveyard.reap()

    def bury_code(self, index: int, free: Callable[[], None]) -> None:
        self._graveyard.bury_code(on_its_device(self, index, free))

    def free_code(self) -> None:
        if not self.lost() and not torch.cuda.is_current_stream_capturing():
            self._graveyard.free_code()

    def _query(self, events: Sequence[Event]) -> bool:
        # Nothing is freed in the midst of a capture, which that might end; of other threads' captures nobody knows.
        if self._lost or torch.cuda.is_current_stream_capturing():
            return False
        # Asking an event is forbidden while a global-mode capture is under way, and would invalidate that capture.
        with self.building():
            return all(event.query() for event in events)

    def lost(self) -> str | None:
        return self._lost

    def check_error(self, error: BaseException) -> None:
        if getattr(error, "error_code", None) in STICKY and not isinstance(error, DeviceLost):
            self._lost = str(error).splitlines()[0]
            raise DeviceLost(
                f"the GPU reported an error that lasts until this process ends: {self._lost}. Every engine on it now"
                " raises DeviceLost. Start a new process; CUDA_LAUNCH_BLOCKING=1 there finds the kernel at fault."
            ) from error

    def native_api(self, core: Any) -> int:
        return int(core.cuda_api())

    def call_error(self, call: str, code: int) -> Exception:
        return CudaCallError(call, rt.cudaError_t(code))

    @property
    def is_profiled(self) -> bool:
        return self._nvtx

    def range(self, name: str) -> AbstractContextManager[Any]:
        return torch.cuda.nvtx.range(name) if self._nvtx else nullcontext()

    def describe(self, index: int) -> str:
        return torch.cuda.get_device_name(index)
