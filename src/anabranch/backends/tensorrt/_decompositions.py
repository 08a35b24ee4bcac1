"""Operators taken apart on their way to ONNX, where its own, or TensorRT's kernel, gives another result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import get_decompositions
from torch.export import ExportedProgram

_aten = torch.ops.aten
#: Of selu as an elu: its factor, and that of the result.
_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def decompose(exported: ExportedProgram) -> ExportedProgram:
    """Batch normalizations that are left compute in float32, as PyTorch's kernels do, and round their results once.

    And what ONNX leaves open is written out: which of NaN and a number is larger, and what a sum of exponentials does
    when one of them is too large. So is what TensorRT computes of results that are rounded to half precision first.
    """
    norms = (_aten._native_batch_norm_legit_no_training.default, _aten._native_batch_norm_legit.default)
    table: dict[Any, Callable[..., Any]] = {
        **get_decompositions([*norms, _aten.logsumexp.default]),
        _aten.sign.default: _sign,
        _aten.sgn.default: _sign,
        _aten.maximum.default: _larger,
        _aten.minimum.default: _smaller,
        _aten.log_softmax.int: _log_softmax,
        _aten._log_softmax.default: lambda x, dim, to_float: _log_softmax(x, dim, torch.float32 if to_float else None),
        _aten.log_sigmoid.default: _log_sigmoid,
        _aten.log_sigmoid_forward.default: lambda x: (_log_sigmoid(x), x.new_empty(0)),
        _aten.log1p.default: _in_float32(_log1p),
        _aten.expm1.default: _in_float32(_expm1),
        _aten.elu.default: _elu,
        _aten.celu.default: lambda x, alpha=1.0: _elu(x, alpha, 1.0, 1.0 / alpha),
        _aten.selu.default: lambda x: _elu(x, *_SELU),
    }
    return exported.run_decompositions(table)


def _sign(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


def _larger(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """NaN if either is. TensorRT's takes the one that is a number (https://github.com/NVIDIA/TensorRT/issues/4758)."""
    if not torch.result_type(x, y).is_floating_point:
        return NotImplemented
    return torch.where((x > y) | torch.isnan(x), x, y)


def _smaller(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if not torch.result_type(x, y).is_floating_point:
        return NotImplemented
    return torch.where((x < y) | torch.isnan(x), x, y)


def _log_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """TensorRT's is the logarithm of its softmax: minus infinity where that is 0."""
    dtype = x.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        return NotImplemented
    above = x.float() - x.float().amax(dim, keepdim=True)
    return (above - above.exp().sum(dim, keepdim=True).log()).to(dtype)


def _log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """TensorRT's is the logarithm of its sigmoid: minus infinity where that is 0."""
    wide = x.float()
    return (torch.where(wide < 0, wide, 0.0) - _log1p((-wide.abs()).exp())).to(x.dtype)


def _in_float32(compute: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def computed(x: torch.Tensor) -> torch.Tensor:
        return compute(x.float()).to(x.dtype) if x.is_floating_point() else NotImplemented

    return computed


def _log1p(x: torch.Tensor) -> torch.Tensor:
    """In float32. The logarithm of a sum with 1 has no digits of a small number."""
    series = x * (1 - x * (1 / 2 - x * (1 / 3 - x / 4)))
    return torch.where(x.abs() < 2**-6, series, (x + 1).log())


def _expm1(x: torch.Tensor) -> torch.Tensor:
    """In float32, likewise."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120))))
    return torch.where(x.abs() < 2**-5, series, x.exp() - 1)


def _elu(x: torch.Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> torch.Tensor:
    wide = x.float()
    return torch.where(wide > 0, wide * scale, _expm1(wide * input_scale) * (alpha * scale)).to(x.dtype)
