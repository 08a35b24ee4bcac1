"""Three transformers at their true size, random weights, float16: one call, and many streams of one engine.

    python benchmarks/true_size.py --json benchmarks/results/true_size_h200.json

All systems are in one process and are timed in turn, in rounds; the median of the rounds counts. A call's time is until
its results are there. Needs transformers and a CUDA device.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import zoo_models
from torch.utils._pytree import tree_map_only

import anabranch
from anabranch.check import write_json

MODELS = ("bert-base", "vit-b16", "llama-1b")


def _on_gpu(x: torch.Tensor) -> torch.Tensor:
    return x.to("cuda", torch.float16 if x.is_floating_point() else None)


def latency(call: Callable[[], Any], calls: int) -> float:
    """Microseconds of the median call."""
    took = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


def throughput(call: Callable[[], Any], streams: int, seconds: float) -> float:
    """Calls a second of so many threads, each on a stream of its own."""
    made, end = [0] * streams, threading.Event()
    barrier = threading.Barrier(streams + 1)

    def work(thread: int) -> None:
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):
                call()
            stream.synchronize()
            barrier.wait()
            while not end.is_set():
                for _ in range(4):
                    call()
                stream.synchronize()
                made[thread] += 4

    threads = [threading.Thread(target=work, args=(i,)) for i in range(streams)]
    for t in threads:
        t.start()
    barrier.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    end.set()
    for t in threads:
        t.join()
    return sum(made) / (time.perf_counter() - began)


def measure(name: str, rounds: int) -> dict[str, Any]:
    model, (inputs,) = zoo_models.make(f"real/{name}", [zoo_models.Sizes()])
    model = model.half().cuda()
    args, kwargs = tree_map_only(torch.Tensor, _on_gpu, (inputs.args, inputs.kwargs or {}))
    built = {}
    began = time.monotonic()
    engine = anabranch.compile(model, args, kwargs=kwargs)
    engine.warm(contexts=16)
    built["anabranch"] = time.monotonic() - began
    systems: dict[str, Callable[..., Any]] = {"anabranch": engine, "eager": model}
    calls: dict[str, Callable[[], Any]] = {s: partial(call, *args, **kwargs) for s, call in systems.items()}
    peers: dict[str, dict[str, Any]] = {"torch.compile": {}, "reduce-overhead": {"mode": "reduce-overhead"}}
    for label, options in peers.items():
        torch._dynamo.reset()
        began = time.monotonic()
        compiled: Any = torch.compile(model, dynamic=False, **options)
        calls[label] = partial(compiled, *args, **kwargs)
        for _ in range(4):
            calls[label]()
        built[label] = time.monotonic() - began
        # One after the other: both would share what Dynamo keeps of the model.
        latency(calls["anabranch"], 20)
        pairs = [{k: latency(calls[k], 30) for k in ("anabranch", "eager", label)} for _ in range(rounds)]
        built[f"rounds with {label}"] = pairs  # type: ignore[assignment]
    rows = [*built.pop("rounds with torch.compile"), *built.pop("rounds with reduce-overhead")]  # type: ignore[misc]
    us = {k: round(statistics.median(r[k] for r in rows if k in r), 1) for k in calls}
    with torch.no_grad():
        rates = {n: round(throughput(calls["anabranch"], n, 2.0), 1) for n in (1, 4, 16)}
    return {
        "model": name,
        "us": us,
        "faster than": {k: round(v / us["anabranch"], 3) for k, v in us.items() if k != "anabranch"},
        "calls a second, by streams": rates,
        "16 streams against one": round(rates[16] / rates[1], 2),
        "build s": {k: round(v, 1) for k, v in built.items()},
        "stats": {k: getattr(engine.stats(), k) for k in ("calls", "graph_calls", "direct_calls", "contexts", "bytes")},
        "rounds": rows,
    }


@click.command()
@click.option("--only", default=",".join(MODELS), show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path))
def main(only: str, rounds: int, target: Path | None) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    environment = {
        "date": date.today().isoformat(),
        "device": anabranch.devices.get_device("cuda").describe(0),
        "torch": torch.__version__,
        "command": f"python benchmarks/true_size.py --rounds {rounds}",
    }
    rows = []
    with torch.no_grad():
        for name in only.split(","):
            rows.append(measure(name, rounds))
            print({k: v for k, v in rows[-1].items() if k != "rounds"}, flush=True)
            if target is not None:
                write_json(target, {"environment": environment, "rows": rows})


if __name__ == "__main__":
    main()
