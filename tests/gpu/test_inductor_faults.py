"""Engines of the backend ``inductor`` on a GPU give eager's values where Inductor alone does not: ``docs/use.md``."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import anabranch
from anabranch._judge import Rounding, differences
from anabranch.backends import get_backend
from gpu.support import Gpu

pytestmark = pytest.mark.gpu


class Pooled(torch.nn.Module):
    """As in ``tests/unit/test_inductor_faults.py``, of pictures of this size."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        self.pool = torch.nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.norm = torch.nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        t = x.transpose(1, 2).reshape(1, self.channels, 8, self.size, self.size).contiguous()
        result: torch.Tensor = self.norm(self.pool(t).reshape(1, self.channels, -1).transpose(1, 2) + y)
        return result


class PooledPictures(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = (x.permute(0, 2, 3, 1) * 2).permute(0, 3, 1, 2)
        return torch.nn.functional.max_pool2d(t, 3, 2, 1).flatten(2).softmax(-1).sum(1)


def _compare(model: torch.nn.Module, inputs: list[torch.Tensor]) -> None:
    # Memory that nobody wrote shall not happen to be zeros.
    spoiled = [torch.full((1 << 26,), torch.nan, device="cuda") for _ in range(2)]
    del spoiled
    with torch.no_grad(), anabranch.compile(model, inputs, backend="inductor") as engine:
        for _ in range(2):
            found = differences(engine(*inputs), model(*inputs), rounding=Rounding())
            assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("channels", "size"), [(384, 30), (384, 28), (192, 26)])
def test_temporaries_are_read_where_they_lie(gpu: Gpu, channels: int, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator(device="cuda").manual_seed(size)
    rows = 8 * size**2, 8 * (size // 2) ** 2
    inputs = [torch.randn(1, n, channels, generator=generator, device="cuda", dtype=dtype) for n in rows]
    _compare(Pooled(channels, size).eval().to("cuda", dtype), inputs)


def test_pictures_that_lie_channels_last(gpu: Gpu) -> None:
    generator = torch.Generator(device="cuda").manual_seed(3)
    x = torch.randn(2, 64, 81, 75, generator=generator, device="cuda").to(memory_format=torch.channels_last)
    _compare(PooledPictures(), [x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_with_a_fault_are_found_and_operators_are_captured_instead(
    gpu: Gpu, runtime: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend: Any = get_backend("inductor")
    lower = backend.lower

    def faulty(self: Any, *given: Any) -> Any:
        kernels = lower(*given)
        return lambda inputs: [y.flip(0) for y in kernels(inputs)]

    monkeypatch.setattr(type(backend), "lower", faulty)
    generator = torch.Generator(device="cuda").manual_seed(4)
    x = torch.randn(64, 128, generator=generator, device="cuda").to(dtype)
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.Tanh(), torch.nn.Linear(256, 10)).to("cuda", dtype)
    model.eval().requires_grad_(False)
    with caplog.at_level(logging.WARNING, "anabranch"):
        engine = anabranch.compile(model, [x], backend="inductor", runtime=runtime, cuda_graphs=True)
    assert "PyTorch's operators run the model instead" in caplog.text
    made = engine.summary()["signatures"][0]
    assert (made["backend"], made["captured"]) == ("eager", True)
    for _ in range(3):
        assert not differences(engine(x), model(x))
    engine.close()
