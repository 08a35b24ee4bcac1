"""What the GPU tests share beyond ``tests/contract``: how CUDA spells it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from contract.support import PATHS, ROUNDING, Chain, Make, Mlp, Rig, assert_same, on_threads

__all__ = ["PATHS", "Chain", "Gpu", "Make", "Mlp", "assert_same", "on_threads"]


@functools.cache
def _load_what_tests_queue() -> None:
    """CUDA loads a kernel when it is first launched, and may wait for all streams then, those that a latch holds, too.
    So what tests themselves queue behind latches is queued once before the first one, in each process."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32):
        x = torch.arange(1, 65, device="cuda").to(dtype).view(8, 8)
        y = torch.full_like(x, float("nan") if dtype.is_floating_point else 0).copy_(x)
        results = [x * 1, x * 2 + 1, x[1:] + 1, x.clone().fill_(5), x.t().contiguous(), torch.cat([x, y]), x.sum()]
        assert_same(results, [z.clone() for z in results])
        assert_same(x * 1.0, y * 1.0, rounding=ROUNDING)
        assert torch.equal(x, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            x = x * 2 + 1
    for stream in streams:
        with torch.cuda.stream(stream):
            graph.replay()
    torch.cuda.synchronize()


class Gpu(Rig):
    """Streams, latches and inputs of one test. Every latch is opened at its end, whatever happened."""

    kind = "cuda"
    # Instantiating a graph takes memory of the driver's, which may have to wait for all streams, the held ones too.
    builds_ahead = True
    small_blocks = 5000  # of 512 bytes, in 2 MiB

    def __init__(self) -> None:
        from anabranch.devices.cuda._graph import CudaGraph

        super().__init__()
        _load_what_tests_queue()
        self.defaults = {"backend": "eager"}
        # PyTorch's own class cannot be changed.
        self.event_class = type("Event", (torch.Event,), {})
        self.graph_class = CudaGraph

    def draw(self, shape: tuple[int, ...], seed: int, index: int) -> torch.Tensor:
        device = self.device(index)
        generator = torch.Generator(device=device).manual_seed(seed)
        return torch.empty(shape, device=device).uniform_(-1, 1, generator=generator)

    @contextmanager
    def asks_nothing(self) -> Iterator[None]:
        # Python's ways only. Calls of the native runtime do not come by them: the simulated device, whose machine
        # counts what it is asked by whomever, is where this is tested of both runtimes.
        with pytest.MonkeyPatch.context() as m:
            for owner, name in ((self.event_class, "query"), (self.event_class, "synchronize")):
                m.setattr(owner, name, lambda self: pytest.fail("waited for the device, or asked it, on the call path"))
            m.setattr(torch.cuda.Stream, "synchronize", lambda self: pytest.fail("waited on the call path"))
            yield

    def new_graph(self) -> Any:
        return torch.cuda.CUDAGraph()

    def capture(self, graph: Any, mode: str = "global") -> AbstractContextManager[Any]:
        return torch.cuda.graph(graph, capture_error_mode=mode)

    def fast_matmul(self, allowed: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = allowed
