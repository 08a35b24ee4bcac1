"""Plan as plain data. Nothing here imports PyTorch: a plan can be printed, drawn, saved and checked anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: What a buffer is for. ``workspace`` and ``temporary`` are the hidden resources: no step names them in the model's
#: own code, yet two steps that share one conflict (a cuBLAS workspace, a convolution's scratch memory).
#: ``state`` is a session's.
BUFFER_KINDS = ("input", "output", "weight", "state", "static", "temporary", "workspace")


@dataclass(frozen=True)
class Buffer:
    """Bytes that steps read and write.

    ``block`` and ``offset`` say where the bytes are: two buffers with the same block and overlapping byte ranges share
    memory, and steps that use them conflict although their names differ. A buffer alone in its block leaves
    ``block=""``, which means a block of its own name.
    """

    name: str
    nbytes: int
    kind: str = "temporary"
    block: str = ""
    offset: int = 0
    dtype: str = ""
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in BUFFER_KINDS:
            raise ValueError(f"buffer {self.name!r}: kind is {self.kind!r}, expected one of {', '.join(BUFFER_KINDS)}")
        if self.nbytes < 0 or self.offset < 0:
            raise ValueError(f"buffer {self.name!r}: nbytes and offset must not be negative")

    @property
    def location(self) -> str:
        """Name of the block that holds the bytes."""
        return self.block or self.name


@dataclass(frozen=True)
class Access:
    """A half-open byte range ``[start, stop)`` of a buffer; ``stop=None`` means up to its end."""

    buffer: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Step:
    """One piece of device work, queued on ``lane``.

    ``kind``: ``op`` (one ATen operator), ``kernels`` (a backend's compiled subgraph), ``copy`` (into or out of a
    context's memory), ``view`` (no device work).
    """

    name: str
    lane: str
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    kind: str = "op"
    op: str = ""
    source: str = ""
    #: Which of the plan's pieces it is in.
    piece: int = 0


@dataclass(frozen=True)
class Edge:
    """Order between lanes: an event recorded after step ``before``, waited for ahead of step ``after``."""

    before: str
    after: str


@dataclass(frozen=True)
class PlanPiece:
    """How a part of a plan runs: as a captured graph with memory of its own, or direct; and why."""

    captured: bool
    backend: str
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """The steps of one engine for one input signature.

    Steps are listed in issue order. Two steps of one lane run in that order; steps of different lanes are ordered
    only by :class:`Edge` (and what follows from edges and lanes together). ``captured`` says whether the steps run as
    a captured CUDA graph; ``reason`` says why or why not. Where they run in several ways, ``pieces`` has those, and
    ``captured`` says whether any of them is.
    """

    name: str
    device: str
    backend: str
    lanes: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    edges: tuple[Edge, ...] = ()
    captured: bool = False
    reason: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    pieces: tuple[PlanPiece, ...] = ()

    def __post_init__(self) -> None:
        names = {b.name for b in self.buffers}
        if len(names) != len(self.buffers):
            raise ValueError(f"plan {self.name!r}: buffer names are not unique; give each buffer a name of its own")
        order = {s.name: i for i, s in enumerate(self.steps)}
        if len(order) != len(self.steps):
            raise ValueError(f"plan {self.name!r}: step names are not unique; give each step a name of its own")
        for s in self.steps:
            if s.lane not in self.lanes:
                raise ValueError(
                    f"step {s.name!r}: lane {s.lane!r} is not one of {', '.join(self.lanes)}; name one of them"
                )
            for a in (*s.reads, *s.writes):
                if a.buffer not in names:
                    raise ValueError(f"step {s.name!r}: buffer {a.buffer!r} is not in the plan; add it")
        for e in self.edges:
            for end in (e.before, e.after):
                if end not in order:
                    raise ValueError(f"edge {e.before!r} -> {e.after!r}: step {end!r} is not in the plan; add it")
            if order[e.before] >= order[e.after]:
                raise ValueError(f"edge {e.before!r} -> {e.after!r}: a wait must be issued after its record")

    def to_json(self) -> str:
        """The plan as JSON; :meth:`from_json` gives an equal plan back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        d: dict[str, Any] = json.loads(text)

        def accesses(items: list[dict[str, Any]]) -> tuple[Access, ...]:
            return tuple(Access(**a) for a in items)

        return cls(
            **{
                **d,
                "lanes": tuple(d["lanes"]),
                "buffers": tuple(Buffer(**{**b, "shape": tuple(b["shape"])}) for b in d["buffers"]),
                "steps": tuple(
                    Step(**{**s, "reads": accesses(s["reads"]), "writes": accesses(s["writes"])}) for s in d["steps"]
                ),
                "edges": tuple(Edge(**e) for e in d["edges"]),
                "pieces": tuple(PlanPiece(**p) for p in d.get("pieces", ())),
            }
        )

    def draw(self, path: str | Path) -> Path:
        """Write the plan as an SVG picture: a column a lane, time downwards, edges between lanes as arrows."""
        from anabranch.plan._svg import render

        path = Path(path)
        path.write_text(render(self), encoding="utf-8")
        return path

    def __str__(self) -> str:
        return _text(self)


_UNITS = ("B", "KiB", "MiB", "GiB")


def human_bytes(n: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    for unit in _UNITS:
        if n < 1024 or unit == _UNITS[-1]:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def _accesses(accesses: Sequence[Access]) -> str:
    def one(a: Access) -> str:
        whole = a.start == 0 and a.stop is None
        return a.buffer if whole else f"{a.buffer}[{a.start}:{'' if a.stop is None else a.stop}]"

    return ", ".join(map(one, accesses)) or "-"


def _text(plan: Plan) -> str:
    mode = "in pieces" if plan.pieces else "captured" if plan.captured else "direct"
    lines = [f"plan {plan.name}: {plan.device}, {plan.backend}, {mode} ({plan.reason})"]
    lines.append(f"  lanes: {', '.join(plan.lanes)}")
    width = max((len(s.name) for s in plan.steps), default=0)
    lane_width = max((len(x) for x in plan.lanes), default=0)
    waits: dict[str, list[str]] = {}
    for e in plan.edges:
        waits.setdefault(e.after, []).append(e.before)
    piece = -1
    for i, s in enumerate(plan.steps):
        if plan.pieces and s.piece != piece:
            piece, p = s.piece, plan.pieces[s.piece]
            lines.append(f"  piece {piece}: {'captured' if p.captured else 'direct'}, {p.backend} ({p.reason})")
        wait = f"  waits for {', '.join(waits[s.name])}" if s.name in waits else ""
        where = f"  # {s.source}" if s.source else ""
        lines.append(
            f"  {i:>3} [{s.lane:<{lane_width}}] {s.name:<{width}}  {s.kind}: {s.op or '-'}"
            f"  reads {_accesses(s.reads)}; writes {_accesses(s.writes)}{wait}{where}"
        )
    by_kind: dict[str, tuple[int, int]] = {}
    for b in plan.buffers:
        n, size = by_kind.get(b.kind, (0, 0))
        by_kind[b.kind] = (n + 1, size + b.nbytes)
    parts = [f"{n} {kind} ({human_bytes(size)})" for kind, (n, size) in by_kind.items()]
    lines.append(f"  buffers: {', '.join(parts) or 'none'}")
    lines += [f"  {key}: {value}" for key, value in plan.notes.items()]
    return "\n".join(lines)
