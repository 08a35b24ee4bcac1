"""What one run of the program under one schedule came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from anabranch.explore._dependence import Step

End = Literal["complete", "deadlock", "cut", "steps", "crash", "hang", "diverged"]


@dataclass(frozen=True)
class Failure:
    """One finding: which oracle, what it says, and the race reports where there are some."""

    oracle: str
    message: str
    report: str = ""


@dataclass
class Run:
    """The steps taken, in order; who was enabled before each; and how it ended.

    ``complete``: every thread ended and every queue is empty. ``deadlock``: neither, and nothing can go on. ``cut``:
    all that can go on is covered by another schedule. ``steps``: the limit of steps. ``crash`` and ``hang``: the
    process died, or made no progress. ``pending`` are the steps that were not taken; of a cut run only those that
    were not enabled. ``outcome`` is a digest of what
    the program returned or raised: equal outcomes are equal values.
    """

    steps: list[Step]
    enabled: list[frozenset[str]]
    end: End
    pending: list[Step] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    outcome: str = ""
    trace: bytes = b""
    seconds: float = 0.0

    @property
    def schedule(self) -> Sequence[str]:
        return [step.actor for step in self.steps]
