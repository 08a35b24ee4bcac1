"""What was seen of one system on one work, and the process that several of these share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from anabranch.bench._host import free_memory
from anabranch.bench._process import Crashed, Hung, Worker
from anabranch.bench._statistics import spread
from anabranch.bench._system import BASELINE, System
from anabranch.bench._work import Work

#: How often what its surroundings ended is tried again: a context that was refused, a build or a measurement that found
#: no memory or that the kernel killed for want of it. A build without an answer is tried again once, as it may be the
#: system's own fault; the baseline's as often as the others.
TRIES = 4
OUT_OF_MEMORY = "out of memory"


@dataclass(eq=False)
class Cell:
    """One system on one work, and all that was seen of it."""

    work: Work
    system: System
    #: ``ok``, ``unavailable``, ``failed`` (raised), ``crashed``, ``hung``, ``slow`` (not built in time), ``skipped``.
    status: str = "waiting"
    reason: str = ""
    crash: dict[str, Any] | None = None
    built: dict[str, Any] = field(default_factory=dict)
    latency: list[dict[str, Any]] = field(default_factory=list)
    throughput: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    #: Streams -> why there is no (further) figure.
    without: dict[int, str] = field(default_factory=dict)
    #: What it holds when idle, and the most that it held beside that while it was measured.
    held_mb: float = 0.0
    passing_mb: float = 0.0
    #: What ended earlier tries, after which it was tried again; and how many of them count (contexts do apart).
    retried: list[str] = field(default_factory=list)
    tries: int = 0
    #: Threads make their first calls while building; not those of a system which that broke.
    warm: bool = True
    #: Its build was cut off, or not begun, so that measuring could start.
    late: bool = False

    def end(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason

    def count(self, figure: str) -> int:
        """Rounds in which this figure (``"latency"``, or a number of streams) was measured."""
        return len(self.latency) if figure == "latency" else len(self.throughput.get(int(figure), []))

    def may_try_again(self, why: str) -> bool:
        """Whether it may be tried again after its surroundings ended it; why it was is noted either way."""
        self.retried.append(f"{why} ({free_memory()})")
        self.tries += 1
        return self.tries <= TRIES

    def was_surroundings(self, error: Crashed | Hung) -> bool:
        """Whether what ended its process was not the system: want of memory, or whatever ended the baseline, which is
        plain PyTorch."""
        if self.system.name == BASELINE:
            return True
        return isinstance(error, Crashed) and (error.how == "SIGKILL" or OUT_OF_MEMORY in error.how)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Figures are medians over the rounds, with the lowest and highest round."""
        result: dict[str, Any] = {"work": self.work.name, "system": self.system.name, "status": self.status}
        if self.reason:
            result["reason"] = self.reason
        if self.retried:
            result["retried"] = self.retried
        if self.crash:
            result["crash"] = self.crash
        if self.built:
            hidden = ("grew_mb", "passing_mb", "error")
            result |= {k: v for k, v in self.built.items() if k not in hidden and v != ""}
            result["serial_error"] = self.built["error"]
            result["serially_wrong"] = not self.built["error"] <= self.built["allowed_error"]
            result["memory_mb"] = self.held_mb + self.passing_mb
        if self.latency:
            result["latency"] = {
                key: spread([r[key] for r in self.latency]) for key in ("p50_us", "p99_us", "host_us", "copy_us")
            } | {"calls": sum(r["calls"] for r in self.latency)}
        result["throughput"] = {
            str(n): {"per_s": spread([r["per_s"] for r in rounds])}
            | {k: sum(r[k] for r in rounds) for k in ("calls", "checked", "wrong", "inexact", "all_zero")}
            for n, rounds in self.throughput.items()
        }
        if self.without:
            result["without"] = {str(n): why for n, why in self.without.items()}
        return result


@dataclass(eq=False)
class Group:
    """One system's cells of a batch, or one of them (``System.apart``), and the process that builds and measures them.

    A crash ends the process; the cells that it held and that still miss figures are built again in a new one.
    """

    system: System
    cells: list[Cell]
    queue: list[Cell] = field(default_factory=list)
    #: Built, and to be warmed once nothing is left to build.
    cold: list[Cell] = field(default_factory=list)
    worker: Worker | None = None
    building: Cell | None = None
    #: What it does: ``start``, or with ``building`` ``build`` or ``warm``.
    stage: str = "build"
    #: Contexts that it was refused.
    refused: int = 0
    #: ``time.monotonic()`` before which nothing more is tried.
    after: float = 0.0

    def lost(self, cell: Cell, stage: str, error: Exception) -> None:
        """Note how the process ended, at this cell."""
        worker, self.worker, self.building, self.cold = self.worker, None, None, []
        if isinstance(error, Crashed):
            cell.end("crashed", f"{stage}: {error.how}")
            cell.crash = {"stage": stage, "how": error.how, "stderr": error.lines}
        else:
            lines = worker.last_lines() if worker else []
            cell.end("hung", f"{stage}: no answer")
            cell.crash = {"stage": stage, "how": "no answer in time; killed", "stderr": lines}
