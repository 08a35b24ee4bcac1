"""CUDA behind the seam."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch

from anabranch import _sync
from anabranch.devices._device import Graph, Lane, Latch, Memory, Scratch
from anabranch.devices._stream import Event, Stream
from anabranch.devices._stream_device import Spares, StreamDevice
from anabranch.devices._turns import watch_pytorch
from anabranch.devices.cuda._callers import CallerCaptures
from anabranch.devices.cuda._calls import NOT_CAPTURING, RELAXED, STICKY, CudaCallError, checked, rt
from anabranch.devices.cuda._driver import handle
from anabranch.devices.cuda._graph import CudaGraph, WholeKernels, capture_on, capture_work, instantiated, making
from anabranch.devices.cuda._lane import CudaLane, CudaLatch, new_stream
from anabranch.devices.cuda._memory import CudaMemory, OrdinaryMemory
from anabranch.errors import DeviceLost


@_sync.atomics("_lost")
class CudaDevice(StreamDevice):
    """See :class:`anabranch.devices.Device`."""

    kind = "cuda"
    has_streams = True
    survives_fork = False
    has_time = True
    backends: tuple[str, ...] = ("inductor", "eager", "tensorrt")

    def __init__(self) -> None:
        super().__init__()
        # Apart from lanes of contexts: what is freed stays with the stream, and shall do so with one stream only.
        self._scratches = Spares("scratch", lambda i: Scratch(self.on_stream, self.acquire_lane(i), OrdinaryMemory(i)))
        self._captured_by_callers = CallerCaptures(self.release_lane)
        self._lost: str | None = None
        self._leaked: list[Any] = _sync.list_("leaked")
        self._nvtx = os.environ.get("ANABRANCH_NVTX", "") not in ("", "0")
        self._deferred.also = self._captured_by_callers.collect
        os.register_at_fork(after_in_child=self._after_fork)
        watch_pytorch()

    def _after_fork(self) -> None:
        # The child cannot use the parent's CUDA context. Nothing of it may be destroyed there, so it is leaked.
        self._lost = "this process was forked from one that used CUDA"
        ours = (self._deferred, self._captured_by_callers, self.lanes, self.memories, self._scratches)
        for obj in (*ours, self._leaked):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(obj))
        self._deferred.close()

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
    def relaxed(self) -> Iterator[None]:
        before = checked("cudaThreadExchangeStreamCaptureMode", rt.cudaThreadExchangeStreamCaptureMode(RELAXED))
        try:
            yield
        finally:
            checked("cudaThreadExchangeStreamCaptureMode", rt.cudaThreadExchangeStreamCaptureMode(before))

    def new_lane(self, index: int) -> Lane:
        return CudaLane(index)

    def new_memory(self, index: int) -> Memory:
        return CudaMemory(index)

    def scratch(self, index: int) -> Scratch:
        return self._scratches.take(index)

    def release_scratch(self, scratch: Scratch) -> None:
        self._scratches.give(scratch.lane.index, scratch)

    def trim(self) -> None:
        self.collect()
        self.free_code()
        for _ in self.memories.drain():
            pass
        for unused in self._scratches.drain():
            self.release_lane(unused.lane)
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
                with making:
                    checked("cudaGraphUpload", rt.cudaGraphUpload(captured.executable, handle(stream)))
            except BaseException:
                captured.destroy()
                raise
        return captured, result

    def whole_kernels(self, stream: Stream, queue: Callable[[Stream], None]) -> WholeKernels:
        """A library's work so that no kernel starts before the one ahead of it has ended."""
        return WholeKernels(self, stream, queue)

    def without_captures(self) -> AbstractContextManager[Any]:
        """No graph of ours is made while the block runs, in any thread; nor another such block. It nests."""
        return making

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

    def leak(self, *what: Any) -> None:
        self._leaked.append(what)

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
