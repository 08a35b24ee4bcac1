"""What ``anabranch calibrate`` does; its options are in ``cli/_calibrate.py``."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from anabranch._exit import refuse, refuse_unwritable
from anabranch.calibrate._calibrate import Calibration, calibrate
from anabranch.calibrate._drawing import draw
from anabranch.calibrate._operator import Finding
from anabranch.calibrate._samples import load_samples
from anabranch.check import find_subject, float32_exactly
from anabranch.errors import AnabranchError

_NAME = "anabranch calibrate"


def run(
    model: str,
    data: str,
    budget: float,
    dtype: str,
    reference: str,
    samples: int,
    device: str | None,
    out: Path,
    svg: Path | None,
    rows: int,
) -> None:
    """Calibrate, print a table, write the files, and exit with 0 or 2; takes the command's options."""
    console = Console() if sys.stdout.isatty() else Console(width=140)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        for path in filter(None, (out, svg)):
            refuse_unwritable(path, parents=True)
        subject = find_subject(model)
        given = load_samples(data, samples, place)
        made = subject.make()
        if isinstance(made, torch.nn.Module):
            made = made.to(place)
        with Bar(console=Console(stderr=True), transient=True) as bar, float32_exactly():
            task = bar.add_task(f"calibrate {subject.name}", total=None)
            found = calibrate(
                made,
                given,
                dtype=getattr(torch, dtype),
                budget=budget,
                reference=getattr(torch, reference),
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except AnabranchError as e:
        refuse(_NAME, e)
    console.print(_table(found, f"{subject.name} in {dtype} beside {reference}, worst first", rows))
    console.print(f"plain {dtype}: error {_figure(_last(found))} at the end", highlight=False)
    console.print(
        f"proposed: {found.share_half:.1%} of floating-point operations in {dtype}, error {found.error:.1e} on the"
        f" worst of {found.samples} samples, budget {budget:.1e}; products in float32: {len(found.mixed.keep)}",
        highlight=False,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found.data(), indent=1) + "\n", encoding="utf-8")
    console.print(f'{out}: for anabranch.compile(..., precision="{out}")', highlight=False, markup=False)
    if svg is not None:
        svg.parent.mkdir(parents=True, exist_ok=True)
        svg.write_text(draw(found, subject.name), encoding="utf-8")


def _last(found: Calibration) -> float:
    order = sorted(found.operators, key=lambda f: f.depth)
    return found.plain.get(order[-1].place, math.nan) if order else math.nan


def _figure(x: float) -> str:
    return f"{x:.1e}" if math.isfinite(x) else "not finite"


def _table(found: Calibration, title: str, rows: int) -> Table:
    result = Table(title=title, title_justify="left")
    result.add_column("operator", overflow="fold")
    for name in ("work", "overflow", "NaN", "flushed", "subnormal", "own error", "effect", "share"):
        result.add_column(name, justify="right")
    result.add_column("proposed")
    total = sum(f.flops for f in found.operators) or 1
    for f in found.operators[:rows]:
        result.add_row(
            f.place.removeprefix(":"),
            f"{f.flops / total:.1%}" if f.flops else "",
            *(_part(n, f) for n in (f.overflow, f.nan, f.flushed, f.subnormal)),
            *((f.refused[:24], "", "") if f.refused else (_figure(f.error), _figure(f.effect), f"{f.share:.0%}")),
            str(found.mixed.dtype).removeprefix("torch.") if f.half else "float32",
        )
    return result


def _part(n: int, f: Finding) -> str:
    return f"{n / f.elements:.1%}" if n else ""
