"""Direct calls with numbers that depend on data, from many threads at once, each on a stream of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import anabranch
from contract.numbers import MODELS, assert_eagers, inputs_of
from contract.support import on_threads
from gpu.support import Gpu


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_results_are_eagers_from_many_threads(gpu: Gpu, model: nn.Module, runtime: str) -> None:
    engine = anabranch.compile(model.eval(), [torch.randn(5, 4, device="cuda")], runtime=runtime, backend="eager")

    def serve(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            for k in range(5):
                for x in inputs_of(100 * i + k):
                    on_gpu = x.cuda()
                    assert_eagers(engine(on_gpu), model(on_gpu))

    on_threads(8, serve)
    if runtime == "native":
        assert "through Python" not in engine.explain()
