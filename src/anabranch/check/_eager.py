"""Eager PyTorch beside the engine: what serial results should be, and whether right ones say anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from anabranch._exit import described
from anabranch._judge import (
    Pair,
    Rounding,
    describe,
    differences,
    error,
    identical,
    numbers,
    pair,
    sharing,
    tensors,
    unequal,
    wrong,
)
from anabranch.check._case import Case, Subject
from anabranch.check._row import Row
from anabranch.errors import CannotJudge, InputError

#: The part of integers and booleans that may differ from float32 eager's as those of eager in the case's dtype do. An
#: example is the index of the larger of two numbers that the dtype cannot tell apart.
_MOVED = 0.25
#: Not ``model.to(dtype)``, which takes complex parameters for floating ones, and drops their imaginary parts.
_CASTS: dict[torch.dtype, Callable[[torch.nn.Module], torch.nn.Module]] = {
    torch.float32: torch.nn.Module.float,
    torch.float16: torch.nn.Module.half,
    torch.bfloat16: torch.nn.Module.bfloat16,
    torch.float64: torch.nn.Module.double,
}


class Eager:
    """One case's model in eager PyTorch."""

    def __init__(self, subject: Subject, case: Case, device: torch.device) -> None:
        self.case = case
        model = subject.make()
        if isinstance(model, torch.nn.Module):
            model = _CASTS[case.dtype](model).to(device)
            #: Eager PyTorch in the case's dtype, and in float32.
            self.call: Callable[..., Any] = model
            float32 = _float32(model, subject)
            self.reference: Callable[..., Any] = lambda x: float32(x.float())
            self.parameters = [*model.parameters(), *model.buffers()]
        else:
            self.call = self.reference = model.module()
            self.parameters = []
        #: What an engine is compiled of.
        self.model = model
        #: The first result that was looked at, and whether another one differed from it.
        self._first: Any = None
        self._varied = False
        #: Integers and booleans that were compared with float32 eager, and that differ there but not from eager.
        self._integers = self._moved = 0

    def check_repeatable(self, x: torch.Tensor, synchronize: Callable[[], None]) -> None:
        """One input must have one result that can be compared, or nothing can be said of a concurrent result."""
        try:
            once, again = self.call(x), self.call(x)
            synchronize()
        except Exception as e:
            raise InputError(
                f"the model raises where it gets {self.case.dtype_name}{list(self.case.shape)}: {described(e)}."
                " Expected a model of one tensor that runs in eager PyTorch; give a --shape and a --dtype that it takes"
            ) from e
        if found := differences(again, once, rounding=Rounding()):
            raise CannotJudge(
                f"eager PyTorch gives two results for one input, so that no output can be compared: {found[0]}. Does"
                " the model draw random numbers, or keep state from call to call? Check it without."
            )

    def compare(self, row: Row, x: torch.Tensor, result: Any) -> None:
        """Have ``row`` say what is wrong with a serial result."""
        eager = self.call(x)
        inputs = [x, *self.parameters]
        found, pairs = pair(result, eager, rounding=Rounding())
        row.problem(*(found or sharing(pairs, inputs, inputs)))
        told = {line.partition(" differs")[0] for line in row.problems}  # of each output once
        if self.case.dtype is torch.float32:
            wide: dict[str, torch.Tensor] = {}  # eager is the reference
        else:
            float32 = pair(result, self.reference(x), dtypes=False, strides=False)[1]
            wide = {p.name: p.expected for p in float32}
        for name, actual, expected in pairs:
            same = identical(actual, expected)
            if same and name not in wide:
                continue
            # What has no counterpart in float32 has a shape that depends on data.
            reference = wide.get(name, expected)
            if actual.is_floating_point() or actual.is_complex():
                off = error(actual, reference)
                if off > row.tolerance and name not in told:
                    row.problem(describe(Pair(name, actual, reference), wrong(actual, reference, row.tolerance)))
                row.max_error = max(row.max_error, off)
                row.eager_error = max(row.eager_error, off if same else error(expected, reference))
                continue
            differs = unequal(actual, reference)
            bad = int((differs & unequal(actual, expected)).sum())
            if bad:
                row.problem(f"{name} ({_name(actual.dtype)}) differs from eager in {bad} of {actual.numel()} elements")
            # A number that was rounded to an integer differs by little.
            moved = differs & _far(actual, reference, row.tolerance)
            self._integers += actual.numel()
            self._moved += max(0, int(moved.sum()) - bad)
            if self._moved > max(1.0, _MOVED * self._integers):
                row.problem(
                    f"{name} ({_name(actual.dtype)}) is as eager {self.case.dtype_name}'s, but far from float32"
                    f" eager's in {self._moved} of {self._integers} elements: more than rounding moves"
                )
        if not self._varied:
            if self._first is None:
                self._first = result
            elif _vary(self._first, result):
                self._varied, self._first = True, ()

    def silence(self) -> str:
        """Why the outputs of this case say little; empty where they say something."""
        if self._varied:
            return ""
        seen = [x for x in tensors(self._first) if x.numel()]
        if not seen:
            return "the model returns no tensor" if not tensors(self._first) else "its outputs have no elements"
        floats = [x for x in seen if x.is_floating_point() or x.is_complex()]
        if len(floats) == len(seen) and all(bool(x.isnan().all()) for x in floats):
            return "NaN is every element of every output, in eager, too"
        return "its outputs were the same for every input, so that nobody would see calls that are mixed up"


def _float32(model: torch.nn.Module, subject: Subject) -> torch.nn.Module:
    """The same model in float32."""
    try:
        return copy.deepcopy(model).float()
    except Exception:  # it holds what cannot be copied, a lock for example
        other: torch.nn.Module = subject.make().to(next(model.parameters(), torch.empty(0)).device)
        other.load_state_dict(model.state_dict())
        return other.float()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _far(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> torch.Tensor:
    """Where integers are further from one another than rounding before they became integers puts them."""
    if actual.dtype is torch.bool or not actual.numel():
        return torch.ones_like(actual, dtype=torch.bool)
    a, e = actual.double(), expected.double()
    return (a - e).abs() > 1 + bound * e.abs().amax()


def _vary(first: Any, other: Any) -> bool:
    """Whether two results differ at all, but for the signs of zeros."""
    found, pairs = pair(first, other, strides=False)
    return bool(found) or any(
        not identical(p.actual, p.expected)
        and bool((unequal(p.actual, p.expected) & ((numbers(p.actual) != 0) | (numbers(p.expected) != 0))).any())
        for p in pairs
    )
