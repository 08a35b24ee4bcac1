"""What calls cost in two checkouts of this project: host time, and calls a second on 1 and on 16 streams.

    git worktree add /tmp/before COMMIT
    python benchmarks/two_trees.py --before /tmp/before --after . --json benchmarks/results/two_trees_h200.json

Each checkout has a process that compiles all works and keeps them, and the two take turns for some rounds. Then both
begin anew: where a process happens to lie in memory and on which cores moves host times by more than changes do. Of
the figures the median over all rounds counts, and the ratio is the later checkout's over the earlier one's. Every
call uses a CUDA graph, on backend ``eager``, so that what compilers do is the same. A thread has a stream of its own,
and looks at the device after every 8 calls.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

#: Works whose Python runtime is timed, too: where the host's time is most of a call's.
IN_PYTHON = ("relu", "chain")


def works() -> dict[str, tuple[Any, Any]]:
    import torch
    from torch import nn

    from anabranch import models

    def chain() -> nn.Module:
        return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.ReLU())))

    made = {
        "relu": (models.relu(), torch.randn(1, 3, 64, 64)),
        "relu-4k": (models.relu(), torch.randn(1, 3, 2160, 3840, dtype=torch.half)),
        "chain": (chain(), torch.randn(16, 256)),
    }
    try:
        from torchvision.models import googlenet
    except ImportError:
        return made
    return {
        **made,
        "googlenet": (googlenet(weights=None, init_weights=False).half(), torch.randn(1, 3, 224, 224).half()),
    }


def host_us(engine: Any, x: Any, seconds: float) -> float:
    """Microseconds until a call returns, with little queued ahead of it: a median."""
    import torch

    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            began = time.perf_counter()
            engine(x)
            taken.append(time.perf_counter() - began)
        torch.cuda.synchronize()
    return statistics.median(taken) * 1e6


def rate(engine: Any, x: Any, threads: int, seconds: float) -> float:
    """Calls a second of so many threads, each on a stream of its own."""
    import torch

    counts, start, over = [0] * threads, threading.Barrier(threads + 1), threading.Event()

    def work(number: int) -> None:
        torch.set_grad_enabled(False)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            mine = x.clone()
            stream.synchronize()
            start.wait()
            while not over.is_set():
                for _ in range(8):
                    engine(mine)
                counts[number] += 8
                stream.synchronize()

    all_threads = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in all_threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    time.sleep(seconds)  # what is measured: a length of time
    over.set()
    for thread in all_threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


def child() -> None:
    """Compiles; then a round for each line of standard input, as a line of JSON."""
    import torch

    import anabranch

    torch.set_grad_enabled(False)
    engines = {}
    for name, (model, x) in works().items():
        model, x = model.to("cuda").eval(), x.to("cuda")
        for runtime in ("native", "python") if name in IN_PYTHON else ("native",):
            engine = anabranch.compile(model, [x], backend="eager", cuda_graphs=True, runtime=runtime)
            engine.warm(contexts=16)
            engines[name if runtime == "native" else f"{name}, python"] = engine, x
            host_us(engine, x, 0.1)
            rate(engine, x, 16, 0.1)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(
            json.dumps(
                {
                    name: {"host_us": host_us(e, x, 0.5), "rate_1": rate(e, x, 1, 0.3), "rate_16": rate(e, x, 16, 0.3)}
                    for name, (e, x) in engines.items()
                }
            ),
            flush=True,
        )


def answer(process: subprocess.Popen[str]) -> Any:
    """The next line of JSON; libraries may print others."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("{", '"')):
            return json.loads(line)
    raise click.ClickException(f"the process of a checkout ended with status {process.wait()}")


def take_turns(trees: dict[str, Path], rounds: int, number: int, measured: dict[str, list[Any]]) -> None:
    """Starts a process for each checkout, and has each measure once a round; which is first changes every time."""
    order = list(trees) if number % 2 else list(trees)[::-1]
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(trees[name] / "src")},
        )
        for name in order
    }
    for process in processes.values():
        answer(process)
    for turn in range(rounds):
        for name in order if turn % 2 else order[::-1]:
            stdin = processes[name].stdin
            assert stdin is not None
            stdin.write("\n")
            stdin.flush()
            measured[name].append(answer(processes[name]))
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()  # it ends
        process.wait()


@click.command()
@click.option("--before", type=click.Path(exists=True, path_type=Path), help="The earlier checkout.")
@click.option("--after", type=click.Path(exists=True, path_type=Path), default=".", show_default=True)
@click.option("--rounds", default=2, show_default=True, help="Turns of a pair of processes.")
@click.option("--pairs", default=5, show_default=True, help="Pairs of processes, one after another.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Where the results go.")
@click.option("--child", "is_child", is_flag=True, hidden=True)
def main(before: Path | None, after: Path, rounds: int, pairs: int, target: Path | None, is_child: bool) -> None:
    """Time calls of two checkouts in turn."""
    if is_child:
        return child()
    if before is None:
        raise click.UsageError("--before CHECKOUT is needed: it says what this one is compared with")
    trees = {"before": before, "after": after}
    measured: dict[str, list[Any]] = {name: [] for name in trees}
    for number in range(pairs):
        take_turns(trees, rounds, number, measured)
    report(measured, trees, target)
    return None


def report(measured: dict[str, list[Any]], trees: dict[str, Path], target: Path | None) -> None:
    ratios: dict[str, list[float]] = {}
    for work, figures in measured["before"][0].items():
        for figure in figures:
            old, new = (statistics.median(r[work][figure] for r in measured[name]) for name in ("before", "after"))
            ratios[f"{work} {figure}"] = [round(old, 2), round(new, 2), round(new / old, 3)]
            print(f"{work:16} {figure:8} {old:12.2f} {new:12.2f} {new / old:.3f}")
    if target is not None:
        import torch

        commit = ["git", "describe", "--always", "--dirty"]
        where = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(0),
            "torch": torch.__version__,
            "commits": {
                n: subprocess.run(commit, cwd=t, capture_output=True, text=True).stdout.strip()
                for n, t in trees.items()
            },
        }
        target.write_text(json.dumps({"environment": where, "ratios": ratios, "rounds": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
