"""Models with pairs of quantize and dequantize on a GPU: eager's results, in every backend, on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import anabranch
from contract.quantized import quantized_ops, through
from contract.support import PATHS, Make, on_threads
from gpu.support import Gpu

_WEIGHTS = (-127, 127, torch.int8)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(2991)


class Pairs(nn.Module):
    """As PT2E quantization writes it: a convolution and a product of int8, by tensor and by channel."""

    def __init__(self, channels: int, results: int) -> None:
        super().__init__()
        weight, last = torch.randn(channels, 16, 3, 3) * 0.1, torch.randn(results, channels) * 0.1
        for name, value in (("weight", weight), ("last", last)):
            scales = value.flatten(1).abs().amax(1) / 127
            zeros = torch.zeros(len(value), dtype=torch.int64)
            self.register_buffer(name, quantized_ops().quantize_per_channel(value, scales, zeros, 0, *_WEIGHTS))
            self.register_buffer(f"{name}_scales", scales)
            self.register_buffer(f"{name}_zeros", zeros)

    def _wide(self, name: str) -> torch.Tensor:
        given = (getattr(self, f"{name}{end}") for end in ("", "_scales", "_zeros"))
        result: torch.Tensor = quantized_ops().dequantize_per_channel(*given, 0, *_WEIGHTS)
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(F.conv2d(through(x, 0.03), self._wide("weight"), padding=1))
        return F.linear(through(y, 0.05).mean((2, 3)), self._wide("last"))


class Fake(nn.Module):
    """As after quantization-aware training: the zero points are computed in the model, too."""

    def __init__(self, width: int, results: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(results, width) * 0.1, requires_grad=False)
        self.register_buffer("scales", self.weight.abs().amax(1) / 127)
        self.register_buffer("zeros", torch.zeros(results, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, 0.03, 0, -128, 127)
        weight = torch.fake_quantize_per_channel_affine(self.weight, self.scales, self.zeros.int(), 0, -127, 127)
        return F.linear(x, weight)


class Mean(nn.Module):
    """Of a picture; TensorRT-RTX 1.4 has made zeros of what follows, in int8."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = Fake(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fake(x.mean((2, 3)))
        return result


MODELS: dict[str, Any] = {
    "fake of a mean": (Mean, (4, 16, 10, 10)),
    "pairs": (lambda: Pairs(32, 16), (4, 16, 12, 12)),
    "pairs of odd sizes": (lambda: Pairs(24, 10), (3, 16, 11, 7)),
    "fake": (lambda: Fake(64, 32), (8, 64)),
    "fake of odd sizes": (lambda: Fake(16, 10), (4, 16)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["eager", "inductor", "tensorrt"])
@pytest.mark.parametrize("graphs", [None, False], ids=["auto", "direct"])
def test_four_threads_get_eagers_results(
    gpu: Gpu, compiled: Make, name: str, backend: str, graphs: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "tensorrt":
        pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    make, shape = MODELS[name]
    model = make().eval().cuda()
    inputs = [gpu.random(*shape) * (i + 1) - 0.3 * i for i in range(4)]
    inputs[3].view(-1)[::7] *= 1e4  # beyond the range of int8: saturated
    expected = [model(x) for x in inputs]
    engine = compiled(model, inputs[0], backend=backend, cuda_graphs=graphs, max_contexts=4)
    # Of kernels in int8, what is rounded may be a step away; those of PyTorch round as eager does.
    bound = 0.03 if backend == "tensorrt" else 1e-5
    wrong: list[float] = []

    def work(i: int) -> None:
        with torch.cuda.stream(gpu.stream()):
            for turn in range(20):
                k = (i + turn) % 4
                y, e = engine(inputs[k]), expected[k]
                off = float((y - e).abs().max() / e.abs().max())
                if not off <= bound:
                    wrong.append(off)

    torch.cuda.synchronize()
    on_threads(4, work)
    assert not wrong, (max(wrong), engine.explain())


@PATHS
def test_kernels_of_inductor_ask_the_host_for_nothing(gpu: Gpu, compiled: Make, graphs: bool) -> None:
    """PyTorch's operator looks at the zero points there, which no graph can be captured around."""
    model, x = Fake(64, 32).eval().cuda(), gpu.random(8, 64) * 3
    engine = compiled(model, x, backend="inductor", cuda_graphs=graphs)
    torch.testing.assert_close(engine(x), model(x), rtol=0, atol=1e-5)
    with pytest.raises(anabranch.BuildError, match=r"cuda_graphs=True given, and this model cannot be captured"):
        compiled(model, x, backend="eager", cuda_graphs=True)
