"""Very many calls of shared engines from many threads, each on a stream of its own; every output is looked at.

    python benchmarks/many_calls.py --calls 120000 --json benchmarks/results/many_calls_h200.json

Each call gets an input that was never used before, drawn on the caller's stream. The memory that its results will most
likely get is filled with NaN and freed just before. The result is compared with the module's own, run on the same
stream right afterwards, on the device, in dtype, shape, strides and every element: exactly for the ReLU, within a
rounding error of the dtype for the others.
Nothing waits for the device but a thread's own look at its count of wrong outputs in the end.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import anabranch
from anabranch import models
from anabranch._judge import pair
from anabranch._judge import wrong as differs
from anabranch.check import write_json


@dataclass(frozen=True)
class Work:
    """A module, the shape of its input, its share of the calls, and how far off a result may be."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    share: float
    tolerance: float


def _mlp() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256), nn.LayerNorm(256))


WORKS = {
    "relu": Work(models.relu, (1, 3, 5), 0.4, 0.0),
    "relu, larger": Work(models.relu, (3, 270, 480), 0.2, 0.0),
    "mlp": Work(_mlp, (4, 256), 0.3, 0.05),
    "branches": Work(models.branches, (1, 3, 64, 64), 0.1, 0.05),
}
#: Options of compile, used in turn: as it comes; contexts that calls must share; always a graph; never one.
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"max_contexts": 3, "cuda_graphs": True},
    {"cuda_graphs": True},
    {"cuda_graphs": False},
)


def serve(engine: Any, module: nn.Module, work: Work, device: torch.device, calls: int, seed: int) -> tuple[int, int]:
    """One thread's calls; returns how many there were and how many were wrong."""
    api: Any = torch.get_device_module(device.type)
    stream = api.Stream()
    with api.stream(stream), torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator(device=device).manual_seed(seed)
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(calls):
            x = torch.empty(work.shape, dtype=torch.float16, device=device).normal_(generator=generator)
            poison = torch.full_like(module(x), float("nan"))
            del poison
            y = engine(x)
            z = module(x)
            found, pairs = pair(y, z)
            far = [differs(p.actual, p.expected, work.tolerance).any() for p in pairs]
            wrong += torch.stack(far).any() if not found else 1
            del x, y, z
        return calls, int(wrong)  # waits for the stream


def summed(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Calls and wrong ones of all rows."""
    return {key: sum(r[key] for r in rows) for key in ("calls", "wrong")}


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--runtime", default="native", show_default=True)
@click.option("--backend", default=None, help="Default: the device's best.")
@click.option("--threads", default=16, show_default=True)
@click.option("--calls", default=120_000, show_default=True, help="All works and settings together.")
@click.option("--json", "target", type=click.Path(path_type=Path))
def main(device: str, runtime: str, backend: str | None, threads: int, calls: int, target: Path | None) -> None:
    if device == "sim":
        importlib.import_module("anabranch.sim")  # registers the device
    place = torch.device(device, 0)
    rows: list[dict[str, Any]] = []
    environment = {
        "date": date.today().isoformat(),
        "device": anabranch.devices.get_device(device).describe(0),
        "torch": torch.__version__,
        "runtime": runtime,
        "threads": threads,
        "command": f"python benchmarks/many_calls.py --device {device} --runtime {runtime} --calls {calls}",
    }
    for name, work in WORKS.items():
        module = work.make().eval().requires_grad_(False).to(place, torch.float16)
        for settings in SETTINGS:
            example = torch.empty(work.shape, dtype=torch.float16, device=place)
            started = time.monotonic()
            engine = anabranch.compile(module, [example], runtime=runtime, backend=backend, **settings)
            each = -(-int(calls * work.share / len(SETTINGS)) // threads)
            counts: list[tuple[int, int]] = []

            def run(i: int) -> None:
                counts.append(serve(engine, module, work, place, each, 1000 * len(rows) + i))  # noqa: B023

            workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            stats = engine.stats()
            row = {
                "work": name,
                "settings": {k: str(v) for k, v in settings.items()},
                "calls": sum(n for n, _ in counts),
                "wrong": sum(w for _, w in counts),
                "threads that ended": len(counts),
                "graph_calls": stats.graph_calls,
                "direct_calls": stats.direct_calls,
                "waits": stats.waits,
                "contexts": stats.contexts,
                "seconds": round(time.monotonic() - started, 1),
            }
            rows.append(row)
            print(row, flush=True)
            engine.close()
            if target is not None:
                write_json(target, {"environment": environment, "total": summed(rows), "rows": rows})
    total = summed(rows)
    print(total)
    raise SystemExit(bool(total["wrong"] or total["calls"] < calls))


if __name__ == "__main__":
    main()
