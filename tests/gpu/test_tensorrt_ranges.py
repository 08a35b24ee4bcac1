"""TensorRT's engines for ranges of sizes, on a GPU: many sizes from many threads, and nothing is built for one."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from anabranch import Dim, Input
from anabranch.backends.tensorrt import _compiler as compiler
from gpu.support import Gpu, Make, assert_same, on_threads

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")),
    reason="neither tensorrt nor tensorrt_rtx is installed",
)

#: As compile decides, with graphs for what repeats, direct.
WAYS = pytest.mark.parametrize("graphs", [None, True, False], ids=["auto", "graph", "direct"])
SIZES = (2, 3, 5, 8, 13, 17, 24, 31, 48, 64)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.last = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(x)).flatten(1)


def convolutions() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3, stride=2), nn.ReLU()
    )


class InBetween(nn.Module):
    """An operator that TensorRT does not run, and sizes that are computed around it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.special.erfinv(torch.tanh(self.linear(x)) * 0.5)
        return self.linear(y.view(x.shape[0] * x.shape[1], 64)).view(x.shape[0], -1)


def make(name: str) -> tuple[nn.Module, tuple[Any, ...], Any]:
    """Model, its input with its batch declared, and the shape of a batch of n."""
    torch.manual_seed(5)
    batch = Dim("batch", 1, 64)
    if name == "convolutions":
        return convolutions(), (batch, 3, 32, 32), lambda n: (n, 3, 32, 32)
    model = Encoder() if name == "encoder" else InBetween()
    return model, (batch, 16, 64), lambda n: (n, 16, 64)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What TensorRT builds from now on."""
    made: list[str] = []
    real = compiler.build

    def build(library: Any, path: Any, wanted: Any, label: str, *rest: Any) -> bytes:
        made.append(label)
        return real(library, path, wanted, label, *rest)

    monkeypatch.setattr(compiler, "build", build)
    return made


@WAYS
@pytest.mark.parametrize("name", ["encoder", "convolutions", "in between"])
def test_eight_threads_with_many_sizes_get_their_own_outputs(
    gpu: Gpu, builds: list[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, name: str, graphs: bool | None
) -> None:
    monkeypatch.setenv("ANABRANCH_TENSORRT_CACHE", str(tmp_path / "engines"))
    model, declared, shape = make(name)
    model = model.eval().requires_grad_(False).half().cuda()
    wanted = [Input(declared, torch.float16)]
    engine = anabranch.compile(model, wanted, backend="tensorrt", cuda_graphs=graphs, max_contexts=8)
    with engine:
        assert len([label for label in builds if label]) == (2 if name == "in between" else 1)
        assert "one optimization profile: batch 2 to 64" in engine.explain()
        before = len(builds)
        exact = make(name)[0].eval().requires_grad_(False).cuda()
        exact.load_state_dict(model.float().state_dict())
        inputs = [gpu.random(*shape(n), dtype=torch.float16) * (0.5 + 0.1 * i) for i, n in enumerate(SIZES)]
        expected = [engine(x) for x in inputs]
        torch.cuda.synchronize()
        for x, y in zip(inputs, expected, strict=True):
            right = exact(x.float())
            assert y.shape == right.shape
            assert ((y.float() - right).abs().max() / right.abs().max()).item() <= 5e-3
        wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(8)]
        torch.cuda.synchronize()

        def work_on(i: int) -> None:
            with torch.cuda.stream(gpu.stream()):
                for j in range(500):
                    k = (3 * i + j) % len(SIZES)
                    y = engine(inputs[k])
                    # Kernels differ between graphs of a shape and direct calls by the tactics they are built of only.
                    wrong[i] += (y != expected[k]).any()
                    y.fill_(float("nan"))
                torch.cuda.current_stream().synchronize()

        on_threads(8, work_on)
        engine._shapes.wait()
        assert [int(n) for n in wrong] == [0] * 8
        stats = engine.stats()
        assert stats.specializations == 1
        assert len(builds) == before, "something was built within the range"
        assert stats.graph_calls + stats.direct_calls == stats.calls == 8 * 500 + len(SIZES)
        if graphs is False:
            assert not stats.graph_calls
        if graphs is True:
            assert stats.graph_calls
        # 1 is not in a range: what broadcasts is compiled by itself.
        x = gpu.random(*shape(1), dtype=torch.float16)
        right = exact(x.float())
        assert ((engine(x).float() - right).abs().max() / right.abs().max()).item() <= 5e-3
        assert engine.stats().specializations == 2


@WAYS
def test_the_second_value_of_a_size_makes_a_range(gpu: Gpu, compiled: Make, graphs: bool | None) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).half()
    inputs = [gpu.random(n, 64, dtype=torch.float16) for n in (4, 7, 5, 16, 17)]
    engine = compiled(model, inputs[0], backend="tensorrt", cuda_graphs=graphs)
    made = []
    for x in inputs:
        y, right = engine(x), model(x)
        assert ((y - right).abs().max() / right.abs().max()).item() <= 5e-3
        made.append(engine.stats().specializations)
    assert made == [1, 2, 2, 2, 3], "up to the power of two from twice the size on"


def test_a_shape_of_a_range_in_a_callers_capture(gpu: Gpu, compiled: Make) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).half()
    x, other = gpu.random(4, 64, dtype=torch.float16), gpu.random(6, 64, dtype=torch.float16)
    engine = compiled(model, x, backend="tensorrt", cuda_graphs=True, dynamic=True)
    expected = engine(other)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        with pytest.raises(anabranch.NotCapturable, match=r"engine\.warm\(inputs\)"):
            engine(other)
        y = engine(x)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(y, engine(x))
    engine.warm([other])
    graph = torch.cuda.CUDAGraph()
    source = torch.full_like(other, float("nan"))
    with torch.cuda.graph(graph):
        y = engine(source)
    source.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(y, expected)


def test_contexts_of_a_small_shape_have_a_small_workspace(gpu: Gpu, compiled: Make) -> None:
    """What TensorRT says that a shape needs."""
    model = convolutions().half()
    wanted = [Input((Dim("batch", 1, 64), 3, 64, 64), torch.float16)]
    model = model.eval().requires_grad_(False).cuda()
    with anabranch.compile(model, wanted, backend="tensorrt", cuda_graphs=True) as engine:
        (of_range,) = engine._table.ranges
        kernels = of_range.choice.kernels
        with torch.cuda.stream(gpu.stream()):
            x = gpu.random(2, 3, 64, 64, dtype=torch.float16)
            any_size = kernels.instance(gpu.stream())
            small = kernels.instance(gpu.stream(), of_range.program.sizes.values([x.shape]))
            results = [run([x])[0] for run in (any_size, small)]
            torch.cuda.current_stream().synchronize()
        assert small.nbytes <= any_size.nbytes
        assert_same(results[0], results[1])
