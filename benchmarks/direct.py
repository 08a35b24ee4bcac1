"""Direct calls against eager: what operators cost where nothing is captured, on one thread and on eight.

    python benchmarks/direct.py --device cuda --out benchmarks/results/direct_h200.json
    python benchmarks/direct.py --device cpu --seconds 60 --out /tmp/direct_cpu.json --only lstm,masks

Each model is compiled for the native runtime with backend ``eager`` and with the device's default, without CUDA
graphs. Eager and both engines are timed in turn, for many rounds; a figure is the median of its rounds. On CUDA each
thread has a stream of its own, and a round ends when the device has done its work. All run under
``torch.inference_mode()``, on one CPU thread inside an operator. Before it is timed an engine is compared with
eager's: bit for bit on backend ``eager``, within a rounding error of float32 on the other.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.nn import functional

import anabranch
from anabranch._judge import pair
from anabranch._judge import wrong as differs
from anabranch.check import write_json

#: How far a result of the default backend may be off; of the random ones, whose bits depend on the draw, type and shape
#: are compared alone.
TOLERANCE = 1e-3


class Detector(nn.Module):
    """What a detection model does: a few convolutions, boxes above a score, and of boxes that overlap the best one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1)),
            *(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 5, 1)),
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = self.body(x).flatten(2)[0].t()
        scores = found[:, 4].sigmoid()
        scores, order = scores.topk(128)
        boxes = found[order, :4]
        kept = scores > scores.mean()
        boxes, scores, order = boxes[kept], scores[kept], order[kept]
        centre, size = boxes[:, :2], boxes[:, 2:].exp()
        low, high = centre - size / 2, centre + size / 2
        area = size[:, 0] * size[:, 1]
        overlap = torch.minimum(high[:, None], high[None]) - torch.maximum(low[:, None], low[None])
        shared = overlap.clamp(min=0).prod(2)
        worse = (shared / (area[:, None] + area[None] - shared)).triu(1) > 0.5
        left = torch.nonzero(~worse.any(0)).squeeze(1)
        return torch.cat([low, high], 1)[left], scores[left], order[left]


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = getattr(nn, kind)(64, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x)[0][:, -1])


class Packed(nn.Module):
    """Sequences of different lengths, as one has them for a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(64, 64, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.layers(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class Masks(nn.Module):
    """Boolean masks, their counts, and sizes that depend on both."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        large = x[x > 0.5]
        small = x[x < -0.5] * 2
        joined = torch.cat([large, small])
        return joined / joined.shape[0], joined.new_zeros(joined.shape[0], 2) + 1, torch.nonzero(x > 1)


class Count(nn.Module):
    """A number that the host reads, and what is computed with it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count: Any = (x > 0).sum().item()
        torch._check(count >= 0)
        torch._check(count <= x.numel())
        return x.reshape(-1).narrow(0, 0, count) * (count // 3 + 1) / (count + 1)


class Choice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: (y * 2).relu() + 1, lambda y: (y - 1).sigmoid() * 3, (x,))


class ChoiceInEager(nn.Module):
    """The same with an ``if``, as one writes it without an exporter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2).relu() + 1 if x.sum() > 0 else (x - 1).sigmoid() * 3


class Tiny(nn.Module):
    """200 operators on 16 numbers: nothing but what it costs to call them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            x = ((x + 1) * 0.5).tanh() - x
        return x


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.dropout(functional.gelu(self.first(x)), 0.3, training=True)
        return self.second(x) + torch.rand_like(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(64), nn.LayerNorm(64)
        self.joint, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.feed = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (4, 16)).transpose(1, 2) for y in self.joint(self.norm(x)).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.feed(self.other(x))


@dataclass(frozen=True)
class Work:
    make: Callable[[], nn.Module]
    #: Of the first input.
    shape: tuple[int, ...]
    #: What eager runs, if it is another model.
    eager: Callable[[], nn.Module] | None = None
    #: Further inputs, which stay on the CPU.
    more: tuple[torch.Tensor, ...] = ()


WORKS = {
    "detector": Work(Detector, (1, 3, 96, 96)),
    "lstm": Work(lambda: Recurrent("LSTM"), (4, 16, 64)),
    "gru": Work(lambda: Recurrent("GRU"), (4, 16, 64)),
    "packed": Work(Packed, (4, 16, 64), more=(torch.tensor([16, 9, 12, 3]),)),
    "masks": Work(Masks, (32, 32)),
    "count": Work(Count, (32, 32)),
    "choice": Work(Choice, (32, 32), ChoiceInEager),
    "tiny": Work(Tiny, (4, 4)),
    "random": Work(Random, (8, 64)),
    "transformer": Work(lambda: nn.Sequential(*(Block() for _ in range(4))), (2, 16, 64)),
}
Call = Callable[..., Any]


@contextmanager
def on_stream(device: torch.device) -> Iterator[Callable[[], None]]:
    """A stream of the thread's own, where there are streams; gives what waits for it."""
    if device.type == "cpu":
        yield lambda: None
        return
    api: Any = torch.get_device_module(device.type)
    stream = api.Stream()
    with api.stream(stream):
        yield stream.synchronize


def rate(call: Call, inputs: tuple[torch.Tensor, ...], threads: int, seconds: float) -> float:
    """Calls a second of ``threads`` threads, each of which calls for ``seconds``."""
    counts: list[tuple[int, float]] = []
    ready = threading.Barrier(threads)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            torch.set_num_threads(1)  # what oneDNN goes by is each thread's own
            with torch.inference_mode(), on_stream(inputs[0].device) as synchronize:
                call(*inputs)
                synchronize()
                ready.wait()
                start = time.perf_counter()
                count, spent = 0, 0.0
                while spent < seconds:
                    for _ in range(8):
                        call(*inputs)
                    count += 8
                    spent = time.perf_counter() - start
                synchronize()
                counts.append((count, time.perf_counter() - start))
        except BaseException as e:
            errors.append(e)
            ready.abort()

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return sum(count for count, _ in counts) / max(spent for _, spent in counts)


def check(call: Call, eager: Call, inputs: tuple[torch.Tensor, ...], exact: bool, random: bool) -> None:
    """Raise where an engine's results are not eager's."""
    with torch.inference_mode():
        actual, expected = call(*inputs), eager(*inputs)
    found, pairs = pair(actual, expected)
    if found:
        raise AssertionError(found)
    for p in pairs:
        tolerance = 0.0 if exact else TOLERANCE
        if not random and differs(p.actual, p.expected, tolerance).any():
            raise AssertionError("the engine's results are not eager's")


def measure(name: str, device: torch.device, threads: list[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each number of threads; ``seconds``: of all measurements of this model together."""
    work = WORKS[name]
    torch.manual_seed(0)
    model = work.make().eval().requires_grad_(False).to(device)
    inputs = (torch.randn(work.shape, device=device), *work.more)
    eager = work.eager().eval() if work.eager else model
    ways: dict[str, Call] = {"eager": eager}
    notes: dict[str, Any] = {}
    for backend in ("eager", None):
        key = f"anabranch, {backend or 'default'}"
        try:
            engine = anabranch.compile(model, list(inputs), backend=backend, runtime="native", cuda_graphs=False)
        except anabranch.AnabranchError as e:
            notes[key] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
            continue
        check(engine, eager, inputs, backend == "eager", name == "random")
        ways[key] = engine
        notes[key] = [line.strip() for line in engine.explain().splitlines()]
    rows = []
    each = seconds / (len(ways) * rounds * len(threads))
    for count in threads:
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, call in ways.items():
                rates[way].append(rate(call, inputs, count, each))
        medians = {way: statistics.median(found) for way, found in rates.items()}
        row = {
            "model": name,
            "threads": count,
            "calls_per_second": {way: round(found, 1) for way, found in medians.items()},
            "times_eager": {
                # Of each round by itself: a host's clock may change between two of them.
                way: round(statistics.median(a / b for a, b in zip(found, rates["eager"], strict=True)), 3)
                for way, found in rates.items()
                if way != "eager"
            },
            "rounds": {way: [round(r, 1) for r in found] for way, found in rates.items()},
        }
        rows.append(row)
        us = 1e6 * count / medians["eager"]
        ratios = ", ".join(f"{way} {ratio:.2f} x eager's calls" for way, ratio in row["times_eager"].items())
        print(f"{name}, {count} thread(s): eager {us:.0f} us a call; {ratios}", flush=True)
    rows[0]["notes"] = notes
    return rows


@click.command()
@click.option("--device", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu"]))
@click.option("--out", type=click.Path(path_type=Path), help="JSON file.")
@click.option("--seconds", default=240.0, show_default=True, help="Of measuring; compiling comes on top.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--threads", default="1,8", show_default=True)
@click.option("--only", help="Names of models, with commas.")
def main(device: str, out: Path | None, seconds: float, rounds: int, threads: str, only: str | None) -> None:
    """Measure direct calls against eager."""
    torch.set_num_threads(1)
    place = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    names = only.split(",") if only else list(WORKS)
    counts = [int(n) for n in threads.split(",")]
    content: dict[str, Any] = {
        "environment": {
            "date": date.today().isoformat(),
            "device": anabranch.devices.get_device(device).describe(0),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "anabranch": anabranch.__version__,
            "command": "python " + " ".join(["benchmarks/direct.py", *sys.argv[1:]]),
        },
        "rows": [],
    }
    failed = []
    with torch.cuda.device(place) if device == "cuda" else nullcontext():
        for name in names:
            try:
                content["rows"] += measure(name, place, counts, rounds, seconds / len(names))
            except Exception as e:
                failed.append(name)
                content["rows"].append({"model": name, "error": f"{type(e).__name__}: {e}"})
                print(f"{name}: {type(e).__name__}: {e}", flush=True)
            if out is not None:
                write_json(out, content)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
