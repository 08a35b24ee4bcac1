"""The options of ``anabranch race``."""

from __future__ import annotations

from typing import Any

import click


@click.command(name="race", short_help="Find races in a trace of stream events.")
@click.argument("trace", metavar="TRACE.jsonl")
@click.option("--json", "json_path", metavar="FILE", help="Write verdict, counts and reports there (- for stdout).")
@click.option(
    "--limit",
    default=1000,
    show_default=True,
    type=click.IntRange(min=0),
    help="How many different reports to keep; the rest are counted.",
)
def command(**given: Any) -> None:
    """Find races in TRACE.jsonl (- reads standard input). Each finding gets a report. The last line starts with the
    verdict: race, stale or clean.

    Exit status: 0 clean, 1 race or stale, 2 the trace is malformed, empty or unreadable, 130
    interrupted.
    """
    from anabranch.race._command import run

    run(**given)
