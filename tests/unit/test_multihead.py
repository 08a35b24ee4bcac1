"""torch.nn.MultiheadAttention: results lie in memory as eager's, which takes a fast path where it can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import anabranch

pytestmark = pytest.mark.usefixtures("seeded")


class Viewed(nn.Module):
    """``view`` refuses what does not lie in one piece, as the results of the slow path with ``batch_first``."""

    def __init__(self, heads: int, is_seen: bool, **options: Any) -> None:
        super().__init__()
        self.attention, self.is_seen = nn.MultiheadAttention(12, heads, **options), is_seen

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        y, weights = self.attention(x, x, x, key_padding_mask=mask, need_weights=mask is None)
        return (y.view(-1) if self.is_seen else y), weights


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize(
    ("heads", "is_seen", "is_masked", "options"),
    [
        (2, True, False, {"batch_first": True}),
        (2, True, True, {"batch_first": True}),
        # None of these has a fast path.
        (3, False, False, {"batch_first": True}),
        (2, False, False, {"batch_first": True, "add_bias_kv": True}),
        (2, True, False, {}),
    ],
)
def test_results_lie_as_eagers(
    heads: int, is_seen: bool, is_masked: bool, options: dict[str, Any], backend: str
) -> None:
    model = Viewed(heads, is_seen, **options).eval().requires_grad_(False)

    def inputs() -> list[torch.Tensor]:
        masks = [torch.arange(5) > torch.tensor([[4], [2]])] if is_masked else []
        return [torch.randn(2, 5, 12), *masks]

    with anabranch.compile(model, inputs(), backend=backend) as engine:
        for _ in range(2):
            given = inputs()
            for y, expected in zip(engine(*given), model(*given), strict=True):
                if expected is None:
                    assert y is None
                    continue
                assert y.stride() == expected.stride()
                torch.testing.assert_close(y, expected)


def test_functions_of_pytorch_are_as_before() -> None:
    before = torch.overrides.has_torch_function, nn.MultiheadAttention.forward
    model = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 5, 12)
    with anabranch.compile(model, [x], backend="eager") as engine:
        torch.testing.assert_close(engine(x), model(x))
    assert (torch.overrides.has_torch_function, nn.MultiheadAttention.forward) == before
    assert "forward" not in vars(model.self_attn)
