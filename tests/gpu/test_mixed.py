"""precision="mixed" on a GPU: what overflows in plain half precision is finite and near float32, on eight threads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import anabranch
from contract.overflowing import NETWORKS
from contract.support import PATHS, Make, on_threads
from gpu.support import Gpu

#: As on the CPU (``tests/unit/test_mixed.py``), relative to the result's norm.
BUDGET = {"mixed": 2e-2, "mixed-bf16": 1e-1}
DTYPES = {"mixed": torch.float16, "mixed-bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2991)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def rounded(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model in float32, with matrices of ``dtype``'s numbers: what half precision costs at the least."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(p.to(dtype))
    return model


@PATHS
@pytest.mark.parametrize("precision", BUDGET)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_overflows_in_plain_half_is_finite_and_near(
    gpu: Gpu, compiled: Make, name: str, backend: str, precision: str, graphs: bool
) -> None:
    model, draw = NETWORKS[name]()
    model = model.cuda()
    inputs = [draw().cuda() for _ in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        plain = copy.deepcopy(model).half()
        assert not all(torch.isfinite(plain(x.half())).all() for x in inputs)
    like = anabranch.Input(tuple(inputs[0].shape))  # no values: the graph alone decides
    engine = compiled(model, like, precision=precision, backend=backend, cuda_graphs=graphs)
    assert engine.summary()["signatures"][0]["precision"]["share_half"] >= 0.8
    results: list[Any] = [None] * len(inputs)
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.cuda.stream(gpu.stream()):
            results[i] = engine(inputs[i])

    on_threads(len(inputs), work)
    torch.cuda.synchronize()
    # A sharp softmax (swin's) is that far off by its weights' rounding alone.
    near = rounded(model, DTYPES[precision])
    with torch.no_grad():
        least = max(error(near(x), e) for x, e in zip(inputs, expected, strict=True))
    for y, e in zip(results, expected, strict=True):
        assert error(y, e) < max(BUDGET[precision], 2 * least)
