"""CUDA graphs: captures, what is made of them, and a library's work captured for its own sake.

Captures do not go through ``torch.cuda.graph``: it allows one capture in the process, synchronizes the device, shares
one capture stream, and registers the random generator, so that another thread's ``randn`` raises. Here a capture is
``cudaStreamBeginCapture`` on a private non-blocking stream in thread-local mode, with this thread's allocations routed
into a private pool.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from anabranch import _sync
from anabranch.devices import _turns
from anabranch.devices._device import Device
from anabranch.devices._stream import Stream
from anabranch.devices.cuda._calls import ACTIVE, SUCCESS, THREAD_LOCAL, CudaCallError, checked, rt
from anabranch.devices.cuda._driver import handle
from anabranch.devices.cuda._early import complete
from anabranch.errors import NotCapturable


class CudaGraph:
    """See :class:`anabranch.devices.Graph`. ``source``: what it was instantiated from, where its nodes are needed."""

    __slots__ = ("executable", "source")

    def __init__(self, executable: Any, source: Any = None) -> None:
        self.executable = executable
        self.source = source

    @property
    def native(self) -> int:
        return int(self.executable)

    def launch(self, stream: Stream) -> None:
        error = rt.cudaGraphLaunch(self.executable, handle(stream))[0]
        if error != SUCCESS:
            raise CudaCallError("cudaGraphLaunch", error)

    def destroy(self) -> None:
        rt.cudaGraphExecDestroy(self.executable)
        if self.source is not None:
            rt.cudaGraphDestroy(self.source)


def capture_on(stream: Stream) -> tuple[Any, Any]:
    """Number of the capture that is under way on the stream, and the graph that it adds to."""
    status, identity, graph, *_ = checked("cudaStreamGetCaptureInfo", rt.cudaStreamGetCaptureInfo(handle(stream)))
    if status != ACTIVE:
        raise NotCapturable(
            "the capture on the current stream was invalidated before this call: since it began, something was done"
            " that CUDA forbids meanwhile, on the stream, in this thread, or (in capture mode 'global') in any thread,"
            " such as to allocate or free device memory, load code, or wait for the device. Begin the capture again"
            ' without it, or capture with capture_error_mode="thread_local".'
        )
    return identity, graph


#: Held while a graph is made, and while TensorRT does anything. An execution context records events of its own in each
#: run, those that are captured too, and CUDA 13.0's driver ends the process now and then where one thread records such
#: an event again while another captures: in cuEventRecord or cudaStreamEndCapture, or later. Of 14 runs of 100 s 12 did
#: so; of 4 in which first runs on new shapes took turns with captures, 1; of 2 in which all runs did, none
#: (benchmarks/results/captures_beside_tensorrt_h200.json).
making = _sync.rlock("making graphs")


def capture_work(stream: Stream, fn: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``fn`` queues on the stream and its forks, as a graph that is the caller's to destroy, and its result.

    Nobody waits for the device meanwhile: see :mod:`anabranch.devices._turns`.
    """
    with _turns.turns.capturing(), making:
        return _capture(stream, fn)


def _capture(stream: Stream, fn: Callable[[], Any]) -> tuple[Any, Any]:
    try:
        checked("cudaStreamBeginCapture", rt.cudaStreamBeginCapture(handle(stream), THREAD_LOCAL))
        result = fn()
        return checked("cudaStreamEndCapture", rt.cudaStreamEndCapture(handle(stream))), result
    except BaseException:
        # Wherever it was interrupted: a thread whose capture stays open can do nothing else.
        error, graph = rt.cudaStreamEndCapture(handle(stream))
        if error == SUCCESS:
            rt.cudaGraphDestroy(graph)
        rt.cudaGetLastError()  # a failed capture leaves its error behind; it is not the next call's
        raise


def instantiated(graph: Any) -> CudaGraph:
    """With its source, which goes if this fails."""
    try:
        with making:
            return CudaGraph(checked("cudaGraphInstantiate", rt.cudaGraphInstantiate(graph, 0)), graph)
    except BaseException:
        rt.cudaGraphDestroy(graph)
        raise


class WholeKernels:
    """A library's work, captured once, with each kernel after the whole of the one before.

    ``early``: how many kernels would have started before that. Where there are none, nothing is kept, and the library
    may as well queue its work itself. Threads: one use at a time. Streams: any; each launch has to be ordered after the
    one before.
    """

    def __init__(self, device: Device, stream: Stream, queue: Callable[[Stream], None]) -> None:
        """``queue`` is to put its work on the stream that it is given, which is ``stream``; nothing runs there."""
        graphs: list[CudaGraph] = []
        weakref.finalize(self, _destroy, graphs).atexit = False
        with device.relaxed():
            source, _ = capture_work(stream, lambda: queue(stream))
            try:
                self.early = complete(int(source))
            except BaseException:
                rt.cudaGraphDestroy(source)
                raise
            if self.early:
                graphs.append(instantiated(source))
            else:
                rt.cudaGraphDestroy(source)
        self._graphs = graphs

    def launch(self, stream: Stream) -> None:
        self._graphs[0].launch(stream)


def _destroy(graphs: list[CudaGraph]) -> None:
    while graphs:
        graphs.pop().destroy()
