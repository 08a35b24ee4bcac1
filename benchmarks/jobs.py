"""Measurements by name, each in a process of its own: what a benchmark of several has in common.

With ``--together`` all of them start at once, so that their builds take the time of the longest; what is timed waits in
:func:`measuring` until all are built, and then takes turns.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

Job = Callable[[], dict[str, Any]]

#: Where the processes of ``--together`` meet: a folder.
MEETING = "ANABRANCH_JOBS"


def command(about: str | None, program: str, jobs: Callable[[], Mapping[str, Job]]) -> click.Command:
    """The command of a benchmark: ``program`` is its file, ``jobs`` has its measurements."""

    @click.command(help=about)
    @click.option("--json", "path", type=click.Path(path_type=Path), help="Where to write what was measured.")
    @click.option("--only", default="", help="Measurements whose names begin so, separated by ';'.")
    @click.option("--together", is_flag=True, help="Build all at once; measure in turn.")
    @click.option("--job", hidden=True)
    def main(path: Path | None, only: str, together: bool, job: str | None) -> None:
        if job is not None:
            print(json.dumps(jobs()[job]()))
            return
        names = [name for name in jobs() if not only or name.startswith(tuple(only.split(";")))]
        made = {}
        for name, result in run_together(program, names) if together else run_each(program, names):
            made[name] = result
            click.echo(f"{name}: {json.dumps(result)}")
            if path is not None:
                path.write_text(json.dumps({"environment": environment(), "measured": made}, indent=2) + "\n")

    return main


def run_each(program: str, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One measurement after the other."""
    for name in names:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, program, "--job", name], capture_output=True, text=True, check=False)
        yield name, _result(done.returncode, done.stdout, done.stderr, time.perf_counter() - began)


def run_together(program: str, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All measurements at once, but for what they do within :func:`measuring`."""
    with tempfile.TemporaryDirectory() as folder:
        meeting, began, running = Path(folder), time.perf_counter(), {}
        for number, name in enumerate(names):
            out, err = (meeting / f"{kind}-{number}" for kind in ("out", "err"))
            with out.open("w") as stdout, err.open("w") as stderr:
                running[name] = (
                    subprocess.Popen(
                        [sys.executable, program, "--job", name],
                        env={**os.environ, MEETING: folder},
                        stdout=stdout,
                        stderr=stderr,
                    ),
                    out,
                    err,
                )
        while running:
            time.sleep(0.05)
            for name, (process, out, err) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    took = time.perf_counter() - began
                    yield name, _result(process.returncode, out.read_text(), err.read_text(), took)
            if all((meeting / f"built-{process.pid}").exists() for process, _, _ in running.values()):
                (meeting / "all-built").touch()


def _result(code: int, out: str, err: str, seconds: float) -> dict[str, Any]:
    if code:
        return {"failed": code, "why": err[-1500:]}
    made: dict[str, Any] = json.loads(out.splitlines()[-1])
    return {**made, "took_s": round(seconds, 1)}


@contextmanager
def measuring() -> Iterator[None]:
    """What is timed. Of processes that run together, once all have come here or ended, one at a time."""
    if MEETING not in os.environ:
        yield
        return
    meeting = Path(os.environ[MEETING])
    (meeting / f"built-{os.getpid()}").touch()
    while not (meeting / "all-built").exists():
        time.sleep(0.05)  # for another process
    with (meeting / "lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def environment() -> dict[str, Any]:
    """Where and when it was measured."""
    import torch

    import anabranch

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "anabranch": anabranch.__version__,
        "cores": os.cpu_count(),
        "command": " ".join(["python", *sys.argv]),
    }
