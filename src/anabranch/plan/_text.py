"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anabranch.plan._plan import Access, Plan

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


def render(plan: Plan) -> str:
    mode = "captured" if plan.captured else "direct"
    lines = [f"plan {plan.name}: {plan.device}, {plan.backend}, {mode} ({plan.reason})"]
    lines.append(f"  lanes: {', '.join(plan.lanes)}")
    width = max((len(s.name) for s in plan.steps), default=0)
    lane_width = max((len(x) for x in plan.lanes), default=0)
    waits: dict[str, list[str]] = {}
    for e in plan.edges:
        waits.setdefault(e.after, []).append(e.before)
    for i, s in enumerate(plan.steps):
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
