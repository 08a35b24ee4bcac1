"""Products of a single row and attention of a single query, as a GPU computes them: as eager, but for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import anabranch
from anabranch._judge import Rounding, differences
from gpu.support import Gpu, on_threads

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


class Products(torch.nn.Module):
    """Rows of 1,000 and 4,096 values; with a bias and without; between them what Inductor makes one kernel with."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = torch.nn.Linear(1000, 4096), torch.nn.Linear(1000, 4096, bias=False)
        self.down = torch.nn.Linear(4096, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


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


def _compiled(model: torch.nn.Module, inputs: list[torch.Tensor]) -> Any:
    return anabranch.compile(model, inputs, backend="inductor", cuda_graphs=True, dynamic=False)


@DTYPES
def test_products(gpu: Gpu, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = Products().to("cuda", dtype).eval().requires_grad_(False)
    inputs = [gpu.random(1, 1, 1000, dtype=dtype) for _ in range(8)]
    with _compiled(model, [inputs[0]]) as engine:
        serial = [engine(x) for x in inputs]
        for x, y in zip(inputs, serial, strict=True):
            found = differences(y, model(x), rounding=Rounding())
            assert not found, "\n".join(found)
        outputs: list[Any] = [None] * 8

        def work(i: int) -> None:
            with torch.cuda.stream(gpu.stream()):
                outputs[i] = [engine(x * 1) for x in inputs]

        on_threads(8, work)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for ys in outputs for a, b in zip(ys, serial, strict=True))


@DTYPES
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_attention_of_one_query(gpu: Gpu, dtype: torch.dtype, mask: str) -> None:
    q = gpu.random(2, 8, 1, 64, dtype=dtype)
    k, v = (gpu.random(2, 2, 300, 64, dtype=dtype) for _ in range(2))
    model = Attention(mask)
    with _compiled(model, [q, k, v, torch.tensor(3, device="cuda")]) as engine:
        for at in (0, 5, 299, -1):  # of the last, truths allow no key at all
            given = q * (at + 2), k, v, torch.tensor(at, device="cuda")
            found = differences(engine(*given), model(*given), rounding=Rounding())
            assert not found, f"{at}: " + "\n".join(found)
