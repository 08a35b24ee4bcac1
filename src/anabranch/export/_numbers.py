"""Numbers of a call that become inputs of a program, instead of a part of its signature.

What Python computes of the numbers (``1 / sigma``) is computed by Python in each call, and each result that an operator
takes is an input of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from anabranch.export._signature import TensorSpec


class NotCarried(Exception):
    """A number cannot be an input. ``reasons``: by its position among the leaves of the call."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__("; ".join(dict.fromkeys(reasons.values())))
        self.reasons = dict(reasons)

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.export prints the graph of an exception that takes one.
        if name != "partial_fx_graph":
            super().__setattr__(name, value)


@dataclass(frozen=True)
class Expression:
    """A number of the call (``function`` is None, the one argument is its position), or what Python makes of some."""

    function: Callable[..., Any] | None
    arguments: tuple[Any, ...]
    kind: type

    def of(self, leaves: Sequence[Any]) -> Any:
        """Its value for these leaves of a call. Raises what Python raises."""
        if self.function is None:
            return leaves[self.arguments[0]]
        return self.function(*(x.of(leaves) if isinstance(x, Expression) else x for x in self.arguments))

    def positions(self) -> set[int]:
        """Of the numbers that it is made of."""
        if self.function is None:
            return {self.arguments[0]}
        return {p for x in self.arguments if isinstance(x, Expression) for p in x.positions()}


@dataclass(frozen=True)
class NumberInput:
    """An input of a program that is made of a call's numbers.

    ``dtype`` None: the number itself, for an operator that PyTorch runs; else a tensor of no dimensions. ``finite``:
    NaN is no value of it.
    """

    expression: Expression
    dtype: torch.dtype | None = None
    finite: bool = False

    @property
    def spec(self) -> TensorSpec:
        assert self.dtype is not None
        return TensorSpec((), (), self.dtype)

    def value(self, leaves: Sequence[Any]) -> Any:
        """Its value in a call; None where the program is not right for that."""
        try:
            value: Any = self.expression.of(leaves)
        except Exception:
            return None
        kind: Any = self.expression.kind
        if type(value) is not kind:
            return None  # a power of a negative number is complex, one of an integer may be a fraction
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            return None
        dtype = self.dtype
        if math.isnan(value):
            return None if self.finite else value
        if dtype is None or (math.isinf(value) and dtype.is_floating_point):
            return value
        limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        return value if limits.min <= value <= limits.max else None


@dataclass(frozen=True)
class Numbers:
    """The numbers that a program takes after its tensors, and the positions in a call of those that they come from."""

    inputs: tuple[NumberInput, ...]
    positions: tuple[int, ...]
    #: Why they are not tensors, if they are not.
    as_numbers: str = ""

    def values(self, leaves: Sequence[Any]) -> list[Any] | None:
        """One for each input, or None where a program that has this call's numbers written into it has to be used."""
        made = [x.value(leaves) for x in self.inputs]
        return None if any(x is None for x in made) else made

    def explain(self) -> str:
        which = ", ".join(map(str, self.positions))
        how = f"as numbers, on backend eager: {self.as_numbers}" if self.as_numbers else "as tensors of no dimensions"
        return f"serves all values of the number(s) at input {which}; operators take them {how}"

    def given(self, leaves: Sequence[Any], device: torch.device) -> list[Any]:
        """What a program is called with. Tensors are filled by kernels on the current stream; nothing is copied."""
        made = self.values(leaves)
        assert made is not None
        return [
            value if x.dtype is None else torch.full((), value, dtype=x.dtype, device=device)
            for x, value in zip(self.inputs, made, strict=True)
        ]
