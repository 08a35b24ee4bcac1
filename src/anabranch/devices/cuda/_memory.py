"""Pools of device memory: PyTorch's allocator's, private ones and its own."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch


class CudaMemory:
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


class OrdinaryMemory:
    """PyTorch's own pool, for what a build needs while it is made.

    What was freed there stays for the stream, and goes back to the driver with ``torch.cuda.empty_cache()`` or when
    memory runs out, as after any run of a model. A private pool would keep it: temporaries of the model, and what
    Triton clears the GPU's cache with while it tunes.
    """

    def __init__(self, index: int) -> None:
        self.index = index

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
