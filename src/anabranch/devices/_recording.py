"""Graphs that are bound to their caller's tensors: no copies into static inputs, none out of static outputs.

:func:`record` captures a program twice and compares (:mod:`anabranch.devices._relocation`): the result says which words
of which kernels' parameters are addresses of inputs and outputs. A launch writes the new addresses there and queues the
executable; a short chain without temporaries needs no graph at all. What was found is tried out before anybody relies
on it: on fresh inputs at other addresses, into poisoned outputs between guards, bit for bit against a direct run.

This is the build-time half, in Python, where speed does not matter. :meth:`Recording.launch` and
:meth:`Recording.launch_kernels` are the slow reference of what the native runtime does for each call.

Parameters are read and written as raw bytes (:mod:`anabranch.devices._driver`).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from anabranch.devices._cuda import CudaDevice, _CudaGraph, _CudaLane, _CudaMemory
from anabranch.devices._device import Scratch
from anabranch.devices._driver import DriverError, call, graph_edges, graph_nodes, status
from anabranch.devices._relocation import (
    Capture,
    Edge,
    Empty,
    Kernel,
    Node,
    Noise,
    Range,
    Relocation,
    Table,
    Transfer,
    compare,
    verify,
)
from anabranch.errors import AnabranchError
from anabranch.export import TensorSpec

_Kernels = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
#: Asked for each capture, with its stream current and given, and in its memory. What it gives may have
#: ``private_memory()`` and ``loads_own_code``.
_Source = Callable[[Any], _Kernels]

#: Bytes on either side of a tensor that belong to nobody. No two tensors of ours touch.
_GUARD = 1024
#: What PyTorch's allocator rounds sizes up to: up to here a kernel may write behind an output.
_BLOCK = 512
_POISON = 0xFF  # a NaN in every floating dtype
#: Alignments, in bytes, that the captures are tried with. A call's tensors have the first one at least.
_ALIGNMENTS = (16, 256)


class Log(Protocol):
    """What ``AllocationLog`` of the native runtime does."""

    def begin(self, graph: int) -> None: ...

    def end(self) -> list[tuple[int, int, int]]: ...


@dataclass(frozen=True)
class View:
    """A result tensor: ``offset`` elements into output storage ``storage``."""

    storage: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def on(self, storage: torch.Tensor, start: int = 0) -> torch.Tensor:
        """It in the memory of ``storage``, whose output storage begins at byte ``start``."""
        new = torch.empty(0, dtype=self.dtype, device=storage.device)
        offset = self.offset + start // self.dtype.itemsize
        return new.set_(storage.untyped_storage(), offset, self.size, self.stride)


@dataclass(frozen=True)
class Patch:
    """A kernel node whose parameters hold addresses of inputs or outputs."""

    handle: int
    kernel: Kernel
    #: (position in the parameters, buffer, delta): write the buffer's address plus delta there.
    words: tuple[tuple[int, int, int], ...]


class Recording:
    """A captured graph with what it takes to bind it to other tensors. Not thread-safe: one launch at a time.

    Buffers are numbered inputs first, then output storages. ``storages``: bytes of each output storage, which a call
    has to allocate whole where ``table.bound`` says that it is bound. ``results``: the result tensors of the capture;
    those in a storage that is not bound are copied out of there. ``alignment``: bytes, of each input that is bound.
    """

    def __init__(
        self,
        graph: _CudaGraph,
        table: Table,
        capture: Capture,
        handles: Sequence[int],
        kernels: _Kernels,
        results: Sequence[torch.Tensor],
        views: Sequence[View],
        noise: Sequence[Noise],
        alignment: int,
    ) -> None:
        self.graph = graph
        self.table = table
        self.capture = capture
        self.handles = tuple(handles)
        #: What the graph was captured from, with the state that it uses.
        self.kernels: Any = kernels
        self.results = list(results)
        self.views = tuple(views)
        self.noise = tuple(noise)
        self.alignment = alignment
        self.storages = tuple(r.nbytes for r in capture.outputs)
        by_node: dict[int, list[Relocation]] = {}
        for relocation in table.relocations:
            by_node.setdefault(relocation.node, []).append(relocation)
        self.patches = tuple(
            Patch(self.handles[i], kernel, tuple((r.position, r.buffer, r.delta) for r in by_node.get(i, ())))
            for i, kernel in enumerate(capture.nodes)
            if isinstance(kernel, Kernel)
        )

    @property
    def patched(self) -> tuple[Patch, ...]:
        """The kernels that a launch has to patch."""
        return tuple(p for p in self.patches if p.words)

    def launch(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[int], stream: Any, patches: Sequence[Patch] = ()
    ) -> None:
        """Queue the graph. ``outputs``: an address for each output storage (of those that are not bound: any)."""
        addresses = [*(x.data_ptr() for x in inputs), *outputs]
        for patch in patches or self.patched:
            arguments = _Arguments(patch, addresses)
            params = _KernelNodeParams.of(patch.kernel, arguments)
            call("cuGraphExecKernelNodeSetParams_v2", self.graph.executable, patch.handle, ctypes.byref(params))
        self.graph.launch(stream)

    def launch_kernels(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[int], stream: Any, patches: Sequence[Patch] = ()
    ) -> None:
        """Queue the kernels one by one, without the graph. Only where ``table.why_not_direct`` is empty."""
        assert not self.table.why_not_direct
        addresses = [*(x.data_ptr() for x in inputs), *outputs]
        for patch in patches or self.patches:
            kernel, arguments = patch.kernel, _Arguments(patch, addresses)
            shape = (*kernel.grid, *kernel.block, kernel.shared)
            # cuLaunchKernel takes a CUkernel in the place of a CUfunction.
            function = ctypes.c_void_p(kernel.function or kernel.kernel)
            call(
                "cuLaunchKernel",
                function,
                *map(ctypes.c_uint, shape),
                ctypes.c_void_p(stream.cuda_stream),
                arguments.pointers,
                arguments.extra,
            )

    def with_other_noise(self) -> tuple[Patch, ...]:
        """All patches, with the noise of the other capture: not the one that this recording has."""
        patches = list(self.patches)
        places = {p.handle: k for k, p in enumerate(patches)}
        for noise in self.noise:
            k = places[self.handles[noise.node]]
            params = bytearray(patches[k].kernel.params)
            params[noise.position : noise.stop] = noise.other
            patches[k] = replace(patches[k], kernel=replace(patches[k].kernel, params=bytes(params)))
        return tuple(patches)

    def destroy(self) -> None:
        """Free the graph. Only after everything that was launched has finished."""
        self.graph.destroy()


def record(
    device: CudaDevice,
    lane: _CudaLane,
    memory: _CudaMemory,
    scratch: Scratch,
    source: _Source,
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
    first: _Captured | None = None
    keep = False
    try:
        first = _capture(device, lane, memory, scratch, source, specs, workspaces, log, 0)
        reason = ""
        for alignment in _ALIGNMENTS:
            # At an address that is aligned no better than a call's need be: whatever was chosen for more would show.
            second = _capture(device, scratch.lane, scratch.memory, scratch, source, specs, workspaces, log, alignment)
            try:
                table = compare(first.capture, second.capture, _is_device)
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
    except _Unreadable as e:
        return str(e)
    finally:
        wait(lane, scratch.lane)
        if first is not None and not keep:
            first.graph.destroy()


def record_again(
    known: Recording,
    device: CudaDevice,
    lane: _CudaLane,
    memory: _CudaMemory,
    scratch: Scratch,
    source: _Source,
    specs: Sequence[TensorSpec],
    workspaces: bool,
    log: Log,
) -> Recording | str:
    """A further capture of the program that ``known`` is a recording of: one capture, held against what is known."""
    captured: _Captured | None = None
    keep = False
    try:
        captured = _capture(device, lane, memory, scratch, source, specs, workspaces, log, 0)
        noise = verify(known.table, captured.capture, _is_device)
        if isinstance(noise, str):
            return noise
        recording = captured.bind(known.table, noise, known.alignment)
        wait(lane)  # what warmed up wrote where it was captured
        reason = prove(recording, scratch, captured.kernels, specs, workspaces, [captured], rounds=1)
        keep = not reason
        return reason or recording
    except _Unreadable as e:
        return str(e)
    finally:
        wait(lane, scratch.lane)
        if captured is not None and not keep:
            captured.graph.destroy()


# -- trying it out ------------------------------------------------------------------------------------------------


def prove(
    recording: Recording,
    scratch: Scratch,
    kernels: _Kernels,
    specs: Sequence[TensorSpec],
    workspaces: bool,
    captured: Sequence[_Captured],
    rounds: int,
) -> str:
    """Run it bound to fresh tensors and compare bits with ``kernels``; why it is wrong, or nothing. The host waits.

    Meanwhile the tensors of all that was ``captured`` are poison: who has an address of theirs left reads NaN or is
    seen writing. Noise is tried as every capture had it. (Not with bits of our own: if they were an address after all,
    a kernel would fault, which no process survives. The captures' are addresses of memory that is there.)
    """
    table = recording.table
    launches = [("graph", recording.launch)]
    if not table.why_not_direct:
        launches.append(("kernels", recording.launch_kernels))
    # Every kernel is patched here: what the graph ends up with is the noise that the recording says.
    noises = [recording.with_other_noise(), recording.patches] if recording.noise else [recording.patches]
    ways = [(way, launch, patches) for patches in noises for way, launch in launches]
    alive: list[Any] = []  # so that every round has other addresses
    index = scratch.lane.index
    if workspaces:
        scratch.lane.load_workspaces()
    with scratch.using():
        for c in captured:
            c.poison(table)
        for seed in range(1, rounds + 1):
            values = [_place(spec, index, 0, seed) for spec in specs]
            wanted = kernels(values)
            again = kernels(values)
            if not _equal(wanted, again):
                return "two direct runs on the same inputs differ, so that nothing can be compared with them"
            for way, launch, patches in ways:
                inputs = [_place(spec, index, recording.alignment, seed) for spec in specs]
                outputs = [_guarded(nbytes, index) for nbytes in recording.storages]
                alive += [values, wanted, inputs, outputs]
                launch(inputs, [raw.data_ptr() + _GUARD for raw in outputs], scratch.stream, patches)
                got = [
                    view.on(outputs[view.storage], _GUARD) if table.bound[view.storage] else static
                    for view, static in zip(recording.views, recording.results, strict=True)
                ]
                if not _equal(wanted, got):
                    return f"bound to other tensors, its {way} gave other bits than a direct run"
                for j, (raw, nbytes) in enumerate(zip(outputs, recording.storages, strict=True)):
                    stop = _GUARD + -(-nbytes // _BLOCK) * _BLOCK
                    if not bool((raw[:_GUARD] == _POISON).all() and (raw[stop:] == _POISON).all()):
                        return f"bound to other tensors, its {way} wrote outside output {j}"
                if not _equal(inputs, values):
                    return f"bound to other tensors, its {way} wrote to an input"
                if not all(c.is_poisoned(table) for c in captured):
                    return f"bound to other tensors, its {way} wrote to the old ones"
    return ""


def _equal(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(_bits(x), _bits(y)) for x, y in zip(xs, ys, strict=True))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _guarded(nbytes: int, index: int) -> torch.Tensor:
    """Poison, with room for an output storage after the first guard."""
    rounded = -(-nbytes // _BLOCK) * _BLOCK
    return torch.full((rounded + 2 * _GUARD,), _POISON, dtype=torch.uint8, device=f"cuda:{index}")


def _place(spec: TensorSpec, index: int, alignment: int, seed: int) -> torch.Tensor:
    """A tensor like ``spec`` between guards, aligned to ``alignment`` bytes and no better (0: as well as can be)."""
    device = torch.device("cuda", index)
    raw = torch.full((spec.nbytes + _BLOCK + 2 * _GUARD,), _POISON, dtype=torch.uint8, device=device)
    x = torch.empty(0, dtype=spec.dtype, device=device)
    x.set_(raw.untyped_storage(), (_GUARD + alignment) // spec.dtype.itemsize, spec.shape, spec.strides)
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


# -- capturing ----------------------------------------------------------------------------------------------------


@dataclass
class _Captured:
    graph: _CudaGraph
    capture: Capture
    handles: list[int]
    kernels: _Kernels
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
            _bytes_of(x).fill_(_POISON)

    def is_poisoned(self, table: Table) -> bool:
        return all(bool((_bytes_of(x) == _POISON).all()) for x in self._abandoned(table))

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


def _capture(
    device: CudaDevice,
    lane: _CudaLane,
    memory: _CudaMemory,
    scratch: Scratch,
    source: _Source,
    specs: Sequence[TensorSpec],
    workspaces: bool,
    log: Log,
    alignment: int,
) -> _Captured:
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
        inputs = [_place(spec, lane.index, alignment, 0) for spec in specs]
    scratch.stream.synchronize()
    with device.on_stream(lane.stream), memory.using():
        kernels = source(lane.stream)
        # Per-thread and per-stream set-up of libraries is not allowed to happen inside the capture.
        kernels(inputs)
    try:
        graph, results = device.capture_source(lane, memory, run)
    except RuntimeError as e:
        if "a profiler watches this thread" in str(e):
            raise _Unreadable("a profiler watches the thread that builds it") from e
        raise
    try:
        if any(step < 0 for _, _, step in events):
            raise _Unreadable("CUDA does not list the steps of the graph in the order of their capture")
        nodes, handles, edges = _read(int(graph.source))
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
    return _Captured(graph, capture, handles, kernels, inputs, list(results), views)


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


def wait(*lanes: _CudaLane) -> None:
    """The host waits for what is queued on these."""
    for lane in lanes:
        lane.stream.synchronize()


# -- the driver ---------------------------------------------------------------------------------------------------


class _Unreadable(AnabranchError):
    """Says why a graph cannot be bound, whatever its words are."""


class _KernelNodeParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("params", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, kernel: Kernel, arguments: _Arguments) -> _KernelNodeParams:
        uint3 = ctypes.c_uint * 3
        return cls(
            kernel.function,
            uint3(*kernel.grid),
            uint3(*kernel.block),
            kernel.shared,
            ctypes.cast(arguments.pointers, ctypes.c_void_p),
            ctypes.cast(arguments.extra, ctypes.c_void_p),
            kernel.kernel,
            kernel.context,
        )


class _MemsetNodeParams(ctypes.Structure):
    """CUDA_MEMSET_NODE_PARAMS."""

    _fields_ = (
        ("dst", ctypes.c_uint64),
        ("pitch", ctypes.c_size_t),
        ("value", ctypes.c_uint),
        ("element", ctypes.c_uint),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class _MemcpySide(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_size_t),
        ("y", ctypes.c_size_t),
        ("z", ctypes.c_size_t),
        ("lod", ctypes.c_size_t),
        ("type", ctypes.c_uint),
        ("host", ctypes.c_void_p),
        ("device", ctypes.c_uint64),
        ("array", ctypes.c_void_p),
        ("reserved", ctypes.c_void_p),
        ("pitch", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class _Memcpy3D(ctypes.Structure):
    """CUDA_MEMCPY3D."""

    _fields_ = (
        ("src", _MemcpySide),
        ("dst", _MemcpySide),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("depth", ctypes.c_size_t),
    )


class _Arguments:
    """Parameters with addresses written in, as the driver wants them: a pointer to each, or all of them in a buffer."""

    def __init__(self, patch: Patch, addresses: Sequence[int]) -> None:
        kernel = patch.kernel
        self.blob = ctypes.create_string_buffer(kernel.params, max(1, len(kernel.params)))
        for position, buffer, delta in patch.words:
            struct.pack_into("<Q", self.blob, position, addresses[buffer] + delta)
        start = ctypes.addressof(self.blob)
        self.pointers: Any = None
        self.extra: Any = None
        if kernel.packed:
            self.size = ctypes.c_size_t(len(kernel.params))
            self.extra = (ctypes.c_void_p * 5)(
                _BUFFER_POINTER, start, _BUFFER_SIZE, ctypes.addressof(self.size), _BUFFER_END
            )
        elif kernel.layout:
            self.pointers = (ctypes.c_void_p * len(kernel.layout))(*(start + offset for offset, _ in kernel.layout))


#: CU_LAUNCH_PARAM_...: how parameters in a buffer are given.
_BUFFER_END, _BUFFER_POINTER, _BUFFER_SIZE = 0, 1, 2

_KERNEL, _MEMCPY, _MEMSET, _EMPTY = 0, 1, 2, 5
_OTHERS = {
    3: "a host function",
    4: "a graph inside the graph",
    6: "a wait for an event",
    7: "a record of an event",
    8: "a signal to a semaphore",
    9: "a wait for a semaphore",
    10: "an allocation by the graph",
    11: "a free by the graph",
    12: "a memory operation",
    13: "a condition",
}
_ON_DEVICE = (2, 4)  # CU_MEMORYTYPE_DEVICE, CU_MEMORYTYPE_UNIFIED


def _read(graph: int) -> tuple[list[Node], list[int], list[Edge]]:
    """The nodes of a graph as data, their handles, and their order. Raises :class:`_Unreadable`."""
    handles = graph_nodes(graph)
    places = {h: i for i, h in enumerate(handles)}
    edges = [Edge(places[s], places[t], d) for s, t, d in zip(*graph_edges(graph), strict=True)]
    return [_node(i, h) for i, h in enumerate(handles)], handles, edges


def _node(index: int, handle: int) -> Node:
    kind = ctypes.c_int()
    call("cuGraphNodeGetType", handle, ctypes.byref(kind))
    if kind.value == _KERNEL:
        return _kernel(index, handle)
    if kind.value == _EMPTY:
        return Empty()
    if kind.value == _MEMSET:
        fill = _MemsetNodeParams()
        call("cuGraphMemsetNodeGetParams", handle, ctypes.byref(fill))
        return Transfer("a fill", (fill.dst,), (fill.pitch, fill.value, fill.element, fill.width, fill.height))
    if kind.value == _MEMCPY:
        copy = _Memcpy3D()
        call("cuGraphMemcpyNodeGetParams", handle, ctypes.byref(copy))
        sides = (copy.src, copy.dst)
        if any(side.type not in _ON_DEVICE or side.array for side in sides):
            raise _Unreadable(f"step {index} copies from or to the host")
        rest = [int(getattr(side, name)) for side in sides for name in ("x", "y", "z", "lod", "pitch", "height")]
        return Transfer("a copy", (copy.src.device, copy.dst.device), (*rest, copy.width, copy.height, copy.depth))
    raise _Unreadable(f"step {index} is {_OTHERS.get(kind.value, f'a node of type {kind.value}')}")


def _kernel(index: int, handle: int) -> Kernel:
    node = _KernelNodeParams()
    call("cuGraphKernelNodeGetParams_v2", handle, ctypes.byref(node))
    function, kernel = int(node.func or 0), int(node.kern or 0)
    name = _name(function, kernel)
    layout = _layout(function, kernel)
    packed = bool(node.extra)
    if packed:
        params = _packed(index, name, int(node.extra))
        # Where the driver knows no parameters in the buffer, it is one.
        if not layout or layout[-1][0] + layout[-1][1] > len(params):
            layout = ((0, len(params)),)
    else:
        if layout and not node.params:
            raise _Unreadable(f"step {index}, kernel {name}, has parameters that cannot be read")
        pointers = (ctypes.c_void_p * len(layout)).from_address(node.params) if layout else ()
        params = bytearray(max((offset + size for offset, size in layout), default=0))
        for pointer, (offset, size) in zip(pointers, layout, strict=True):
            params[offset : offset + size] = ctypes.string_at(pointer, size)
    return Kernel(
        name=name,
        function=function,
        kernel=kernel,
        context=int(node.context or 0),
        grid=tuple(node.grid),
        block=tuple(node.block),
        shared=int(node.shared),
        layout=layout,
        params=bytes(params),
        graph_only=_attributes(index, handle, name),
        packed=packed,
    )


def _packed(index: int, name: str, extra: int) -> bytearray:
    """The buffer that a launch's ``extra`` points to."""
    pairs: dict[int, int] = {}
    for k in range(0, 8, 2):
        key, value = (ctypes.c_uint64 * 2).from_address(extra + 8 * k)
        if key == _BUFFER_END:
            break
        pairs[key] = value
    if set(pairs) != {_BUFFER_POINTER, _BUFFER_SIZE}:
        raise _Unreadable(f"step {index}, kernel {name}, has parameters in a form that is not known")
    size = ctypes.c_size_t.from_address(pairs[_BUFFER_SIZE]).value
    return bytearray(ctypes.string_at(pairs[_BUFFER_POINTER], size))


def _layout(function: int, kernel: int) -> tuple[tuple[int, int], ...]:
    query, which = ("cuFuncGetParamInfo", function) if function else ("cuKernelGetParamInfo", kernel)
    layout: list[tuple[int, int]] = []
    while True:
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        code = status(query, which, len(layout), ctypes.byref(offset), ctypes.byref(size))
        if code == 1:  # CUDA_ERROR_INVALID_VALUE: there is none of this number
            return tuple(layout)
        if code:
            raise DriverError(query, code)
        layout.append((offset.value, size.value))


def _name(function: int, kernel: int) -> str:
    text = ctypes.c_char_p()
    query, which = ("cuFuncGetName", function) if function else ("cuKernelGetName", kernel)
    if status(query, ctypes.byref(text), which) or text.value is None:
        return "(no name)"
    return text.value.decode(errors="replace")


#: Attributes of a node with which its kernel runs as it does only inside a graph: number, and a word for it.
_GRAPH_ONLY = (
    (2, "is cooperative"),
    (4, "has clusters"),
    (8, "has a priority"),
    (10, "has a memory domain"),
    (11, "prefers clusters"),
)


def _attributes(index: int, handle: int, name: str) -> str:
    for number, words in _GRAPH_ONLY:
        value = _attribute(handle, number)
        # Clusters of one block are none.
        parts = struct.unpack_from("<3I", value) if number in (4, 11) else (*struct.unpack_from("<i", value), 0, 0)
        if parts not in ((0, 0, 0), (1, 1, 1)):
            return words
    if struct.unpack_from("<Q", _attribute(handle, 1), 8)[0]:  # accessPolicyWindow.num_bytes
        return "keeps memory in the cache"
    if struct.unpack_from("<i", _attribute(handle, 13))[0]:
        raise _Unreadable(f"step {index}, kernel {name}, may be changed by the device itself")
    return ""


def _attribute(handle: int, number: int) -> bytes:
    value = (ctypes.c_char * 64)()
    # One that this driver does not know is not set.
    if status("cuGraphKernelNodeGetAttribute", handle, ctypes.c_int(number), value):
        return bytes(64)
    return bytes(value)


def _is_device(address: int) -> bool:
    return memory_of(address) is not None


def memory_of(address: int) -> tuple[int, int] | None:
    """(start, bytes) of the piece of device memory that ``address`` lies in; None where it is no such address."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    if status("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address):
        return None
    return base.value, size.value
