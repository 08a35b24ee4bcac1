"""Weights in another type, cast once for all programs of an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CastTensors:
    """Casts of tensors, made with the build lock held and kept for as long as the engine may compile."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def get(self, tensor: torch.Tensor, dtype: torch.dtype, aside: Callable[..., Any]) -> torch.Tensor:
        """``tensor`` in ``dtype``; itself if it is. ``aside`` makes a call and waits until what it queued is done:
        streams will read what is cast here without waiting for it."""
        if tensor.dtype is dtype:
            return tensor
        key = (id(tensor), dtype)
        if key not in self._made:
            aside(lambda: self._made.update({key: (tensor, tensor.detach().to(dtype))}), lasting=True)
        return self._made[key][1]
