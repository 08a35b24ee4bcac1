"""`explore`: run a program under many schedules and say what that came to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from anabranch import _sync
from anabranch.errors import CannotJudge
from anabranch.explore import _conductor, _locks, _oracles, _program, _schedule
from anabranch.explore import _schedulers as schedulers
from anabranch.explore._device import device
from anabranch.explore._errors import ExploreError, ReplayDiverged
from anabranch.explore._run import Run
from anabranch.explore._runner import UNJUDGED, Program, Runner, snapshot
from anabranch.explore._schedulers import Scheduler
from anabranch.explore._search import Search, Unreduced, diverged
from anabranch.explore._shared import Factories
from anabranch.explore._verdict import Verdict

SCHEDULES = 5000
STEPS = 20_000

Progress = Callable[[int, Run], None]


class _Tally:
    """Counts runs, keeps the first failing one, and tells of progress."""

    def __init__(self, progress: Progress | None, keep_going: bool) -> None:
        self.runs = self.cut = self.failed = self.too_long = self.steps = 0
        self.first: Run | None = None
        self.only: Run | None = None
        self.outcomes: Counter[str] = Counter()
        self._progress = progress
        self._keep_going = keep_going

    def take(self, run: Run) -> bool:
        """True if it ends the exploration."""
        if run.end == "diverged":
            raise ReplayDiverged(run.failures[0].message)
        for failure in run.failures:
            if failure.oracle == UNJUDGED:
                raise CannotJudge(f"the program returned what cannot be compared: {failure.message}")
        self.runs += 1
        self.cut += run.end == "cut"
        self.too_long += run.end == "steps"
        self.steps = max(self.steps, len(run.steps))
        self.only = run if self.runs == 1 else None
        if run.end != "cut":
            self.outcomes[run.outcome] += 1
        if run.failures:
            self.failed += 1
            self.first = self.first or run
        if self._progress is not None:
            self._progress(self.runs, run)
        return bool(run.failures) and not self._keep_going


def explore(
    fn: Callable[..., Any],
    *,
    args: tuple[Any, ...] = (),
    scheduler: Scheduler | str = "exhaustive",
    schedules: int = SCHEDULES,
    oracles: Iterable[str] = _oracles.ORACLES,
    reference: Any = None,
    reduce: bool = True,
    steps: int = STEPS,
    keep_going: bool = False,
    progress: Progress | None = None,
    show_output: bool = False,
) -> Verdict:
    """Run ``fn(*args)`` under many schedules, each in a forked process, until one fails or there are no more.

    ``fn`` may start threads, and queue work on the device ``sim`` once ``anabranch.sim`` is imported; whatever it makes
    itself (locks, tensors) starts from the same state in every schedule. It returns a pytree, compared bit for bit with
    ``reference``: a value, or a function of the same arguments that is called once, here, before any schedule. Without
    one only exceptions count, asserts among them.

    ``scheduler``: ``"exhaustive"`` (with ``reduce=False`` without partial-order reduction) or an object of
    :mod:`anabranch.explore`. ``schedules`` and ``steps`` (of one schedule) are limits; reaching one is never success.
    ``keep_going`` goes on after a failure, to count outcomes. ``progress`` is called after each schedule with the
    number so far and the :class:`Run`.

    Threads: one at a time in a process; it forks. Raises :class:`~anabranch.explore.ReplayDiverged` if a replayed
    schedule does not fit, :class:`~anabranch.explore.NotDeterministic` if the program does something else under the
    same schedule, :class:`~anabranch.explore.ExploreError` for arguments that make no sense.
    """
    if _conductor.active is not None:
        raise ExploreError("explore() was called inside another exploration or a controlled block; call it outside")
    wanted = frozenset(oracles)
    if unknown := wanted - set(_oracles.ORACLES):
        raise ExploreError(f"oracle {', '.join(sorted(unknown))} given; expected some of {', '.join(_oracles.ORACLES)}")
    if schedules < 1 or steps < 1:
        raise ExploreError(f"schedules={schedules}, steps={steps} given; expected 1 or more of each")
    if isinstance(scheduler, str):
        if scheduler != "exhaustive":
            raise ExploreError(
                f"scheduler {scheduler!r} given; expected 'exhaustive' or a scheduler, such as anabranch.sim.random(0)"
            )
        scheduler = schedulers.exhaustive()
    began = time.monotonic()
    tally = _Tally(progress, keep_going)
    core = device()
    with observed():
        expected = None
        if reference is not None:
            expected = _oracles.collect(reference(*args) if callable(reference) else reference, core)
        program = Program(fn, args, expected, wanted, core, steps, show_output)
        with snapshot():
            if isinstance(scheduler, schedulers.exhaustive):
                limit = (_search if reduce else _all)(program, tally, schedules)
            else:
                limit = _sample(program, tally, scheduler, schedules)
    if tally.too_long:
        limit = f"{steps} steps"
    first = tally.first
    schedule = _schedule.write(first.schedule) if first else None
    command = None
    if schedule is not None:
        command = _program.replay_command(
            fn,
            args,
            reference,
            None if wanted == frozenset(_oracles.ORACLES) else wanted,
            None if steps == STEPS else steps,
            schedule,
        )
    return Verdict(
        kind="failed" if first else "bounded" if limit else "exhaustive",
        schedules=tally.runs,
        limit=None if first else limit,
        schedule=schedule,
        failures=tuple(first.failures) if first else (),
        command=command,
        cut=tally.cut,
        failed_schedules=tally.failed,
        steps=tally.steps,
        seconds=time.monotonic() - began,
        outcomes=dict(tally.outcomes),
        run=first or tally.only,
    )


def _search(program: Program, tally: _Tally, schedules: int) -> str | None:
    """Search; says which limit ended it, None if none did."""
    runner = Runner(program, at_once=1)
    search = Search()
    while (script := search.next()) is not None:
        if tally.runs >= schedules:
            return _plural(schedules)
        run = runner.run(schedulers.script(*script))
        if run.end == "diverged":
            raise diverged(run)
        # A process that died left no steps to learn from: nothing can be said about what comes after.
        if tally.take(run) or run.end in ("crash", "hang"):
            return _plural(tally.runs)
        search.take(run)
    return None


def _all(program: Program, tally: _Tally, schedules: int) -> str | None:
    """Every schedule, equivalent or not; says which limit ended it, None if none did."""
    runner = Runner(program)
    walk = Unreduced()

    def following() -> Scheduler | None:
        prefix = walk.next() if walk.given < schedules else None
        return None if prefix is None else schedulers.script(prefix, {})

    for run in runner.run_all(following):
        if run.end == "diverged":
            raise diverged(run)
        if tally.take(run) or run.end in ("crash", "hang"):
            runner.close()
            return _plural(tally.runs)
        walk.take(run)
    return None if walk.finished else _plural(schedules)


def _sample(program: Program, tally: _Tally, scheduler: Scheduler, schedules: int) -> str:
    runs = schedules if scheduler.runs is None else min(schedules, scheduler.runs)
    runner = Runner(program)
    # The first run's length is what the later ones plan with, so it goes alone.
    first = runner.run(scheduler.for_run(0, 0), keep_trace=runs == 1)
    if not tally.take(first):
        numbers = iter(range(1, runs))

        def following() -> Scheduler | None:
            number = next(numbers, None)
            return None if number is None else scheduler.for_run(number, len(first.steps))

        for run in runner.run_all(following):
            if tally.take(run):
                break
        runner.close()
    return _plural(tally.runs)


def _plural(schedules: int) -> str:
    return f"{schedules} schedule{'s' * (schedules != 1)}"


class observed:
    """Context: locks, threads and the runtime's shared state that are made meanwhile are observable."""

    def __enter__(self) -> None:
        self._patched = _locks.patched()
        self._patched.__enter__()
        self._before = _sync._factories
        if not isinstance(self._before, Factories):
            _sync.install(Factories())

    def __exit__(self, *_: object) -> None:
        if _sync._factories is not self._before:
            _sync.install(self._before)
        self._patched.__exit__(None, None, None)
