"""PyTorch's attention layers and encoders take a fast path in eager where they can: results are as on it."""

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


# -- padding -----------------------------------------------------------------------------------------------------------


def _encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(12, options.pop("heads", 2), 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, **options).eval().requires_grad_(False)
    if encoder.norm is not None:
        nn.init.uniform_(encoder.norm.bias)  # which is what is left of zeros
    return encoder


class Summed(nn.Module):
    """Sees what is at padded positions."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        y = self.encoder(x, src_key_padding_mask=mask)
        return y, y.sum(1)


def _padding(*lengths: int) -> torch.Tensor:
    return torch.arange(6) >= torch.tensor(lengths)[:, None]


HOLES = torch.tensor([[False, True, False, False, True, True], [False] * 6])
MASKS = [_padding(6, 3), _padding(1, 5), _padding(6, 6), HOLES]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("options", [{}, {"norm": True}, {"enable_nested_tensor": False}, {"heads": 3}], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_padded_positions_are_as_in_eager(backend: str, options: dict[str, Any], dynamic: bool) -> None:
    norms = {"norm": nn.LayerNorm(12)} if "norm" in options else {}
    model = Summed(_encoder(**{**options, **norms}))
    given = [torch.randn(2, 6, 12), MASKS[0]]
    with anabranch.compile(model, given, backend=backend, dynamic=dynamic, require_full=True) as engine:
        # Where nothing is valid, eager without nested tensors has NaN on its fast path, and numbers on the slow one.
        for mask in (*MASKS, _padding(0, 4)) if not options else MASKS:
            x = torch.randn(2, 6, 12)
            for y, expected in zip(engine(x, mask), model(x, mask), strict=True):
                torch.testing.assert_close(y, expected)


def test_padded_positions_are_zero_in_half_too() -> None:
    model = Summed(_encoder())
    given = [torch.randn(2, 6, 12), MASKS[0]]
    for precision in (torch.bfloat16, "mixed-bf16"):
        with anabranch.compile(model, given, backend="eager", precision=precision, require_full=True) as engine:  # type: ignore[arg-type]
            y, expected = engine(*given)[0], model(*given)[0]
            assert torch.equal(y == 0, expected == 0)
            assert int((y == 0).sum()) == 3 * 12
            torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)
