"""The run: builds side by side, then measures one at a time, all systems of a work in turn, round after round."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from anabranch.bench._process import Crashed, Hung, Worker
from anabranch.bench._statistics import spread
from anabranch.bench._system import System, find_system
from anabranch.bench._work import Work, find_work
from anabranch.check import environment, write_json

#: The part of a limited run's time after which building ends and measuring starts.
_BUILDING = 0.6
#: ``progress(done, of, what)``.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Options:
    """How to run; see ``anabranch bench --help``. Times are in seconds."""

    device: str = "cpu"
    dtype: str = "float32"
    streams: tuple[int, ...] = (1, 4, 16)
    rounds: int = 3
    #: What each figure of each round takes, about.
    seconds: float = 0.2
    #: How long one system may take to be built for one work; more than that is reported as such.
    build_seconds: float = 300.0
    #: The whole run; what is not measured by then is reported as such. 0: no limit.
    limit: float = 0.0
    #: Works that are built together. More use the cores better; all of their engines are held at once.
    batch: int = 1
    #: Cores that builds may use at a time. 0: all.
    cores: int = 0
    #: Longest time that one measurement may take before it counts as hung.
    patience: float = 120.0
    #: Threads that one call may use on the CPU. 0: PyTorch's own choice.
    torch_threads: int = 0
    json: Path | None = None
    #: Keep what the workers wrote to stdout and stderr here.
    logs: Path | None = None


@dataclass(eq=False)
class Cell:
    """One system on one work, and all that was seen of it."""

    work: Work
    system: System
    worker: Worker | None = None
    #: ``ok``, ``unavailable``, ``failed`` (raised), ``crashed``, ``hung``, ``slow`` (not built in time), ``skipped``.
    status: str = "waiting"
    reason: str = ""
    crash: dict[str, Any] | None = None
    built: dict[str, Any] = field(default_factory=dict)
    latency: list[dict[str, Any]] = field(default_factory=list)
    throughput: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    #: Streams -> why there is no (further) figure.
    without: dict[int, str] = field(default_factory=dict)
    memory_mb: float = 0.0
    tries: int = 0

    def end(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason

    def take(self, stage: str, error: Exception) -> None:
        """Note how the worker ended."""
        if isinstance(error, Crashed):
            self.end("crashed", f"{stage}: {error.how}")
            self.crash = {"stage": stage, "how": error.how, "stderr": error.lines}
        else:
            lines = self.worker.last_lines() if self.worker else []
            self.end("hung", f"{stage}: no answer")
            self.crash = {"stage": stage, "how": "no answer in time; killed", "stderr": lines}
        self.worker = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Figures are medians over the rounds, with the lowest and highest round."""
        result: dict[str, Any] = {"work": self.work.name, "system": self.system.name, "status": self.status}
        if self.reason:
            result["reason"] = self.reason
        if self.crash:
            result["crash"] = self.crash
        if self.built:
            result |= {k: v for k, v in self.built.items() if k not in ("memory_mb", "error") and v != ""}
            result["serial_error"] = self.built["error"]
            result["serially_wrong"] = not self.built["error"] <= self.built["allowed_error"]
            result["memory_mb"] = self.memory_mb
        if self.latency:
            result["latency"] = {
                key: spread([r[key] for r in self.latency]) for key in ("p50_us", "p99_us", "host_us")
            } | {"calls": sum(r["calls"] for r in self.latency)}
        result["throughput"] = {
            str(n): {"per_s": spread([r["per_s"] for r in rounds])}
            | {k: sum(r[k] for r in rounds) for k in ("calls", "checked", "wrong", "inexact", "all_zero")}
            for n, rounds in self.throughput.items()
        }
        if self.without:
            result["without"] = {str(n): why for n, why in self.without.items()}
        return result


def run_bench(
    works: Sequence[str],
    systems: Sequence[str],
    options: Options,
    progress: Progress = lambda done, of, what: None,
) -> dict[str, Any]:
    """Run every system on every work and return plain data. ``options.json`` is rewritten as figures come in."""
    return _Run([find_work(w) for w in works], [find_system(s) for s in systems], options, progress).run()


class _Run:
    def __init__(self, works: list[Work], systems: list[System], options: Options, progress: Progress) -> None:
        self.works, self.systems, self.options = works, systems, options
        self.cells = [Cell(w, s) for w in works for s in systems]
        self.start = time.monotonic()
        self.report = progress
        self.done = 0
        self.cores = options.cores or os.cpu_count() or 1
        self.where = environment(options.device)
        self.where |= {"cores": os.cpu_count(), "load_before": os.getloadavg(), "versions": _versions()}

    # Each cell counts once for its build and once for each round.
    @property
    def total(self) -> int:
        return len(self.cells) * (1 + self.options.rounds)

    def _step(self, what: str, n: int = 1) -> None:
        self.done += n
        self.report(self.done, self.total, what)

    def _left(self) -> float:
        return self.options.limit - (time.monotonic() - self.start) if self.options.limit else float("inf")

    def run(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="anabranch-bench-", ignore_cleanup_errors=True) as folder:
            for i in range(0, len(self.works), self.options.batch):
                batch = self.works[i : i + self.options.batch]
                batches_left = -(-(len(self.works) - i) // self.options.batch)
                cells = [c for c in self.cells if c.work in batch]
                until = time.monotonic() + self._left() / batches_left
                try:
                    self._build(cells, Path(folder), until)
                    self._measure(batch, cells, until)
                finally:
                    for cell in cells:
                        if cell.worker:
                            cell.worker.kill()
                            cell.worker = None
                self._save()
        return self._content(partial=False)

    # -- building -------------------------------------------------------------------------------------------------

    def _build(self, cells: list[Cell], folder: Path, until: float) -> None:
        """Build all of ``cells``, as many at a time as there are cores; slow ones first."""
        waiting = sorted(cells, key=lambda c: -c.system.slow)
        running: list[Cell] = []
        start = time.monotonic()
        close = start + (until - start) * _BUILDING
        while waiting or running:
            free = self.cores - sum(c.system.cores for c in running)
            while waiting and (free > 0 or not running):
                cell = waiting.pop(0)
                missing = cell.system.missing(self.options.device)
                if missing or time.monotonic() > close:
                    cell.end("unavailable" if missing else "skipped", missing or "out of time before its build")
                    self._step(f"{cell.work.name}: {cell.system.label}", 1 + self.options.rounds)
                    continue
                self._start(cell, folder, min(self.options.build_seconds, close - time.monotonic()))
                running.append(cell)
                free -= cell.system.cores
            if not running:
                continue
            ends = {c: min(c.worker.since + self.options.build_seconds, close) for c in running if c.worker}
            readable = {c.worker.connection: c for c in running if c.worker}
            sentinels = {c.worker.process.sentinel: c for c in running if c.worker}
            hit = wait([*readable, *sentinels], max(0.0, min(ends.values()) - time.monotonic()) + 0.01)
            now = time.monotonic()
            answered = {id(readable.get(h) or sentinels[h]) for h in hit}  # type: ignore[call-overload]
            for cell in list(running):
                if id(cell) in answered or now > ends[cell]:
                    running.remove(cell)
                    self._built(cell, id(cell) in answered)
                    if cell.status == "failed" and "out of memory" in cell.reason and cell.tries < 4:
                        # Not the system's fault: other builds' peaks pass, and a virtual machine's memory grows.
                        cell.tries += 1
                        waiting.append(cell)
                        continue
                    self._step(f"built {cell.work.name}: {cell.system.label}")

    def _start(self, cell: Cell, folder: Path, seconds: float) -> None:
        name = f"{cell.work.name}-{cell.system.name}".replace("/", "_").replace(":", "_")
        variables = {
            # A cache of its own: no system's build is quicker for another's having been there.
            "TORCHINDUCTOR_CACHE_DIR": str(folder / name),
            "TRITON_CACHE_DIR": str(folder / name / "triton"),
            # More hardware queues than the default 8, or streams would wait for each other without need.
            "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        }
        job = {
            "work": cell.work.name,
            "system": cell.system.name,
            "device": self.options.device,
            "dtype": self.options.dtype,
            "streams": min(max(self.options.streams), cell.work.max_streams),
            "build_seconds": seconds,
            "torch_threads": self.options.torch_threads,
            "cores": cell.system.cores,
            "environment": {**variables, **cell.system.environment},
        }
        logs = self.options.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        cell.worker = Worker(job, logs / f"{name}.log")
        cell.worker.send(do="build")

    def _built(self, cell: Cell, answered: bool) -> None:
        assert cell.worker is not None
        if not answered:
            took = time.monotonic() - cell.worker.since
            cell.worker.kill()
            cell.worker = None
            cell.end("slow", f"not built within {took:.0f} s")
            return
        try:
            answer = cell.worker.receive(1.0)
        except (Crashed, Hung) as e:
            cell.take("build", e)
            return
        if "error" in answer and "build_s" not in answer:
            cell.end("failed", f"build: {answer['error']}")
            cell.worker.kill()
            cell.worker = None
            return
        cell.end("ok", "")
        cell.built = answer
        cell.memory_mb = answer["memory_mb"]

    # -- measuring ------------------------------------------------------------------------------------------------

    def _measure(self, batch: list[Work], cells: list[Cell], until: float) -> None:
        for r in range(self.options.rounds):
            for work in batch:
                todo = [c for c in cells if c.work is work]
                # Another order each round: no system always runs just after the same other one.
                shift = r * (len(todo) // max(1, self.options.rounds))
                for cell in todo[shift:] + todo[:shift]:
                    if cell.worker is None:
                        if cell.status not in ("unavailable", "skipped"):
                            self._step(cell.work.name)
                        continue
                    if time.monotonic() > until or self._left() < 0:
                        if not cell.latency:
                            cell.end("skipped", "out of time before its measurement")
                    else:
                        self._round(cell)
                    self._step(f"round {r + 1} {cell.work.name}: {cell.system.label}")
                self._save()

    def _round(self, cell: Cell) -> None:
        worker, options = cell.worker, self.options
        assert worker is not None
        stage = "latency"
        try:
            answer = worker.ask(options.patience, do="latency", seconds=options.seconds)
            if "error" in answer:
                cell.end("failed", f"{stage}: {answer['error']}")
                worker.kill()
                cell.worker = None
                return
            cell.latency.append(answer)
            self._peak(cell, answer)
            for n in options.streams:
                if n > cell.work.max_streams:
                    cell.without[n] = f"at most {cell.work.max_streams} streams for this work"
                if n in cell.without:
                    continue
                stage = f"{n} streams"
                answer = worker.ask(options.patience, do="throughput", streams=n, seconds=options.seconds)
                if "error" in answer:
                    cell.without[n] = answer["error"]
                    continue
                cell.throughput.setdefault(n, []).append(answer)
                self._peak(cell, answer)
        except (Crashed, Hung) as e:
            cell.take(stage, e)

    def _peak(self, cell: Cell, answer: dict[str, Any]) -> None:
        cell.memory_mb = max(cell.memory_mb, answer.get("memory_mb", 0.0))

    # -- results --------------------------------------------------------------------------------------------------

    def _content(self, partial: bool) -> dict[str, Any]:
        from anabranch.bench._report import with_ratios

        options = self.options
        content = {
            "environment": {
                **self.where,
                "load_after": os.getloadavg(),
                "seconds": round(time.monotonic() - self.start, 1),
            },
            "settings": {
                "device": options.device,
                "dtype": options.dtype,
                "streams": list(options.streams),
                "rounds": options.rounds,
                "seconds_a_figure": options.seconds,
                "build_seconds": options.build_seconds,
                "limit_seconds": options.limit or None,
                "works_built_together": options.batch,
                "cores_for_builds": self.cores,
                "torch_threads": options.torch_threads or None,
            },
            "partial": partial,
            "works": {w.name: {"summary": w.summary, "shape": list(w.shape_on(options.device))} for w in self.works},
            "systems": {s.name: {"label": s.label, "family": s.family} for s in self.systems},
            "cells": [c.as_dict() for c in self.cells],
        }
        return with_ratios(_finite(content))

    def _save(self) -> None:
        if self.options.json:
            # In one step, so that a run that is cut off leaves a whole file.
            partial = self.options.json.with_suffix(".partial")
            write_json(partial, self._content(partial=True))
            os.replace(partial, self.options.json)


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("torchvision", "triton", "torch-tensorrt-rtx", "torch_tensorrt", "tensorrt-rtx-cu13", "onnxruntime"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _finite(value: Any) -> Any:
    """Rounded to six significant digits; JSON knows no infinity."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
