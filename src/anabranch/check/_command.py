"""What ``anabranch check`` does; its options are in ``cli/_check.py``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from anabranch._exit import NOT_JUDGED, RIGHT, WRONG, Patience, refuse, refuse_unwritable
from anabranch.check._bench import Options
from anabranch.check._case import cases_for, find_subject
from anabranch.check._report import table, to_json, write_json
from anabranch.check._row import Row
from anabranch.check._run import paths_for, run_check
from anabranch.errors import AnabranchError

#: Elements of the largest default shape on the simulated device, whose kernels are the CPU's.
_SIMULATED = 1 << 13


def run(
    model: str,
    device: str | None,
    calls: int | None,
    dtypes: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    json_path: Path | None,
    patience: float,
    **settings: Any,
) -> None:
    """Check, print a table, and exit with 0, 1 or 2; takes the command's options."""
    # The driver maps streams onto 8 hardware queues unless told otherwise, and a held stream would hold those that
    # share its queue: fewer calls would really be in flight. Read when CUDA starts, which is later.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        refuse("anabranch check", "--device cuda given, but PyTorch sees no GPU here; use --device cpu")
    options = Options(device=device, calls=calls or (16 if device == "sim" else 100), **settings)
    if options.inject and device == "cpu":
        refuse(
            "anabranch check",
            f"--inject {options.inject}: device 'cpu' has no streams, so there is no stale stream to find."
            " Run it with --device sim, which needs no GPU, or with --device cuda.",
        )
    # Piped or in a log there is no window to fit: a table cut down to 80 columns would hide its figures.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        if json_path:
            refuse_unwritable(json_path, parents=True)
        subject = find_subject(model)
        most = _SIMULATED if device == "sim" else None
        cases = cases_for(subject, [getattr(torch, d) for d in dtypes or ("float32", "float16")], shapes or None, most)
        total = len(cases) * len(paths_for(device)) * options.calls
        with (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("calls"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            ) as bar,
            Patience("anabranch check", patience) as waiting,
        ):
            task = bar.add_task(f"check {subject.name}", total=total)
            waiting.beat(f"building {subject.name} for the first row")

            def progress(row: Row | None, calls: int) -> None:
                bar.advance(task, calls)
                if row is not None:
                    bar.update(task, description=f"check {subject.name} {row.dtype} {row.shape}")
                waiting.beat(f"doing what follows {row.path}, {row.dtype} {row.shape}" if row else "calling the engine")

            rows = run_check(subject, cases, options, progress)
    except AnabranchError as e:
        refuse("anabranch check", e)
    except SystemExit as e:
        refuse("anabranch check", f"{model} called sys.exit({e.code!r}); expected a model that returns")
    injected = f", with {options.inject} injected" if options.inject else ""
    title = f"{subject.name} on {device}: {options.streams} streams, {options.threads} threads{injected}"
    console.print(table(rows, title, watched=device == "sim"))
    allowed = {r.dtype: r.tolerance for r in rows}
    bounds = ", ".join(f"{dtype} {bound:.1e}" for dtype, bound in allowed.items())
    console.print(f"largest error allowed against float32 eager (serial, relative to its largest value): {bounds}")
    for line in dict.fromkeys(f"{r.dtype} {r.shape}: {r.mode}" for r in rows):
        console.print(f"  {line}")
    _print_races(console, rows)
    _print_findings(console, rows)
    if json_path:
        write_json(json_path, to_json(rows, device, model=subject.name, inject=options.inject))
    verdict, status = judgement(rows)
    console.print(verdict, markup=False, highlight=False)
    sys.exit(status)


def judgement(rows: Sequence[Row]) -> tuple[str, int]:
    """The last line, and the exit status: 0 where all outputs are right and say something, 1 where one is wrong, 2
    where there is nothing by which right could be told from wrong."""
    made, wrong = sum(r.calls for r in rows), sum(r.wrong for r in rows)
    count = f"{wrong} wrong of {made} calls"
    if bad := [r for r in rows if not r.ok]:
        return f"WRONG in {len(bad)} of {len(rows)} rows: {count}", WRONG
    silent = [r for r in rows if r.silent]
    if len(silent) == len(rows) or any(r.nan_only for r in silent):
        row = next((r for r in silent if r.nan_only), silent[0])
        why = f"{row.dtype} {row.shape}: {row.silent}"
        return f"CANNOT BE JUDGED: {why}. Check with other shapes or another model. {count}", NOT_JUDGED
    return f"all outputs right: {count}", RIGHT


def _print_findings(console: Console, rows: Sequence[Row]) -> None:
    """What is wrong in words; what says little; what came of special values."""

    def say(line: str) -> None:
        console.print(f"  {line}", markup=False, highlight=False)

    for row in rows:
        for problem in row.problems:
            say(f"WRONG {row.path}, {row.dtype} {row.shape}: {problem}")
        if not row.ok and row.tolerance < row.eager_error:
            say(f"{row.path}, {row.dtype} {row.shape}: eager {row.dtype} is itself off by {row.eager_error:.1e}")
    tried = 0
    for row in rows:
        if (boundary := row.boundary) is not None:
            tried += boundary.tried
            for word, lines in (("WRONG", boundary.wrong), ("differs", boundary.told), ("not tried", boundary.skipped)):
                for line in lines:
                    say(f"{word} {row.dtype} {row.shape}, {line}")
    if tried:
        console.print(
            f"inputs with NaN, infinities, zeros, subnormals, and at the ends of the range: {tried} compared"
            " with eager",
            highlight=False,
        )
    for line in dict.fromkeys(f"{r.dtype} {r.shape}: {r.silent}" for r in rows if r.silent):
        say(f"says little: {line}")


def _print_races(console: Console, rows: Sequence[Row]) -> None:
    """What the race checker says of each path, at its first case."""
    seen = set()
    for row in rows:
        if row.report and row.path not in seen:
            seen.add(row.path)
            console.print(f"\n{row.path}, {row.dtype} {row.shape}:", highlight=False)
            console.print(row.report, markup=False, highlight=False)
