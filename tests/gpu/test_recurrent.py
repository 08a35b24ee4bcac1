"""Recurrent layers run as in eager, captured, with cuDNN and without a copy of their weights in each call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from anabranch._judge import Rounding, differences
from gpu.support import Gpu


class Tagger(nn.Module):
    """Two layers, one after another; returns results and states."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.first = kind(12, 16, 2, **options)
        directions = 2 if options.get("bidirectional") else 1
        self.second = kind((options.get("proj_size") or 16) * directions, 8)
        self.out = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> Any:
        y, state = self.first(x)
        z, _ = self.second(y)
        return self.out(z), state


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Tagger(nn.LSTM, batch_first=True, bidirectional=True),
    "lstm with a projection": lambda: Tagger(nn.LSTM, proj_size=6),
    "lstm without biases, with dropout": lambda: Tagger(nn.LSTM, bias=False, dropout=0.5),
    "gru": lambda: Tagger(nn.GRU, bidirectional=True),
    "rnn": lambda: Tagger(nn.RNN, nonlinearity="relu"),
}


def inputs(k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(7, 3, 12, generator=torch.Generator().manual_seed(k)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", MODELS)
def test_results_are_eagers(gpu: Gpu, name: str, backend: str, dtype: torch.dtype, runtime: str) -> None:
    model = MODELS[name]().eval().to("cuda", dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*single contiguous chunk.*")
        engine = anabranch.compile(model, [inputs(0, dtype)], runtime=runtime, backend=backend, cuda_graphs=True)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            for k in range(1, 4):
                x = inputs(k, dtype)
                assert not differences(engine(x), model(x), rounding=Rounding(), inputs=[x])
    stats = engine.stats()
    assert stats.graph_calls == stats.calls == 3


def test_weights_are_the_models_own(gpu: Gpu, runtime: str) -> None:
    """What is written into them is seen by the engine, so no copy was made."""
    model = Tagger(nn.LSTM).eval().cuda()
    engine = anabranch.compile(model, [inputs(0)], runtime=runtime, backend="eager")
    with torch.no_grad():
        model.first.weight_hh_l1.mul_(0.5)  # type: ignore[operator, union-attr]
        torch.cuda.synchronize()
        x = inputs(1)
        assert not differences(engine(x), model(x), rounding=Rounding(), inputs=[x])


def test_weights_that_lie_apart_are_put_together_once(gpu: Gpu, runtime: str) -> None:
    model = Tagger(nn.GRU).eval().cuda()
    for layer in (model.first, model.second):
        for name, weight in list(layer.named_parameters()):
            layer.register_parameter(name, nn.Parameter(weight.detach().clone()))
        layer._flat_weights = [getattr(layer, n) for n in layer._flat_weights_names]  # type: ignore[assignment, operator, union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = model(inputs(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*single contiguous chunk.*")
        engine = anabranch.compile(model, [inputs(0)], runtime=runtime, backend="eager", cuda_graphs=False)
        assert not differences(engine(inputs(1)), want, rounding=Rounding())


def test_in_half_precision(gpu: Gpu) -> None:
    model = Tagger(nn.LSTM, bidirectional=True).eval().cuda()
    engine = anabranch.compile(model, [inputs(0)], precision=torch.float16)
    given, want = engine(inputs(1))[0], model(inputs(1))[0]
    assert given.dtype is torch.float32
    assert torch.allclose(given, want, atol=1e-2)


class Packed(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer = kind(12, 16, 2, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        y, state = self.layer(packed)
        return nn.utils.rnn.pad_packed_sequence(y, batch_first=True), state


@pytest.mark.parametrize("place", ["cuda", "cpu"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_packed_sequences(gpu: Gpu, kind: type[nn.Module], place: str, runtime: str) -> None:
    model = Packed(kind).eval().cuda()
    lengths = [[7, 3, 1], [2, 6, 6], [1, 1, 4]]
    first = inputs(0).transpose(0, 1).contiguous()
    engine = anabranch.compile(model, [first, torch.tensor([1, 1, 1], device=place)], runtime=runtime)
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        for k, given in enumerate(lengths):
            x, n = inputs(k).transpose(0, 1).contiguous(), torch.tensor(given, device=place)
            assert not differences(engine(x, n), model(x, n), rounding=Rounding(), inputs=[x, n])
