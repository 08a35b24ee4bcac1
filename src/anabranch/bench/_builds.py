"""The builds of a run: systems side by side in processes of their own, each with another try where it is due."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from anabranch.bench._cell import OUT_OF_MEMORY, TRIES, Cell, Group
from anabranch.bench._host import free_memory
from anabranch.bench._options import Options
from anabranch.bench._process import Crashed, Hung, Worker
from anabranch.bench._system import System

#: Seconds that a process gets to stop a build by itself before it is killed; longer if other works would go with it.
_GRACE, _LONG_GRACE = 15.0, 30.0
#: First calls of all threads may take so many times the patience for one measurement.
_WARM = 2.0
#: Seconds in which a process has to create its device's context.
_CONTEXT = 60.0
#: Pauses before another try, in seconds: twice as long each time. The memory of a virtual machine grows meanwhile.
_PAUSE, _LONGEST_PAUSE = 1.0, 16.0
#: Hardware queues of each process, for all systems alike, and how many processes may use a GPU at a time with so many.
#: Each queue takes channels of the GPU. An H200 had enough for 15 contexts with 32 queues. The driver refused each
#: further one with "out of memory" (the kernel's log: "Failed to allocate Channel ID"), or hung. With the default of 8,
#: many streams wait for each other without need: 16 threads that each launched one graph of 60 kernels made 47,000
#: calls a second with 8 queues, 61,000 with 32.
_QUEUES = ((32, 14), (16, 26), (8, 48))


class Builds:
    """Builds cells, and starts the processes that hold them. ``step`` hears of each that has ended; ``incomplete`` says
    whether one still misses figures; ``folder`` is for what its processes write."""

    def __init__(
        self, options: Options, cores: int, queues: int, step: Callable[[str], None], incomplete: Callable[[Cell], bool]
    ) -> None:
        self.options, self.cores, self.queues, self.step, self.incomplete = options, cores, queues, step, incomplete
        self.folder = Path()
        self.started = 0
        #: The group whose process creates its context.
        self.starting: Group | None = None

    def build(self, groups: list[Group], close: float) -> None:
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
        if group.refused > 2 * TRIES:
            for cell in group.queue:
                cell.end("failed", f"{why}, {group.refused} times")
                self.step(f"{cell.status} {cell.work.name}: {cell.system.label}")
            group.queue = []
        self._pause(group, group.refused, close)

    def _pause(self, group: Group, tries: int, close: float) -> None:
        group.after = min(close, time.monotonic() + min(_LONGEST_PAUSE, _PAUSE * 2 ** (tries - 1)))

    def _again(self, group: Group, cell: Cell, why: str, close: float) -> bool:
        """Queue a cell that its surroundings ended once more, unless that was tried often enough."""
        if not cell.may_try_again(why):
            return False
        cell.end("waiting", "")
        cell.crash = None
        group.queue.append(cell)
        self._pause(group, cell.tries, close)
        return True

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
                if cell.was_surroundings(e) and self._again(group, cell, cell.reason, close):
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
        again = [c for c in group.cells if c.status == "ok" and self.incomplete(c)]
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
            if not ((once or cell.was_surroundings(e)) and self._again(group, cell, cell.reason, close)):
                self.step(f"{cell.status} {cell.work.name}: {cell.system.label}")
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
        elif OUT_OF_MEMORY in answer["error"] and self._again(group, cell, f"build: {answer['error']}", close):
            return  # other builds' peaks pass
        else:
            cell.end("failed", f"build: {answer['error']}")
        self.step(f"{cell.status} {cell.work.name}: {cell.system.label}")

    def _unwarmed(self, group: Group, cell: Cell, again: list[Cell], why: str) -> None:
        """First calls on many threads broke it: in a new process it is measured on few of them before that."""
        assert group.worker is not None
        cell.retried.append(f"first calls: {why}")
        group.worker.kill()
        group.worker, group.cold, cell.warm = None, [], False
        group.queue = again + group.queue


def hardware_queues(processes: int) -> int:
    """Of each of so many processes on one GPU: as many as its channels allow for."""
    return next((queues for queues, most in _QUEUES if processes <= most), _QUEUES[-1][0])
