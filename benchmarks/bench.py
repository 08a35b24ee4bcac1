"""The committed runs of ``anabranch bench``; the README's performance section comes from the GPU's.

    python benchmarks/bench.py cpu    # 2 cores, under 10 minutes -> benchmarks/results/bench_cpu.json
    python benchmarks/bench.py h200   # 2 GPUs, 10 minutes -> benchmarks/results/bench_h200.json
    python benchmarks/bench.py h200 --works relu,chain -- --systems eager,anabranch-inductor-native   # some of it
    python benchmarks/bench.py merge light.json heavy.json --out FOLDER    # several calls -> FOLDER/bench_h200.json

What follows ``--`` goes to ``anabranch bench``. On a GPU host the works are dealt to lanes, one a GPU, each with cores
of its own: a lane measures one system at a time on its GPU and shares nothing with the other. All systems of a work are
measured in one lane, so ratios always compare what ran side by side. Where a machine is lent for less time than all
works take, give some of them a call: ``merge`` joins the files and says which call each work is from.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from anabranch.bench import default_works, find_work
from anabranch.bench._plot import plot
from anabranch.bench._report import with_ratios
from anabranch.check import write_json

RESULTS = Path(__file__).parent / "results"

#: Lanes of like cost, light works first: what a build that runs out of time takes along is then little. What is held at
#: the same time has to fit onto a GPU: the two works with large frames take 49 and 67 GB, the others up to 27.
LANES = (
    ("relu", "chain", "relu-4k", "encoder", "googlenet"),
    ("upscaler-1080p", "resnet50", "mobilenet_v3_large", "inception_v3"),
)


def deal(works: Sequence[str], lanes: int) -> list[list[str]]:
    """The works in lanes, in their order there; works that are in none come last in the first one."""
    known = [w for lane in LANES for w in lane]
    dealt = [[w for w in lane if w in works] for lane in LANES]
    dealt[0] += [w for w in works if w not in known]
    if lanes == 1:
        dealt = [[w for lane in dealt for w in lane]]
    return [lane for lane in dealt if lane]


def lane(number: int, of: int, works: list[str], target: Path, device: str, limit: float, more: list[str]) -> None:
    """One lane in processes of its own."""
    import torch

    cores = max(1, (os.cpu_count() or 1) // of)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(number % max(1, torch.cuda.device_count()))}
    command = [
        *("taskset", "-c", f"{number * cores}-{(number + 1) * cores - 1}"),
        *(sys.executable, "-m", "anabranch", "bench", *works, "--device", device, "--json", str(target)),
        # Twice as many builds as cores: most wait for the driver, or for each other to create their contexts.
        *("--batch", str(len(works)), "--cores", str(2 * cores), "--limit", str(limit), *more),
    ]
    with target.with_suffix(".log").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)


def merge(parts: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """Lanes of one call, or several calls, as one run. A work that is in several parts comes from the last of them."""
    if any(list(part["systems"]) != list(parts[0]["systems"]) for part in parts):
        raise click.ClickException("the files hold different systems: ratios would not compare alike")
    lanes = []
    for part in parts:
        where = part["environment"]
        keys = ("date", "command", "device", "seconds", "load_before", "load_after")
        about = {key: where[key] for key in keys if key in where}
        about["limit_seconds"] = part["settings"].get("limit_seconds")
        lanes += where.get("lanes") or [{"works": list(part["works"]), **about}]
    source = {work: part for part in parts for work in part["works"]}
    whole = {**parts[0], "environment": {**parts[0]["environment"], "lanes": lanes, "command": command}}
    whole["works"] = {work: part["works"][work] for work, part in source.items()}
    whole["cells"] = [c for work, part in source.items() for c in part["cells"] if c["work"] == work]
    whole["partial"] = any(part["partial"] for part in parts)
    return with_ratios(whole)


@click.command()
@click.argument("which", type=click.Choice(["cpu", "h200", "merge"]))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the results.")
@click.option("--limit", default=500.0, show_default=True, help="Seconds a lane may take.")
@click.option("--lanes", default=2, show_default=True, type=click.IntRange(1, 2))
@click.option("--works", help="Names, with commas; all.")
@click.option("--device", default="cuda", type=click.Choice(["cuda", "cpu"]), help="cpu: a rehearsal of h200.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def main(
    which: str, out: Path, limit: float, lanes: int, works: str | None, device: str, more: tuple[str, ...]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"bench_{'cpu' if which == 'cpu' else 'h200'}.json"
    chosen = works.split(",") if works else default_works()
    if which == "cpu":
        command = [sys.executable, "-m", "anabranch", "bench", "--device", "cpu", "--streams", "1,2,4"]
        # One core a call: two cores are shared by up to four callers.
        command += ["--batch", "8", "--torch-threads", "1", "--limit", str(limit), "--rounds", "3"]
        command += ["--build-share", "0.7", "--json", str(target), "--plot", str(target.with_suffix(".png"))]
        command[4:4] = works.split(",") if works else []
        sys.exit(subprocess.run([*command, *more], check=False).returncode)
    if which == "merge":
        files = [Path(name) for name in more]
    else:
        # One core a call: a GPU's caller computes nothing.
        settings = ["--streams", "1,4,16", "--rounds", "3", "--seconds", "0.1", "--build-seconds", "300"]
        settings += ["--patience", "35", "--build-share", "0.66", "--torch-threads", "1", *more]
        for name in chosen:
            find_work(name)  # refused now, not by one lane of two
        dealt = deal(chosen, lanes)
        files = [out / f"lane{i}.json" for i in range(len(dealt))]
        threads = [
            threading.Thread(target=lane, args=(i, len(dealt), works, file, device, limit, settings))
            for i, (works, file) in enumerate(zip(dealt, files, strict=True))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    parts = [json.loads(file.read_text()) for file in files if file.exists()]
    if not parts:
        sys.exit(f"no lane wrote a result; see {files[0].with_suffix('.log')}")
    content = merge(parts, f"python benchmarks/bench.py {' '.join(sys.argv[1:])}")
    write_json(target, content)
    plot(content, target.with_suffix(".png"))
    counts: dict[str, int] = {}
    for cell in content["cells"]:
        counts[cell["status"]] = counts.get(cell["status"], 0) + 1
    print(counts)
    if len(parts) < len(files):
        sys.exit(f"not all of it: {', '.join(str(file) for file in files if not file.exists())} was not written")


if __name__ == "__main__":
    main()
