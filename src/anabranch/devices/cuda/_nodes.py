"""The nodes of a captured graph as plain data, and the parameters of its kernels as raw bytes."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.devices.cuda._driver import DriverError, call, graph_edges, graph_nodes, status
from anabranch.devices.cuda._relocation import Edge, Empty, Kernel, Node, Transfer
from anabranch.errors import AnabranchError


class Unreadable(AnabranchError):
    """Says why a graph cannot be bound, whatever its words are."""


class KernelNodeParams(ctypes.Structure):
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
    def of(cls, kernel: Kernel, arguments: Arguments) -> KernelNodeParams:
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


@dataclass(frozen=True)
class Patch:
    """A kernel node whose parameters hold addresses of inputs or outputs."""

    handle: int
    kernel: Kernel
    #: (position in the parameters, buffer, delta): write the buffer's address plus delta there.
    words: tuple[tuple[int, int, int], ...]


class Arguments:
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


def read_nodes(graph: int) -> tuple[list[Node], list[int], list[Edge]]:
    """The nodes of a graph as data, their handles, and their order. Raises :class:`Unreadable`."""
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
            raise Unreadable(f"step {index} copies from or to the host")
        rest = [int(getattr(side, name)) for side in sides for name in ("x", "y", "z", "lod", "pitch", "height")]
        return Transfer("a copy", (copy.src.device, copy.dst.device), (*rest, copy.width, copy.height, copy.depth))
    raise Unreadable(f"step {index} is {_OTHERS.get(kind.value, f'a node of type {kind.value}')}")


def _kernel(index: int, handle: int) -> Kernel:
    node = KernelNodeParams()
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
            raise Unreadable(f"step {index}, kernel {name}, has parameters that cannot be read")
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
        raise Unreadable(f"step {index}, kernel {name}, has parameters in a form that is not known")
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
        raise Unreadable(f"step {index}, kernel {name}, may be changed by the device itself")
    return ""


def _attribute(handle: int, number: int) -> bytes:
    value = (ctypes.c_char * 64)()
    # One that this driver does not know is not set.
    if status("cuGraphKernelNodeGetAttribute", handle, ctypes.c_int(number), value):
        return bytes(64)
    return bytes(value)


def is_device(address: int) -> bool:
    return memory_of(address) is not None


def memory_of(address: int) -> tuple[int, int] | None:
    """(start, bytes) of the piece of device memory that ``address`` lies in; None where it is no such address."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    if status("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address):
        return None
    return base.value, size.value
