"""What it costs to compile for many batch sizes, against one static compile and against ``torch.compile``.

    python benchmarks/sizes.py --json benchmarks/results/sizes_cpu.json

A three-layer perceptron on the CPU is called with eight batch sizes, 1 among them. Each way has a process of its own
for each round, with empty caches, and the ways take turns. The time is that of ``compile`` and of all calls, without
the imports; the median over the rounds counts. Every output is compared with eager's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

BATCHES = (8, 1, 2, 3, 5, 16, 33, 64)


def model() -> Any:
    from torch import nn

    layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(*layers).eval()


def ways() -> dict[str, Callable[[Any], tuple[Any, tuple[int, ...]]]]:
    """By name, what makes something to call of a model, and the batch sizes to call it with."""
    import torch

    import anabranch

    def ours(inputs: Any, batches: tuple[int, ...], **options: Any) -> Callable[[Any], tuple[Any, tuple[int, ...]]]:
        return lambda net: (anabranch.compile(net, [inputs], backend="inductor", **options), batches)

    first = torch.randn(BATCHES[0], 64)
    return {
        "static": ours(first, BATCHES[:1], dynamic=False),
        "each by itself": ours(first, BATCHES, dynamic=False),
        "declared": ours(anabranch.Input((anabranch.Dim("batch", 1, 64), 64)), BATCHES),
        "undeclared": ours(first, BATCHES),
        "torch.compile": lambda net: (torch.compile(net), BATCHES),
        "torch.compile, static": lambda net: (torch.compile(net), BATCHES[:1]),
    }


def measure(way: str) -> None:
    """In a process of its own: prints seconds, compiles and wrong outputs."""
    import torch

    import anabranch.runtime  # part of no way's time

    assert anabranch.runtime
    torch.manual_seed(0)
    net, make = model(), ways()[way]
    inputs = {n: torch.randn(n, 64) for n in BATCHES}
    with torch.no_grad():
        expected = {n: net(x) for n, x in inputs.items()}
        import_compilers()
        began = time.perf_counter()
        call, batches = make(net)
        results = {n: call(inputs[n]) for n in batches}
        seconds = time.perf_counter() - began
    wrong = sum(not torch.allclose(y, expected[n], rtol=1e-4, atol=1e-5) for n, y in results.items())
    compiles = call.stats().specializations if hasattr(call, "stats") else None
    print(json.dumps({"seconds": seconds, "compiles": compiles, "wrong": wrong}))


def import_compilers() -> None:
    """What all ways import, ahead of their time."""
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401


def run(way: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
        command = [sys.executable, __file__, "--way", way]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{way}: ended with {done.returncode}: {done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


@click.command(help=__doc__)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where to write what was measured.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--way", hidden=True, help="Measure this way, in this process.")
def main(path: Path | None, rounds: int, way: str | None) -> None:
    if way is not None:
        measure(way)
        return
    import torch

    import anabranch

    names = list(ways())
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for k in range(rounds):
        for name in names[:: 1 if k % 2 == 0 else -1]:
            taken[name].append(run(name))
            click.echo(f"round {k + 1} of {rounds}: {name}: {taken[name][-1]}", err=True)
    seconds = {name: statistics.median(t["seconds"] for t in all_) for name, all_ in taken.items()}
    rows = {
        name: {
            "seconds": round(seconds[name], 2),
            "of_static": round(seconds[name] / seconds["static"], 2),
            "compiles": taken[name][0]["compiles"],
            "wrong": sum(t["wrong"] for t in taken[name]),
        }
        for name in names
    }
    click.echo(json.dumps(rows, indent=2))
    if path is not None:
        about = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "command": " ".join(["python", *sys.argv]),
            "torch": torch.__version__,
            "anabranch": anabranch.__version__,
            "cores": os.cpu_count(),
            "batches": list(BATCHES),
        }
        path.write_text(json.dumps({"environment": about, "ways": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
