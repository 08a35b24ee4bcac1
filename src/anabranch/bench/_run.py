"""The run: builds side by side, then measures one at a time, all systems of a work in turn, round after round."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from anabranch.bench._cell import Cell, Group
from anabranch.bench._host import free_memory, host_memory
from anabranch.bench._process import Crashed, Hung, Worker
from anabranch.bench._system import BASELINE, System, find_system
from anabranch.bench._work import Work, find_work
from anabranch.check import environment, write_json

#: Seconds that a process gets to stop a build by itself before it is killed; longer if other works would go with it.
_GRACE, _LONG_GRACE = 15.0, 30.0
#: First calls of all threads may take so many times the patience for one measurement.
_WARM = 2.0
#: Seconds in which a process has to create its device's context.
_CONTEXT = 60.0
#: How often what its surroundings ended is tried again: a context that was refused, a build or a measurement that found
#: no memory or that the kernel killed for want of it. A build without an answer is tried again once, as it may be the
#: system's own fault; the baseline's as often as the others.
_TRIES = 4
_OUT_OF_MEMORY = "out of memory"
#: Pauses before another try, in seconds: twice as long each time. The memory of a virtual machine grows meanwhile.
_PAUSE, _LONGEST_PAUSE = 1.0, 16.0
#: Seconds at a run's end that no later pass builds in, so that it can measure.
_LAST = 10.0
#: Hardware queues of each process, for all systems alike, and how many processes may use a GPU at a time with so many.
#: Each queue takes channels of the GPU. An H200 had enough for 15 contexts with 32 queues. The driver refused each
#: further one with "out of memory" (the kernel's log: "Failed to allocate Channel ID"), or hung. With the default of 8,
#: many streams wait for each other without need: 16 threads that each launched one graph of 60 kernels made 47,000
#: calls a second with 8 queues, 61,000 with 32.
_QUEUES = ((32, 14), (16, 26), (8, 48))
#: ``progress(done, of, what)``.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Options:
    """How to run; see ``anabranch bench --help``. Times are in seconds."""

    device: str = "cpu"
    dtype: str = "float32"
    streams: tuple[int, ...] = (1, 4, 16)
    rounds: int = 3
    #: How often a round measures each latency, all systems in turn each time. A figure of a few microseconds moves with
    #: the host's clock from second to second, and this costs little.
    latencies: int = 1
    #: What each figure of each round takes, about.
    seconds: float = 0.2
    #: Outputs of each stream that a throughput's first round checks; None: a few, as the later rounds do.
    checked: int | None = None
    #: How long one system may take to be built for one work; more than that is reported as such.
    build_seconds: float = 300.0
    #: The whole run; what is not measured by then is reported as such. 0: no limit.
    limit: float = 0.0
    #: The part of a limited run's time after which building ends and measuring starts.
    build_share: float = 0.6
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
        self.started = 0
        self.folder = Path()
        self.cores = options.cores or os.cpu_count() or 1
        #: The group whose process creates its context.
        self.starting: Group | None = None
        batches = [works[i : i + options.batch] for i in range(0, len(works), options.batch)]
        self.queues = hardware_queues(max(len(self._groups(batch)) for batch in batches))
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
            self.folder = Path(folder)
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
                self._build([g for g in groups if g.queue], min(close, until))
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

    # -- building -------------------------------------------------------------------------------------------------

    def _build(self, groups: list[Group], close: float) -> None:
        """Build what is queued: systems side by side, as many as there are cores, the works of each in turn."""
        waiting = sorted(groups, key=lambda g: g.system.order)
        running: list[Group] = []
        while waiting or running:
            self._begin(waiting, running, close)
            if not running:
                if waiting:
                    time.sleep(max(0.0, min(g.after for g in waiting) - time.monotonic()))
                continue
            handles: dict[Any, Group] = {}
            for group in running:
                assert group.worker is not None
                handles[group.worker.connection] = handles[group.worker.process.sentinel] = group
            now = time.monotonic()
            until = min([self._end(g, close) for g in running] + [g.after for g in waiting if g.after > now])
            hit = wait(list(handles), max(0.0, until - now) + 0.01)
            answered = {id(handles[h]) for h in hit}
            for group in list(running):
                if id(group) not in answered and time.monotonic() <= self._end(group, close):
                    continue
                if group.stage == "start":
                    self._started(group, close)
                else:
                    self._built(group, close)
                if not self._next(group, close):
                    running.remove(group)
                    if group.queue:
                        waiting.append(group)
        for group in groups:
            if group.worker and not any(c.status == "ok" for c in group.cells):
                # Compilers' helpers would go on with a build that was cut off, while others are measured.
                group.worker.kill()
                group.worker = None

    def _begin(self, waiting: list[Group], running: list[Group], close: float) -> None:
        """Move from ``waiting`` to ``running`` what there are cores for, and drop what has nothing left to build."""
        free = self.cores - sum(g.system.cores for g in running)
        for group in list(waiting):
            if running and free <= 0:
                break
            if self._next(group, close):
                running.append(group)
                free -= group.system.cores
            if group in running or not group.queue:
                waiting.remove(group)

    def _launch(self, group: Group) -> None:
        """Start the group's process and have it create its context. One process at a time does that: of many that
        create theirs at once some are told that there is no memory, although there is."""
        self.starting = group
        group.worker, group.stage = self._start(group.system), "start"
        # Should its process have ended already, the answer that does not come tells.
        with contextlib.suppress(Crashed):
            group.worker.send(do="start")

    def _started(self, group: Group, close: float) -> None:
        """Take the answer to a start. A context that was refused is asked for again later, in a new process."""
        assert group.worker is not None
        self.starting = None
        try:
            why = group.worker.receive(0.0).get("error")
        except Crashed as e:
            why = e.how
        except Hung:
            why = f"no answer in {time.monotonic() - group.worker.since:.0f} s"
        if why is None:
            group.refused = 0
            return
        group.worker.kill()
        group.worker = None
        group.refused += 1
        why = f"context: {why}"
        for cell in group.queue:
            cell.retried.append(f"{why} ({free_memory()})")
        if group.refused > 2 * _TRIES:
            for cell in group.queue:
                cell.end("failed", f"{why}, {group.refused} times")
                self._step(f"{cell.status} {cell.work.name}: {cell.system.label}")
            group.queue = []
        self._pause(group, group.refused, close)

    def _pause(self, group: Group, tries: int, close: float) -> None:
        group.after = min(close, time.monotonic() + min(_LONGEST_PAUSE, _PAUSE * 2 ** (tries - 1)))

    def _again(self, group: Group, cell: Cell, why: str, close: float) -> bool:
        """Queue a cell that its surroundings ended once more, unless that was tried often enough."""
        if not self._more(cell, why):
            return False
        cell.end("waiting", "")
        cell.crash = None
        group.queue.append(cell)
        self._pause(group, cell.tries, close)
        return True

    def _more(self, cell: Cell, why: str) -> bool:
        """Whether a cell that its surroundings ended may be tried again; why it was is noted either way."""
        cell.retried.append(f"{why} ({free_memory()})")
        cell.tries += 1
        return cell.tries <= _TRIES

    def _end(self, group: Group, close: float) -> float:
        """When to give up on a build. Its own process stops it in time, unless it hangs where Python cannot reach."""
        assert group.worker is not None
        if group.stage == "start":
            return min(group.worker.since + _CONTEXT, max(group.worker.since + 5.0, close))
        if group.stage == "warm":
            return min(group.worker.since + _WARM * self.options.patience, close) + self.options.patience
        others = any(c.status == "ok" and c is not group.building for c in group.cells)
        return min(group.worker.since + self.options.build_seconds, close) + (_LONG_GRACE if others else _GRACE)

    def _next(self, group: Group, close: float) -> bool:
        """Have the group start its process, build the next of its cells, or warm it. False: nothing to do, or no time
        for it, or not yet."""
        while group.queue:
            if close - time.monotonic() < 1.0:
                cell = group.queue.pop(0)
                if cell.status == "waiting":
                    cell.late = True
                    cell.end("skipped", "; ".join(["out of time before its build", *cell.retried[-1:]]))
                continue
            if time.monotonic() < group.after or (group.worker is None and self.starting is not None):
                return False
            if group.worker is None:
                self._launch(group)
                return True
            seconds = min(self.options.build_seconds, close - time.monotonic())
            cell = group.queue.pop(0)
            group.building, group.stage = cell, "build"
            try:
                group.worker.send(do="build", work=cell.work.name, streams=max(self._counts(cell)), seconds=seconds)
            except Crashed as e:
                # It had ended since it was last asked.
                group.lost(cell, "build", e)
                if _of_surroundings(cell, e) and self._again(group, cell, cell.reason, close):
                    return False
                continue
            return True
        return self._warm(group, close)

    def _counts(self, cell: Cell) -> list[int]:
        """Numbers of streams that this work is measured with; of them all the smallest, if it takes fewer."""
        found = [n for n in self.options.streams if n <= cell.work.max_streams]
        return found or [cell.work.max_streams]

    def _warm(self, group: Group, close: float) -> bool:
        """Have the threads of the group's next cell make their first calls; False as for :meth:`_next`."""
        seconds = min(_WARM * self.options.patience, (close - time.monotonic()) / max(1, len(group.cold)))
        if group.worker is None or not group.cold or seconds < 1.0:
            group.cold = []
            return False
        cell = group.building = group.cold.pop(0)
        group.stage = "warm"
        # Should its process have ended meanwhile, the answer that does not come tells.
        with contextlib.suppress(Crashed):
            group.worker.send(do="warm", work=cell.work.name, streams=self._counts(cell), seconds=seconds)
        return True

    def _start(self, system: System) -> Worker:
        self.started += 1
        name = f"{system.name}-{self.started}".replace("/", "_").replace(":", "_")
        variables = {
            # A cache of its own: no system's build is quicker for another's having been there.
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / system.name.replace(":", "_")),
            "TRITON_CACHE_DIR": str(self.folder / system.name.replace(":", "_") / "triton"),
            "CUDA_DEVICE_MAX_CONNECTIONS": str(self.queues),
        }
        job = {
            "system": system.name,
            "device": self.options.device,
            "dtype": self.options.dtype,
            "torch_threads": self.options.torch_threads,
            "cores": system.cores,
            "environment": {**variables, **system.environment},
        }
        logs = self.options.logs or self.folder
        logs.mkdir(parents=True, exist_ok=True)
        return Worker(job, logs / f"{name}.log")

    def _built(self, group: Group, close: float) -> None:
        """Take the answer to a build or a warming, or its end."""
        cell, group.building = group.building, None
        assert cell is not None
        assert group.worker is not None
        again = [c for c in group.cells if c.status == "ok" and self._incomplete(c, self.options.rounds)]
        try:
            answer = group.worker.receive(0.0)
            if answer.get("lost"):
                raise group.worker.gone(answer["error"])
        except (Crashed, Hung) as e:
            if group.stage == "warm":
                self._unwarmed(group, cell, again, e.how if isinstance(e, Crashed) else "no answer")
                return
            group.lost(cell, "build", e)
            group.queue = again + group.queue
            once = isinstance(e, Hung) and not cell.tries
            if not ((once or _of_surroundings(cell, e)) and self._again(group, cell, cell.reason, close)):
                self._step(f"{cell.status} {cell.work.name}: {cell.system.label}")
            return
        if group.stage == "warm":
            if "error" in answer:
                self._unwarmed(group, cell, again, answer["error"])
            else:
                cell.held_mb += answer["grew_mb"]
            return
        if "error" not in answer or "build_s" in answer:
            first = cell.status == "waiting"
            cell.end("ok", "")
            if first:
                cell.built = answer
                cell.held_mb = answer["grew_mb"]
            if cell.warm:
                group.cold.append(cell)
        elif answer.get("slow"):
            cell.late = answer["seconds"] < self.options.build_seconds - 1.0
            cell.end("slow", f"not built within {answer['seconds']:.0f} s")
        elif _OUT_OF_MEMORY in answer["error"] and self._again(group, cell, f"build: {answer['error']}", close):
            return  # other builds' peaks pass
        else:
            cell.end("failed", f"build: {answer['error']}")
        self._step(f"{cell.status} {cell.work.name}: {cell.system.label}")

    def _unwarmed(self, group: Group, cell: Cell, again: list[Cell], why: str) -> None:
        """First calls on many threads broke it: in a new process it is measured on few of them before that."""
        assert group.worker is not None
        cell.retried.append(f"first calls: {why}")
        group.worker.kill()
        group.worker, group.cold, cell.warm = None, [], False
        group.queue = again + group.queue

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
            if _of_surroundings(cell, e) and self._more(cell, cell.reason):
                # In a new process, before the next round.
                cell.end("ok", "")
                cell.crash = None

    def _later(self, cell: Cell, why: str) -> bool:
        """Whether a figure for which there was no memory is left to the next round."""
        return _OUT_OF_MEMORY in why and self._more(cell, why)

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


def hardware_queues(processes: int) -> int:
    """Of each of so many processes on one GPU: as many as its channels allow for."""
    return next((queues for queues, most in _QUEUES if processes <= most), _QUEUES[-1][0])


def _of_surroundings(cell: Cell, error: Crashed | Hung) -> bool:
    """Whether what ended a process was not the system: want of memory, or whatever ended the baseline, which is plain
    PyTorch."""
    if cell.system.name == BASELINE:
        return True
    return isinstance(error, Crashed) and (error.how == "SIGKILL" or _OUT_OF_MEMORY in error.how)


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
