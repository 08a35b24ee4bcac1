"""What ``anabranch race`` does; its options are in ``cli/_race.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NoReturn

import click

from anabranch._exit import refuse_unwritable
from anabranch.errors import AnabranchError
from anabranch.race._detector import Result, check_trace


def run(trace: str, json_path: str | None, limit: int) -> None:
    """Judge, print the reports, and exit with 0, 1 or 2; takes the command's options."""
    try:
        if json_path not in (None, "-"):
            refuse_unwritable(Path(json_path))
    except AnabranchError as error:
        _fail(str(error))
    try:
        result = check_trace(sys.stdin.buffer if trace == "-" else trace, report_limit=limit)
    except AnabranchError as error:
        _fail(f"{trace}: {error}")
    except OSError as error:
        _fail(f"{trace}: cannot be read: {error.strerror}; give a trace file, or - for standard input")
    if not result.events:
        _fail(f"{trace}: has no events, so that there is nothing to judge; expected one JSON object a line")
    if json_path is not None:
        text = json.dumps(result.to_dict(), indent=1)
        if json_path != "-":
            Path(json_path).write_text(text + "\n", encoding="utf-8")
        else:
            click.echo(text)
    for report in result.reports:
        click.echo(f"{report}\n")
    click.echo(_last_line(result))
    sys.exit(0 if result.verdict == "clean" else 1)


def _last_line(result: Result) -> str:
    races = sum(report.verdict == "race" for report in result.reports)
    stales = len(result.reports) - races
    found = [f"{races} distinct race{'s' * (races != 1)}"] * (races > 0)
    found += [f"{stales} distinct stale use{'s' * (stales != 1)}"] * (stales > 0)
    found += [f"{result.unreported} findings not kept"] * (result.unreported > 0)
    found += [f"{result.events} events, {result.streams} streams, {result.threads} threads"]
    return f"{result.verdict} ({'; '.join(found)})"


def _fail(message: str) -> NoReturn:
    click.echo(f"anabranch race: {message}", err=True)
    sys.exit(2)
