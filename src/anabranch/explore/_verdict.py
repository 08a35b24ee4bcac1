"""What an exploration came to. There is no bare success: it says how much was tried."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from anabranch.explore._drawing import draw
from anabranch.explore._run import Failure, Run

Kind = Literal["exhaustive", "bounded", "failed"]


@dataclass(frozen=True)
class Verdict:
    """``exhaustive``: every schedule was tried, or is equivalent to one that was, and none failed. ``bounded``: none of
    ``schedules`` failed, and ``limit`` ended it before every one was tried. ``failed``: ``schedule`` fails as
    ``failures`` say.

    ``cut`` counts those of ``schedules`` that turned out to repeat another one. ``outcomes`` counts the schedules by a
    digest of what they returned. ``command`` replays the failure in a fresh process; None if the function or its
    arguments cannot be named there (then ``explore(fn, scheduler=replay(schedule))`` does).
    """

    kind: Kind
    schedules: int
    limit: str | None = None
    schedule: str | None = None
    failures: tuple[Failure, ...] = ()
    command: str | None = None
    cut: int = 0
    failed_schedules: int = 0
    steps: int = 0
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    run: Run | None = field(default=None, repr=False, compare=False)

    @property
    def failed(self) -> bool:
        return self.kind == "failed"

    @property
    def failure(self) -> Failure | None:
        """The first of :attr:`failures`."""
        return self.failures[0] if self.failures else None

    @property
    def oracles(self) -> frozenset[str]:
        """Those that the failing schedule did not satisfy."""
        return frozenset(failure.oracle for failure in self.failures)

    def __str__(self) -> str:
        if self.kind == "failed":
            return f"failed({self.schedule})"
        count = f"{self.schedules} schedule{'s' * (self.schedules != 1)}"
        return f"exhaustive({count})" if self.kind == "exhaustive" else f"bounded({self.limit}, {self.schedules})"

    def report(self) -> str:
        """All there is to say, ending with the verdict; for a failure with its schedule drawn and the command."""
        parts = []
        for failure in self.failures:
            parts.append(f"{failure.oracle}: {failure.message}")
            if failure.report:
                parts.append(failure.report)
        if self.run is not None and self.failed:
            parts.append(f"the schedule, {len(self.run.steps)} steps:\n\n{draw(self.run.steps)}")
        if self.failed:
            parts.append(f"replay it with:\n  {self.command or self._in_python()}")
        parts.append(str(self))
        return "\n\n".join(parts)

    def _in_python(self) -> str:
        return f"explore(fn, scheduler=replay({self.schedule!r}))"

    def save_trace(self, path: str | Path) -> None:
        """Write the trace of the failing (or only) schedule, for ``anabranch race``. Raises ValueError without one."""
        if self.run is None or not self.run.trace:
            raise ValueError(
                f"{self} has no trace; only a failing schedule or a single one keeps it. Replay one schedule."
            )
        Path(path).write_bytes(self.run.trace)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``--json`` writes it."""
        return {
            "verdict": self.kind,
            "text": str(self),
            "schedules": self.schedules,
            "cut": self.cut,
            "limit": self.limit,
            "schedule": self.schedule,
            "failures": [{"oracle": f.oracle, "message": f.message, "report": f.report} for f in self.failures],
            "command": self.command,
            "failed_schedules": self.failed_schedules,
            "steps": self.steps,
            "outcomes": len(self.outcomes),
            "seconds": round(self.seconds, 3),
        }
