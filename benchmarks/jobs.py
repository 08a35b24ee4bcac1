"""Measurements by name, each in a process of its own: what a benchmark of several has in common."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

Job = Callable[[], dict[str, Any]]


def command(about: str | None, program: str, jobs: Callable[[], Mapping[str, Job]]) -> click.Command:
    """The command of a benchmark: ``program`` is its file, ``jobs`` has its measurements."""

    @click.command(help=about)
    @click.option("--json", "path", type=click.Path(path_type=Path), help="Where to write what was measured.")
    @click.option("--only", default="", help="Measurements whose names begin so, separated by ';'.")
    @click.option("--job", hidden=True)
    def main(path: Path | None, only: str, job: str | None) -> None:
        if job is not None:
            print(json.dumps(jobs()[job]()))
            return
        made = {}
        for name in jobs():
            if only and not name.startswith(tuple(only.split(";"))):
                continue
            made[name] = run(program, name)
            click.echo(f"{name}: {json.dumps(made[name])}")
            if path is not None:
                path.write_text(json.dumps({"environment": environment(), "measured": made}, indent=2) + "\n")

    return main


def run(program: str, name: str) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, program, "--job", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.returncode, "why": done.stderr[-1500:]}
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**made, "took_s": round(time.perf_counter() - began, 1)}


def environment() -> dict[str, Any]:
    """Where and when it was measured."""
    import torch

    import anabranch

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "anabranch": anabranch.__version__,
        "cores": os.cpu_count(),
        "command": " ".join(["python", *sys.argv]),
    }
