"""A plan as a picture: one column a lane, time downwards, an arrow for each wait between lanes."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anabranch.plan._plan import Plan, Step

_COLUMN, _ROW, _BOX, _TOP = 300, 46, 34, 92
_FILL = {"op": "#dbeafe", "kernels": "#dcfce7", "copy": "#fef3c7", "view": "#f3f4f6"}


def _label(text: str, limit: int = 40) -> str:
    return escape(text if len(text) <= limit else text[: limit - 1] + "…")


def _tooltip(step: Step) -> str:
    reads = ", ".join(a.buffer for a in step.reads) or "-"
    writes = ", ".join(a.buffer for a in step.writes) or "-"
    return escape(f"{step.name}: {step.op}\nreads {reads}\nwrites {writes}\n{step.source}".strip())


def render(plan: Plan) -> str:
    """The picture as SVG text; hovering over a step shows what it reads and writes."""
    column = {lane: i for i, lane in enumerate(plan.lanes)}
    row = {s.name: i for i, s in enumerate(plan.steps)}
    width, height = 40 + _COLUMN * max(1, len(plan.lanes)), _TOP + _ROW * max(1, len(plan.steps)) + 20

    def x(lane: str) -> int:
        return 20 + _COLUMN * column[lane]

    def y(step: str) -> int:
        return _TOP + _ROW * row[step]

    lane_of = {s.name: s.lane for s in plan.steps}
    mode = "captured in a CUDA graph" if plan.captured else "run directly"
    if plan.pieces:
        mode = f"in {len(plan.pieces)} pieces, {sum(p.captured for p in plan.pieces)} of them captured"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ' font-family="ui-monospace, monospace" font-size="12">',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#b91c1c"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="20" y="26" font-size="15" font-weight="bold">{_label(plan.name, 80)}</text>',
        f'<text x="20" y="46" fill="#4b5563">{escape(plan.device)}, {escape(plan.backend)}, {mode}</text>',
    ]
    for lane in plan.lanes:
        middle = x(lane) + (_COLUMN - 20) // 2
        out.append(f'<text x="{middle}" y="74" text-anchor="middle" fill="#1d4ed8">lane {escape(lane)}</text>')
        out.append(f'<line x1="{middle}" y1="80" x2="{middle}" y2="{height - 12}" stroke="#93c5fd" stroke-width="2"/>')
    for s in plan.steps:
        fill = _FILL.get(s.kind, "#f3f4f6")
        out.append(
            f'<g><title>{_tooltip(s)}</title><rect x="{x(s.lane)}" y="{y(s.name)}" width="{_COLUMN - 20}"'
            f' height="{_BOX}" rx="5" fill="{fill}" stroke="#6b7280"/>'
            f'<text x="{x(s.lane) + 8}" y="{y(s.name) + 14}">{_label(s.name, 38)}</text>'
            f'<text x="{x(s.lane) + 8}" y="{y(s.name) + 28}" fill="#4b5563" font-size="10">{_label(s.op, 46)}</text>'
            "</g>"
        )
    for e in plan.edges:
        rightwards = column[lane_of[e.before]] <= column[lane_of[e.after]]
        x1 = x(lane_of[e.before]) + (_COLUMN - 20 if rightwards else 0)
        x2 = x(lane_of[e.after]) + (0 if rightwards else _COLUMN - 20)
        out.append(
            f'<line x1="{x1}" y1="{y(e.before) + _BOX // 2}" x2="{x2}" y2="{y(e.after) + _BOX // 2}"'
            ' stroke="#b91c1c" stroke-width="1.5" marker-end="url(#a)"/>'
        )
    return "\n".join([*out, "</svg>"]) + "\n"
