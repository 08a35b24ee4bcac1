"""What the runtime asks of a device. Everything takes its stream as an argument: there is no hidden default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from anabranch.devices._stream import Event, Stream


class Graph(Protocol):
    """A captured graph, ready to launch. Not thread-safe: one thread at a time may use it."""

    @property
    def native(self) -> int:
        """The device's own handle, for the native runtime."""

    def launch(self, stream: Stream) -> None:
        """Queue the graph on ``stream``. The host does not wait."""

    def destroy(self) -> None:
        """Free it. Only after everything that was launched has finished."""


class Memory(Protocol):
    """A private memory pool: what is allocated under :meth:`using` is never handed to anybody else."""

    @property
    def index(self) -> int:
        """The device's."""

    def using(self) -> AbstractContextManager[None]:
        """Route this thread's allocations into the pool."""

    def nbytes(self) -> int:
        """Bytes of device memory that the pool holds."""


class Lane(Protocol):
    """A private stream together with the resources that libraries key by stream (cuBLAS workspaces).

    A lane belongs to one execution context, or to one capture of a caller, at a time. Lanes are recycled, never
    destroyed: CUDA may give a new stream an old handle, and PyTorch would then find the old handle's workspace.
    """

    @property
    def stream(self) -> Stream:
        """Nobody else's."""

    @property
    def index(self) -> int:
        """The device's."""

    def load_workspaces(self) -> None:
        """Make the calling thread's hidden per-stream workspaces exist, in memory that only this lane uses."""

    def hidden_nbytes(self) -> int:
        """Bytes of device memory that the lane's hidden resources take."""


class Scratch:
    """A lane and memory for what a build needs while it is made: runs on made-up inputs, captures to compare.

    PyTorch's allocator keeps what was freed for the stream that it was allocated on. With a stream that never changes,
    that stays as large as one build needs; on the lanes of contexts it would grow with each of them.
    """

    def __init__(self, on_stream: Callable[[Stream], AbstractContextManager[Any]], lane: Lane, memory: Memory) -> None:
        """``on_stream``: the device's."""
        self.lane = lane
        self.memory = memory
        self._on_stream = on_stream

    @property
    def stream(self) -> Stream:
        return self.lane.stream

    @contextmanager
    def using(self) -> Iterator[None]:
        """Work of this thread goes to the stream, and its allocations into the memory."""
        with self._on_stream(self.stream), self.memory.using():
            yield


class Latch(Protocol):
    """Holds streams still until it is opened: how tests force an order without sleeping."""

    def hold(self, stream: Stream) -> None:
        """What is queued on ``stream`` from here on waits for :meth:`open`. The host does not wait."""

    def open(self) -> None:
        """Let go of every stream, for good."""


class Device(Protocol):
    """One kind of device. Stateless towards callers; every method may be called from any thread."""

    kind: str
    #: Whether work is asynchronous and ordered by streams. Without streams a call is done when it returns.
    has_streams: bool
    #: Whether a forked child has the device's memory, and so may go on using the parent's engines.
    survives_fork: bool
    #: Whether how long work takes can be measured.
    has_time: bool
    #: The backends that can compile for it, the best one first.
    backends: tuple[str, ...]

    def index(self, device: torch.device) -> int:
        """The device's index; the current device's where ``device`` names none."""

    def current_stream(self, index: int) -> Stream:
        """The calling thread's current stream of device ``index``."""

    def on_stream(self, stream: Stream) -> AbstractContextManager[Any]:
        """Make ``stream`` (and its device) current in the calling thread."""

    def on_device(self, index: int) -> AbstractContextManager[Any]:
        """Make device ``index`` current in the calling thread."""

    def current_index(self) -> int:
        """The calling thread's current device."""

    def stream(self, index: int) -> Stream:
        """A new stream of device ``index`` that does not synchronize with the default stream, and is nobody else's."""

    def latch(self) -> Latch:
        """A new, closed latch."""

    def event(self) -> Event:
        """A new event, never recorded yet, without timing."""

    def is_capturing(self, stream: Stream) -> bool:
        """Whether the caller is capturing ``stream`` into a graph of its own."""

    def relaxed(self) -> AbstractContextManager[None]:
        """Where other threads' global-mode captures must not forbid what this one does: to allocate, to load code."""

    def acquire_lane(self, index: int) -> Lane:
        """A lane that nothing else uses."""

    def release_lane(self, lane: Lane) -> None:
        """Give a lane back. Everything queued on it must have finished."""

    def memory(self, index: int, fresh: bool = False) -> Memory:
        """A private memory pool that nothing else uses; with ``fresh``, nor ever did."""

    def release_memory(self, memory: Memory) -> None:
        """Give a pool back for the next context. Nothing in it may be in use any more."""

    def scratch(self, index: int) -> Scratch:
        """A lane for a build, which nothing else uses meanwhile, and memory."""

    def release_scratch(self, scratch: Scratch) -> None:
        """Give it back. Everything queued on it must have finished, and nothing in it may be in use any more."""

    def trim(self) -> None:
        """Return released pools, and what else is cached, to the driver. The host may wait for the device."""

    def capture(self, lane: Lane, memory: Memory, fn: Callable[[], Any]) -> tuple[Graph, Any]:
        """Capture what ``fn`` queues on ``lane`` and return the graph and ``fn``'s result.

        Only this thread's work on this lane enters the capture; other threads may allocate, copy and draw random
        numbers meanwhile.
        """

    def join_capture(self, stream: Stream, index: int, keep: Any) -> Lane:
        """A lane for the capture that the caller has under way on ``stream``; ``keep`` lives as long as its graph.

        The same lane for each call on this stream in this capture; it is recycled after the graph and all that was
        made of it are gone.
        """

    def kept_by_capture(self, stream: Stream) -> list[Any]:
        """What :meth:`join_capture` was told to keep for the capture under way on ``stream``."""

    def hand_over(self, tensors: Sequence[torch.Tensor], stream: Stream) -> None:
        """``tensors`` of a lane that :meth:`join_capture` gave are now the caller's, who uses and frees them on
        ``stream``."""

    def prepare_retire(self, index: int) -> None:
        """Create what :meth:`retire` needs on device ``index``; a finalizer must not create anything."""

    def retire(self, events: Sequence[Event], tensors: Sequence[torch.Tensor]) -> None:
        """Let the allocator re-use ``tensors``, once freed, only after ``events``. The host does not wait."""

    def defer_free(self, index: int, events: Sequence[Event], kept: Any, free: Callable[[], None]) -> None:
        """Keep ``kept`` until ``events`` are done, then call ``free``. Safe in a garbage collection.

        ``free`` finds device ``index`` current, in whatever thread, and may change that: libraries do where they free.
        """

    def collect(self) -> None:
        """Free what was deferred and is done by now. The host does not wait."""

    def defer_free_code(self, index: int, free: Callable[[], None]) -> None:
        """Have the next :meth:`free_code` call ``free``, as :meth:`defer_free` does. Safe in a garbage collection.

        For what a library has loaded: unloading it makes the host wait for the whole device, perhaps with Python's lock
        held, so that nobody would be left to do what the device waits for.
        """

    def free_code(self) -> None:
        """Free what :meth:`defer_free_code` was given. The host waits for the device; in a capture nothing happens."""

    def lost(self) -> str | None:
        """Why the device is lost, or None."""

    def check_error(self, error: BaseException) -> None:
        """Raise :class:`~anabranch.errors.DeviceLost` if ``error`` says that the device is lost."""

    def native_api(self, core: Any) -> int:
        """The address of what the native runtime (whose module is ``core``) calls: a ``DeviceApi``."""

    def call_error(self, call: str, code: int) -> Exception:
        """What to raise for an error code that the native runtime got."""

    @property
    def is_profiled(self) -> bool:
        """Whether calls name their range for a profiler: see :meth:`range`."""

    def range(self, name: str) -> AbstractContextManager[Any]:
        """A named range for the device's profiler (NVTX)."""

    def describe(self, index: int) -> str:
        """The device's name for people."""
