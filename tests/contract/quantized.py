"""Quantizations as PyTorch's tools write them, for models of the tests."""

from __future__ import annotations

import importlib
from typing import Any

import torch

#: Of int8: the smallest and the largest step, and the type.
INT8 = (-128, 127, torch.int8)


def quantized_ops() -> Any:
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers them
    return torch.ops.quantized_decomposed


def through(x: torch.Tensor, scale: float, zero: int = 0, limits: Any = INT8) -> torch.Tensor:
    """``x`` by a pair of quantize and dequantize."""
    y: torch.Tensor = quantized_ops().quantize_per_tensor(x, scale, zero, *limits)
    result: torch.Tensor = quantized_ops().dequantize_per_tensor(y, scale, zero, *limits)
    return result
