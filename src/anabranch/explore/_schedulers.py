"""Who goes next. A scheduler is one method, `pick`, over what can happen; the rest says how runs differ."""

from __future__ import annotations

import math
import random as _random
from collections.abc import Mapping, Sequence

from anabranch.explore import _schedule
from anabranch.explore._conductor import Choice
from anabranch.explore._dependence import Step, dependent
from anabranch.explore._errors import ReplayDiverged


class Scheduler:
    """Picks the next of what can run. One object serves one run; :meth:`for_run` makes it."""

    #: Schedules after which it would only repeat itself; None if there is no such number.
    runs: int | None = 1

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def attach(self, steps: list[Step]) -> None:
        """``steps`` grows with the run."""
        self._steps = steps

    def pick(self, choices: Sequence[Choice]) -> Choice | None:
        """One of ``choices`` (host threads in the order of their start, then queues); None ends the run."""
        raise NotImplementedError

    def for_run(self, number: int, length: int) -> Scheduler:
        """The scheduler of run ``number``; ``length`` is the number of steps that run 0 had (0 for run 0 itself)."""
        return self

    def _going(self, choices: Sequence[Choice]) -> Choice:
        """Whoever made the last step, else the first thread, else the first queue."""
        last = self._steps[-1].actor if self._steps else ""
        for choice in choices:
            if choice.actor == last:
                return choice
        return choices[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class fifo(Scheduler):
    """Device work as soon as it can run; threads only when no queue can go on: as if every launch were blocking."""

    def pick(self, choices: Sequence[Choice]) -> Choice | None:
        return self._going([c for c in choices if c.is_device] or choices)


class lazy(Scheduler):
    """Device work only when no thread can go on: everything is queued as far ahead as can be."""

    def pick(self, choices: Sequence[Choice]) -> Choice | None:
        return self._going([c for c in choices if not c.is_device] or choices)


class random(Scheduler):
    """Any of the choices, by weights that each actor draws once a run: from as likely as the others to hundreds of
    times less. With equal weights a queue would hardly ever fall behind by the many steps that a call takes.

    Run n of ``random(seed)`` is run 0 of ``random(seed + n)``.
    """

    runs = None

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._seed = seed
        self._random = _random.Random(seed)
        self._weights: dict[str, float] = {}

    def pick(self, choices: Sequence[Choice]) -> Choice | None:
        for choice in choices:
            if choice.actor not in self._weights:
                self._weights[choice.actor] = math.exp(-self._random.uniform(0, 6))
        return self._random.choices(choices, [self._weights[choice.actor] for choice in choices])[0]

    def for_run(self, number: int, length: int) -> Scheduler:
        return random(self._seed + number)

    def __repr__(self) -> str:
        return f"random({self._seed})"


class pct(Scheduler):
    """Probabilistic concurrency testing: every actor has a random priority and the highest goes on; at ``depth`` - 1
    random steps the one that would go on falls below all others. A bug that needs ``depth`` orderings among n actors
    and k steps shows in a run with probability at least 1 / (n k^(depth - 1)).

    S. Burckhardt, P. Kothari, M. Musuvathi, S. Nagarakatte, *A randomized scheduler with probabilistic guarantees of
    finding bugs*, ASPLOS 2010.
    """

    runs = None

    def __init__(self, seed: int = 0, depth: int = 3, length: int = 0) -> None:
        super().__init__()
        self._seed, self._depth = seed, depth
        self._random = _random.Random(seed)
        self._priority: dict[str, float] = {}
        steps = range(1, max(length, depth) + 1)
        self._falls = dict(zip(self._random.sample(steps, depth - 1), range(depth - 1, 0, -1), strict=True))

    def pick(self, choices: Sequence[Choice]) -> Choice | None:
        for choice in choices:
            # Above all the levels that an actor can fall to.
            self._priority.setdefault(choice.actor, self._depth + self._random.random())
        if (level := self._falls.pop(len(self._steps) + 1, None)) is not None:
            self._priority[self._highest(choices).actor] = level
        return self._highest(choices)

    def _highest(self, choices: Sequence[Choice]) -> Choice:
        return max(choices, key=lambda choice: self._priority[choice.actor])

    def for_run(self, number: int, length: int) -> Scheduler:
        return pct(self._seed + number, self._depth, length or 100)

    def __repr__(self) -> str:
        return f"pct({self._seed}, {self._depth})"


class exhaustive(Scheduler):
    """Stands for the search over all schedules; it is no scheduler of a single run."""

    runs = None


class replay(Scheduler):
    """Exactly the schedule that a string says; when it is used up, as :class:`fifo` goes on."""

    def __init__(self, schedule: str) -> None:
        super().__init__()
        self._schedule = schedule
        self._actors = _schedule.parse(schedule)
        self._rest = fifo()

    def attach(self, steps: list[Step]) -> None:
        super().attach(steps)
        self._rest.attach(steps)

    def pick(self, choices: Sequence[Choice]) -> Choice | None:
        index = len(self._steps)
        if index >= len(self._actors):
            return self._rest.pick(choices)
        for choice in choices:
            if choice.actor == self._actors[index]:
                return choice
        can = ", ".join(f"{choice.actor} ({choice.label})" for choice in choices)
        raise ReplayDiverged(
            f"step {index + 1} of the schedule is one of {self._actors[index]}, which cannot go on there; "
            f"these can: {can}. The schedule is from another program or another version of it: replay it with that one."
        )

    def __repr__(self) -> str:
        return f"replay({self._schedule!r})"


class script(Scheduler):
    """The search's: the actors of ``prefix``, then whoever is awake, the last one for as long as it can.

    ``sleep`` sleeps before the last step of the prefix; a step that depends on a sleeper's wakes it. When all that can
    go on sleep, the run is cut.
    """

    def __init__(self, prefix: Sequence[str], sleep: Mapping[str, Step]) -> None:
        super().__init__()
        self._prefix = prefix
        self._asleep = dict(sleep)
        self._judged = max(len(prefix) - 1, 0)

    def pick(self, choices: Sequence[Choice]) -> Choice | None:
        index = len(self._steps)
        if index < len(self._prefix):
            wanted = self._prefix[index]
            if index == len(self._prefix) - 1:
                self._compare(choices)
            for choice in choices:
                if choice.actor == wanted:
                    return choice
            raise ReplayDiverged(f"step {index + 1} of the script is one of {wanted}, which cannot go on there")
        # Only now is it known what the last step touched.
        while self._asleep and self._judged < index:
            step = self._steps[self._judged]
            self._asleep = {a: other for a, other in self._asleep.items() if not dependent(other, step)}
            self._judged += 1
        awake = [choice for choice in choices if choice.actor not in self._asleep]
        return self._going(awake) if awake else None

    def _compare(self, choices: Sequence[Choice]) -> None:
        """What sleeps was run from this very node: the same step must be pending again."""
        for choice in choices:
            before = self._asleep.get(choice.actor)
            if before is not None and before.label != choice.label:
                raise ReplayDiverged(
                    f"{choice.actor}'s step after {len(self._steps)} others was {before.label!r}, now {choice.label!r}"
                )
