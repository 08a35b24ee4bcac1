"""A program captured once, on made-up inputs, with the memory around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from anabranch.devices._device import Lane, Memory, Scratch
from anabranch.devices._stream import Stream
from anabranch.devices.cuda._device import CudaDevice
from anabranch.devices.cuda._graph import CudaGraph
from anabranch.devices.cuda._lane import CudaLane
from anabranch.devices.cuda._nodes import Unreadable, read_nodes
from anabranch.devices.cuda._recording import Computation, Recording, View
from anabranch.devices.cuda._relocation import Capture, Kernel, Noise, Range, Table
from anabranch.export import TensorSpec

#: Asked for each capture, with its stream current and given, and in its memory. What it gives may have
#: ``private_memory()`` and ``loads_own_code``.
Source = Callable[[Stream], Computation]


class Log(Protocol):
    """What ``AllocationLog`` of the native runtime does."""

    def begin(self, graph: int) -> None: ...

    def end(self) -> list[tuple[int, int, int]]: ...


#: Bytes on either side of a tensor that belong to nobody. No two tensors of ours touch.
GUARD = 1024


#: What PyTorch's allocator rounds sizes up to: up to here a kernel may write behind an output.
BLOCK = 512


POISON = 0xFF  # a NaN in every floating dtype


@dataclass
class Captured:
    graph: CudaGraph
    capture: Capture
    handles: list[int]
    kernels: Computation
    inputs: list[torch.Tensor]
    results: list[torch.Tensor]
    views: list[View]

    def bind(self, table: Table, noises: Sequence[Noise], alignment: int) -> Recording:
        # With the noise that the first capture had: every recording of a program has the same.
        nodes = list(self.capture.nodes)
        for noise in noises:
            kernel, tried = nodes[noise.node], table.template.nodes[noise.node]
            assert isinstance(kernel, Kernel)
            assert isinstance(tried, Kernel)
            params = bytearray(kernel.params)
            params[noise.position : noise.stop] = tried.params[noise.position : noise.stop]
            nodes[noise.node] = replace(kernel, params=bytes(params))
        capture = replace(self.capture, nodes=tuple(nodes))
        return Recording(
            self.graph, table, capture, self.handles, self.kernels, self.results, self.views, noises, alignment
        )

    def poison(self, table: Table) -> None:
        """Spoil all memory that a bound graph has no business with any more."""
        for x in self._abandoned(table):
            _bytes_of(x).fill_(POISON)

    def is_poisoned(self, table: Table) -> bool:
        return all(bool((_bytes_of(x) == POISON).all()) for x in self._abandoned(table))

    def _abandoned(self, table: Table) -> list[torch.Tensor]:
        """The inputs, and the outputs that are bound and were never a temporary's memory before."""
        # What may be indices has to stay valid ones.
        tensors = [x for x in self.inputs if x.dtype.is_floating_point or x.dtype.is_complex]
        for y, view in zip(self.results, self.views, strict=True):
            place = self.capture.outputs[view.storage]
            if table.bound[view.storage] and sum(r.overlaps(place) for r in self.capture.allocations) == 1:
                tensors.append(y)
        return tensors


def _bytes_of(x: torch.Tensor) -> torch.Tensor:
    """The whole storage of ``x``."""
    storage = x.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage, 0, (storage.nbytes(),), (1,))


def capture_on_lane(
    device: CudaDevice,
    lane: CudaLane,
    memory: Memory,
    scratch: Scratch,
    source: Source,
    specs: Sequence[TensorSpec],
    workspaces: bool,
    log: Log,
    alignment: int,
) -> Captured:
    if workspaces:
        lane.load_workspaces()
    events: list[tuple[int, int, int]] = []

    def run() -> Sequence[torch.Tensor]:
        log.begin(device.graph_under_capture(lane.stream))
        try:
            return kernels(inputs)
        finally:
            events.extend(log.end())

    with scratch.using():
        inputs = [place(spec, lane.index, alignment, 0) for spec in specs]
    scratch.stream.synchronize()
    with device.on_stream(lane.stream), memory.using():
        kernels = source(lane.stream)
        # Per-thread and per-stream set-up of libraries is not allowed to happen inside the capture.
        kernels(inputs)
    try:
        graph, results = device.capture_source(lane, memory, run)
    except RuntimeError as e:
        if "a profiler watches this thread" in str(e):
            raise Unreadable("a profiler watches the thread that builds it") from e
        raise
    try:
        if any(step < 0 for _, _, step in events):
            raise Unreadable("CUDA does not list the steps of the graph in the order of their capture")
        nodes, handles, edges = read_nodes(int(graph.source))
        views, outputs = _views(results)
        capture = Capture(
            nodes=tuple(nodes),
            edges=frozenset(edges),
            log=tuple(events),
            # Inputs without elements have no address.
            inputs=tuple(Range(x.data_ptr(), s.nbytes) for x, s in zip(inputs, specs, strict=True)),
            outputs=tuple(outputs),
            hidden=(
                *(Range(*segment) for segment in lane.hidden.segments()),
                *(Range(x.data_ptr(), x.nbytes) for x in getattr(kernels, "private_memory", list)()),
            ),
            own_code=bool(getattr(kernels, "loads_own_code", False)),
        )
    except BaseException:
        graph.destroy()
        raise
    return Captured(graph, capture, handles, kernels, inputs, list(results), views)


def place(spec: TensorSpec, index: int, alignment: int, seed: int) -> torch.Tensor:
    """A tensor like ``spec`` between guards, aligned to ``alignment`` bytes and no better (0: as well as can be)."""
    device = torch.device("cuda", index)
    raw = torch.full((spec.nbytes + BLOCK + 2 * GUARD,), POISON, dtype=torch.uint8, device=device)
    x = torch.empty(0, dtype=spec.dtype, device=device)
    x.set_(raw.untyped_storage(), (GUARD + alignment) // spec.dtype.itemsize, spec.shape, spec.strides)
    if spec.values is not None:
        return x.copy_(spec.values)
    if not x.numel():
        return x
    generator = torch.Generator(device=device).manual_seed(seed)
    if spec.dtype.is_floating_point and spec.dtype.itemsize >= 2:
        return x.uniform_(0, 1, generator=generator)
    if spec.dtype.is_complex:
        torch.view_as_real(x).uniform_(0, 1, generator=generator)
        return x
    if spec.dtype is torch.bool:
        return x.random_(0, 2, generator=generator)
    return x.fill_(spec.integer)  # may be indices


def _views(results: Sequence[torch.Tensor]) -> tuple[list[View], list[Range]]:
    views: list[View] = []
    outputs: list[Range] = []
    places: dict[int, int] = {}
    for y in results:
        storage = y.untyped_storage()
        if storage._cdata not in places:
            places[storage._cdata] = len(outputs)
            outputs.append(Range(storage.data_ptr(), storage.nbytes()))
        place = places[storage._cdata]
        views.append(View(place, y.dtype, int(y.storage_offset()), tuple(y.size()), tuple(y.stride())))
    return views, outputs


def wait(*lanes: Lane) -> None:
    """The host waits for what is queued on these."""
    for lane in lanes:
        lane.stream.synchronize()
