"""Tensors at the border of an engine, which knows contiguous ones only: channels-last memory is a permuted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from anabranch.export import shape_at
from anabranch.export._sizes import plain_size


@dataclass(frozen=True)
class Layout:
    """``x.permute(order)`` is contiguous as an engine takes or makes ``x``: its dimensions as they lie in memory.

    ``stride`` is that of ``x`` in the model. Of an engine that was built on another machine it may ask for another
    order, since PyTorch's operators choose the memory of their results by the device: a copy is made then.

    ``sizes``: of each dimension a number or, where it varies, an expression of symbols; ``shape`` and ``stride`` are
    then those of the call that the program was exported for.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    sizes: tuple[Any, ...] = ()

    @classmethod
    def of(cls, x: Any) -> Layout:
        """Of a tensor, a fake one too. What is not dense counts as contiguous: it is copied on the way in."""
        shape, stride = shape_at(x.shape), shape_at(x.stride())
        return cls(shape, stride, x.dtype, _order(shape, stride), tuple(map(plain_size, x.shape)))

    def reordered(self, order: Sequence[int]) -> Layout:
        """The same tensor, for an engine that was built for this order of its dimensions."""
        return replace(self, order=tuple(order))

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

    @property
    def physical_sizes(self) -> tuple[Any, ...]:
        """The same with expressions where sizes vary."""
        return tuple(self.sizes[d] for d in self.order) if self.sizes else self.physical

    @property
    def bound(self) -> tuple[int, ...]:
        """The same as TensorRT has it: -1 where a size varies."""
        return tuple(n if isinstance(n, int) else -1 for n in self.physical_sizes)

    def to_engine(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as an engine reads it; a copy only where ``x`` lies in memory otherwise."""
        return x.permute(self.order).contiguous()

    def empty(self, device: torch.device, physical: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """New memory for a result: as the engine writes it, and with the dimensions in the model's order.

        ``physical``: its shape in memory, where sizes vary.
        """
        written = torch.empty(self.physical if physical is None else physical, dtype=self.dtype, device=device)
        return written, written.permute(self.inverse)

    def to_model(self, result: torch.Tensor) -> torch.Tensor:
        """``result``, once it is written, with the memory that the model gives it: itself, if that is the engine's."""
        if self._of_model is None:
            return result
        return result.permute(self._of_model.order).contiguous().permute(self._of_model.inverse)

    @cached_property
    def _of_model(self) -> Layout | None:
        """As the model lays it out, where that is another order than the engine's."""
        order = _order(self.shape, self.stride)
        return None if order == self.order else replace(self, order=order)


def _order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    plain = tuple(range(len(shape)))
    if _is_packed(shape, stride):  # dimensions of one element may come in any order
        return plain
    order = tuple(sorted(plain, key=lambda d: (-stride[d], d)))
    return order if _is_packed([shape[d] for d in order], [stride[d] for d in order]) else plain


def _is_packed(shape: Any, stride: Any) -> bool:
    expected = 1
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and s != expected:
            return False
        expected *= n
    return True
