"""The result of one path for one case."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from anabranch._judge import Rounding
from anabranch.check._boundary import Boundary

#: Lines that say what is wrong with a row.
_MOST_PROBLEMS = 8


@dataclass
class Row:
    """The result of one path for one case. ``max_error`` is relative to the largest magnitude of float32 eager's."""

    path: str
    dtype: str
    shape: str
    calls: int = 0
    in_flight: int = 0
    wrong: int = 0
    all_zero: int = 0
    non_finite: int = 0
    max_error: float = 0.0
    tolerance: float = 0.0
    us_a_call: float = 0.0
    mode: str = ""
    #: Findings of the race checker at different places, and the first of them in words; on the simulated device.
    races: int = 0
    report: str = ""
    #: What is wrong, in words; each once.
    problems: list[str] = field(default_factory=list)
    #: Why right outputs say little: they were the same whatever the input was. Empty where they differed.
    silent: str = ""
    #: The largest error of eager itself in the case's dtype.
    eager_error: float = 0.0
    #: At the first row of a case: the special values that were tried, and what came of them.
    boundary: Boundary | None = None

    @property
    def ok(self) -> bool:
        findings = self.wrong or self.all_zero or self.non_finite or self.races or self.problems
        return not findings and self.max_error <= self.tolerance and not (self.boundary and self.boundary.wrong)

    @property
    def nan_only(self) -> bool:
        """Whether nothing can be said of these outputs, although they have elements."""
        return self.silent.startswith("NaN")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def count(self, calls: int, wrong: int, all_zero: int, non_finite: int) -> None:
        self.calls += calls
        self.wrong += wrong
        self.all_zero += all_zero
        self.non_finite += non_finite

    def problem(self, *lines: str) -> None:
        self.problems += [line for line in lines if line not in self.problems][: _MOST_PROBLEMS - len(self.problems)]


def tolerance(dtype: torch.dtype) -> float:
    """Largest accepted error of a serial result against float32 eager: 16 units in the last place, at least 1e-5."""
    return Rounding().of(dtype) or Rounding().floor
