"""The correctness matrix on a GPU: models x dtypes x streams x threads, every output compared bit for bit.

    python benchmarks/matrix.py --json benchmarks/results/matrix_h200.json

One process a model, side by side; nothing is timed.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from anabranch.check import Bench, Case, Options, Row, find_subject, float32_exactly, to_json, write_json

MODELS = {"relu": (1, 3, 5), "relu-4k": (1, 3, 2160, 3840), "upscaler": (1, 3, 270, 480), "branches": (1, 3, 64, 64)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STREAMS = (1, 8, 40)
THREADS = (1, 8)
PLACES = (0, 0, 1, 0)  # the upscaler's float32 takes as long as all the others


def check_model(name: str, calls: int, target: Path) -> None:
    rows: list[dict[str, object]] = []
    for cuda_graphs in (True, False):
        for dtype in DTYPES:
            options = Options(
                "cuda", max(STREAMS), max(THREADS), calls, cuda_graphs=cuda_graphs, reference_every=8, timed=False
            )
            with concurrent.futures.ThreadPoolExecutor(options.threads) as workers:
                bench = Bench(find_subject(name.removesuffix("-4k")), Case(dtype, MODELS[name]), options, workers)
                for streams in STREAMS:
                    for threads in THREADS:
                        row: Row = bench.run("threads" if threads > 1 else "rotate", lambda n: None, streams, threads)
                        rows.append({"model": name, "streams": streams, "threads": threads, **row.as_dict()})
                        print(name, streams, threads, row, file=sys.stderr, flush=True)
                        target.write_text(json.dumps(rows))
                bench.close()


@click.command()
@click.option("--calls", default=500, show_default=True, help="A row; a tenth of it at 4K.")
@click.option("--json", "target", type=click.Path(path_type=Path), required=True)
@click.option("--seconds", default=1200.0, show_default=True, help="Stop after this; what is not done is said.")
@click.option("--only", type=click.Choice(list(MODELS)), help="This model only, in this process.")
def main(calls: int, target: Path, seconds: float, only: str | None) -> None:
    if only:
        with float32_exactly(), torch.no_grad():
            check_model(only, calls // 10 if only.endswith("-4k") else calls, target)
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for i, name in enumerate(MODELS):
            # Spread over the GPUs that there are: processes that share one take turns on it.
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(PLACES[i] % torch.cuda.device_count())}
            environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
            file = Path(folder) / f"{name}.json"
            command = [sys.executable, __file__, "--only", name, "--calls", str(calls), "--json", str(file)]
            runs[file] = subprocess.Popen(command, env=environment)
        rows, failed = [], {}
        end = time.monotonic() + seconds
        for file, run in runs.items():
            try:
                status = run.wait(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                run.kill()
                status = "out of time"
            if status:
                failed[file.stem] = f"exit status {status}"
            rows += json.loads(file.read_text()) if file.exists() else []
    content = to_json([], "cuda", calls=sum(r["calls"] for r in rows), wrong=sum(r["wrong"] for r in rows))
    content |= {"all_zero": sum(r["all_zero"] for r in rows), "non_finite": sum(r["non_finite"] for r in rows)}
    content |= {"failed": failed, "rows": rows}
    content["environment"]["command"] = f"python {' '.join(sys.argv)}"
    write_json(target, content)
    bad = [r for r in rows if not r["ok"]]
    print(f"{len(rows)} rows, {content['calls']} calls, {content['wrong']} wrong, {len(bad)} rows not right")
    print(failed or "all done")
    sys.exit(bool(bad or failed))


if __name__ == "__main__":
    main()
