"""How many schedules small programs have, and how many of them the reduced search runs: the table of docs/explore.md.

python benchmarks/explore_schedules.py --write     # runs all, a few minutes, and puts the table into the docs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "explore.md"
BEGIN, END = "<!-- schedules: begin -->", "<!-- schedules: end -->"
LIMIT = 5000

sys.path.insert(0, str(ROOT / "tests" / "sim"))

#: (module of tests/sim/programs, function, arguments)
PROGRAMS: list[tuple[str, str, tuple[Any, ...]]] = [
    *[("threads", name, (n,)) for name, n in (("writers", 2), ("adders", 2), ("readers", 1), ("separate", 2))],
    *[("threads", name, ()) for name in ("lost_update", "store_buffer", "two_preemptions", "trying", "event")],
    *[("threads", name, (2,)) for name in ("locked", "philosophers", "polite_philosophers")],
    *[("threads", name, ()) for name in ("spinning", "lost_wakeup", "timed_out", "two_setters", "condition")],
    *[
        ("streams", name, ())
        for name in (
            "missing_wait",
            "waited_for",
            "side_by_side",
            "read_and_write",
            "two_readers",
            "chain",
            "event_recorded_again",
            "asked",
            "polled",
            "freed_too_early",
            "freed_with_record_stream",
            "handed_to_a_thread",
            "one_stream_of_two_threads",
            "two_threads",
        )
    ],
]


@dataclass(frozen=True)
class Row:
    """What the two searches of one program gave; ``total`` is None where it has more than the limit."""

    name: str
    total: int | None
    reduced: int
    outcomes: int
    fails: str
    equal: bool

    def __str__(self) -> str:
        total = f"{self.total:,}" if self.total is not None else f"> {LIMIT:,}"
        return f"| {self.name} | {total} | {self.reduced:,} | {self.outcomes} | {self.fails} |"


def find(module: str, name: str) -> Callable[..., Any]:
    import importlib

    fn: Callable[..., Any] = getattr(importlib.import_module(f"programs.{module}"), name)
    return fn


def title(name: str, args: tuple[Any, ...]) -> str:
    return f"`{name}({', '.join(map(repr, args))})`"


def measure(module: str, name: str, args: tuple[Any, ...], limit: int = LIMIT) -> Row:
    """Both searches, to their ends, whatever fails on the way."""
    from anabranch.explore import explore

    fn = find(module, name)
    reduced = explore(fn, args=args, keep_going=True)
    total = explore(fn, args=args, keep_going=True, reduce=False, schedules=limit)
    finished = total.schedules < limit
    return Row(
        title(name, args),
        total.schedules if finished else None,
        reduced.schedules,
        len(reduced.outcomes),
        ", ".join(sorted(reduced.oracles)) or "",
        set(reduced.outcomes) == set(total.outcomes) if finished else set(total.outcomes) <= set(reduced.outcomes),
    )


def documented() -> Iterator[list[str]]:
    """The cells of the table's rows as they stand in the docs."""
    text = DOCS.read_text(encoding="utf-8")
    for line in text[text.index(BEGIN) : text.index(END)].splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/explore.md")
    arguments = parser.parse_args()
    lines = ["| program | schedules | with reduction | outcomes | fails by |", "|---|---|---|---|---|"]
    for program in PROGRAMS:
        row = measure(*program)
        if not row.equal:
            sys.exit(f"{row.name}: the reduced search does not reach the same outcomes")
        print(row, flush=True)
        lines.append(str(row))
    if arguments.write:
        text = DOCS.read_text(encoding="utf-8")
        before, after = text[: text.index(BEGIN)], text[text.index(END) :]
        DOCS.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
