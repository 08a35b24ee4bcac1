"""What an engine consists of, as plain data for tools: what ``Engine.summary`` returns and ``explain`` prints."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from anabranch.export import Choices, State, Uncaptured
from anabranch.runtime import _phases


@dataclass(frozen=True)
class Shared:
    """How much of something runs in CUDA graphs; the rest runs operator by operator. None: nobody knows yet."""

    total: int | None
    captured: int | None

    @property
    def share(self) -> float | None:
        """The captured share, from 0 to 1; None where there is nothing of it, or nobody can tell."""
        if self.captured == 0 and self.total != 0:
            return 0.0
        return self.captured / self.total if self.total and self.captured is not None else None

    def data(self) -> dict[str, Any]:
        known = self.total is not None and self.captured is not None
        direct = self.total - self.captured if known else None  # type: ignore[operator]
        return {"captured": self.captured, "direct": direct, "share_captured": self.share}


@dataclass(frozen=True)
class PieceSummary:
    """Of one piece of a signature's calls. ``why``: why it runs direct."""

    captured: bool
    backend: str
    operators: int
    why: str


@dataclass(frozen=True)
class SignatureSummary:
    """Of one signature. ``seconds``: of its build, by phase; contexts that were built later do not count."""

    signature: str
    captured: bool
    backend: str
    reason: str
    uncaptured: Sequence[Uncaptured]
    operators: Shared
    flops: Shared
    seconds: Mapping[str, float]
    contexts: int
    bytes_per_context: int
    bytes: int
    measured_us: Mapping[str, float]
    #: What a session keeps for it: name, shape, dtype and bytes.
    state: Sequence[Mapping[str, Any]] = ()
    #: Names of inputs that it writes into.
    writes: Sequence[str] = ()
    #: In order, where there are several.
    pieces: Sequence[PieceSummary] = ()
    #: In mixed precision: which operators are in which type, and the part of the floating-point operations in half.
    choices: Choices | None = None
    share_in_half: float | None = None

    def data(self) -> dict[str, Any]:
        """Dicts, lists, strings and numbers, as ``json.dumps`` takes them."""
        seconds = {name: round(s, 6) for name, s in self.seconds.items()}
        return {
            "signature": self.signature,
            "captured": self.captured,
            "backend": self.backend,
            "reason": self.reason,
            "reasons": [u._asdict() for u in self.uncaptured],
            "operators": self.operators.data(),
            "flops": self.flops.data(),
            "seconds": {**seconds, "total": round(sum(self.seconds.values()), 6)},
            "contexts": self.contexts,
            "bytes_per_context": self.bytes_per_context,
            "bytes": self.bytes,
            "measured_us": dict(self.measured_us),
            "state": [dict(x) for x in self.state],
            "writes": list(self.writes),
            "pieces": [asdict(piece) for piece in self.pieces],
            "precision": self._precision(),
        }

    def _precision(self) -> dict[str, Any] | None:
        choices = self.choices
        if choices is None:
            return None
        return {
            "dtype": str(choices.dtype).removeprefix("torch."),
            "share_half": self.share_in_half,
            "half": list(choices.half),
            "float32": [{"operator": place, "why": why} for place, why in choices.wide],
        }

    def lines(self) -> list[str]:
        """For people: counts and times, a line each."""
        lines = []
        if self.operators.total:
            counts = self.operators.data()
            lines.append(f"operators: {counts['captured']} captured, {counts['direct']} direct")
        if self.flops.total is None:
            lines.append("floating-point operations: how many depends on data, or on sizes")
        elif self.flops.total:
            lines.append(f"floating-point operations: {self.flops.total:,} a call, {self.flops.share:.0%} captured")
        return [*lines, _phases.describe(self.seconds)]


def described(state: Sequence[State]) -> list[dict[str, Any]]:
    """What a session keeps, as plain data."""
    tensors = ((s.name, s.initial) for s in state)
    return [
        {"name": name, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."), "bytes": x.nbytes}
        for name, x in tensors
    ]


def count_operators(graph: fx.Graph) -> int:
    """Operators of a graph; taking one of several results is none."""
    return sum(n.op in ("call_function", "call_module") and n.target is not operator.getitem for n in graph.nodes)
