"""Whether what a call returned is what was expected: the one comparison that tools, programs and tests share.

Compared are the structure and the types (order of keys, named tuples, dataclasses, ``torch.Size``, ``None``, numbers),
then of each tensor its dtype, shape, device, strides, what it shares memory with, and every element. What cannot be
compared raises :class:`~anabranch.errors.CannotJudge`: no tool may call it right.

Elements, in short:

- Integers and booleans are equal or wrong, whatever ``rounding`` is.
- NaN is right where NaN is expected, and only there. Its sign and its payload say nothing: PyTorch's own kernels give
  different ones for the same operator. ``nan_bits`` compares them too, for two results of the same kernels.
- An infinity is right where one of that sign is expected, and only there.
- Without ``rounding`` all other elements must have the same bits: -0.0 is not 0.0, subnormals are not flushed.
- With ``rounding`` an element may be that far from the expected one. ``signed_zeros`` says whether -0.0 for 0.0 is
  reported all the same; the default is no, as the order of a sum can change that sign.
- The real and the imaginary part of a complex number are compared each by itself.
"""

from __future__ import annotations

from typing import Any

from anabranch._judge._elements import (
    Pair,
    Rounding,
    describe,
    element_difference,
    error,
    identical,
    numbers,
    relative_error,
    unequal,
    wrong,
)
from anabranch._judge._structure import pair, sharing, tensors

__all__ = [
    "Pair",
    "Rounding",
    "describe",
    "differences",
    "error",
    "identical",
    "numbers",
    "pair",
    "relative_error",
    "sharing",
    "tensors",
    "unequal",
    "wrong",
]


def differences(
    actual: Any,
    expected: Any,
    *,
    rounding: Rounding | None = None,
    signed_zeros: bool | None = None,
    nan_bits: bool = False,
    strides: bool = True,
    inputs: Any = None,
    expected_inputs: Any = None,
) -> list[str]:
    """What is wrong with ``actual``, a line for each difference, most important first; empty where it is right.

    Without ``rounding`` elements must be equal bit for bit. ``strides=False`` leaves memory layout out. ``inputs`` is
    what the call got (any nest of tensors; parameters may be among it): outputs must share memory with the same ones of
    it as the expected outputs do with ``expected_inputs``, which are the same objects unless they are given. Which
    outputs share memory with one another is always compared.

    The host waits for both results; the caller's current stream must be ordered after the work that makes them.
    Raises :class:`~anabranch.errors.CannotJudge` where both are of a kind that cannot be compared (sparse, quantized,
    nested, or on the meta device; objects of unknown types).
    """
    found, pairs = pair(actual, expected, rounding=rounding, strides=strides)
    if not found:
        given = tensors(inputs)
        found += sharing(pairs, given, given if expected_inputs is None else tensors(expected_inputs))
    for p in pairs:
        line = element_difference(p, rounding, rounding is None if signed_zeros is None else signed_zeros, nan_bits)
        found += [line] if line else []
    return found
