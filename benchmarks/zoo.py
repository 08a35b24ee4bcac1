"""A zoo: public architectures with random weights, each compiled, called from threads, and timed beside its peers.

    python benchmarks/zoo.py --procs 8 --limit 540 --json benchmarks/results/zoo_h200.json
    python benchmarks/zoo.py --only tv/resnet18,hf/llama,timm/resnet50 --json one.json
    python benchmarks/zoo.py --only hf/bert,hf/t5 --device cpu --json cpu.json
    python benchmarks/zoo.py --merge a.json --merge b.json --json benchmarks/results/zoo_h200.json

A name is ``tv/NAME`` (torchvision), ``timm/NAME``, ``hf/MODEL_TYPE`` (transformers, very small) or ``real/NAME``
(transformers at true size); ``--families`` takes the default lists, which ``benchmarks/zoo_models.py`` holds. Each
model has a process of its own, in which eager, ``torch.compile`` and anabranch run the same model; times are taken in
turn, in rounds, one process at a time, and the medians count. ``benchmarks/zoo_measure.py`` says what is measured.

GPU memory is what the driver counts as the process's. Where eager has nothing left of a result in half precision
(zeros, or no numbers), the model is judged in float32.
``--missing FILE`` leaves out what the file has a verdict on: a run that needs several calls goes on where it ended.
Runs become one with ``--merge``: of two rows of a model the later counts, and the builds of both orders are kept.
``docs/models.md`` shows the results; ``python benchmarks/tables.py`` writes it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import zoo_models

Row = dict[str, Any]

#: How far off a right result may be in each dtype, relative to the largest expected value, however near eager is.
TOLERANCE = {"float16": 0.02, "bfloat16": 0.08, "float32": 1e-4}
#: The share of integers (indices, classes) that may differ: near ties fall either way.
INTEGERS_DIFFER = 0.02
#: The last stages: whatever ends the process there, the model was judged before.
FIGURES = ("profile", "reduce-overhead")
#: Seconds that a model gets at least; with less left, it is not started.
_LEAST = 20


# -- the verdict ------------------------------------------------------------------------------------------------------


def verdict(row: Row) -> tuple[str, str]:
    """``right``, ``wrong``, ``refused``, ``failed`` or ``not started``, and why, in a line; empty where it is right."""
    if row.get("stage") == "not started":
        return "not started", "no time was left"
    if "failure" in row and row["stage"] not in FIGURES:
        kind = "refused" if row.get("refused") and row["stage"] == "build" else "failed"
        return kind, f"{row['stage']}: {_line(row['failure'])}"
    found = _wrong(row)
    if found:
        return "wrong", "; ".join(found)
    if row["stage"] not in ("done", *FIGURES):
        return "failed", f"the process ended at: {row['stage']}"
    return "right", ""


def _wrong(row: Row) -> list[str]:
    """What is wrong among the results that there are."""
    found = []
    if row.get("wrong"):
        found.append(f"{row['wrong']} of {row['calls']} concurrent calls differ: {_line(row.get('wrong_first', ''))}")
    if "thread_error" in row:
        found.append(f"a thread's call: {_line(row['thread_error'])}")
    if row.get("repeats") is False:
        found.append("the same call by itself gives other bits")
    if row.get("structure"):
        found.append(f"structure: {_line(row['structure'])}")
    if "error_to_eager" in row and not is_accurate(row):
        found.append(
            f"error {row['error']:.1e}, eager's {row['eager_error']:.1e}, to eager {row['error_to_eager']:.1e};"
            f" {row['integers_differ']:.1%} of integers differ"
        )
    return found


def is_accurate(row: Row) -> bool:
    """Whether the results are as near float32 as eager's are, twice eager's error at most or the dtype's tolerance.

    Where eager overflows in this dtype, or finds other boxes than in float32, they must be near eager's own. In float32
    they may be further from eager's by as much as eager's are from those of inputs that differ by an ulp: the best
    boxes of a thousand that are nearly as good are others after any rounding. An engine that rounds as eager does must
    be near it all the same.
    """
    if row.get("exact_error", 0) > TOLERANCE["float32"] or row.get("exact_integers_differ", 0) > INTEGERS_DIFFER:
        return False
    tolerance = TOLERANCE[row["dtype"]] + row.get("moved_error", 0)
    if row["integers_differ"] > INTEGERS_DIFFER + row.get("moved_integers_differ", 0):
        return False
    if row.get("eager_differs") or not math.isfinite(row["eager_error"]):
        return bool(row["error_to_eager"] <= tolerance)
    return bool(row["error"] <= max(2 * row["eager_error"] if row["eager_error"] < 1 else 0, tolerance))


def _line(text: str) -> str:
    return " ".join(text.split())[:240]


def judged(row: Row) -> Row:
    """The row with its ``status`` and ``why``."""
    status, why = verdict(row)
    return {**row, "status": status, "why": why}


# -- files ------------------------------------------------------------------------------------------------------------


def merge(runs: list[Row]) -> Row:
    """One run of several on one kind of machine. Raises ``click.ClickException`` where they are of different kinds."""
    kinds = {tuple(str(r["environment"][k]) for k in ("device", "torch")) for r in runs}
    if len(kinds) > 1:
        raise click.ClickException(f"runs of different machines do not become one: {sorted(kinds)}")
    rows: dict[str, Row] = {}
    for row in (row for run in runs for row in run["rows"]):
        before = rows.get(row["model"])
        if before is None:
            rows[row["model"]] = row
        elif row["status"] != "not started":
            builds = {b["first"]: b for r in (before, row) for b in r.get("builds", [])}
            # The peer that is timed on demand only keeps its figures.
            peer = {k: before[k] for k in ("us_beside_overhead", "overhead_us") if k in before}
            rows[row["model"]] = {**peer, **row, "builds": list(builds.values())}
    environments = [r["environment"] for r in runs]
    commands = list(dict.fromkeys(c for e in environments for c in e["commands"]))
    return {
        "environment": {**environments[-1], "date": max(e["date"] for e in environments), "commands": commands},
        "rows": [rows[n] for n in sorted(rows)],
    }


def environment(device: str) -> Row:
    import torch

    from anabranch.devices import get_device

    versions = {}
    for name in ("torchvision", "timm", "transformers", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kind": device,
        "device": get_device(device).describe(0),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "versions": versions,
        "cores": len(os.sched_getaffinity(0)),
        "commands": [shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])],
    }


def write(file: Path, content: Row) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # JSON has no infinity: what is infinite is written as a string that float() takes.
    text = json.dumps(_finite(content), indent=1)
    file.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def report(rows: list[Row]) -> str:
    """For the terminal: what is right, what is not and why, and what is slower than a peer."""
    right = [r for r in rows if r["status"] == "right"]
    calls, wrong = (sum(r.get(k, 0) for r in rows) for k in ("calls", "wrong"))
    lines = [f"{len(right)} of {len(rows)} right; wrong calls: {wrong} of {calls:,}"]
    for peer, label in (("eager_us", "eager"), ("compile_us", "torch.compile"), ("overhead_us", "reduce-overhead")):
        ours = "us_beside_overhead" if peer == "overhead_us" else "us"
        timed = [r for r in rows if r.get(peer) and r.get(ours)]
        slow = [f"{r['model']} {r[ours] / r[peer]:.2f}" for r in timed if r[ours] > 1.05 * r[peer]]
        lines.append(f"slower than 1.05 x {label}: {len(slow)} of {len(timed)} {', '.join(slow)}")
    lines += [f"{r['model']}: {r['status']}: {r['why']}" for r in rows if r["status"] != "right"]
    return "\n".join(lines)


# -- processes --------------------------------------------------------------------------------------------------------


class Run:
    """The models of one call, each in a process of its own, a number of them at a time; any thread may ask for rows."""

    def __init__(
        self,
        names: list[str],
        options: Row,
        target: Path,
        each: float,
        limit: float,
        program: Sequence[str] = (__file__,),
        judge: Callable[[Row], Row] = judged,
    ) -> None:
        """``program``: the command that takes ``--child``; ``judge``: adds ``status`` and ``why`` to a row."""
        self._waiting = list(names)
        self._options = options
        self._target = target
        self._each = each
        self._limit = limit
        self._program, self._judge = program, judge
        self._rows: list[Row] = []
        self._lock = threading.Lock()
        self._environment = environment(options["device"])

    def run(self, procs: int) -> list[Row]:
        self._end = time.monotonic() + self._limit
        # Once, before several ask for it: C++ is compiled at the first use on a machine.
        self._process("", self._limit)
        slots = [threading.Thread(target=self._slot) for _ in range(procs)]
        for t in slots:
            t.start()
        for t in slots:
            t.join()
        self._rows += [self._judge({"model": n, "stage": "not started"}) for n in self._waiting]
        self._save()
        return self._rows

    def _slot(self) -> None:
        while True:
            with self._lock:
                left = self._end - time.monotonic()
                if not self._waiting or left < _LEAST:
                    return
                name = self._waiting.pop(0)
            row = self._judge(self._process(name, min(self._each, left), ends=left < self._each))
            with self._lock:
                self._rows.append(row)
                self._save()
                print(f"{row['model']}: {row['status']} {row['why']}", flush=True)

    def _save(self) -> None:
        write(self._target, {"environment": self._environment, "rows": self._rows})

    def _process(self, name: str, seconds: float, ends: bool = False) -> Row:
        """What a process told last, and how it ended if that was not at the end.

        ``ends``: with these seconds the run ends; a model that was not judged by then was not given its time.
        """
        began = time.monotonic()
        command = [sys.executable, *self._program, "--child", json.dumps({**self._options, "name": name})]
        surroundings = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2", **os.environ}
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(command, stdout=out, stderr=errors, text=True, env=surroundings)
            try:
                ended = f"exit status {child.wait(seconds)}"
                ends = False
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                ended = f"no answer in {seconds:.0f} s"
            out.seek(0)
            errors.seek(0)
            told = [line for line in out.read().splitlines() if line.startswith('{"model"')]
            last = errors.read().strip().splitlines()[-1:]
        row: Row = json.loads(told[-1]) if told else {"model": name, "stage": "start"}
        if row["stage"] != "done" and "failure" not in row:
            row["failure"] = f"{ended} {' '.join(last)}"[:500]
            if ends and row["stage"] not in FIGURES:
                row["stage"] = "not started"
        row["seconds"] = round(time.monotonic() - began, 1)
        return row


def child(text: str, subject: Any = None) -> None:
    """Measures one model in this process; the row goes to standard output after each step. No name: prepares only.

    ``subject``: the class that measures; None: that of ``zoo_measure``.
    """
    import zoo_measure

    given = json.loads(text)
    name = given.pop("name")
    if not name:
        zoo_measure.prepare(given["device"])
        return
    # Libraries may print: what they print is no row.
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(row: Row) -> None:
        print(json.dumps(row), file=rows, flush=True)

    (subject or zoo_measure.Subject)(name, zoo_measure.Options(**given), tell).run()
    rows.flush()
    # Threads of libraries must not keep the process.
    os._exit(0)


@click.command()
@click.option("--only", help="Names, with commas between them; --families is then not looked at.")
@click.option("--families", default=",".join(zoo_models.NAMES), show_default=True, help="Whose default lists to take.")
@click.option(
    "--missing", type=click.Path(path_type=Path), help="Leave out the models that this file has a verdict on."
)
@click.option("--device", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu"]))
@click.option("--dtype", type=click.Choice(list(TOLERANCE)), help="Default: float16; on the CPU float32.")
@click.option("--backend", help="anabranch's backend; default: the device's best.")
@click.option("--flip", is_flag=True, help="Build torch.compile's first.")
@click.option("--overhead", is_flag=True, help='Time torch.compile with mode="reduce-overhead", too.')
@click.option("--rounds", default=5, show_default=True, help="Rounds of timing.")
@click.option("--procs", default=1, show_default=True, help="Processes at a time.")
@click.option("--each", default=300.0, show_default=True, help="Seconds that a model may take.")
@click.option("--limit", default=540.0, show_default=True, help="Seconds that the run may take.")
@click.option(
    "--json", "target", type=click.Path(path_type=Path), help="Where the results go; needed except for --list."
)
@click.option(
    "--merge", "parts", type=click.Path(exists=True, path_type=Path), multiple=True, help="Merge; run nothing."
)
@click.option("--list", "listed", is_flag=True, help="Print the names and run nothing.")
@click.option("--child", "single", hidden=True)
def main(
    only: str | None,
    families: str,
    missing: Path | None,
    target: Path | None,
    parts: tuple[Path, ...],
    listed: bool,
    single: str | None,
    procs: int,
    each: float,
    limit: float,
    **options: Any,
) -> None:
    """Compile public architectures, compare their results with eager's, and time them."""
    if single is not None:
        child(single)
        return
    unknown = sorted(set(families.split(",")) - set(zoo_models.NAMES))
    if unknown:
        raise click.UsageError(f"--families: no {', '.join(unknown)}; there are {', '.join(zoo_models.NAMES)}")
    names = only.split(",") if only else zoo_models.default_names(families.split(","))
    if listed:
        print("\n".join(names))
        return
    if target is None:
        raise click.UsageError("--json FILE is needed: it says where the results go")
    if parts:
        whole = merge([read(p) for p in parts])
        whole["rows"] = [judged(r) for r in whole["rows"]]
        write(target, whole)
        print(report(whole["rows"]))
        return
    if missing is not None:
        names = left_out(names, read(missing)) if missing.exists() else names
    options["dtype"] = options["dtype"] or ("float32" if options["device"] == "cpu" else "float16")
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        import zoo_measure

        chosen = zoo_measure.Options(**options, lock=str(Path(folder, "lock")))
        rows = Run(names, asdict(chosen), target, each, limit).run(procs)
    print(report(rows))


def read(file: Path) -> Row:
    content: Row = json.loads(file.read_text(encoding="utf-8"))
    for row in content["rows"]:
        for key in ("error", "eager_error", "error_to_eager", "moved_error", "exact_error"):
            if row.get(key) in ("inf", "nan", "-inf"):
                row[key] = float(row[key])
    return content


def left_out(names: list[str], run: Row) -> list[str]:
    """The names that a run has no verdict on."""
    known = {r["model"] for r in run["rows"] if r["status"] != "not started"}
    return [n for n in names if n not in known]


if __name__ == "__main__":
    main()
