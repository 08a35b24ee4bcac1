"""CUDA behind the seam.

Captures do not go through ``torch.cuda.graph``: it allows one capture in the process, synchronizes the device, shares
one capture stream, and registers the random generator, so that another thread's ``randn`` raises. Here a capture is
``cudaStreamBeginCapture`` on a private non-blocking stream in thread-local mode, with this thread's allocations routed
into a private pool.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, ClassVar

import torch

from anabranch import _sync
from anabranch.devices._dependents import complete
from anabranch.devices._device import Graph, Lane, Latch, Memory, Scratch, on_its_device, real_tensors
from anabranch.devices._graveyard import Graveyard
from anabranch.errors import AnabranchError, DeviceLost, NotCapturable

try:
    from cuda.bindings import driver
    from cuda.bindings import runtime as rt
except ImportError as e:  # pragma: no cover - PyTorch's CUDA 13 wheels depend on it
    raise AnabranchError(
        "CUDA engines need the package cuda-bindings, which is not installed here. Do: pip install 'anabranch[cuda]'"
    ) from e

#: Errors after which the CUDA context of this process is unusable, and every later call fails too.
_STICKY = {
    int(getattr(rt.cudaError_t, name))
    for name in (
        "cudaErrorECCUncorrectable",
        "cudaErrorIllegalAddress",
        "cudaErrorLaunchTimeout",
        "cudaErrorAssert",
        "cudaErrorHardwareStackError",
        "cudaErrorIllegalInstruction",
        "cudaErrorMisalignedAddress",
        "cudaErrorInvalidAddressSpace",
        "cudaErrorInvalidPc",
        "cudaErrorLaunchFailure",
    )
}
_THREAD_LOCAL = rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
_RELAXED = rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
_NONE = rt.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone
_ACTIVE = rt.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive
_SUCCESS = rt.cudaError_t.cudaSuccess


class CudaCallError(AnabranchError):
    """A CUDA runtime call failed; ``code`` is its ``cudaError_t``."""

    def __init__(self, call: str, code: Any) -> None:
        super().__init__(f"{call} failed: {rt.cudaGetErrorString(code)[1].decode()} ({code.name})")
        self.error_code = int(code)


def _ok(call: str, result: tuple[Any, ...]) -> Any:
    if result[0] != _SUCCESS:
        raise CudaCallError(call, result[0])
    return result[1] if len(result) == 2 else result[1:]


class _CudaGraph:
    """See :class:`anabranch.devices.Graph`. ``source``: what it was instantiated from, where its nodes are needed."""

    __slots__ = ("executable", "source")

    def __init__(self, executable: Any, source: Any = None) -> None:
        self.executable = executable
        self.source = source

    @property
    def native(self) -> int:
        return int(self.executable)

    def launch(self, stream: Any) -> None:
        error = rt.cudaGraphLaunch(self.executable, stream.cuda_stream)[0]
        if error != _SUCCESS:
            raise CudaCallError("cudaGraphLaunch", error)

    def destroy(self) -> None:
        rt.cudaGraphExecDestroy(self.executable)
        if self.source is not None:
            rt.cudaGraphDestroy(self.source)


class _CudaMemory:
    """See :class:`anabranch.devices.Memory`."""

    def __init__(self, index: int) -> None:
        with torch.cuda.device(index):
            self._pool = torch.cuda.MemPool()
        self._id: tuple[int, int] = self._pool.id
        self.index = index

    def using(self) -> AbstractContextManager[None]:
        return torch.cuda.use_mem_pool(self._pool, self.index)

    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.segments())

    def segments(self) -> list[tuple[int, int]]:
        """(address, bytes) of each piece of device memory that the pool holds."""
        return [(int(s["address"]), int(s["total_size"])) for s in _snapshot(self._id)]


class _OrdinaryMemory:
    """PyTorch's own pool, for what a build needs while it is made.

    What was freed there stays for the stream, and goes back to the driver with ``torch.cuda.empty_cache()`` or when
    memory runs out, as after any run of a model. A private pool would keep it: temporaries of the model, and what
    Triton clears the GPU's cache with while it tunes.
    """

    def using(self) -> AbstractContextManager[None]:
        return nullcontext()

    def nbytes(self) -> int:
        return 0


def _snapshot(pool: tuple[int, int]) -> list[dict[str, Any]]:
    """What PyTorch's allocator has in the pool of this id."""
    if _snapshot_drops_references():
        for argument in (*pool, True):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(argument))
    return torch.cuda.memory_snapshot(pool)


@cache
def _snapshot_drops_references() -> bool:
    """Whether a snapshot gives up one reference too many to each number of the id that it is asked for.

    PyTorch 2.11 and 2.13 do. From Python 3.12 on the small numbers do not mind, and True does not; the ids of a process
    with more than 256 pools do: they are freed while they are in use, and some later allocation crashes.
    """
    number = int("1000003")  # an object that nobody else has, and the id of no pool
    before = sys.getrefcount(number)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(number))
    torch.cuda.memory_snapshot((0, number))
    dropped = sys.getrefcount(number) == before
    if not dropped:
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(number))
    return dropped


def _new_stream(index: int) -> Any:
    # torch.cuda.Stream() would be one of 32 that strangers share.
    with torch.cuda.device(index):
        handle = _ok("cudaStreamCreateWithFlags", rt.cudaStreamCreateWithFlags(rt.cudaStreamNonBlocking))
    return torch.cuda.ExternalStream(int(handle), device=index)


class _CudaLane:
    """See :class:`anabranch.devices.Lane`."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.stream = _new_stream(index)
        self.hidden = _CudaMemory(index)

    def load_workspaces(self) -> None:
        # PyTorch keeps one cuBLAS and one cuBLASLt workspace per (handle, stream), and a handle per thread. A first
        # product on this stream allocates them, here from the lane's own pool. Whoever clears all workspaces of the
        # process (PyTorch's own CUDA graph trees do) then gives these bytes back to a pool that only this lane
        # allocates from, so a graph that has their address baked in still owns them.
        with torch.cuda.stream(self.stream), self.hidden.using():
            a = torch.ones(8, 8, dtype=torch.half, device=f"cuda:{self.index}")
            torch.addmm(a[0], a, a)
            torch.mm(a, a)

    def hidden_nbytes(self) -> int:
        return self.hidden.nbytes()


class _CudaLatch:
    """See :class:`anabranch.devices.Latch`. The stream waits for a word of host memory: no kernel has to spin."""

    #: Held streams look at the word whatever becomes of this object, so the words live as long as the process.
    _words: ClassVar[list[torch.Tensor]] = []

    def __init__(self) -> None:
        self._word = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._words.append(self._word)

    def hold(self, stream: Any) -> None:
        address = int(_ok("cudaHostGetDevicePointer", rt.cudaHostGetDevicePointer(self._word.data_ptr(), 0)))
        equal_or_greater = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        with torch.cuda.device(stream.device_index):
            error = driver.cuStreamWaitValue32(stream.cuda_stream, address, 1, int(equal_or_greater))[0]
        if error != driver.CUresult.CUDA_SUCCESS:
            raise AnabranchError(f"cuStreamWaitValue32 failed: {error.name}")

    def open(self) -> None:
        self._word[0] = 1


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
        self._reapers: dict[int, Any] = _sync.dict_("reapers")
        self._graveyard = Graveyard(self._query, self.building)
        self._captured_by_callers = _CallerCaptures(self.release_lane)
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

    def current_stream(self, index: int) -> Any:
        return torch.cuda.current_stream(index)

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def on_device(self, index: int) -> AbstractContextManager[Any]:
        return torch.cuda.device(index)

    def stream(self, index: int) -> Any:
        return _new_stream(index)

    def latch(self) -> Latch:
        return _CudaLatch()

    def event(self) -> Any:
        return torch.Event(device=self.kind)  # PyTorch's device-generic one, which the native runtime can use

    def is_capturing(self, stream: Any) -> bool:
        # torch.cuda.is_current_stream_capturing asks about the current *device*, which need not be the stream's.
        if stream.device_index == torch.cuda.current_device():
            return torch.cuda.is_current_stream_capturing()
        return bool(_ok("cudaStreamIsCapturing", rt.cudaStreamIsCapturing(stream.cuda_stream)) != _NONE)

    @contextmanager
    def building(self) -> Iterator[None]:
        before = _ok("cudaThreadExchangeStreamCaptureMode", rt.cudaThreadExchangeStreamCaptureMode(_RELAXED))
        try:
            yield
        finally:
            _ok("cudaThreadExchangeStreamCaptureMode", rt.cudaThreadExchangeStreamCaptureMode(before))

    def acquire_lane(self, index: int) -> Lane:
        try:
            return self._free_lanes[index].pop()
        except (KeyError, IndexError):
            return _CudaLane(index)

    def release_lane(self, lane: Lane) -> None:
        assert isinstance(lane, _CudaLane)
        self._free_lanes.setdefault(lane.index, _sync.list_("lanes")).append(lane)

    def memory(self, index: int, fresh: bool = False) -> Memory:
        if fresh:
            return _CudaMemory(index)
        try:
            return self._free_memory[index].pop()
        except (KeyError, IndexError):
            return _CudaMemory(index)

    def release_memory(self, memory: Memory) -> None:
        # Not freed here: freeing a pool calls cudaFree, which waits for the whole device, and this runs in finalizers.
        assert isinstance(memory, _CudaMemory)
        self._free_memory.setdefault(memory.index, _sync.list_("memory")).append(memory)

    def scratch(self, index: int) -> Scratch:
        try:
            return self._free_scratch[index].pop()
        except (KeyError, IndexError):
            return Scratch(self, self.acquire_lane(index), _OrdinaryMemory())

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

    def capture_source(self, lane: Lane, memory: Memory, fn: Callable[[], Any]) -> tuple[_CudaGraph, Any]:
        """:meth:`capture`, with the nodes kept for as long as the graph: they name what is to be patched."""
        stream = lane.stream
        with torch.cuda.stream(stream), memory.using():
            source, result = _captured(stream, fn)
            captured = _instantiated(source)
            try:
                _ok("cudaGraphUpload", rt.cudaGraphUpload(captured.executable, stream.cuda_stream))
            except BaseException:
                captured.destroy()
                raise
        return captured, result

    def whole_kernels(self, stream: Any, queue: Callable[[Any], None]) -> WholeKernels:
        """A library's work so that no kernel starts before the one ahead of it has ended."""
        return WholeKernels(self, stream, queue)

    def graph_under_capture(self, stream: Any) -> int:
        """The handle of the graph that the capture on ``stream`` adds to."""
        return int(_capture_on(stream)[1])

    def join_capture(self, stream: Any, index: int, keep: Any) -> Lane:
        tie = self._captured_by_callers.of(stream)
        if keep not in tie.kept:
            tie.kept.append(keep)
        lane = tie.lanes.get(stream.cuda_stream)
        if lane is None:
            lane = tie.lanes.setdefault(stream.cuda_stream, self.acquire_lane(index))
        return lane

    def kept_by_capture(self, stream: Any) -> list[Any]:
        return list(self._captured_by_callers.of(stream).kept)

    def hand_over(self, tensors: Sequence[torch.Tensor], stream: Any) -> None:
        # The allocator need not know. Their blocks can come back only to the lane, in this capture's pool, and all that
        # is ever queued on the lane there waits for the caller's stream first.
        pass

    def prepare_retire(self, index: int) -> None:
        if index not in self._reapers:
            self._reapers.setdefault(index, _new_stream(index))

    def retire(self, events: Sequence[Any], tensors: Sequence[torch.Tensor]) -> None:
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

    def bury(self, index: int, events: Sequence[Any], remains: Any, then: Callable[[], None]) -> None:
        self._graveyard.bury(events, remains, on_its_device(self, index, then))

    def reap(self) -> None:
        self._graveyard.reap()

    def bury_code(self, index: int, free: Callable[[], None]) -> None:
        self._graveyard.bury_code(on_its_device(self, index, free))

    def free_code(self) -> None:
        if not self.lost() and not torch.cuda.is_current_stream_capturing():
            self._graveyard.free_code()

    def _query(self, events: Sequence[Any]) -> bool:
        # Nothing is freed in the midst of a capture, which that might end; of other threads' captures nobody knows.
        if self._lost or torch.cuda.is_current_stream_capturing():
            return False
        # Asking an event is forbidden while a global-mode capture is under way, and would invalidate that capture.
        with self.building():
            return all(event.query() for event in events)

    def lost(self) -> str | None:
        return self._lost

    def check_error(self, error: BaseException) -> None:
        if getattr(error, "error_code", None) in _STICKY and not isinstance(error, DeviceLost):
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


def _capture_on(stream: Any) -> tuple[Any, Any]:
    """Number of the capture that is under way on the stream, and the graph that it adds to."""
    status, identity, graph, *_ = _ok("cudaStreamGetCaptureInfo", rt.cudaStreamGetCaptureInfo(stream.cuda_stream))
    if status != _ACTIVE:
        raise NotCapturable(
            "the capture on the current stream was invalidated before this call: since it began, something was done"
            " that CUDA forbids meanwhile, on the stream, in this thread, or (in capture mode 'global') in any thread,"
            " such as to allocate or free device memory, load code, or wait for the device. Begin the capture again"
            ' without it, or capture with capture_error_mode="thread_local".'
        )
    return identity, graph


def _captured(stream: Any, fn: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``fn`` queues on the stream and its forks, as a graph that is the caller's to destroy, and its result."""
    try:
        _ok("cudaStreamBeginCapture", rt.cudaStreamBeginCapture(stream.cuda_stream, _THREAD_LOCAL))
        result = fn()
        return _ok("cudaStreamEndCapture", rt.cudaStreamEndCapture(stream.cuda_stream)), result
    except BaseException:
        # Wherever it was interrupted: a thread whose capture stays open can do nothing else.
        error, graph = rt.cudaStreamEndCapture(stream.cuda_stream)
        if error == _SUCCESS:
            rt.cudaGraphDestroy(graph)
        rt.cudaGetLastError()  # a failed capture leaves its error behind; it is not the next call's
        raise


def _instantiated(graph: Any) -> _CudaGraph:
    """With its source, which goes if this fails."""
    try:
        return _CudaGraph(_ok("cudaGraphInstantiate", rt.cudaGraphInstantiate(graph, 0)), graph)
    except BaseException:
        rt.cudaGraphDestroy(graph)
        raise


class WholeKernels:
    """A library's work, captured once, with each kernel after the whole of the one before.

    ``early``: how many kernels would have started before that. Where there are none, nothing is kept, and the library
    may as well queue its work itself. Threads: one use at a time. Streams: any; each launch has to be ordered after the
    one before.
    """

    def __init__(self, device: CudaDevice, stream: Any, queue: Callable[[Any], None]) -> None:
        """``queue`` is to put its work on the stream that it is given, which is ``stream``; nothing runs there."""
        graphs: list[_CudaGraph] = []
        weakref.finalize(self, _destroy, graphs).atexit = False
        with device.building():
            source, _ = _captured(stream, lambda: queue(stream))
            try:
                self.early = complete(int(source))
            except BaseException:
                rt.cudaGraphDestroy(source)
                raise
            if self.early:
                graphs.append(_instantiated(source))
            else:
                rt.cudaGraphDestroy(source)
        self._graphs = graphs

    def launch(self, stream: Any) -> None:
        self._graphs[0].launch(stream)


def _destroy(graphs: list[_CudaGraph]) -> None:
    while graphs:
        graphs.pop().destroy()


class _CallerCapture:
    """One capture of a caller's: what its graph has baked in."""

    def __init__(self) -> None:
        self.semaphore = (ctypes.c_char * 64)()  # sizeof(sem_t) is 32 on 64-bit Linux
        self.kept: list[Any] = _sync.list_("kept")
        self.lanes: dict[int, Lane] = _sync.dict_("lanes of a capture")


class _CallerCaptures:
    """What callers' own graphs have baked in, kept until CUDA says that the graph is gone.

    A CUDA *user object* is retained by the graph under capture and by every executable made of it. Its destructor runs
    on a thread of the driver, where Python must not run (at interpreter exit least of all), so it is libc's own
    ``sem_post``: it raises a semaphore here, and :meth:`reap` looks at the semaphores later.
    """

    def __init__(self, release_lane: Callable[[Lane], None]) -> None:
        self._libc = ctypes.CDLL(None)
        self._sem_post = ctypes.cast(self._libc.sem_post, ctypes.c_void_p).value
        self._release_lane = release_lane
        #: By CUDA's id of the capture, unique in the process.
        self._captures: dict[int, _CallerCapture] = _sync.dict_("captures of callers")

    def of(self, stream: Any) -> _CallerCapture:
        """The capture under way on ``stream``."""
        identity, graph = _capture_on(stream)
        capture = self._captures.get(int(identity))
        if capture is not None:
            return capture
        capture = _CallerCapture()
        self._libc.sem_init(ctypes.byref(capture.semaphore), 0, 0)
        user_object = _ok(
            "cudaUserObjectCreate",
            rt.cudaUserObjectCreate(
                ctypes.addressof(capture.semaphore),
                self._sem_post,
                1,
                rt.cudaUserObjectFlags.cudaUserObjectNoDestructorSync,
            ),
        )
        # From here on the driver may write to the semaphore: it has to be kept before anything else can fail.
        self._captures[int(identity)] = capture
        move = rt.cudaUserObjectRetainFlags.cudaGraphUserObjectMove
        _ok("cudaGraphRetainUserObject", rt.cudaGraphRetainUserObject(graph, user_object, 1, move))
        return capture

    def reap(self) -> None:
        """Let go of what dead graphs kept. Runs in garbage collections: no locks."""
        for identity, capture in list(self._captures.items()):
            if self._libc.sem_trywait(ctypes.byref(capture.semaphore)) == 0:
                self._captures.pop(identity, None)
                for lane in capture.lanes.values():
                    self._release_lane(lane)
