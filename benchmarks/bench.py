"""The committed runs of ``anabranch bench``; the README's performance section comes from the GPU's.

    python benchmarks/bench.py cpu    # 2 cores, under 10 minutes -> benchmarks/results/bench_cpu.json
    # 2 GPUs of 141 GB, twice 8 minutes, and both as one -> benchmarks/results/bench_h200.json
    python benchmarks/bench.py h200 --works relu,chain,googlenet,relu-4k,encoder --out a
    python benchmarks/bench.py h200 --works upscaler-1080p,resnet50,mobilenet_v3_large,inception_v3 --out b
    python benchmarks/bench.py merge a/bench_h200.json b/bench_h200.json
    python benchmarks/bench.py h200 --works relu,chain -- --systems eager,anabranch-inductor-native   # some of it

What follows ``--`` goes to ``anabranch bench``. On a GPU host the works are dealt to lanes, one a GPU, each with cores
of its own (``benchmarks/lanes.py``). Where a machine is lent for less time than all works take, give some of
them a call: ``merge`` joins the files and says which call each work is from.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
from lanes import deal, merge, run_lanes, statuses

from anabranch.bench import default_works, find_work
from anabranch.bench._plot import plot
from anabranch.bench._report import notes, without_baseline
from anabranch.check import write_json

RESULTS = Path(__file__).parent / "results"

#: Lanes of like cost, light works first: what a build that runs out of time takes along is then little. What a call
#: builds in one lane has to fit onto a GPU beside about 40 contexts of half a gigabyte: the two works with large frames
#: take 49 and 67 GB, googlenet 80, the others up to 35. So not all works fit into one call on two GPUs.
LANES = (
    ("relu", "chain", "googlenet", "upscaler-1080p", "resnet50"),
    ("relu-4k", "encoder", "mobilenet_v3_large", "inception_v3"),
)


@click.command()
@click.argument("which", type=click.Choice(["cpu", "h200", "merge"]))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the results.")
@click.option("--limit", default=500.0, show_default=True, help="Seconds a lane may take.")
@click.option("--lanes", default=2, show_default=True, type=click.IntRange(1, 2))
@click.option("--works", help="Names, with commas; all.")
@click.option("--device", default="cuda", type=click.Choice(["cuda", "cpu"]), help="cpu: a rehearsal of h200.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def main(
    which: str,
    out: Path,
    limit: float,
    lanes: int,
    works: str | None,
    device: str,
    more: tuple[str, ...],
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
    missing: list[Path] = []
    if which == "merge":
        parts = [json.loads(Path(name).read_text(encoding="utf-8")) for name in more]
    else:
        # One core a call: a GPU's caller computes nothing.
        settings = ["--streams", "1,4,16", "--rounds", "3", "--latencies", "3", "--seconds", "0.1"]
        settings += ["--build-seconds", "300", "--patience", "35", "--build-share", "0.66"]
        settings += ["--torch-threads", "1", *more]
        for name in chosen:
            find_work(name)  # refused now, not by one lane of two
        parts, missing = run_lanes(deal(chosen, LANES, lanes), out, device, limit, settings)
    content = merge(parts, f"python benchmarks/bench.py {' '.join(sys.argv[1:])}")
    write_json(target, content)
    plot(content, target.with_suffix(".png"))
    print("\n".join([*notes(content), str(statuses(content))]))
    if missing:
        sys.exit(f"not all of it: {', '.join(map(str, missing))} was not written")
    if lost := without_baseline(content):
        sys.exit(f"no figures of the baseline: {'; '.join(lost)}")


if __name__ == "__main__":
    main()
