"""Models with sizes and numbers that depend on data, and with numbers beside tensors, for each device's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree


class Sizes(nn.Module):
    """What sizes that depend on data are used for."""

    def forward(self, x: torch.Tensor) -> Any:
        kept = x[x > 0]
        n = kept.shape[0]
        places = torch.nonzero(x > 0.5)
        ones = x.new_ones(n, 2)
        halves = torch.arange(n, device=x.device) // 2
        return (
            kept / (n + 1),
            ones * n,
            halves,
            places[:, 0] - places.size(0),
            kept.sum() % (n + 2),
            n,
            (n * 3 - 7) // 2,
        )


class Values(nn.Module):
    """Numbers that the host reads."""

    def forward(self, x: torch.Tensor) -> Any:
        n: Any = (x > 0).sum().item()
        torch._check(n >= 0)
        torch._check(n <= x.numel())
        first: Any = x.reshape(-1)[0].item()
        return (
            x.reshape(-1).narrow(0, 0, n) * first,
            functional.pad(x, (0, 1), value=1.5) * (n // 3 - 7) + n / 5,
            torch.full((3,), n, dtype=torch.float32),
            x.clamp(min=first),
            *(-n % 5, (n - 9) // 4, (n - 9) % 4, n > 4, first * 2, torch.sym_max(n, 3), -first),
        )


class Repeats(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        times = x.abs().reshape(-1).long()
        y = torch.repeat_interleave(x.reshape(-1), times)
        return y * 2, torch.unique(times), torch.masked_select(x, x < 0), y.numel()


class Chooses(nn.Module):
    """As ``torch.cond``, which is slow in eager, has it."""

    def forward(self, x: torch.Tensor) -> Any:
        def yes(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return y * 2, y.relu() + 1

        def no(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return y - 1, y.sigmoid()

        if torch.compiler.is_exporting():
            a, b = torch.cond(x.sum() > 0, yes, no, (x,))
        else:
            a, b = (yes if x.sum() > 0 else no)(x)
        return a + b


class Scalars(nn.Module):
    """Numbers beside tensors: of the model's code, whole and broken, and complex."""

    def forward(self, x: torch.Tensor) -> Any:
        i = (x * 3).long()
        return x * 2, i * 2, i + 0.5, (i > 1) * 3, x - 1j, 2**x, torch.where(x > 0, x, 0.25)


def inputs_of(seed: int) -> Iterator[torch.Tensor]:
    """On the CPU, (5, 4): two that are mixed, one of which nothing is selected, one of which everything is."""
    generator = torch.Generator().manual_seed(seed)
    for scale in (1.0, 3.0):
        yield torch.randn(5, 4, generator=generator) * scale
    yield -torch.rand(5, 4, generator=generator) * 4 - 1
    yield torch.rand(5, 4, generator=generator) * 4 + 1


MODELS = [Sizes(), Values(), Repeats(), Chooses(), Scalars()]


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and repr(a) == repr(b)  # tells zeros apart, and takes NaN for NaN


def assert_eagers(actual: Any, expected: Any, strides: bool = True) -> None:
    """The same structure, types and bits; ``actual`` may be on another device."""
    (ours, structure), (theirs, wanted) = pytree.tree_flatten(actual), pytree.tree_flatten(expected)
    assert structure == wanted
    for y, z in zip(ours, theirs, strict=True):
        assert type(y) is type(z)
        if isinstance(y, torch.Tensor):
            assert y.dtype is z.dtype
            assert y.shape == z.shape
            assert not strides or y.stride() == z.stride()
            assert torch.equal(y.cpu(), z.cpu())
        else:
            assert same(y, z)
