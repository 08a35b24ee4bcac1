"""The table and the JSON of a check."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from anabranch._version import __version__
from anabranch.check._device import find_device
from anabranch.check._row import Row


def environment(device: str) -> dict[str, Any]:
    """Where and when a figure was measured."""
    seam = find_device(device)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": seam.describe(seam.index(torch.device(device))),
        "anabranch": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "command": " ".join(["anabranch", *sys.argv[1:]]),
    }


def to_json(rows: Sequence[Row], device: str, **more: Any) -> dict[str, Any]:
    """The rows, their totals, and the environment."""
    return {
        "rows": [r.as_dict() for r in rows],
        "calls": sum(r.calls for r in rows),
        "wrong": sum(r.wrong for r in rows),
        "all_zero": sum(r.all_zero for r in rows),
        "non_finite": sum(r.non_finite for r in rows),
        "environment": environment(device),
        **more,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Row], title: str, watched: bool = False) -> Table:
    """The rows. ``watched``: by the race checker, on a device that has no time to measure."""
    result = Table(title=title, title_justify="left")
    for name in ("path", "dtype", "shape"):
        result.add_column(name, no_wrap=True)
    last = "races" if watched else "us a call"
    for name in ("calls", "in flight", "wrong", "all-zero", "non-finite", "max error", last):
        result.add_column(name, justify="right")
    for r in rows:

        def count(n: int) -> str:
            return f"[bold red]{n}[/]" if n else "0"

        error = f"{r.max_error:.1e}" if r.max_error <= r.tolerance else f"[bold red]{r.max_error:.1e}[/]"
        result.add_row(
            r.path,
            r.dtype,
            r.shape,
            str(r.calls),
            str(r.in_flight),
            count(r.wrong),
            count(r.all_zero),
            count(r.non_finite),
            error,
            count(r.races) if watched else f"{r.us_a_call:.1f}" if r.us_a_call < 1000 else f"{r.us_a_call:,.0f}",
        )
    return result
