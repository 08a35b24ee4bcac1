"""A program's own captures on the simulated device, as ``torch.cuda.graph`` is on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from anabranch.sim import _module

core = _module.core


class Graph:
    """A captured graph. Made by :func:`graph`; not thread-safe, as CUDA's are not.

    Its launches are ordered with each other, whatever their streams. Memory that was allocated during the capture stays
    the graph's own until it is dropped; replays write to the same addresses.
    """

    def __init__(self) -> None:
        self._handle: int | None = None
        self._pool = core.pool_new()

    def replay(self) -> None:
        """Queue the graph on the calling thread's current stream."""
        if self._handle is None:
            raise RuntimeError("this graph was not captured: use `with anabranch.sim.graph(g):` first")
        stream = torch.accelerator.current_stream()
        core.graph_launch(self._handle, stream.stream_id, stream.device_index)

    def reset(self) -> None:
        """Free the graph; what was launched still runs."""
        if self._handle is not None:
            core.graph_destroy(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.reset()


@contextmanager
def graph(g: Graph, stream: torch.Stream | None = None, mode: str = "global") -> Iterator[None]:
    """Capture what this thread queues on ``stream`` (default: a new one) into ``g``.

    ``mode`` is ``global``, ``thread_local`` or ``relaxed``, as for CUDA. Other streams enter the capture by waiting for
    an event recorded in it, and must be waited for before it ends.
    """
    if stream is None:
        stream = _module.Stream()
    with stream:
        core.capture_begin(stream.stream_id, stream.device_index, mode)
        core.pool_begin(g._pool)
        try:
            yield
        except BaseException:
            core.capture_abort(stream.stream_id, stream.device_index)
            raise
        finally:
            core.pool_end()
        g._handle = core.capture_end(stream.stream_id, stream.device_index)
