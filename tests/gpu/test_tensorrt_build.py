"""What was built from a model on the CPU is found, and right, when the model is compiled on the GPU."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import anabranch
from anabranch import models
from anabranch.backends.tensorrt import _compiler as compiler
from gpu.support import Gpu

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")),
    reason="neither tensorrt nor tensorrt_rtx is installed",
)


class Mixed(nn.Module):
    """Two engines around an operator of PyTorch's; CUDA's replicated padding gives other strides than the CPU's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(functional.pad(x, (1, 1, 1, 1), mode="replicate")))
        return self.last(torch.special.erfinv(torch.tanh(x) * 0.5))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("make", "dtype"), [(models.branches, torch.float16), (Mixed, torch.float32)], ids=["branches", "mixed"]
)
def test_compile_finds_what_was_built_from_the_model_on_the_cpu(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, dtype: torch.dtype, memory: Any
) -> None:
    monkeypatch.setenv("ANABRANCH_TENSORRT_CACHE", str(tmp_path))
    model = make().eval().requires_grad_(False).to(dtype=dtype, memory_format=memory)
    x = torch.rand(1, 3, 64, 64).to(dtype).contiguous(memory_format=memory)
    built = anabranch.build(model, [x])
    assert built.compute_capability == torch.cuda.get_device_capability()
    assert built.engines

    def refuse(*args: Any, **kwargs: Any) -> bytes:
        raise AssertionError("an engine is built that was built before")

    monkeypatch.setattr(compiler, "_serialize", refuse)
    there = copy.deepcopy(model).cuda()
    engine = anabranch.compile(there, [x.cuda()], backend="tensorrt")
    assert f", {len(built.engines)} from the cache" in engine.explain()
    for _ in range(3):
        x = torch.rand_like(x)
        y, expected = engine(x.cuda()), there(x.cuda())
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
        assert y.stride() == expected.stride()
