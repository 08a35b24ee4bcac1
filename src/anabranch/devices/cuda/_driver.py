"""CUDA's driver through :mod:`ctypes`: what is to be read and written as raw bytes, which the bindings hide."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from anabranch.devices._stream import Stream
from anabranch.errors import AnabranchError


class DriverError(AnabranchError):
    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call} failed with CUDA driver error {code}")
        self.error_code = code


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def has(name: str) -> bool:
    """Whether this driver has a function of this name."""
    return hasattr(_driver(), name)


def status(name: str, *arguments: Any) -> int:
    """Call a function of the driver; what it returns."""
    # Plain integers here are handles and sizes, 8 bytes each.
    converted = [ctypes.c_uint64(int(a)) if hasattr(a, "__int__") else a for a in arguments]
    return int(getattr(_driver(), name)(*converted))


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver. Raises :class:`DriverError`."""
    code = status(name, *arguments)
    if code:
        raise DriverError(name, code)


def handle(stream: Stream) -> int:
    """What the driver, the runtime and libraries know a stream by; 0 is the default stream."""
    return stream.cuda_stream  # type: ignore[attr-defined]  # a stream of CUDA's has it


def graph_nodes(graph: int) -> list[int]:
    """Handles of the nodes of a graph; it may be under capture."""
    count = ctypes.c_size_t()
    call("cuGraphGetNodes", graph, None, ctypes.byref(count))
    handles = (ctypes.c_void_p * count.value)()
    if count.value:
        call("cuGraphGetNodes", graph, handles, ctypes.byref(count))
    return [int(h or 0) for h in handles]


def graph_edges(graph: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Handles of each edge's nodes, from and to, and its ``CUgraphEdgeData`` as a number: 0 for an ordinary one."""
    count = ctypes.c_size_t()
    call("cuGraphGetEdges_v2", graph, None, None, None, ctypes.byref(count))
    sources, targets = (ctypes.c_void_p * count.value)(), (ctypes.c_void_p * count.value)()
    data = (ctypes.c_uint64 * count.value)()
    if count.value:
        call("cuGraphGetEdges_v2", graph, sources, targets, data, ctypes.byref(count))
    return [int(s or 0) for s in sources], [int(t or 0) for t in targets], [int(d) for d in data]
