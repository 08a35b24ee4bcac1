"""The committed runs of ``anabranch bench``; the README's performance section comes from the GPU's.

    python benchmarks/bench.py cpu    # 2 cores, under 10 minutes -> benchmarks/results/bench_cpu.json
    python benchmarks/bench.py h200   # 2 GPUs, 10 minutes -> benchmarks/results/bench_h200.json

On a GPU host the works are dealt to lanes, one a GPU, each with cores of its own: a lane measures one system at a time
on its GPU and shares nothing with the other. All systems of a work are measured in one lane.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import click

from anabranch.bench import default_works
from anabranch.bench._plot import plot
from anabranch.bench._report import with_ratios
from anabranch.check import write_json

RESULTS = Path(__file__).parent / "results"

#: Lanes of like cost. Light works first: what a build that runs out of time takes along is then little.
LANES = (
    ("relu", "chain", "upscaler-1080p", "googlenet", "inception_v3"),
    ("relu-4k", "encoder", "resnet50", "mobilenet_v3_large"),
)


def lane(number: int, of: int, target: Path, limit: float, more: list[str]) -> None:
    """One lane in processes of its own."""
    import torch

    works = list(LANES[number]) if of > 1 else [w for lane in LANES for w in lane]
    works = [w for w in works if w in default_works()]
    cores = (os.cpu_count() or 1) // of
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(number % torch.cuda.device_count())}
    command = [
        *("taskset", "-c", f"{number * cores}-{(number + 1) * cores - 1}"),
        *(sys.executable, "-m", "anabranch", "bench", *works, "--device", "cuda", "--json", str(target)),
        *("--batch", str(len(works)), "--cores", str(cores), "--limit", str(limit), *more),
    ]
    with target.with_suffix(".log").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)


def merge(parts: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """The lanes as one run."""
    lanes = [
        {"works": list(p["works"]), **{k: p["environment"][k] for k in ("seconds", "load_before", "load_after")}}
        for p in parts
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole["works"] |= part["works"]
        whole["cells"] += part["cells"]
        whole["partial"] |= part["partial"]
    whole["environment"]["lanes"] = lanes
    whole["environment"]["command"] = command
    return with_ratios(whole)


@click.command()
@click.argument("which", type=click.Choice(["cpu", "h200"]))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the results.")
@click.option("--limit", default=500.0, show_default=True, help="Seconds a lane may take.")
@click.option("--lanes", default=2, show_default=True, type=click.IntRange(1, 2))
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def main(which: str, out: Path, limit: float, lanes: int, more: tuple[str, ...]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"bench_{which}.json"
    if which == "cpu":
        command = [sys.executable, "-m", "anabranch", "bench", "--device", "cpu", "--streams", "1,2,4"]
        # One core a call: two cores are shared by up to four callers.
        command += ["--batch", "8", "--torch-threads", "1", "--limit", str(limit), "--rounds", "3"]
        command += ["--build-share", "0.7", "--json", str(target), "--plot", str(target.with_suffix(".png")), *more]
        sys.exit(subprocess.run(command, check=False).returncode)
    settings = ["--streams", "1,4,16", "--rounds", "3", "--seconds", "0.1", "--build-seconds", "120"]
    settings += ["--patience", "30", *more]
    files = [out / f"lane{i}.json" for i in range(lanes)]
    threads = [threading.Thread(target=lane, args=(i, lanes, file, limit, settings)) for i, file in enumerate(files)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parts = [json.loads(file.read_text()) for file in files if file.exists()]
    content = merge(parts, f"python benchmarks/bench.py {' '.join(sys.argv[1:])}")
    write_json(target, content)
    plot(content, target.with_suffix(".png"))
    counts: dict[str, int] = {}
    for cell in content["cells"]:
        counts[cell["status"]] = counts.get(cell["status"], 0) + 1
    print(counts)


if __name__ == "__main__":
    main()
