"""Numbers that vary from call to call, on a device with streams: they are tensors that each call fills."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import anabranch
from anabranch._judge import differences
from contract.support import Fn, Rig

FLOATS = (0.1, 1 / 3, -0.0, 2.0, -1.7, math.inf)


def _arithmetic(x: torch.Tensor, s: float) -> Any:
    return x + s, x - s, x * s, x / s, s / x, x * (1 / (s**2 + 0.25) ** 0.5), torch.lerp(x, x * 2, s)


def _choices(x: torch.Tensor, s: float) -> Any:
    return x > s, x <= s, x == s, torch.where(x > 0, s, x), torch.where(x > 0, s, 1.0), x.masked_fill(x > 0, s)


def _limits(x: torch.Tensor, s: float) -> Any:
    y = x.clone()
    y[0] = s
    at = torch.tensor([s], device=x.device), torch.tensor([s]).to(x.device)
    return x.clamp(min=s), x.clamp(-1, s), y, torch.full_like(x, s), x * at[0], x + at[1], x.new_tensor([s]) * x


def _as_numbers(x: torch.Tensor, s: float) -> Any:
    return x**s, torch.nn.functional.leaky_relu(x, s), torch.linspace(0, s, 4, device=x.device)


@pytest.fixture(autouse=True)
def device() -> None:
    import anabranch.sim  # noqa: F401  # makes it


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("function", [_arithmetic, _choices, _limits, _as_numbers])
def test_bits_are_eagers_and_calls_are_captured(function: Any, dtype: torch.dtype, runtime: str) -> None:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(40, generator=generator) * 3
    x = torch.cat([drawn, torch.tensor([0.0, -0.0, math.nan, math.inf, 0.1])]).to(dtype)
    engine = anabranch.compile(Fn(function).eval(), [x.to("sim"), 1.5], backend="eager", runtime=runtime)
    for s in FLOATS:
        wrong = differences(torch.utils._pytree.tree_map(lambda y: y.cpu(), engine(x.to("sim"), s)), function(x, s))
        assert not wrong, f"{s!r}: {wrong}"
    stats = engine.stats()
    assert stats.specializations == 2
    if function is _as_numbers:
        assert stats.direct_calls == len(FLOATS)
        assert "a number of the call is no tensor: aten.pow.Tensor_Scalar" in engine.explain()
        assert engine.summary()["signatures"][1]["reasons"][0]["why"] == "number"
    else:
        assert stats.graph_calls == len(FLOATS)


def test_integers_and_integer_tensors(runtime: str) -> None:
    def computed(x: torch.Tensor, n: int) -> Any:
        return x * n, x + n, x - n, x / n, x > n, torch.where(x > 0, n, x), x * (n * 0.3), x.clamp(max=n)

    x = torch.arange(-9, 9)
    engine = anabranch.compile(Fn(computed).eval(), [x.to("sim"), 3], backend="eager", runtime=runtime)
    for n in (7, -2, 1 << 40, 1):
        wrong = differences([y.cpu() for y in engine(x.to("sim"), n)], list(computed(x, n)))
        assert not wrong, f"{n!r}: {wrong}"
    assert engine.stats().specializations == 2


def test_each_call_fills_its_own_tensor_on_its_own_stream(rig: Rig, runtime: str) -> None:
    x = torch.rand(16).to("sim")
    engine = anabranch.compile(Fn(lambda x, s: x * s + s).eval(), [x, 1.5], backend="eager", runtime=runtime)
    engine(x, 2.5)
    streams = [rig.stream() for _ in range(3)]
    rig.module.synchronize()
    results = []
    for i in range(30):
        with rig.module.stream(streams[i % 3]):
            results.append((1 / (i + 2), engine(x, 1 / (i + 2))))
    rig.module.synchronize()
    for s, y in results:
        assert torch.equal(y.cpu(), x.cpu() * s + s)
    assert engine.stats().specializations == 2
