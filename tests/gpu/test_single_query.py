"""Attention of a single query, as a GPU's engines compute it: near to float64's, and the same on each thread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import anabranch
from anabranch._judge import Rounding, differences
from gpu.support import Gpu, on_threads

pytestmark = pytest.mark.gpu


class Attention(torch.nn.Module):
    """One query of 8 heads over keys and values of 2; ``mask``: "none", of truths, or what is added to scores."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        seen = torch.arange(k.shape[2], device=k.device) <= at
        mask: Any = {"none": None, "bool": seen[None, None, None]}.get(self.mask, seen[None] * 2.0 - 1)
        mask = mask.to(q.dtype) if self.mask == "added" else mask
        y: torch.Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_attention_of_one_query(gpu: Gpu, dtype: torch.dtype, mask: str) -> None:
    q = gpu.random(2, 8, 1, 64, dtype=dtype)
    k, v = (gpu.random(2, 2, 300, 64, dtype=dtype) for _ in range(2))
    places = [torch.tensor(at, device="cuda") for at in (0, 5, 150, 299)]
    model = Attention(mask)
    inputs = [(q * (i + 2), k, v, at) for i, at in enumerate(places)]
    with anabranch.compile(model, [*inputs[0]], backend="inductor", cuda_graphs=True, dynamic=False) as engine:
        serial = [engine(*x) for x in inputs]
        for (*x, at), y in zip(inputs, serial, strict=True):
            found = differences(y, model(*(t.double() for t in x), at).to(dtype), rounding=Rounding())
            assert not found, "\n".join(found)
        if mask == "bool":
            nothing = engine(q, k, v, torch.tensor(-1, device="cuda"))
            assert torch.equal(nothing, torch.zeros_like(nothing)), "no key may be looked at"
        outputs: list[Any] = [None] * 8

        def work(i: int) -> None:
            with torch.cuda.stream(gpu.stream()):
                outputs[i] = [engine(*(t * 1 for t in x)) for x in inputs]

        on_threads(8, work)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for ys in outputs for a, b in zip(ys, serial, strict=True))
