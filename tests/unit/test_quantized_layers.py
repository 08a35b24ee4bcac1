"""Linears and experts in float8 and 4-bit integers: how far they are from the float ones, what they store, engines."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import anabranch
from contract.support import ROUNDING, assert_same

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def q() -> Iterator[Any]:
    """The module of the examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        from seven import quantized

        yield quantized
        for name in [name for name in sys.modules if name.split(".")[0] == "seven"]:
            del sys.modules[name]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(*shape: int) -> Tensor:
    """Rows and columns of very different sizes, some zeros, and the largest element at no block's beginning."""
    rows, columns = shape[-2:]
    sizes = torch.logspace(-3, 2, rows)[:, None] * torch.logspace(1, -2, columns)
    x = drawn(*shape, seed=3) * sizes
    x[..., 0, :3] = 0
    return x


def within(error: Tensor, bound: Tensor) -> None:
    """No element is beyond its bound, and some are so near that half of it would not do."""
    assert bool((error <= bound * (1 + 1e-5)).all())
    assert bool((error > bound * 0.5).any())


@pytest.mark.parametrize(("shape", "block"), [((64, 96), (16, 32)), ((50, 70), (16, 32)), ((3, 20, 40), (1, 40))])
def test_float8_is_as_near_as_the_format_says(q: Any, shape: tuple[int, ...], block: tuple[int, int]) -> None:
    weight = uneven(*shape)
    stored = q.Fp8Weight.of(weight, block)
    assert stored.weight.dtype is torch.float8_e4m3fn
    rows, columns = shape[-2:]
    assert stored.scale.shape == (*shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    # Elementwise: the scale of the block that an element is in.
    scale = torch.empty_like(weight)
    for i in range(rows):
        for j in range(columns):
            scale[..., i, j] = stored.scale[..., i // block[0], j // block[1]]
    dense = stored.dense(torch.float32)
    within((dense - weight).abs(), torch.maximum(weight.abs() / 16, scale * 2.0**-10))
    assert_same(dense, stored.weight.float() * scale)
    assert float(stored.weight.float().abs().amax()) == q.FP8_MAX


@pytest.mark.parametrize(("shape", "group"), [((24, 64), 32), ((3, 10, 48), 16)])
def test_4_bits_are_as_near_as_the_format_says(q: Any, shape: tuple[int, ...], group: int) -> None:
    weight = uneven(*shape)
    stored = q.Int4Weight.of(weight, group)
    largest = weight.unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True).expand(*shape[:-1], -1, group).flatten(-2)
    within((stored.dense(torch.float32) - weight).abs(), largest / 14)


def test_4_bits_are_packed_as_compressed_tensors_packs_them(q: Any) -> None:
    """Eight to an int32, the first column in the lowest bits, 8 added to each, by the format's definition."""
    weight = torch.tensor([[-7.0, -3, 0, 1, 2, 5, 6, 7, 7, 0, 0, 0, 0, 0, 0, -7]])
    stored = q.Int4Weight.of(weight, group=16)
    assert stored.scale.tolist() == [[1.0]]
    words = [0xFEDA9851, 0x1888888F]
    assert [x & 0xFFFFFFFF for x in stored.packed[0].tolist()] == words
    assert_same(stored.dense(torch.float32), weight)


def makers(q: Any) -> dict[str, Callable[[Tensor], Any]]:
    return {
        "float8": functools.partial(q.Fp8Weight.of, block=(16, 16)),
        "4 bits": functools.partial(q.Int4Weight.of, group=16),
    }


KINDS = pytest.mark.parametrize("kind", ["float8", "4 bits"])


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_float_one_of_the_same_numbers(q: Any, kind: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(48, 32).to(dtype)
    made = {"float8": q.Fp8Linear, "4 bits": q.Int4Linear}[kind].of(
        layer, *(((16, 16),) if kind == "float8" else (16,))
    )
    x = drawn(5, 48).to(dtype)
    with torch.no_grad():
        y, exact = made(x), layer(x)
        assert y.dtype is dtype
        assert_same(y, functional.linear(x, made.weight.dense(dtype), layer.bias))
        # At most what all weights are off by, all in one direction: 1/16 of each, or half of the group's largest / 7.
        off = made.weight.dense(torch.float32) - layer.weight.float()
        bound = functional.linear(x.float().abs(), off.abs()) + 0.02 * exact.float().abs().amax()
        assert bool(((y - exact).float().abs() <= bound).all())
    assert float((y - exact).float().abs().amax()) > 0


class Experts(nn.Module):
    """As transformers has them: a loop over the experts that get tokens, here over all of them."""

    def __init__(self, experts: int = 7, hidden: int = 32, inner: int = 16) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        self.gate_up_proj = nn.Parameter(drawn(experts, 2 * inner, hidden, seed=1) * hidden**-0.5)
        self.down_proj = nn.Parameter(drawn(experts, hidden, inner, seed=2) * inner**-0.5)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for token in range(len(x)):
            for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                gate, up = (self.gate_up_proj[expert] @ x[token]).chunk(2)
                result[token] += weight * (self.down_proj[expert] @ (self.act_fn(gate) * up))
        return result


def routed(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    x, scores = drawn(tokens, 32, seed=seed), drawn(tokens, 7, seed=seed + 50)
    weights, index = scores.softmax(-1).topk(2)
    return x, index, weights


@KINDS
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("at_once", [None, 1, 3])
def test_experts_are_the_float_ones_of_the_same_numbers(q: Any, kind: str, tokens: int, at_once: int | None) -> None:
    plain = Experts()
    made = q.QuantizedExperts(plain, makers(q)[kind], at_once)
    with torch.no_grad():
        plain.gate_up_proj.copy_(made.gate_up.dense(torch.float32))
        plain.down_proj.copy_(made.down.dense(torch.float32))
        for seed in (1, 2):
            call = routed(tokens, seed)
            assert_same(made(*call), plain(*call), rounding=ROUNDING)


@KINDS
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_engines_of_them(q: Any, kind: str, backend: str) -> None:
    """Eager's bits on the backend of that name; experts of few tokens and of many."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.experts = nn.Linear(32, 32), Experts()

        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return self.experts(functional.silu(self.layer(x)), index, weights)

    model = q.quantize(Both().eval().requires_grad_(False), makers(q)[kind])
    assert isinstance(model.layer, q.QuantizedLinear)
    assert isinstance(model.experts, q.QuantizedExperts)
    rounding = None if backend == "eager" else ROUNDING
    with anabranch.compile(model, list(routed(3, 1)), backend=backend, dynamic=False) as engine, torch.no_grad():
        for tokens in (3, 9):
            for seed in (1, 2):
                call = routed(tokens, seed)
                assert_same(engine(*call), model(*call), rounding=rounding)
        assert "with Python between" not in engine.explain()


def test_what_cannot_be_quantized_is_said(q: Any) -> None:
    with pytest.raises(ValueError, match="ReLU has no linear layer and no stack of experts to quantize"):
        q.quantize(nn.ReLU(), q.Fp8Weight.of)
    with pytest.raises(ValueError, match=r"given 20 columns; expected a multiple of 8 and of the group, 4"):
        q.Int4Weight.of(drawn(3, 20), group=4)
    with pytest.raises(ValueError, match=r"given the shape \(3,\), blocks of \(4, 4\); expected a matrix"):
        q.Fp8Weight(3, block=(4, 4))


def test_linears_are_chosen_by_name(q: Any) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 16)), nn.Linear(16, 8))
    q.quantize(model, q.Fp8Weight.of, lambda name: name != "2")
    assert [type(layer).__name__ for layer in (model[0], model[1][0], model[2])] == [
        "QuantizedLinear",
        "QuantizedLinear",
        "Linear",
    ]
