"""Models that carry pairs of quantize and dequantize: compiled on the CPU they give eager's bits, on four threads."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import anabranch
from anabranch.export import export_program, quantized_lines
from contract.quantized import INT8, quantized_ops, through
from contract.support import on_threads

pytestmark = pytest.mark.usefixtures("seeded")

_UINT8 = (0, 255, torch.uint8)


class Quantized(nn.Module):
    """As PT2E quantization writes it: activations by pairs, with zero points, one of them unsigned; weights in int8, by
    channels; and, as after quantization-aware training, fake quantizations of a tensor and of channels."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(16, 8, 3, 3) * 0.1
        zeros = torch.zeros(16, dtype=torch.int64)
        scales = weight.abs().amax((1, 2, 3)) / 127
        self.register_buffer(
            "weight", quantized_ops().quantize_per_channel(weight, scales, zeros, 0, -127, 127, torch.int8)
        )
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.last = nn.Parameter(torch.randn(10, 16) * 0.1, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = quantized_ops().dequantize_per_channel(self.weight, self.scales, self.zeros, 0, -127, 127, torch.int8)
        y = F.relu(F.conv2d(through(x, 0.02, 3, INT8), weight))
        y = through(y, 0.03, 5, _UINT8).mean((2, 3))
        y = torch.fake_quantize_per_tensor_affine(y, 0.01, 0, -128, 127)
        last = torch.fake_quantize_per_channel_affine(self.last, self.scales[:10], self.zeros[:10].int(), 0, -127, 127)
        return F.linear(y, last)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_four_threads_get_eagers_bits(backend: str, runtime: str) -> None:
    model = Quantized().eval()
    inputs = [torch.randn(4, 8, 12, 12) * (i + 1) for i in range(4)]
    inputs[3].view(-1)[::7] *= 1e4  # beyond the range of int8: saturated
    expected = [model(x) for x in inputs]
    # Halves between two steps of the first quantization.
    steps = (torch.arange(inputs[2].numel()).reshape(inputs[2].shape) % 200 - 100 + 0.5) * 0.02
    inputs[2], expected[2] = steps, model(steps)
    assert all(float(y.abs().max()) > 0 for y in expected)
    wrong: list[int] = []
    with anabranch.compile(model, [inputs[0]], backend=backend) as engine:
        assert engine.summary()["signatures"][0]["backend"] == backend

        def work(i: int) -> None:
            for turn in range(40):
                k = (i + turn) % 4
                if not torch.equal(engine(inputs[k]), expected[k]):
                    wrong.append(k)

        on_threads(4, work)
        text = engine.explain()
    assert not wrong
    assert "quantized: 7 operators, to int8, uint8 or back" in text
    assert "of quantized values, computed in float32 as in eager: conv2d (test_quantized_models.py:" in text
    assert "computed in int8" not in text


class _Kernel(nn.Module):
    """A product in int8 itself, as torchao's dynamic quantization has it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-128, 128, (32, 16), dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax() / 127
        quantized = (x / scale).round().clamp(-128, 127).to(torch.int8)
        return torch._int_mm(quantized, self.weight) * scale


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_products_in_int8_stay_in_int8(backend: str) -> None:
    model, x = _Kernel(), torch.randn(24, 32)
    with anabranch.compile(model, [x], backend=backend, runtime="python") as engine:
        torch.testing.assert_close(engine(x * 3), model(x * 3), rtol=1e-6, atol=0)
        text = engine.explain()
    assert "computed in int8 or float8: _int_mm (test_quantized_models.py:" in text


def test_what_is_told_of_tensorrt_and_of_models_without_quantizations() -> None:
    program = export_program(Quantized().eval(), [torch.randn(1, 8, 6, 6)], {})
    lines = quantized_lines(program.module.graph, "tensorrt")
    assert lines[1].startswith("for TensorRT to compute in int8 or float8, where it has such a kernel: conv2d (")
    assert "linear" in lines[1]
    plain = export_program(nn.Linear(4, 4).eval().requires_grad_(False), [torch.randn(2, 4)], {})
    assert quantized_lines(plain.module.graph, "inductor") == []
    float8 = nn.Linear(4, 4).eval().requires_grad_(False)

    class Fp8(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32) * 0.01
            result: torch.Tensor = float8(y)
            return result

    model = Fp8()
    model.layer = float8
    graph = export_program(model, [torch.randn(2, 4)], {}).module.graph
    assert quantized_lines(graph, "eager") == [
        "quantized: 2 operators, to float8_e4m3fn or back",
        quantized_lines(graph, "eager")[1],
    ]
    assert "linear (" in quantized_lines(graph, "eager")[1]
