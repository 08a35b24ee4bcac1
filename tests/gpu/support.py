"""What the GPU tests share: streams held still by a latch, poisoned inputs, small models whose bugs would show."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from anabranch.devices import get_device


class Mlp(torch.nn.Module):
    """Matrix products: they use the stream's cuBLAS workspace, the hidden resource that captures must not share."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, width), torch.nn.Linear(width, width)
        )
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * (width**-0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Chain(torch.nn.Module):
    """Twenty small operators: a graph of these is what a captured graph is for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(10):
            x = torch.roll(x, i + 1, -1) * 0.9 + 0.1
        return x


class Gpu:
    """Streams, latches and inputs of one test. Every latch is opened at its end, whatever happened."""

    def __init__(self) -> None:
        self.seam = get_device("cuda")
        self._latches: list[Any] = []
        self._seed = 0

    def stream(self) -> Any:
        return self.seam.stream(0)

    def latch(self, *streams: Any) -> Any:
        latch = self.seam.latch()
        self._latches.append(latch)
        for stream in streams:
            latch.hold(stream)
        return latch

    def open_all(self) -> None:
        for latch in self._latches:
            latch.open()
        torch.cuda.synchronize()

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Values of order 1, none of them zero, different at every call; ready when this returns."""
        self._seed += 1
        generator = torch.Generator(device="cuda").manual_seed(self._seed)
        x = torch.empty(shape, device="cuda").uniform_(-1, 1, generator=generator)
        x = (x + 0.1 * x.sign()).to(dtype)
        torch.cuda.synchronize()
        return x

    def poisoned(self, like: torch.Tensor, stream: Any) -> torch.Tensor:
        """An input that belongs to ``stream`` and holds NaN; ready when this returns."""
        with torch.cuda.stream(stream):
            x = torch.full_like(like, float("nan"))
        torch.cuda.synchronize()
        return x

    def load_kernels(self, engine: Any, x: torch.Tensor) -> torch.Tensor:
        """The engine's serial result. Run before a latch closes: loading a kernel waits for held streams."""
        torch.full_like(x, float("nan")).copy_(x)
        y = engine(x)
        torch.equal(y, y + 1)  # what tests do with results
        torch.cuda.synchronize()
        return y


def on_threads(n: int, work: Any) -> None:
    """Run ``work(i)`` in ``n`` threads that start together; the first error is raised here."""
    barrier, errors = threading.Barrier(n), []

    def run(i: int) -> None:
        try:
            barrier.wait()
            work(i)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


Make = Callable[..., Any]

#: The two ways in which a call outside a capture can run.
PATHS = pytest.mark.parametrize("graphs", [True, False], ids=["graph", "direct"])
