"""Numbers that vary from call to call, on a GPU: bits are eager's, calls are captured, and no stream waits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from anabranch._judge import Rounding, differences
from contract.support import Fn
from gpu.support import Gpu

FLOATS = (0.5, 0.1, 1 / 3, -0.0, 0.0, 2.0, -1.7, math.inf, -math.inf, 40000.3)


def _arithmetic(x: torch.Tensor, s: float) -> Any:
    return x + s, x - s, x * s, x / s, s / x, x * (1 / (s**2 + 0.25) ** 0.5), torch.lerp(x, x * 2, s)


def _reversed(x: torch.Tensor, s: float) -> Any:
    return s - x, 1 - x * s


def _choices(x: torch.Tensor, s: float) -> Any:
    return x > s, x <= s, x == s, x != s, torch.where(x > 0, s, x), torch.where(x > 0, x, s), torch.where(x > 0, s, 1.0)


def _limits(x: torch.Tensor, s: float) -> Any:
    return x.clamp(min=s), x.clamp(max=s), x.clamp(-1, s), x.clamp_min(s), x.masked_fill(x > 0, s)


def _filled(x: torch.Tensor, s: float) -> Any:
    y = x.clone()
    y[0] = s
    at = torch.tensor([s], device=x.device), torch.tensor([s]).to(x.device), torch.full((3,), s, device=x.device)
    return y, torch.full_like(x, s), x * at[0], x + at[1], at[2] * 2, x.new_full((2,), s), x.new_tensor([s])


def _taken_as_numbers(x: torch.Tensor, s: float) -> Any:
    return x**s, torch.add(x, x, alpha=s), nn.functional.leaky_relu(x, s), torch.linspace(0, s, 4, device=x.device)


CAPTURED = (_arithmetic, _choices, _limits, _filled)


def _inputs(dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.randn(2000, generator=torch.Generator().manual_seed(3)) * 3
    return torch.cat([drawn, torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 0.1])]).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("function", [*CAPTURED, _reversed, _taken_as_numbers])
def test_bits_are_eagers_for_every_value(gpu: Gpu, function: Any, dtype: torch.dtype) -> None:
    x = _inputs(dtype)
    engine = anabranch.compile(Fn(function).eval(), [x, 1.5], backend="eager", cuda_graphs=True)
    for s in FLOATS:
        wrong = differences(engine(x, s), function(x, s))
        assert not wrong, f"{s!r}: {wrong}"
    assert engine.stats().specializations == 2, engine.explain()
    if function in CAPTURED:
        assert engine.stats().graph_calls == len(FLOATS), engine.explain()


def test_integers_and_integer_tensors(gpu: Gpu, runtime: str) -> None:
    def computed(x: torch.Tensor, n: int) -> Any:
        return x * n, x + n, x - n, x / n, x > n, torch.where(x > 0, n, x), x * (n * 0.3), x.clamp(max=n)

    x = torch.arange(-40, 40, device="cuda")
    engine = anabranch.compile(Fn(computed).eval(), [x, 3], backend="eager", runtime=runtime, cuda_graphs=True)
    for n in (7, -2, 1 << 40, 1, -(1 << 62)):
        wrong = differences(engine(x, n), computed(x, n))
        assert not wrong, f"{n!r}: {wrong}"
    assert engine.stats().specializations == 2
    assert engine.stats().graph_calls == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_inductor_compiles_once(gpu: Gpu, dtype: torch.dtype, runtime: str) -> None:
    def step(x: torch.Tensor, s: float) -> Any:
        return (x * s).clamp(-s, s) + 1 / (s * s + 1), torch.where(x > s, s, x), x / s, torch.add(x, x, alpha=s)

    x = _inputs(dtype)[:2000]
    engine = anabranch.compile(Fn(step).eval(), [x, 1.0], backend="inductor", runtime=runtime, cuda_graphs=True)
    for s in (0.3, 2.5, 1e-3, 0.7, 1.0):
        wrong = differences(engine(x, s), step(x, s), rounding=Rounding())
        assert not wrong, f"{s!r}: {wrong}"
    assert engine.stats().specializations == 2
    assert engine.stats().graph_calls == 5


def test_the_number_is_ordered_on_the_callers_stream_and_the_host_does_not_wait(gpu: Gpu, runtime: str) -> None:
    x = _inputs(torch.float16)
    engine = anabranch.compile(Fn(_arithmetic).eval(), [x, 1.5], backend="eager", runtime=runtime, cuda_graphs=True)
    engine(x, 2.5)
    # A call that builds one does wait. One context has been used on the stream of the call above.
    assert engine.warm([x, 2.5], contexts=4) == 4
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results: list[tuple[float, Any]] = []
    with gpu.asks_nothing():
        for i in range(60):
            s = 1 / (i + 2)
            with torch.cuda.stream(streams[i % 3]):
                results.append((s, engine(x, s)))
    torch.cuda.synchronize()
    for s, given in results:
        wrong = differences(given, _arithmetic(x, s))
        assert not wrong, f"{s!r}: {wrong}"


def test_inside_a_callers_capture_the_number_is_the_one_of_that_call(gpu: Gpu) -> None:
    x = torch.rand(64, device="cuda")
    engine = anabranch.compile(Fn(lambda x, s: x * s + 1).eval(), [x, 1.5], backend="eager")
    engine(x, 2.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = engine(x, 0.3)
    x.copy_(torch.rand(64, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, x * 0.3 + 1)
