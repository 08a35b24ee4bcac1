"""Engines against eager on models made up at random (``tests/unit/generated.py``), a seed each. Resumable.

    python benchmarks/generated_models.py --backend eager --seeds 0:20000 --jobs 16
    python benchmarks/generated_models.py --backend inductor --seeds 0:500 --jobs 16 --limit 500

Results go to ``benchmarks/results/generated_models.json``: how many models were tried, what differed, and of each
difference the seed and a short model that shows it. A run goes on where the last one of the same backend ended; models
that it found to differ are tried again with ``--again``. One seed is shown, and tried, with ``--show SEED``.

On backend ``eager`` values are compared bit for bit. With ``inductor`` models are made of operators whose rounding does
not grow, and an element may be 1e-5 of the largest in its tensor away (of 1 where all are smaller), or 16 units in the
last place (``anabranch._judge.Rounding``). Types, dtypes, strides and shared memory are compared with both. What
PyTorch cannot export is refused by name (``REFUSED`` there) and counted by itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "generated_models.json"
#: Models that are compiled at once.
BATCH = {"eager": 10, "inductor": 10}


def models_of(seeds: list[int], backend: str) -> list[Any]:
    import generated

    return [generated.make(random.Random(seed), seed, stable=backend == "inductor") for seed in seeds]


def run_batch(seeds: list[int], backend: str, runtime: str) -> dict[str, Any]:
    """Compare the models of these seeds; where they differ, each by itself."""
    import generated

    models = {model.seed: model for model in models_of(seeds, backend)}
    refused, different = generated.compare_each(list(models.values()), backend, runtime)
    found: dict[str, Any] = {}
    for seed, what in different.items():
        short = models[seed]
        if backend == "eager":  # to compile anew for each line takes too long with Inductor
            kind = what[0].split(" ")[0]
            short = generated.shrunk(short, lambda m, k=kind: _kind(m, backend, runtime) == k)
        found[str(seed)] = {
            "what": generated.refusal(short, backend, runtime)[1][:3] or what[:3],
            "runtime": runtime,
            "inputs": {n: repr(x) for n, x in short.inputs.items() if n in short.source},
            "model": short.source.splitlines(),
        }
    lines = sum(len(m.lines) for m in models.values())
    return {"seeds": seeds, "lines": lines, "refused": dict(refused), "found": found}


def _kind(model: Any, backend: str, runtime: str) -> str:
    import generated

    _, what = generated.refusal(model, backend, runtime)
    return what[0].split(" ")[0] if what else ""


def start() -> None:
    """In each process."""
    sys.path.insert(0, str(ROOT / "tests" / "unit"))
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)


def ranges(done: list[list[int]], first: int, last: int, size: int) -> Iterator[list[int]]:
    """The seeds that are left, in batches."""
    known = {seed for a, b in done for seed in range(a, b)}
    left = [seed for seed in range(first, last) if seed not in known]
    for i in range(0, len(left), size):
        yield left[i : i + size]


def joined(done: list[list[int]]) -> list[list[int]]:
    """Ranges of seeds, as few as there can be."""
    made: list[list[int]] = []
    for a, b in sorted(done):
        if made and a <= made[-1][1]:
            made[-1][1] = max(made[-1][1], b)
        else:
            made.append([a, b])
    return made


@click.command()
@click.option("--backend", type=click.Choice(["eager", "inductor"]), default="eager", show_default=True)
@click.option("--seeds", default="0:20000", show_default=True, help="FIRST:LAST, without the last.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True, help="Processes.")
@click.option("--limit", default=0.0, help="Seconds after which no batch is begun; 0: none.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="File of the results.")
@click.option("--again", is_flag=True, help="Try the models again that differed.")
@click.option("--show", type=int, help="Print the model of one seed and compare it.")
def main(backend: str, seeds: str, jobs: int, limit: float, out: Path, again: bool, show: int | None) -> None:
    """Compare engines with eager on generated models."""
    start()
    if show is not None:
        import generated

        model = models_of([show], backend)[0]
        click.echo(f"{model.source}\n{model.inputs}")
        for runtime in ("python", "native"):
            refused, found = generated.refusal(model, backend, runtime)
            click.echo(f"{runtime}: {refused or found or 'as eager'}")
        return
    first, last = (int(n) for n in seeds.split(":"))
    kept: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    state = kept.setdefault(backend, {"seeds": [], "models": 0, "lines": 0, "seconds": 0.0})
    state.setdefault("refused", {})
    state.setdefault("found", {})
    size = BATCH[backend]
    if again:
        todo = [[int(seed)] for seed in state["found"]]
        state["found"] = {}
    else:
        todo = list(ranges(state["seeds"], first, last, size))
    began = time.monotonic()

    def write() -> None:
        import torch

        state["found"] = dict(sorted(state["found"].items(), key=lambda item: int(item[0])))
        state["torch"], state["python"] = torch.__version__, sys.version.split()[0]
        state["date"], state["command"] = time.strftime("%Y-%m-%d"), " ".join(sys.argv)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        partial.replace(out)

    spent = state["seconds"]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=start) as pool:
        waiting = iter(enumerate(todo))
        running = set()

        def submit() -> None:
            if limit and time.monotonic() - began > limit:
                return
            for i, batch in waiting:
                # Both runtimes, in turn.
                running.add(pool.submit(run_batch, batch, backend, ("native", "python")[i % 2]))
                return

        for _ in range(jobs):
            submit()
        count = 0
        while running:
            future = next(as_completed(running))
            running.discard(future)
            result = future.result()
            if not again:
                state["seeds"] = joined([*state["seeds"], *([s, s + 1] for s in result["seeds"])])
                state["models"] += len(result["seeds"])
                state["lines"] += result["lines"]
                for why, count in result["refused"].items():
                    state["refused"][why] = state["refused"].get(why, 0) + count
            state["found"] |= result["found"]
            state["seconds"] = round(spent + time.monotonic() - began, 1)
            for seed, what in result["found"].items():
                click.echo(f"seed {seed}: {what['what'][0][:300]}")
            count += 1
            if count % 20 == 0:
                write()
            submit()
    write()
    click.echo(
        f"{backend}: {state['models']} models, {state['lines']} lines, {sum(state['refused'].values())} refused,"
        f" {len(state['found'])} differ; {out}"
    )
    sys.exit(bool(state["found"]))


if __name__ == "__main__":
    main()
