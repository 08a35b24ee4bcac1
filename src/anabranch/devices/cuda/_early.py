"""Kernels that start before the one ahead of them has ended, and how they are kept from it.

CUDA's *programmatic dependent launch* (compute capability 9.0 on) lets a kernel begin while the one before it on its
stream still runs. It has to wait by itself (``griddepcontrol.wait``) before it touches what earlier kernels still work
on. Whether it does is known to its author only; what a library gets wrong there shows when other streams keep the
device busy, as a wrong value now and then.

In a captured graph such a launch is an edge of a type of its own, which can be replaced by an ordinary one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection

from anabranch.devices.cuda._driver import call, graph_edges, has

_PROGRAMMATIC = 1  # CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC


def early_edges(graph: int) -> list[tuple[int, int, int]]:
    """(from, to, ``CUgraphEdgeData`` as a number) of each edge whose target may start before its source has ended."""
    if not has("cuGraphGetEdges_v2"):
        return []  # drivers before CUDA 12.3 capture no such launches
    return [edge for edge in zip(*graph_edges(graph), strict=True) if (edge[2] >> 16) & 0xFF == _PROGRAMMATIC]


def complete(graph: int, but: Collection[int] = ()) -> int:
    """Have the nodes of a graph wait for the whole of those before them; it may be under capture.

    ``but``: handles of nodes to leave alone. Returns how many edges it has replaced.
    """
    early = [edge for edge in early_edges(graph) if edge[1] not in but]
    n = len(early)
    if not n:
        return 0
    sources, targets = (ctypes.c_void_p * n)(*(e[0] for e in early)), (ctypes.c_void_p * n)(*(e[1] for e in early))
    call("cuGraphRemoveDependencies_v2", graph, sources, targets, (ctypes.c_uint64 * n)(*(e[2] for e in early)), n)
    call("cuGraphAddDependencies_v2", graph, sources, targets, (ctypes.c_uint64 * n)(), n)
    return n
