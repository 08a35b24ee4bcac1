"""The reduced search reaches the same outcomes as all schedules together, and the docs say so with true figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import explore_schedules as table  # noqa: E402

DOCUMENTED = {row[0]: row for row in table.documented()}
#: Programs with more schedules are compared when the table is made, and only searched here.
COMPARED = 300


def _total(name: str) -> int | None:
    text = DOCUMENTED[name][1]
    return None if text.startswith(">") else int(text.replace(",", ""))


@pytest.mark.parametrize("program", table.PROGRAMS, ids=lambda program: f"{program[1]}{program[2] or ''}")
def test_row(program: tuple[str, str, tuple[Any, ...]]) -> None:
    import anabranch.sim  # noqa: F401
    from anabranch.explore import explore

    module, name, args = program
    total = _total(table.title(name, args))
    if total is not None and total <= COMPARED:
        row = table.measure(*program)
        assert row.equal
    else:
        reduced = explore(table.find(module, name), args=args, keep_going=True)
        row = table.Row(
            table.title(name, args),
            total,
            reduced.schedules,
            len(reduced.outcomes),
            ", ".join(sorted(reduced.oracles)),
            True,
        )
    assert [cell.strip() for cell in str(row).strip("|").split("|")] == DOCUMENTED[row.name]


def test_twenty_programs_are_compared_with_every_schedule() -> None:
    totals = [_total(name) for name in DOCUMENTED]
    assert len([total for total in totals if total is not None and total <= COMPARED]) >= 20
    assert len(DOCUMENTED) == len(table.PROGRAMS)
