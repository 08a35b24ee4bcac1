"""One forked process a schedule: each starts from the same state, and what it breaks dies with it."""

from __future__ import annotations

import gc
import marshal
import mmap
import os
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from anabranch.errors import CannotJudge
from anabranch.explore import _locks, _oracles
from anabranch.explore._actor import child_names, local, plain
from anabranch.explore._conductor import Conductor, Core, Picks
from anabranch.explore._dependence import Step
from anabranch.explore._errors import ExploreError
from anabranch.explore._hostwait import HostWaits
from anabranch.explore._oracles import Result
from anabranch.explore._run import End, Failure, Run
from anabranch.race import Detector

#: Of a run whose result no oracle can compare: no finding, but the end of the exploration.
UNJUDGED = "unjudged"
#: Seconds without a step after which a schedule counts as hung.
PATIENCE = 30.0
_HEADER = struct.Struct("<Q")
_ROOM = 1 << 20


@dataclass(frozen=True)
class Program:
    """What is explored: ``fn(*args)``, what it should return, and how a run is judged."""

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    reference: Result | None = None
    oracles: frozenset[str] = frozenset(_oracles.ORACLES)
    core: Any = None
    max_steps: int = 20_000
    show_output: bool = False


class _Child:
    """A process that runs one schedule. What it writes into ``board`` is there even if it dies."""

    def __init__(self, program: Program, scheduler: Picks, board: mmap.mmap, keep_trace: bool) -> None:
        self.board = board
        _HEADER.pack_into(board, 0, _HEADER.size)
        self.began = time.monotonic()
        self._moved = self.began
        self._position = 0
        self._answer: list[bytes] = []
        sys.stdout.flush()
        sys.stderr.flush()
        self.pipe, out = os.pipe()
        # What the standard library makes anew in a forked child are plain locks, as they were.
        with plain(), child_names():
            self.pid = os.fork()
            if self.pid == 0:
                try:
                    os.close(self.pipe)
                    local.plain = 0
                    _control(program, scheduler, out, board, keep_trace)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(70)
        os.close(out)

    def read(self) -> bool:
        """Take what is in the pipe; True at its end."""
        data = os.read(self.pipe, 1 << 20)
        if data:
            self._answer.append(data)
        return not data

    def hangs(self) -> bool:
        position = _HEADER.unpack_from(self.board)[0]
        now = time.monotonic()
        if position != self._position:
            self._position, self._moved = position, now
        return now - self._moved > PATIENCE

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pipe)

    def finish(self, hung: bool = False) -> Run:
        if hung:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pipe)
        answer = b"".join(self._answer)
        if answer and not hung:
            return _unpack(answer, time.monotonic() - self.began)
        done = _HEADER.unpack_from(self.board)[0]
        actors = bytes(self.board[_HEADER.size : done]).decode().split()
        steps = [Step(actor, "?", []) for actor in actors]
        if hung:
            failure = Failure(
                "hang",
                f"no step for {PATIENCE:.0f} s: a thread computes without end, or blocks on something that the explorer"
                " does not see (a lock made before the exploration, a pipe, another process)",
            )
        elif os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            failure = Failure("crash", f"the process died of signal {number} ({signal.Signals(number).name})")
        else:
            failure = Failure("crash", f"the process ended with status {os.waitstatus_to_exitcode(status)} by itself")
        run = Run(steps, [], "hang" if hung else "crash", failures=[failure], outcome=failure.message)
        run.seconds = time.monotonic() - self.began
        return run


class Runner:
    """Starts processes and waits for them. One thread uses it; it forks, so nothing may hold a lock meanwhile."""

    def __init__(self, program: Program, *, at_once: int = 2) -> None:
        self.program = program
        self._at_once = at_once
        self._boards = [mmap.mmap(-1, _ROOM) for _ in range(at_once)]
        self._running: list[_Child] = []

    def run(self, scheduler: Picks, *, keep_trace: bool = False) -> Run:
        waiting = [scheduler]
        return next(self.run_all(lambda: waiting.pop() if waiting else None, keep_trace=keep_trace))

    def run_all(self, following: Callable[[], Picks | None], *, keep_trace: bool = False) -> Iterator[Run]:
        """A run of each, in their order, two processes at a time; ``following`` gives the next scheduler, or None where
        there is none yet. Over when there is none and nothing runs.
        """
        order: list[_Child] = []
        done: dict[int, Run] = {}
        try:
            while True:
                while len(self._running) < self._at_once and (scheduler := following()) is not None:
                    free = next(b for b in self._boards if all(c.board is not b for c in self._running))
                    child = _Child(self.program, scheduler, free, keep_trace)
                    self._running.append(child)
                    order.append(child)
                if not order:
                    return
                self._collect(done)
                while order and order[0].pid in done:
                    yield done.pop(order.pop(0).pid)
        finally:
            self.close()

    def _collect(self, done: dict[int, Run]) -> None:
        if not self._running:
            return
        ready, _, _ = select.select([child.pipe for child in self._running], [], [], 1.0)
        for child in list(self._running):
            ended, hung = False, False
            if child.pipe in ready:
                ended = child.read()
            elif not ready:
                hung = child.hangs()
            if ended or hung:
                self._running.remove(child)
                done[child.pid] = child.finish(hung)

    def close(self) -> None:
        """Kill what still runs."""
        while self._running:
            self._running.pop().kill()


@contextmanager
def snapshot() -> Iterator[None]:
    """The state that children start from: one thread in PyTorch's pools, nothing left for the collector to move."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Loaded here once, not in every child.
    Detector().finish()
    _oracles.outcome(_oracles.collect(torch.zeros(1), None), [], "")
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


# In the child.


def _control(program: Program, scheduler: Picks, out: int, board: mmap.mmap, keep_trace: bool) -> NoReturn:
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not program.show_output:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        # It need not write to 1: a test's capture has its own.
        sys.stdout = os.fdopen(null, "w", encoding="utf-8")
    core: Core | None = program.core
    returned: list[Any] = []
    position = _HEADER.size

    def progress(actor: str) -> None:
        nonlocal position
        text = actor.encode() + b" "
        if position + len(text) <= _ROOM:
            board[position : position + len(text)] = text
            position += len(text)
            _HEADER.pack_into(board, 0, position)

    def main() -> None:
        returned.append(program.fn(*program.args))
        _locks.end_pools()

    def finish(end: End) -> NoReturn:
        try:
            local.actor = None
            local.plain = 1
            answer = _judge(program, conductor, end, returned, keep_trace)
        except CannotJudge as error:
            failure = Failure(UNJUDGED, str(error))
            answer = _pack(conductor, "complete", [failure], failure.message, b"")
        except BaseException:
            failure = Failure("error", "the run could not be judged:\n" + traceback.format_exc())
            answer = _pack(conductor, "complete", [failure], failure.message, b"")
        view = memoryview(answer)
        while view:
            view = view[os.write(out, view) :]
        sys.stdout.flush()
        os._exit(0)

    conductor = Conductor(scheduler, core=core, max_steps=program.max_steps, finish=finish, progress=progress)
    if program.core is not None:
        program.core.trace(True)
        if "host-wait" in program.oracles:
            conductor.watch = HostWaits(conductor)
    conductor.run(main)


def _judge(program: Program, conductor: Conductor, end: End, returned: list[Any], keep_trace: bool) -> bytes:
    failures = list(conductor.failures)
    core = program.core
    result: Result | None = None
    trace = b""
    if core is not None:
        core.withdraw()
        core.set_hooks(None, None)
    if end == "deadlock" and "deadlock" in program.oracles:
        failures.append(Failure("deadlock", "nothing can go on:\n" + conductor.stuck()))
    # Before anything is fetched, which is no part of the program.
    captures: list[bytes] = []
    if end not in ("cut", "diverged"):
        if core is not None:
            trace, captures = core.take_trace(), core.take_captures()
        else:
            trace = "".join(line + "\n" for line in conductor.lines).encode()
    if end == "complete":
        lost = core.lost() if core is not None else None
        if lost:
            failures.append(Failure("error", f"the device is lost: {lost}"))
        elif returned:
            result = _oracles.collect(returned[0], core)
        elif program.reference is not None and not failures:
            failures.append(Failure("values", "the program ended with sys.exit and returned nothing"))
    if "race" in program.oracles and trace:
        failures += _found(_oracles.race(trace, captures))
    if result is not None:
        if "values" in program.oracles and program.reference is not None:
            failures += _found(_oracles.values(result, program.reference))
        if "poison" in program.oracles:
            failures += _found(_oracles.poison(result, program.reference))
    if "values" not in program.oracles:
        failures = [f for f in failures if f.oracle != "values"]
    digest = "" if end in ("cut", "diverged") else _oracles.outcome(result, failures, end)
    return _pack(conductor, end, failures, digest, trace if keep_trace or failures else b"")


def _found(failure: Failure | None) -> list[Failure]:
    return [] if failure is None else [failure]


def _pack(conductor: Conductor, end: End, failures: list[Failure], digest: str, trace: bytes) -> bytes:
    steps = [(s.actor, s.label, [tuple(t) for t in s.touches], s.timeout) for s in conductor.steps]
    pending = [(s.actor, s.label, [tuple(t) for t in s.touches]) for s in conductor.pending()]
    enabled = [tuple(actors) for actors in conductor.enabled]
    found = [(f.oracle, f.message, f.report) for f in failures]
    return marshal.dumps((end, steps, enabled, pending, found, digest, trace))


def _unpack(answer: bytes, seconds: float) -> Run:
    try:
        end, steps, enabled, pending, found, digest, trace = marshal.loads(answer)
    except (EOFError, ValueError, TypeError) as error:
        raise ExploreError(
            "the process of a schedule ended in the middle of its answer; expected memory for two copies of the"
            " program. Free memory and run it again."
        ) from error
    return Run(
        [Step(*step) for step in steps],
        [frozenset(actors) for actors in enabled],
        end,
        [Step(*step) for step in pending],
        [Failure(*failure) for failure in found],
        digest,
        trace,
        seconds,
    )
