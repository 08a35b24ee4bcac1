"""Verdicts on concurrent results: whether each has the bits of the serial one. The host does not wait for any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from anabranch._judge import Pair, identical, numbers, pair, sharing, unequal


@dataclass(frozen=True)
class Serial:
    """A call that was made when nothing else ran. ``x`` is its input, if it is needed later on."""

    source: torch.Tensor
    x: torch.Tensor
    result: Any


def form(result: Any, x: torch.Tensor, serial: Serial) -> list[str]:
    """How a concurrent result differs from the serial one in all but its elements. The host does not wait."""
    found, pairs = pair(result, serial.result)
    return found or sharing(pairs, [x], [serial.x])


def verdict(result: Any, reference: Any, device: torch.device) -> torch.Tensor:
    """(wrong, all zero, non-finite) as 0 or 1, computed on the current stream without the host, of whose memory nothing
    may be copied: that would wait for the stream.

    Wrong is whatever has other bits, NaN's included: the same kernels ran on the same input."""
    found, pairs = pair(result, reference)
    none = torch.zeros((), dtype=torch.bool, device=device)
    flags = [torch.stack([~none if found else none, none, none])]
    for p in pairs:
        if p.actual.device == device:
            flags.append(_flags(p))
        else:  # an output on the CPU is there already
            flags.append(torch.stack([~none if flag else none for flag in _flags(p).tolist()]))
    return torch.stack(flags).any(0).to(torch.int32)


def _flags(p: Pair) -> torch.Tensor:
    if p.actual.device.type == "cpu" and identical(p.actual, p.expected):
        return torch.zeros(3, dtype=torch.bool)
    other = unequal(p.actual, p.expected, nan_bits=True).any()
    y, r = numbers(p.actual), numbers(p.expected)
    if not y.is_floating_point():
        none = torch.zeros_like(p.expected)
        zero = ~unequal(p.actual, none).any() & unequal(p.expected, none).any()
        return torch.stack([other, zero, torch.zeros_like(other)])
    return torch.stack([other, (y == 0).all() & (r != 0).any(), (~y.isfinite() & r.isfinite()).any()])
