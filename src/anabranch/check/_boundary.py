"""The engine's serial results against eager's where the input has special values: NaN, infinities, zeros of both
signs, subnormals, the largest and smallest numbers, and numbers whose sums just overflow. Compilers' shortcuts (x * 0
is 0) show there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from anabranch._judge import Pair, Rounding, describe, numbers, pair, unequal, wrong

#: Elements of an input beyond which the values are tried together.
_LARGE = 1 << 20
#: Lines of a sort that are kept.
_MOST = 8


@dataclass
class Boundary:
    """What came of it. ``wrong`` and ``told`` are lines that name the input's value, the output and the elements.

    ``told``: what is no error: a zero of the other sign and a subnormal that became zero, as PyTorch promises neither;
    a number where eager overflows and float32 does not. ``skipped``: values that eager itself raises on.
    """

    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def boundary(
    engine: Callable[[torch.Tensor], Any],
    eager: Callable[[torch.Tensor], Any],
    reference: Callable[[torch.Tensor], Any],
    x: torch.Tensor,
    synchronize: Callable[[], None],
) -> Boundary:
    """Call with each special value in place of some and of all elements of ``x``, an ordinary input.

    An element is right if it is as ``eager``'s in the input's dtype or as ``reference``'s in float32: what overflows in
    one may not in the other. ``synchronize`` waits for the current stream.
    """
    found = Boundary()
    if not x.is_floating_point() or not x.numel():
        return found
    for name, special in special_inputs(x):
        try:
            expected, wide = eager(special), reference(special)
            synchronize()
        except Exception as e:
            _add(found.skipped, f"{name}: eager raises {type(e).__name__}")
            continue
        try:
            actual = engine(special)
            synchronize()
        except Exception as e:
            _add(found.wrong, f"{name}: the engine raises {type(e).__name__}, eager does not: {e}")
            continue
        found.tried += 1
        _compare(found, name, actual, expected, wide)
    return found


def special_inputs(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Of the same dtype and strides as ``x``, a floating tensor that has elements: with every third element replaced by
    a special value, then all of them; and with two values in turn, whose sums just overflow, or just do not. A large
    input is tried once, with all values in turn: the same operators on a smaller one show more."""
    info = torch.finfo(x.dtype)
    values = {
        "NaN": float("nan"),
        "inf": float("inf"),
        "-inf": -float("inf"),
        "0.0": 0.0,
        "-0.0": -0.0,
        f"{info.max:.4g}": info.max,
        f"{info.min:.4g}": info.min,
        # Well inside the range of subnormals: rounding does not make these zero.
        f"{info.tiny / 4:.4g}": info.tiny / 4,
        f"{-info.tiny / 4:.4g}": -info.tiny / 4,
        f"{info.tiny:.4g}": info.tiny,
        f"{info.tiny * info.eps:.4g}": info.tiny * info.eps,
    }
    place = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    if x.numel() > _LARGE:
        mixed = x
        for turn, value in enumerate(values.values()):
            mixed = mixed.masked_fill(place % (2 * len(values)) == turn, value)
        yield "input with all of these values", torch.empty_like(x).copy_(mixed)
        return
    for name, value in values.items():
        if x.numel() > 1:
            yield f"input with {name} here and there", torch.empty_like(x).copy_(x.masked_fill(place % 3 == 0, value))
        yield f"input all {name}", torch.empty_like(x).fill_(value)
    if x.numel() > 1:
        # Half a unit in the last place of the largest number: rounded to even, the sum is infinite.
        unit = info.max * info.eps / (4 - 2 * info.eps)
        for name, small in {"just overflow": unit, "just do not overflow": unit * (1 - info.eps)}.items():
            turns = torch.empty_like(x).fill_(info.max).masked_fill(place % 2 == 1, small)
            yield f"input whose sums {name}", torch.empty_like(x).copy_(turns)


def _compare(found: Boundary, name: str, actual: Any, expected: Any, wide: Any) -> None:
    rounding = Rounding()
    lines, pairs = pair(actual, expected, rounding=rounding, strides=False)
    if lines:
        _add(found.wrong, f"{name}: {lines[0]}")
        return
    others = {p.name: p.expected for p in pair(actual, wide, dtypes=False, strides=False)[1]}
    for p in pairs:
        other = others.get(p.name, p.expected)
        if not (p.actual.is_floating_point() or p.actual.is_complex()):
            bad = unequal(p.actual, p.expected) & unequal(p.actual, other)
        else:
            bound = rounding.of(p.actual.dtype)
            bad = wrong(p.actual, p.expected, bound) & wrong(p.actual, other, bound)
            bad &= ~_tell(found, name, p)
            lost = numbers(p.actual).isfinite() & ~numbers(p.expected).isfinite()
            if bool(lost.any()):
                at = f"{int(lost.sum())} of {lost.numel()} numbers where eager has infinities or NaN"
                _add(found.told, f"{name}: {p.name} has {at}, and float32 has not")
        if bool(bad.any()):
            _add(found.wrong, f"{name}: {describe(p, bad)}")


def _tell(found: Boundary, name: str, p: Pair) -> torch.Tensor:
    """Note what only the bits show; where it is about subnormals, which are no wrong values."""
    y, e = numbers(p.actual), numbers(p.expected)
    tiny = torch.finfo(p.actual.dtype).tiny
    sign = int(((y == 0) & (e == 0) & (y.signbit() != e.signbit())).sum())
    flushed = int(((y == 0) & (e.abs() < tiny) & (e.abs() >= tiny / 16)).sum())
    if sign:
        _add(found.told, f"{name}: {p.name} has {sign} of {y.numel()} zeros of the other sign than eager's")
    if flushed:
        _add(found.told, f"{name}: {p.name} has {flushed} of {y.numel()} zeros where eager has subnormal numbers")
    return (y.abs() < tiny) & (e.abs() < tiny)


def _add(lines: list[str], line: str) -> None:
    if line not in lines and len(lines) < _MOST:
        lines.append(line)
