"""What ``anabranch bench`` does; its options are in ``cli/_bench.py``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from anabranch._exit import refuse_unwritable
from anabranch.bench._options import Options
from anabranch.bench._report import notes, status, table, without_baseline
from anabranch.bench._run import run_bench
from anabranch.bench._system import SYSTEMS, default_systems
from anabranch.bench._work import WORKS, default_works
from anabranch.check import write_json
from anabranch.errors import AnabranchError


def run(
    works: tuple[str, ...],
    systems: list[str],
    device: str | None,
    dtype: str | None,
    json_path: Path | None,
    plot_path: Path | None,
    source: Path | None,
    listing: bool,
    **settings: Any,
) -> None:
    """Measure, print tables, and exit with 2 where it cannot be done; takes the command's options."""
    # Piped or in a log there is no window to fit, and figures must not be cut off.
    console = Console() if sys.stdout.isatty() else Console(width=190)
    if listing:
        for work in WORKS.values():
            console.print(f"{work.name:20} {work.summary}", highlight=False)
        for system in SYSTEMS.values():
            console.print(f"{system.name:26} {system.label} ({', '.join(system.devices)})", highlight=False)
        return
    for path in (json_path if source is None else None, plot_path):
        if path is not None:
            try:
                refuse_unwritable(path, parents=True)
            except AnabranchError as e:
                _refuse(str(e))
    if source is not None:
        content = _read(source)
    else:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            _refuse("--device cuda given, but PyTorch sees no GPU here; use --device cpu")
        options = Options(device, dtype or ("float16" if device == "cuda" else "float32"), json=json_path, **settings)
        try:
            content = _run(list(works) or default_works(), systems or default_systems(device), options)
        except AnabranchError as e:
            _refuse(str(e))
    for name in content["works"]:
        console.print(table(content, name))
    for line in notes(content):
        console.print(line, style="dim", highlight=False, markup=False)
    if json_path and source is None:
        write_json(json_path, content)
    if plot_path:
        from anabranch.bench._plot import plot

        try:
            plot(content, plot_path)
        except AnabranchError as e:
            _refuse(str(e))
    if lost := without_baseline(content):
        click.echo(f"anabranch bench: no figures of the baseline: {'; '.join(lost)}", err=True)
    sys.exit(status(content))


def _read(source: Path) -> dict[str, Any]:
    """What an earlier run wrote."""
    try:
        content: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        if not {"works", "systems", "cells", "settings"} <= content.keys():
            raise ValueError("it has no works, systems, cells and settings")
    except (OSError, ValueError, AttributeError) as e:
        _refuse(f"{source} is no file that --json wrote: {str(e) or type(e).__name__}; give one")
    return content


def _run(works: list[str], systems: list[str], options: Options) -> dict[str, Any]:
    if not sys.stderr.isatty():
        # A log cannot be redrawn: a line a step.
        start = time.monotonic()

        def line(done: int, of: int, what: str) -> None:
            click.echo(f"{time.monotonic() - start:6.1f} s  {done} of {of}  {what}", err=True)

        return run_bench(works, systems, options, line)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("bench", total=None)
        return run_bench(
            works,
            systems,
            options,
            lambda done, of, what: bar.update(task, completed=done, total=of, description=what[:60]),
        )


def _refuse(message: str) -> NoReturn:
    click.echo(f"anabranch bench: {message}", err=True)
    sys.exit(2)
