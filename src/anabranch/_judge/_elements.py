"""Elements of two tensors, compared on the device, on the current stream, without the host; differences in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

_PACKED = {getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name)}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How far a right floating-point element may be from the expected one, relative to the largest finite magnitude
    that is expected in its tensor: ``units`` in the last place of the tensor's dtype, at least ``floor`` and at most a
    quarter.

    16 units are 1.9e-6 in float32 (so the floor is what counts there), 1.6e-2 in float16 and 1.3e-1 in bfloat16. The
    quarter is for floats of eight bits, of which 16 units would pass anything. ``least``, where results may be small
    differences of larger values, is how large these are: a tensor's largest magnitude counts as no less.
    """

    units: float = 16
    floor: float = 1e-5
    least: float = 0.0

    def of(self, dtype: torch.dtype) -> float:
        """The bound for a floating or complex dtype; 0 for all others."""
        if dtype in _PACKED or not (dtype.is_floating_point or dtype.is_complex):
            return 0.0
        return min(max(self.units * torch.finfo(dtype).eps, self.floor), 0.25)


class Pair(NamedTuple):
    """A tensor of a result, by name, and the expected one. Same dtype and shape, unless :func:`pair` was told else."""

    name: str
    actual: torch.Tensor
    expected: torch.Tensor


def unequal(actual: torch.Tensor, expected: torch.Tensor, *, nan_bits: bool = False) -> torch.Tensor:
    """Where two tensors of one dtype and shape do not have the same bits: booleans of their shape (with a last
    dimension of 2 where they are complex), computed on the current stream; the host does not wait.

    NaN equals NaN; with ``nan_bits`` only of the same sign and payload."""
    actual, expected = _real(actual), _real(expected)
    if actual.dtype is torch.bool:
        return actual != expected
    bits = _BITS[actual.element_size()]
    different = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    if nan_bits or not actual.is_floating_point():
        return different
    return different & ~(_widened(actual).isnan() & _widened(expected).isnan())


def wrong(
    actual: torch.Tensor, expected: torch.Tensor, bound: float, *, signed_zeros: bool = False, least: float = 0.0
) -> torch.Tensor:
    """Where an element is further than ``bound`` times the largest finite expected magnitude (or ``least``) from the
    expected one, or is NaN or infinite where that is not expected, or not where it is; shape and stream as
    :func:`unequal`.

    Integers and booleans must be equal. ``actual`` and ``expected`` may be floating dtypes of two sizes."""
    actual, expected = _real(actual), _real(expected)
    if not actual.is_floating_point():
        return unequal(actual, expected)
    actual, expected = _widened(actual), _widened(expected)
    if actual.dtype != expected.dtype:
        actual, expected = actual.double(), expected.double()
    far = ~((actual - expected).abs() <= bound * _scale(expected).clamp_min(least))
    # Neither a NaN nor an infinity has a distance from anything: they must be the same.
    far &= ~((actual == expected) | (actual.isnan() & expected.isnan()))
    far |= actual.isfinite() != expected.isfinite()
    if signed_zeros:
        far |= (actual == 0) & (expected == 0) & (actual.signbit() != expected.signbit())
    return far


def error(actual: torch.Tensor, expected: torch.Tensor, *, least: float = 0.0) -> float:
    """:func:`relative_error` on the host, which waits; quick where all elements are finite."""
    a, e = _real(actual), _real(expected)
    if a.numel() and a.is_floating_point():
        a, e = _widened(a), _widened(e)
        if a.dtype != e.dtype:
            a, e = a.double(), e.double()
        # One pass each, and none where something is not finite: the sums and the largest value then are not, either.
        largest = e.abs().amax()
        far = (a - e).abs().amax()
        if bool(largest.isfinite() & far.isfinite()):
            return float(far / largest.clamp_min(max(torch.finfo(e.dtype).tiny, least)))
    return float(relative_error(actual, expected, least=least))


def identical(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all bits of two tensors of one dtype and shape are the same; the host waits."""
    a, e = _real(actual), _real(expected)
    if a.dtype is torch.bool:
        return torch.equal(a, e)
    bits = _BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), e.contiguous().view(bits))


def relative_error(actual: torch.Tensor, expected: torch.Tensor, *, least: float = 0.0) -> torch.Tensor:
    """The largest distance from an expected element relative to the largest finite expected magnitude (or ``least``),
    as a tensor of no dimension on the current stream. Infinite where :func:`wrong` would not accept an element at any
    bound. 0 for tensors without elements."""
    if not actual.numel():
        return torch.zeros((), device=actual.device)
    actual, expected = _real(actual), _real(expected)
    if not actual.is_floating_point():
        return torch.where(unequal(actual, expected).any(), math.inf, 0.0)
    actual, expected = _widened(actual), _widened(expected)
    if actual.dtype != expected.dtype:
        actual, expected = actual.double(), expected.double()
    error = (actual - expected).abs() / _scale(expected).clamp_min(least)
    error = torch.where((actual == expected) | (actual.isnan() & expected.isnan()), 0.0, error)
    error = torch.where(actual.isfinite() != expected.isfinite(), math.inf, error)
    return error.nan_to_num(nan=math.inf, posinf=math.inf).amax()


def numbers(x: torch.Tensor) -> torch.Tensor:
    """A floating or complex tensor in a dtype that arithmetic is there for, the parts of complex numbers in a last
    dimension; an integer or boolean one as it is."""
    x = _real(x)
    return _widened(x) if x.is_floating_point() else x


def _real(x: torch.Tensor) -> torch.Tensor:
    """With the parts of a complex tensor in a last dimension, and without bits that postpone a conjugate or a minus."""
    x = x.detach().resolve_conj().resolve_neg()
    if x.dtype in _PACKED:
        return x.view(torch.uint8)  # two numbers a byte, and no arithmetic
    return torch.view_as_real(x) if x.is_complex() else x


def _widened(x: torch.Tensor) -> torch.Tensor:
    """In a dtype that arithmetic and comparisons are there for."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _scale(expected: torch.Tensor) -> torch.Tensor:
    """The largest finite magnitude; of a tensor that has none, or only zeros, the least number there is."""
    finite = torch.where(expected.isfinite(), expected.abs(), 0.0)
    largest = finite.amax() if finite.numel() else finite.sum()
    return largest.clamp_min(torch.finfo(expected.dtype).tiny)


def element_difference(p: Pair, rounding: Rounding | None, signed_zeros: bool, nan_bits: bool) -> str:
    """In words; empty where the elements are right."""
    _, actual, expected = p
    if identical(actual, expected):
        return ""
    if rounding is None:
        mask = unequal(actual, expected, nan_bits=nan_bits)
        if not signed_zeros and _real(actual).is_floating_point():
            mask &= ~((_widened(_real(actual)) == 0) & (_widened(_real(expected)) == 0))
    else:
        bound = rounding.of(expected.dtype)
        mask = wrong(actual, expected, bound, signed_zeros=signed_zeros, least=rounding.least)
    if not bool(mask.any()):
        return ""
    text = describe(p, mask)
    if rounding is not None and math.isfinite(error := float(relative_error(actual, expected))) and error:
        text += f"; largest relative error {error:.1e}, at most {rounding.of(expected.dtype):.1e} allowed"
    return text


def describe(p: Pair, mask: torch.Tensor) -> str:
    """The elements where ``mask`` (as :func:`unequal` returns it) is true, in words; there is one at least."""
    name, actual, expected = p
    flat = int(mask.flatten().to(torch.uint8).argmax())
    first: tuple[int, ...] = ()
    for size in reversed(mask.shape):
        flat, index = divmod(flat, size)
        first = (index, *first)
    got, wanted = (_real(x)[first].item() for x in (actual, expected))
    parts = "parts" if actual.is_complex() else "elements"
    where = f"element {first[:-1] if actual.is_complex() else first}"
    if actual.is_complex():
        where += f", {'imaginary' if first[-1] else 'real'} part"
    text = f"{name} differs in {int(mask.sum())} of {mask.numel()} {parts};"
    text += f" the first is {where}: {got!r}, expected {wanted!r}"
    kinds = _kinds(actual, expected, mask)
    return f"{text} ({', '.join(kinds)})" if kinds else text


def _kinds(actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> Iterable[str]:
    """What sorts of differences there are, where the sort says more than the numbers."""
    if not _real(actual).is_floating_point():
        return []
    a, e = _widened(_real(actual))[mask], _widened(_real(expected))[mask]
    found = {
        "NaN where a number is expected": a.isnan() & ~e.isnan(),
        "a number where NaN is expected": e.isnan() & ~a.isnan(),
        "an infinity where none is expected": a.isinf() & e.isfinite(),
        "no infinity where one is expected": e.isinf() & a.isfinite(),
        "an infinity of the wrong sign": a.isinf() & e.isinf() & (a != e),
        "a zero of the wrong sign": (a == 0) & (e == 0) & (a.signbit() != e.signbit()),
    }
    kinds = [f"{int(where.sum())} with {kind}" for kind, where in found.items() if bool(where.any())]
    if actual.numel() > 1 and not bool((_widened(_real(actual)) != 0).any()):
        kinds.append("all zeros")
    return kinds
