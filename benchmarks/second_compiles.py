"""What calls of one engine feel of another thread's compiles in the same process: host latency, by phase of the build.

    python benchmarks/second_compiles.py --device cpu --json benchmarks/results/second_compiles_cpu.json

A thread calls a small engine in a loop. First alone; then while another one compiles ranges of sizes with cold caches.
A call counts for each phase of a build (export, lowering, and so on) that it overlaps.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import nn

import anabranch
from anabranch import Dim, Input
from anabranch.check import write_json
from anabranch.runtime._phases import Clock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Block(nn.Module):
    """A few layers; each width is another model, so that nothing of it is in a cache."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 32)
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.linear(x)))
        return self.attention(y, y, y, need_weights=False)[0].softmax(-1)


class Caller:
    """Calls an engine in a thread of its own, and keeps when each call began and ended."""

    def __init__(self, engine: anabranch.Engine, x: torch.Tensor) -> None:
        self.calls: list[tuple[float, float]] = []
        self.wrong = 0
        self._engine, self._x, self._stop = engine, x, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        expected = self._engine(self._x)
        while not self._stop.is_set():
            began = time.perf_counter()
            y = self._engine(self._x)
            self.calls.append((began, time.perf_counter()))
            self.wrong += not torch.equal(y, expected)

    def __enter__(self) -> Caller:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def noting_phases() -> Iterator[list[tuple[str, float, float]]]:
    """The phases of builds in here: name, begin and end."""
    noted: list[tuple[str, float, float]] = []
    switch: Any = Clock._switch

    def noting(clock: Clock, name: str) -> None:
        before, since = clock._phase, clock._since
        switch(clock, name)
        noted.append((before, since, clock._since))

    setattr(Clock, "_switch", noting)  # noqa: B010  # a type checker minds an assignment
    try:
        yield noted
    finally:
        setattr(Clock, "_switch", switch)  # noqa: B010


def latencies(calls: Sequence[tuple[float, float]]) -> dict[str, float]:
    """In microseconds."""
    taken = sorted((end - began) * 1e6 for began, end in calls)
    if not taken:
        return {"calls": 0}
    points = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    found = {name: round(taken[int(point * (len(taken) - 1))], 1) for name, point in points.items()}
    over = {f"over {ms} ms": sum(t > ms * 1e3 for t in taken) for ms in (1, 10)}
    return {"calls": len(taken), **found, "max": round(taken[-1], 1), **over}


def during(calls: Sequence[tuple[float, float]], intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that overlap one of these intervals, which come one after another."""
    found, k = [], 0
    for began, end in calls:
        while k < len(intervals) and intervals[k][1] <= began:
            k += 1
        if k < len(intervals) and intervals[k][0] < end:
            found.append((began, end))
    return found


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--builds", default=4, show_default=True, help="How many ranges are compiled.")
@click.option("--alone", default=5.0, show_default=True, help="Seconds of calls beside which nothing is built.")
@click.option("--json", "target", type=click.Path(path_type=Path))
def main(device: str, builds: int, alone: float, target: Path | None) -> None:
    place = torch.device(device)
    small = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval().to(place)
    x = torch.randn(4, 16, device=place)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        engine = anabranch.compile(small, [x])
        # The first build of a process imports the compiler.
        anabranch.compile(Block(16).eval().to(place), [Input((Dim("batch", 2, 64), 5, 16))])
        with Caller(engine, x) as quiet:
            time.sleep(alone)
        with Caller(engine, x) as beside, noting_phases() as noted:
            for width in range(17, 17 + builds):
                anabranch.compile(Block(width).eval().to(place), [Input((Dim("batch", 2, 64), 5, width))]).close()
    for name, began, end in noted:
        seconds[name] = seconds.get(name, 0.0) + end - began
    phases = {
        name: {
            "seconds": round(total, 2),
            **latencies(during(beside.calls, [(b, e) for n, b, e in noted if n == name])),
        }
        for name, total in seconds.items()
        if total >= 0.01
    }
    result = {"alone": latencies(quiet.calls), "beside builds": latencies(beside.calls), "phases": phases}
    for name, found in {**result, **phases}.items():
        if name != "phases":
            print(f"{name}: {found}")
    wrong = quiet.wrong + beside.wrong
    print(f"wrong: {wrong}")
    if target is not None:
        environment = {
            "date": date.today().isoformat(),
            "device": anabranch.devices.get_device(place.type).describe(0),
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "command": f"python benchmarks/second_compiles.py --device {device} --builds {builds}",
        }
        write_json(target, {"environment": environment, "unit": "us", "result": result, "wrong": wrong})
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
