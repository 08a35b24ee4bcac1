"""The error along the depth of a network, as a picture: everything in half precision, and as proposed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from anabranch.calibrate._calibrate import Calibration

_LEFT, _TOP, _HEIGHT, _BOTTOM = 70, 70, 300, 40
_STYLE = {"plain": ("#b91c1c", "all in half precision"), "proposed": ("#1d4ed8", "as proposed")}


def draw(found: Calibration, name: str) -> str:
    """SVG text: a point for each operator, its error upwards on a logarithmic scale; crosses where it is not finite.
    Hovering over a point shows the operator."""
    order = [f.place for f in sorted(found.operators, key=lambda f: f.depth)]
    step = max(4.0, min(24.0, 900 / max(1, len(order))))
    width = _LEFT + step * max(1, len(order)) + 30
    series = {"plain": found.plain, "proposed": found.proposed}
    logs = [math.log10(v) for errors in series.values() for v in errors.values() if 0 < v < math.inf]
    low, high = math.floor(min(logs, default=-6)), max(math.ceil(max(logs, default=0)), 0) + 1

    def y(value: float) -> float:
        at = high if not math.isfinite(value) else max(math.log10(value), low) if value > 0 else low
        return _TOP + _HEIGHT * (high - at) / (high - low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 420):.0f}" height="{_TOP + _HEIGHT + _BOTTOM}"'
        ' font-family="ui-monospace, monospace" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="20" y="24" font-size="15" font-weight="bold">{escape(name)}: error along the depth</text>',
    ]
    for power in range(low, high):
        out.append(
            f'<line x1="{_LEFT}" x2="{width - 20:.0f}" y1="{y(10.0**power):.1f}" y2="{y(10.0**power):.1f}"'
            f' stroke="#e5e7eb"/><text x="{_LEFT - 8}" y="{y(10.0**power) + 4:.1f}" text-anchor="end">1e{power}</text>'
        )
    out.append(
        f'<line x1="{_LEFT}" x2="{width - 20:.0f}" y1="{y(found.budget):.1f}" y2="{y(found.budget):.1f}"'
        ' stroke="#6b7280" stroke-dasharray="5 4"><title>budget</title></line>'
    )
    for i, (key, errors) in enumerate(series.items()):
        color, label = _STYLE[key]
        out.append(f'<text x="{20 + 220 * i}" y="48" fill="{color}">{label}</text>')
        out += _series(order, errors, y, step, color)
    foot = "operators, in the order of the graph"
    out.append(f'<text x="{_LEFT}" y="{_TOP + _HEIGHT + 26}" fill="#4b5563">{foot}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _series(order: Sequence[str], errors: Mapping[str, float], y: object, step: float, color: str) -> list[str]:
    assert callable(y)
    out: list[str] = []
    points = [(_LEFT + step * (i + 0.5), errors[p], p) for i, p in enumerate(order) if p in errors]
    line = " ".join(f"{x:.1f},{y(v):.1f}" for x, v, _ in points if math.isfinite(v))
    out.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    for x, value, place in points:
        title = f"<title>{escape(place)}: {value:.1e}</title>"
        if math.isfinite(value):
            out.append(f'<circle cx="{x:.1f}" cy="{y(value):.1f}" r="2.5" fill="{color}">{title}</circle>')
        else:
            out.append(
                f'<path d="M{x - 3:.1f} {_TOP - 3}l6 6m0 -6l-6 6" stroke="{color}" stroke-width="2">{title}</path>'
            )
    return out
