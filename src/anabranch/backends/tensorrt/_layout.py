"""Tensors at the border of an engine, which knows contiguous ones only: channels-last memory is a permuted one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Layout:
    """``x.permute(order)`` is contiguous, for a tensor ``x`` of this layout: its dimensions as they lie in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]

    @classmethod
    def of(cls, x: Any) -> Layout:
        """Of a tensor, a fake one too. What is not dense counts as contiguous: it is copied on the way in."""
        shape, stride = tuple(int(n) for n in x.shape), tuple(int(n) for n in x.stride())
        order = tuple(sorted(range(len(shape)), key=lambda d: (-stride[d], d)))
        if not _is_packed([shape[d] for d in order], [stride[d] for d in order]):
            order = tuple(range(len(shape)))
        if _is_packed(shape, stride):  # dimensions of one element may come in any order
            order = tuple(range(len(shape)))
        return cls(shape, stride, x.dtype, order)

    @property
    def is_identity(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    @property
    def inverse(self) -> tuple[int, ...]:
        return tuple(self.order.index(d) for d in range(len(self.order)))

    @property
    def physical(self) -> tuple[int, ...]:
        """The shape as it lies in memory."""
        return tuple(self.shape[d] for d in self.order)

    def to_engine(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as an engine reads it; a copy only where ``x`` lies in memory otherwise."""
        return x.permute(self.order).contiguous()

    def empty(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """New memory for a result: as the engine writes it, and as the model returns it."""
        written = torch.empty(self.physical, dtype=self.dtype, device=device)
        return written, written.permute(self.inverse)


def _is_packed(shape: Any, stride: Any) -> bool:
    expected = 1
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and s != expected:
            return False
        expected *= n
    return True
