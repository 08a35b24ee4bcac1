"""What the GPU tests share beyond ``tests/contract``: how CUDA spells it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from contract.support import PATHS, Chain, Make, Mlp, Rig, assert_same, on_threads

__all__ = ["PATHS", "Chain", "Gpu", "Make", "Mlp", "assert_same", "on_threads"]


class Gpu(Rig):
    """Streams, latches and inputs of one test. Every latch is opened at its end, whatever happened."""

    kind = "cuda"

    def __init__(self) -> None:
        from anabranch.devices.cuda._graph import CudaGraph

        super().__init__()
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
