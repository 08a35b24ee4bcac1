"""A schedule as a picture: one column an actor, one line a step, time going down."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.explore._dependence import Step, is_thread

_WIDTH = 30
_LINES = 80


def draw(steps: Sequence[Step], *, lines: int = _LINES) -> str:
    """Of a long schedule the middle is left out: it begins like others, and ends with what went wrong."""
    actors = sorted({step.actor for step in steps}, key=lambda actor: (not is_thread(actor), len(actor), actor))
    column = {actor: i for i, actor in enumerate(actors)}
    width = [min(_WIDTH, max([len(a), *(len(s.label) for s in steps if s.actor == a)])) for a in actors]
    rows = [_row([*actors], width), _row(["-" * w for w in width], width)]
    for number, step in enumerate(steps):
        left_out = len(steps) - lines
        if left_out > 0 and lines // 4 <= number < lines // 4 + left_out:
            if number == lines // 4:
                rows.append(f"... {left_out} steps ...")
            continue
        cells = [""] * len(actors)
        cells[column[step.actor]] = step.label
        rows.append(_row(cells, width))
    return "\n".join(rows)


def _row(cells: Sequence[str], width: Sequence[int]) -> str:
    return "  ".join(
        cell[: w - 1] + "…" if len(cell) > w else cell.ljust(w) for cell, w in zip(cells, width, strict=True)
    ).rstrip()
