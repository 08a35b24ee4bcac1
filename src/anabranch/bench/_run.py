"""The run: builds side by side, then measures one at a time, all systems of a work in turn, round after round."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anabranch.bench._builds import Builds, hardware_queues
from anabranch.bench._cell import OUT_OF_MEMORY, Cell, Group
from anabranch.bench._host import host_memory
from anabranch.bench._options import Options
from anabranch.bench._process import Crashed, Hung, Worker
from anabranch.bench._system import System, find_system
from anabranch.bench._work import Work, find_work
from anabranch.check import environment, write_json

#: Seconds at a run's end that no later pass builds in, so that it can measure.
_LAST = 10.0
#: ``progress(done, of, what)``.
Progress = Callable[[int, int, str], None]


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
        batches = [works[i : i + options.batch] for i in range(0, len(works), options.batch)]
        self.queues = hardware_queues(max(len(self._groups(batch)) for batch in batches))
        self.builds = Builds(
            options, self.cores, self.queues, self._step, lambda cell: self._incomplete(cell, options.rounds)
        )
        self.where = environment(options.device)
        self.where |= {"cores": os.cpu_count(), "load_before": os.getloadavg(), "versions": _versions()}
        total, available = host_memory()
        self.memory = {"before_gb": total, "least_available_gb": available}

    @property
    def figures(self) -> list[str]:
        """What a round measures, in this order."""
        return ["latency"] * self.options.latencies + [*map(str, self.options.streams)]

    def _step(self, what: str, n: int = 1) -> None:
        self.memory["least_available_gb"] = min(self.memory["least_available_gb"], host_memory()[1])
        self.done += n
        total = len(self.cells) * (1 + self.options.rounds * len(self.figures))
        self.report(min(self.done, total), total, what)

    def _left(self) -> float:
        return self.options.limit - (time.monotonic() - self.start) if self.options.limit else float("inf")

    def run(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="anabranch-bench-", ignore_cleanup_errors=True) as folder:
            self.builds.folder = Path(folder)
            for i in range(0, len(self.works), self.options.batch):
                batch = self.works[i : i + self.options.batch]
                batches_left = -(-(len(self.works) - i) // self.options.batch)
                groups = self._groups(batch)
                try:
                    self._batch(groups, time.monotonic() + self._left() / batches_left)
                finally:
                    # All at once: a process with an accelerator takes a second to go.
                    workers = [g.worker for g in groups if g.worker]
                    for worker in workers:
                        worker.process.kill()
                    for worker in workers:
                        worker.kill()
                self._save()
        self._account()
        return self._content(partial=False)

    def _account(self) -> None:
        """See that each cell and each figure that is not there says why."""
        for cell in self.cells:
            last = cell.retried[-1:]
            if cell.status == "waiting":
                cell.end("skipped", "; ".join(["out of time before its build", *last]))
            elif cell.status == "ok" and not cell.latency:
                cell.end("skipped", "; ".join(["out of time before its measurement", *last]))
            if cell.status != "ok":
                continue
            for n in self.options.streams:
                if n > cell.work.max_streams:
                    cell.without.setdefault(n, f"at most {cell.work.max_streams} streams for this work")
                elif not cell.count(str(n)):
                    cell.without.setdefault(n, "; ".join(["out of time before its measurement", *last]))

    def _groups(self, batch: list[Work]) -> list[Group]:
        groups = []
        for system in self.systems:
            cells = [c for c in self.cells if c.work in batch and c.system is system]
            groups += [Group(system, [c]) for c in cells] if system.apart else [Group(system, cells)]
        return groups

    def _batch(self, groups: list[Group], until: float) -> None:
        """Build and measure; then do the same with what was late, while there is time."""
        start = time.monotonic()
        for group in groups:
            missing = group.system.missing(self.options.device)
            for cell in group.cells:
                if missing:
                    cell.end("unavailable", missing)
                    self._step(cell.system.label, 1 + self.options.rounds * len(self.figures))
            group.queue = [c for c in group.cells if c.status == "waiting"]
        self._rounds(groups, start + (until - start) * self.options.build_share, until)
        if time.monotonic() < until - 2 * _LAST:
            for group in groups:
                group.queue = [c for c in group.cells if c.late]
                for cell in group.queue:
                    cell.late = False
                    cell.end("waiting", "")
            self._rounds([g for g in groups if g.queue], until - _LAST, until)

    def _rounds(self, groups: list[Group], close: float, until: float) -> None:
        """Build until ``close``, then measure until ``until``, round after round. What a crash elsewhere took along is
        built again before the next round. Each crash ends one cell for good."""
        for r in range(self.options.rounds):
            # More than once where something was lost.
            while True:
                self.builds.build([g for g in groups if g.queue], min(close, until))
                self._measure(groups, r, until)
                close = until - _LAST
                for group in groups:
                    if group.worker is None and time.monotonic() < close:
                        group.queue = [c for c in group.cells if c.status == "ok" and self._incomplete(c, r + 1)]
                if not any(g.queue for g in groups):
                    break

    def _incomplete(self, cell: Cell, rounds: int) -> bool:
        return any(
            cell.count(f) < rounds * self.figures.count(f)
            for f in set(self.figures)
            if f == "latency" or (int(f) not in cell.without and int(f) <= cell.work.max_streams)
        )

    # -- measuring ------------------------------------------------------------------------------------------------

    def _measure(self, groups: list[Group], r: int, until: float) -> None:
        """One round: figure after figure, each work with all systems in turn."""
        # Another order each round: no system always runs just after the same other one.
        shift = r * (len(groups) // self.options.rounds)
        order = groups[shift:] + groups[:shift]
        for i, figure in enumerate(self.figures):
            done = r * self.figures.count(figure) + self.figures[:i].count(figure)
            # The most streams come last: what crashes there has shown its other figures.
            for work in self.works:
                for group, cell in ((g, c) for g in order for c in g.cells if c.work is work):
                    if group.worker is None or cell.status != "ok" or cell.count(figure) > done:
                        continue
                    if time.monotonic() > until:
                        if not cell.latency:
                            cell.end("skipped", "out of time before its measurement")
                        continue
                    self._one(group, cell, figure)
                    self._step(f"round {r + 1}, {figure}, {work.name}: {cell.system.label}")
            self._save()

    def _one(self, group: Group, cell: Cell, figure: str) -> None:
        """One figure of one cell, once."""
        options, worker = self.options, group.worker
        assert worker is not None
        about = {"work": cell.work.name, "seconds": options.seconds}
        try:
            if figure == "latency":
                answer = self._ask(worker, do="latency", **about)
                if "error" in answer:
                    if not self._later(cell, f"latency: {answer['error']}"):
                        cell.end("failed", f"latency: {answer['error']}")
                    return
                cell.latency.append(answer)
            else:
                n = int(figure)
                if n > cell.work.max_streams:
                    cell.without[n] = f"at most {cell.work.max_streams} streams for this work"
                if n in cell.without:
                    return
                # All in the first round: what comes after it, time permitting, is there to steady the figures.
                checked = None if cell.count(figure) else options.checked
                answer = self._ask(
                    worker, do="throughput", streams=n, patience=options.patience, checked=checked, **about
                )
                if "error" in answer:
                    if not self._later(cell, f"{figure} streams: {answer['error']}"):
                        cell.without[n] = answer["error"]
                    return
                cell.throughput.setdefault(n, []).append(answer)
            cell.held_mb += answer["grew_mb"]
            cell.passing_mb = max(cell.passing_mb, answer["passing_mb"])
        except (Crashed, Hung) as e:
            group.lost(cell, "latency" if figure == "latency" else f"{figure} streams", e)
            if cell.was_surroundings(e) and cell.may_try_again(cell.reason):
                # In a new process, before the next round.
                cell.end("ok", "")
                cell.crash = None

    def _later(self, cell: Cell, why: str) -> bool:
        """Whether a figure for which there was no memory is left to the next round."""
        return OUT_OF_MEMORY in why and cell.may_try_again(why)

    def _ask(self, worker: Worker, **command: Any) -> dict[str, Any]:
        answer = worker.ask(self.options.patience, **command)
        if answer.get("lost"):
            raise worker.gone(answer["error"])
        return answer

    # -- results --------------------------------------------------------------------------------------------------

    def _content(self, partial: bool) -> dict[str, Any]:
        from anabranch.bench._report import with_ratios

        options = self.options
        content = {
            "environment": {
                **self.where,
                "load_after": os.getloadavg(),
                "host_memory": {**self.memory, "after_gb": host_memory()[0]},
                "seconds": round(time.monotonic() - self.start, 1),
            },
            "settings": {
                "device": options.device,
                "dtype": options.dtype,
                "streams": list(options.streams),
                "rounds": options.rounds,
                "latencies_a_round": options.latencies,
                "hardware_queues": self.queues if options.device == "cuda" else None,
                "seconds_a_figure": options.seconds,
                "checked_a_stream": options.checked,
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
    for name in (
        *("torchvision", "triton", "torch-tensorrt-rtx", "torch_tensorrt", "tensorrt", "tensorrt-rtx"),
        *("tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings", "onnx", "onnxscript", "onnxruntime"),
    ):
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
