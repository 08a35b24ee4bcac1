"""The conductor: of all threads and device queues of a process, one makes a step at a time, and a scheduler says which.

An enrolled thread runs until it is about to do something that another could notice. There it calls
:meth:`Conductor.point`, which notes what it is going to do, asks the scheduler for the next actor, and comes back when
it is this thread's turn. Device queues are no threads: whoever is in `point` runs their head op itself.

Threads: only the one that holds the baton runs; the others stand in `point`, each blocked on a lock of its own. So
nothing here needs a lock, and two runs under one schedule are equal.
"""

from __future__ import annotations

import threading
from _thread import allocate_lock
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from anabranch._exit import INTERRUPTED, NOT_JUDGED, give_up
from anabranch.explore._actor import Actor, local, plain
from anabranch.explore._dependence import GIVE, NEED, WRITE, Step, Touch
from anabranch.explore._errors import ExploreError, ReplayDiverged
from anabranch.explore._run import End, Failure

#: Steps in vain after which a thread is not enabled until somebody else has done something.
PATIENCE = 3
#: Time-outs of one thread at one place after which a run counts as stuck.
TIMEOUTS = 16
_CHILDREN = 10_000
#: Steps that change nothing when they fail, so that a thread may make them in a loop.
_IDLE_KINDS = frozenset({"query", "try", "poll", "sleep"})


class Core(Protocol):
    """What the conductor needs of the simulated device (`anabranch.sim`)."""

    def enroll(self, name: str, index: int) -> None: ...
    def withdraw(self) -> None: ...
    def set_hooks(self, point: Any, amend: Any) -> None: ...
    def heads(self) -> list[tuple[str, bool, str, list[Touch]]]: ...
    def step(self, actor: str) -> None: ...
    def all_done(self, needs: list[str]) -> bool: ...
    def emit(self, line: str) -> None: ...


class Choice:
    """Something that can happen next: ``actor`` takes the step that ``label`` and ``touches`` describe."""

    __slots__ = ("actor", "is_device", "label", "touches")

    def __init__(self, actor: str, label: str, touches: Sequence[Touch], is_device: bool) -> None:
        self.actor = actor
        self.label = label
        self.touches = touches
        self.is_device = is_device


class Picks(Protocol):
    def attach(self, steps: list[Step]) -> None: ...
    def pick(self, choices: Sequence[Choice]) -> Choice | None: ...


#: The conductor of this process, while there is one.
active: Conductor | None = None


class Conductor:
    """Runs one schedule in this process. ``finish(end)`` is called when it is over and must not return."""

    def __init__(
        self,
        scheduler: Picks,
        *,
        core: Core | None = None,
        max_steps: int = 20_000,
        finish: Callable[[End], NoReturn],
        progress: Callable[[str], None] | None = None,
        in_process: bool = False,
    ) -> None:
        self.steps: list[Step] = []
        self.enabled: list[frozenset[str]] = []
        self.failures: list[Failure] = []
        self.lines: list[str] = []
        self.now = 0.0
        #: Called with kind and label when a thread is about to sync or query the device.
        self.watch: Callable[[str, str], None] | None = None
        self._scheduler = scheduler
        self._core = core
        self._max_steps = max_steps
        self._finish = finish
        self._in_process = in_process
        #: Why T0 must give up; only where the process goes on afterwards.
        self.broken: str | None = None
        self._progress = progress
        self._actors: list[Actor] = []
        self._vain: dict[str, int] = {}
        self._timeouts: dict[tuple[str, str], int] = {}
        self._dying: threading.Thread | None = None
        self._signalled: set[str] = set()
        self._cut: frozenset[str] = frozenset()
        scheduler.attach(self.steps)

    # What threads call.

    def run(self, main: Callable[[], None]) -> NoReturn:
        """Run ``main`` as thread T0 to the end of the schedule."""
        me = self.enter()
        try:
            main()
        except BaseException as error:
            self.raised(me, error)
        self.end(me)
        # Whichever thread ends the schedule ends the process.
        never = allocate_lock()
        never.acquire()
        while True:
            never.acquire()

    def enter(self) -> Actor:
        """Control the calling thread from now on, as T0."""
        global active
        active = self
        me = Actor("T0", 0, threading.current_thread(), "begin", [])
        self._actors.append(me)
        if self._core is not None:
            self._core.set_hooks(self.core_point, self.amend)
        self._enroll(me)
        return me

    def wait_for_all(self) -> None:
        """T0 waits until all other threads have ended; daemons are left where they are."""
        others = self._actors[1:]
        self.point("join", "wait for all threads", [], ready=lambda: all(a.ended or a.daemon for a in others))

    def leave(self) -> None:
        """Control nobody any more."""
        global active
        active = None
        if self._core is not None:
            self._core.withdraw()
            self._core.set_hooks(None, None)

    def wake_main(self) -> None:
        self._actors[0].baton.release()

    def core_point(self, kind: str, label: str, touches: list[Touch], needs: list[str]) -> None:
        """What the device calls before an enrolled thread does something observable to it."""
        core = self._core
        assert core is not None
        if self.watch is not None and kind in ("sync", "query"):
            self.watch(kind, label)
        try:
            self.point(kind, label, touches, ready=(lambda: core.all_done(needs)) if needs else None)
        except (ExploreError, KeyboardInterrupt) as e:
            if not self._in_process:
                raise
            # Nothing can be raised through the device that called this, and nothing can go on without it.
            interrupted = isinstance(e, KeyboardInterrupt)
            give_up("anabranch", "interrupted" if interrupted else str(e), INTERRUPTED if interrupted else NOT_JUDGED)

    def point(
        self,
        kind: str,
        label: str,
        touches: list[Touch],
        *,
        ready: Callable[[], bool] | None = None,
        timeout: float | None = None,
        why: Callable[[], str] | None = None,
    ) -> bool:
        """The calling thread is about to take this step; returns when it is its turn, False if its time was up."""
        me = local.actor
        assert me is not None
        me.kind, me.label, me.touches, me.ready, me.why = kind, label, touches, ready, why
        me.deadline = None if timeout is None else self.now + max(timeout, 0.0)
        me.timed_out = False
        following = self._decide()
        if following is not me:
            following.baton.release()
            me.baton.acquire()
            if self._dying is not None:
                self._reap()
            if self.broken is not None:
                raise ExploreError(self.broken)
        return not me.timed_out

    def amend(self, touches: Sequence[Touch]) -> None:
        """The step that was just begun touches these, too."""
        if self.steps:
            step = self.steps[-1]
            step.touches = [*step.touches, *touches]

    def start(self, thread: threading.Thread, start: Callable[[], None]) -> None:
        """Start ``thread`` (by ``start``, which returns once it runs) as a controlled child of the calling one."""
        me = local.actor
        assert me is not None
        name, me.children = f"{me.name}.{me.children + 1}", me.children + 1
        self.point("start", f"start {name}", [(f"t{name}", 0, 1, GIVE)])
        # The index names what the thread makes: from its name, not from when it was started.
        index = me.index * _CHILDREN + me.children
        actor = Actor(name, index, thread, "begin", [(f"t{name}", 0, 1, NEED)])
        thread._anabranch_actor = actor  # type: ignore[attr-defined]
        body = thread.run

        def run() -> None:
            actor.baton.acquire()
            if self._dying is not None:
                self._reap()
            self._enroll(actor)
            try:
                body()
            except BaseException as error:
                self.raised(actor, error)
            self.end(actor)

        thread.run = run  # type: ignore[method-assign]
        if self._in_process:
            # If the schedule cannot be finished, the interpreter must not wait for it at its exit.
            thread.daemon = True
        self.emit(f'{{"do":"start","of":"{name}","thread":"{me.name}"}}')
        with plain():
            start()
        self._actors.append(actor)

    def end(self, me: Actor) -> None:
        """The calling thread has nothing more to do."""
        self.point("end", "end", [(f"j{me.name}", 0, 1, GIVE), (f"alive:{me.name}", 0, 1, WRITE)])
        me.ended = True
        if self._core is not None:
            self._core.withdraw()
        local.actor = None
        following = self._decide()
        # The next one waits for this thread to be gone: what it still holds dies before anything else happens.
        if me.name != "T0":
            self._dying = me.thread
        following.baton.release()

    def raised(self, me: Actor, error: BaseException) -> None:
        """An exception left the function of thread ``me``."""
        if isinstance(error, SystemExit) and not error.code:
            return
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        if traceback is not None:
            message += f" (thread {me.name}, {traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno})"
        if self._in_process and me.name != "T0":
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, me.thread)))
        oracle = "values" if isinstance(error, AssertionError) else "error"
        self.failures.append(Failure(oracle, message))

    def signal(self, name: str) -> None:
        """What the calling thread did is seen by whoever calls :meth:`awaited` from now on."""
        self._signalled.add(name)
        self.emit(f'{{"do":"signal","on":"{name}","thread":"{local.actor.name if local.actor else "T0"}"}}')

    def awaited(self, name: str) -> None:
        if name in self._signalled:
            self.emit(f'{{"do":"await","on":"{name}","thread":"{local.actor.name if local.actor else "T0"}"}}')

    def thread_named(self, ident: int) -> str | None:
        """The controlled thread with this `threading.get_ident()`: the number itself may be given again."""
        named = [a for a in self._actors if a.thread.ident == ident]
        return next((a.name for a in named if not a.ended), named[-1].name if named else None)

    def emit(self, line: str) -> None:
        """One event of the trace."""
        if self._core is not None:
            self._core.emit(line)
        else:
            self.lines.append(line)

    def elapse(self, seconds: float) -> None:
        self.now += seconds

    # Deciding.

    def pending(self) -> list[Step]:
        """The steps that were not taken: of threads, then of queues; after a cut only those that are not enabled."""
        left = [Step(a.name, a.label, a.touches) for a in self._actors if not a.ended]
        if self._core is not None:
            left += [Step(actor, label, touches) for actor, _, label, touches in self._core.heads()]
        return [step for step in left if step.actor not in self._cut]

    def stuck(self) -> str:
        """Who waits for what, one line each."""
        lines = []
        for actor in self._actors:
            if not actor.ended:
                why = f" ({actor.why()})" if actor.why else ""
                lines.append(f"{actor.name} waits at: {actor.label}{why}")
        if self._core is not None:
            lines += [f"{actor} waits at: {label}" for actor, _, label, _ in self._core.heads()]
        return "\n".join(lines)

    def _decide(self) -> Actor:
        """Run device steps until the turn is a thread's, and say whose."""
        while True:
            choices, threads, timeout = self._choices()
            if not choices:
                self._finish("deadlock" if self._unfinished() else "complete")
            if len(self.steps) >= self._max_steps:
                self._finish("steps")
            try:
                choice = self._scheduler.pick(choices)
            except ReplayDiverged as error:
                # Not raised here: it would go through the program, which might catch it.
                self.failures = [Failure("replay", str(error))]
                self._finish("diverged")
            if choice is None:
                self._cut = frozenset([c.actor for c in choices])
                self._finish("cut")
            self.steps.append(Step(choice.actor, choice.label, choice.touches, timeout))
            self.enabled.append(frozenset([c.actor for c in choices]))
            if self._progress is not None:
                self._progress(choice.actor)
            if choice.is_device:
                self._vain.clear()
                assert self._core is not None
                self._core.step(choice.actor)
                continue
            actor = threads[choice.actor]
            if timeout:
                self._time_out(actor)
            if actor.kind in _IDLE_KINDS:
                self._vain[actor.name] = self._vain.get(actor.name, 0) + 1
            else:
                self._vain.clear()
            return actor

    def _choices(self) -> tuple[list[Choice], dict[str, Actor], bool]:
        able = [a for a in self._actors if not a.ended and (a.ready is None or a.ready())]
        heads = self._core.heads() if self._core is not None else []
        queues = [Choice(actor, label, touches, True) for actor, enabled, label, touches in heads if enabled]
        if not heads and all(a.ended or a.daemon for a in self._actors):
            return [], {}, False
        # Whoever tried in vain a while makes room, unless nobody else is there to change anything.
        if self._vain:
            fair = [a for a in able if a.kind not in _IDLE_KINDS or self._vain.get(a.name, 0) < PATIENCE]
            if fair or queues:
                able = fair
        timeout = False
        if not able and not queues:
            timed = [a for a in self._actors if not a.ended and a.deadline is not None]
            if timed:
                first = min(a.deadline for a in timed if a.deadline is not None)
                able = [a for a in timed if a.deadline == first]
                timeout = True
        choices = (
            [Choice(a.name, f"{a.label} times out", [], False) for a in able]
            if timeout
            else [Choice(a.name, a.label, a.touches, False) for a in able]
        )
        return choices + queues, {a.name: a for a in able}, timeout

    def _time_out(self, actor: Actor) -> None:
        actor.timed_out = True
        assert actor.deadline is not None
        self.now = max(self.now, actor.deadline)
        place = (actor.name, actor.label)
        self._timeouts[place] = self._timeouts.get(place, 0) + 1
        if self._timeouts[place] > TIMEOUTS:
            self._finish("deadlock")

    def _unfinished(self) -> bool:
        return any(not a.ended and not a.daemon for a in self._actors) or (
            self._core is not None and bool(self._core.heads())
        )

    def _enroll(self, actor: Actor) -> None:
        local.actor = actor
        if self._core is not None:
            self._core.enroll(actor.name, actor.index)

    def _reap(self) -> None:
        dying, self._dying = self._dying, None
        if dying is not None:
            with plain():
                _join(dying)


_join = threading.Thread.join
