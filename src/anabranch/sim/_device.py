"""The simulated accelerator behind the seam: as ``devices/cuda/``, on a machine that runs only when it is stepped.

Host memory is the device's memory, so a forked child has a copy of all of it and may go on using what it inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from anabranch import _sync
from anabranch.devices import Event, Stream, _turns
from anabranch.devices._device import Graph, Lane, Latch, Memory
from anabranch.devices._stream_device import StreamDevice
from anabranch.errors import DeviceLost
from anabranch.sim import _module

_core: Any = _module.core


class _OnStream:
    """Makes a stream and its device current. ``with stream:`` is not for two threads at once, nor for nesting."""

    __slots__ = ("_before", "_device", "_stream")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._device = torch.accelerator.current_device_index()
        self._before = torch.accelerator.current_stream(self._stream.device_index)
        torch.accelerator.set_stream(self._stream)

    def __exit__(self, *exc: object) -> None:
        torch.accelerator.set_stream(self._before)
        torch.accelerator.set_device_index(self._device)


class _SimGraph:
    """See :class:`anabranch.devices.Graph`."""

    __slots__ = ("_graph",)

    def __init__(self, graph: int) -> None:
        self._graph = graph

    @property
    def native(self) -> int:
        return self._graph

    def launch(self, stream: Stream) -> None:
        _core.graph_launch(self._graph, stream.stream_id, stream.device_index)

    def destroy(self) -> None:
        _core.graph_destroy(self._graph)


class _SimMemory:
    """See :class:`anabranch.devices.Memory`."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.pool = _core.pool_new()

    @contextmanager
    def using(self) -> Iterator[None]:
        _core.pool_begin(self.pool)
        try:
            yield
        finally:
            _core.pool_end()

    def nbytes(self) -> int:
        return int(_core.pool_bytes(self.pool))


class _SimLane:
    """See :class:`anabranch.devices.Lane`."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.stream = _module.Stream(index)
        self.hidden = _SimMemory(index)

    def load_workspaces(self) -> None:
        with self.hidden.using():
            _core.workspace_load(self.stream.stream_id, self.index)

    def hidden_nbytes(self) -> int:
        return self.hidden.nbytes()


class _SimLatch:
    """See :class:`anabranch.devices.Latch`."""

    def __init__(self) -> None:
        self._latch = _core.latch_new()

    def hold(self, stream: Stream) -> None:
        _core.latch_hold(self._latch, stream.stream_id, stream.device_index)

    def open(self) -> None:
        _core.latch_open(self._latch)


class SimDevice(StreamDevice):
    """See :class:`anabranch.devices.Device`."""

    kind = "sim"
    has_streams = True
    survives_fork = True
    has_time = False
    backends: tuple[str, ...] = ("eager",)
    is_profiled = False

    def __init__(self) -> None:
        super().__init__()
        #: What callers' captures have baked in, by the machine's id of the capture.
        self._captures: dict[int, _CallerCapture] = _sync.dict_("captures of callers")
        #: Captures whose graph is gone. Noted where a graph is destroyed, which may be anywhere; seen to later.
        self._ended: Any = _sync.deque_("captures that are gone")
        self._deferred.also = self._collect_captures
        _turns.watch_pytorch()

    def index(self, device: torch.device) -> int:
        return self.current_index() if device.index is None else device.index

    def current_index(self) -> int:
        return torch.accelerator.current_device_index()

    def current_stream(self, index: int) -> Stream:
        return torch.accelerator.current_stream(index)

    def on_stream(self, stream: Stream) -> AbstractContextManager[Any]:
        return _OnStream(stream)

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        before = _core.exchange_device(index)
        try:
            yield
        finally:
            _core.exchange_device(before)

    def stream(self, index: int) -> Stream:
        return _module.Stream(index)

    def latch(self) -> Latch:
        return _SimLatch()

    def event(self) -> Event:
        return torch.Event(device=self.kind)

    def is_capturing(self, stream: Stream) -> bool:
        return bool(_core.capture_id(stream.stream_id, stream.device_index))

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        before = _core.relax(True)
        try:
            yield
        finally:
            _core.relax(before)

    def new_lane(self, index: int) -> Lane:
        return _SimLane(index)

    def new_memory(self, index: int) -> Memory:
        return _SimMemory(index)

    def trim(self) -> None:
        self.collect()
        self.free_code()
        kept: list[Memory] = []
        for memory in self.memories.drain():
            assert isinstance(memory, _SimMemory)
            _core.wait_as_free_does(memory.index)
            _core.pool_trim(memory.pool)
            if memory.nbytes():  # other threads have queued work since
                kept.append(memory)
        for memory in kept:
            self.release_memory(memory)

    def capture(self, lane: Lane, memory: Memory, fn: Callable[[], Any]) -> tuple[Graph, Any]:
        stream, index = lane.stream.stream_id, lane.stream.device_index
        with self.on_stream(lane.stream), memory.using(), _turns.turns.capturing():
            graph, result = _core.capture(stream, index, "thread_local", fn)
        return _SimGraph(graph), result

    def join_capture(self, stream: Stream, index: int, keep: Any) -> Lane:
        identity = _core.capture_id(stream.stream_id, stream.device_index)
        assert identity, "asked for a capture where none is under way"
        capture = self._captures.get(identity)
        if capture is None:
            capture = self._captures.setdefault(identity, _CallerCapture())
            _core.graph_on_destroy(identity, lambda: self._ended.append(identity))
        if keep not in capture.kept:
            capture.kept.append(keep)
        lane = capture.lanes.get(stream.stream_id)
        if lane is None:
            lane = capture.lanes.setdefault(stream.stream_id, self.acquire_lane(index))
        return lane

    def kept_by_capture(self, stream: Stream) -> list[Any]:
        capture = self._captures.get(_core.capture_id(stream.stream_id, stream.device_index))
        return [] if capture is None else list(capture.kept)

    def hand_over(self, tensors: Sequence[torch.Tensor], stream: Stream) -> None:
        # Their blocks go back to the lane that made them, where the machine does not know that the caller's stream may
        # still read them.
        for t in tensors:
            t.record_stream(stream)

    def _collect_captures(self) -> None:
        while self._ended:
            capture = self._captures.pop(self._ended.popleft(), None)
            if capture is not None:
                for lane in list(capture.lanes.values()):
                    self.release_lane(lane)

    def leak(self, *what: Any) -> None:
        pass  # it is host memory

    def lost(self) -> str | None:
        lost: str | None = _core.lost()
        return lost

    def check_error(self, error: BaseException) -> None:
        lost = self.lost()
        if lost and not isinstance(error, DeviceLost):
            raise DeviceLost(
                f"queued work failed on the simulated device: {lost}. Every engine on it raises DeviceLost until you"
                " call anabranch.sim.reset()."
            ) from error

    def native_api(self, core: Any) -> int:
        return int(_core.native_api())

    def call_error(self, call: str, code: int) -> Exception:
        return RuntimeError(f"{call} failed with code {code}")

    def range(self, name: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def describe(self, index: int) -> str:
        return f"simulated accelerator {index} of {_core.devices}"


class _CallerCapture:
    """One capture of a caller's: what its graph has baked in."""

    def __init__(self) -> None:
        self.kept: list[Any] = _sync.list_("kept")
        self.lanes: dict[int, Lane] = _sync.dict_("lanes of a capture")
