"""precision=: computed in half, handed back as it came."""

from __future__ import annotations

import pytest
import torch

import anabranch


class _Scale(torch.nn.Module):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x, n, x * 3 + n


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_inputs_come_back_unrounded_and_results_in_the_models_types(precision: torch.dtype) -> None:
    x, n = torch.randn(4, 5), torch.arange(5)
    engine = anabranch.compile(_Scale(), [x, n], backend="eager", precision=precision)
    for scale in (1.0, 1.7):
        z = x * scale
        same, count, y = engine(z, n)
        assert same is z
        assert count is n
        assert y.dtype is torch.float32
        assert torch.equal(y, (z.to(precision) * 3 + n).float())
        assert not torch.equal(y, z * 3 + n)
