"""What ``anabranch explore`` does; its options are in ``cli/_explore.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from anabranch._exit import refuse_unwritable
from anabranch.errors import AnabranchError, InputError
from anabranch.explore import _program
from anabranch.explore import _schedulers as schedulers
from anabranch.explore._explore import explore, observed
from anabranch.explore._oracles import ORACLES
from anabranch.explore._run import Run
from anabranch.explore._verdict import Verdict

_STATUS = {"exhaustive": 0, "failed": 1, "bounded": 3}


def run(
    program: str,
    scheduler: str,
    seed: int,
    depth: int,
    no_reduce: bool,
    replayed: str | None,
    arguments: str | None,
    reference: str | None,
    oracles: tuple[str, ...],
    json_path: str | None,
    trace_path: str | None,
    **limits: Any,
) -> None:
    """Explore, print the verdict, and exit with 0 to 3; takes the command's options."""
    try:
        for path in (json_path, trace_path):
            if path not in (None, "-"):
                refuse_unwritable(Path(path))
        # What the program makes as it is imported must be observable.
        with observed():
            fn = _program.load(program)
            expected = _reference(reference, program)
        args = _program.parse(arguments) if arguments is not None else ()
        if not isinstance(args, tuple):
            raise InputError(f"--args {arguments!r} is {type(args).__name__}; expected a tuple, such as '(3,)'")
        with _Bar(1 if replayed is not None else limits["schedules"]) as bar:
            verdict = explore(
                fn,
                args=args,
                scheduler=_scheduler(scheduler, seed, depth, replayed),
                oracles=oracles or ORACLES,
                reference=expected,
                reduce=not no_reduce,
                progress=bar,
                show_output=replayed is not None,
                **limits,
            )
    except AnabranchError as error:
        _refuse(str(error))
    except (Exception, SystemExit) as error:
        _refuse(
            f"{program} cannot be imported: {type(error).__name__}: {error}. Expected a program that python can import."
        )
    _write(verdict, json_path, trace_path)
    click.echo(verdict.report())
    sys.exit(_STATUS[verdict.kind])


def _scheduler(name: str, seed: int, depth: int, replayed: str | None) -> schedulers.Scheduler:
    if replayed is not None:
        return schedulers.replay(replayed)
    if name == "random":
        return schedulers.random(seed)
    if name == "pct":
        return schedulers.pct(seed, depth)
    return {"fifo": schedulers.fifo, "lazy": schedulers.lazy, "exhaustive": schedulers.exhaustive}[name]()


def _reference(text: str | None, program: str) -> Any:
    """A function of the same file by its name or its whole target, or a literal."""
    if text is None:
        return None
    if ":" in text and text.rpartition(":")[2].isidentifier():
        return _program.load(text)
    if text.isidentifier() and text not in ("None", "True", "False"):
        return _program.load(f"{program.rpartition(':')[0] or program}:{text}")
    return _program.parse(text)


def _write(verdict: Verdict, json_path: str | None, trace_path: str | None) -> None:
    if trace_path is not None:
        try:
            verdict.save_trace(trace_path)
        except ValueError as error:
            click.echo(f"anabranch explore: {error}", err=True)
    text = json.dumps(verdict.to_dict(), indent=1)
    if json_path == "-":
        click.echo(text)
    elif json_path is not None:
        Path(json_path).write_text(text + "\n", encoding="utf-8")


class _Bar:
    """Schedules so far, of those that the limit allows: an exhaustive search does not know how many there are."""

    def __init__(self, total: int) -> None:
        # No thread of rich's own: the exploration forks.
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("schedules"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("explore", total=total)
        self._drawn = 0.0

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, number: int, run: Run) -> None:
        now = self._bar.get_time()
        if now - self._drawn > 0.1:
            self._drawn = now
            self._bar.update(self._task, completed=number, refresh=True)


def _refuse(message: str) -> NoReturn:
    click.echo(f"anabranch explore: {message}", err=True)
    sys.exit(2)
