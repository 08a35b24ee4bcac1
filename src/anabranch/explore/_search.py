"""Exhaustive search: one schedule of each Mazurkiewicz trace, depth first, without stored states.

This is *source-DPOR* with sleep sets [1], for threads that block and device queues that need each other.

The tree. A node is a state, reached by the steps before it; its branches are the enabled actors. Each run of the
program gives one path. `backtrack` are the branches that must be tried at a node, `done` those that were.

Sleep sets [3]. When branch p of a node is finished, every schedule that begins with p there was covered. In the later
branches p sleeps: it need not go on until a step that depends on p's has run, because up to there it could as well have
gone first. A run in which every enabled actor sleeps is a repetition and is cut.

Backtrack sets [1, 2]. A run has one order of each conflict in it. For every race (i, j) of it (see
`History.relate`) there must be a run in which j comes before i and all else that need not follow i stays: the state
before i must get a branch that begins v = notdep(i).j. Any actor that can begin v will do (an *initial*); if one is
already among the branches or asleep there, nothing is to be done. Without conflicts between steps that were neighbours
the order cannot matter, so when every race of every run has its reversal, every trace has its run [1, theorem 1].

Why that stays sound with what threads and queues add:

- *Need* edges. A step that cannot be enabled before its giver (a join, a sync, an op and its queueing) can never be
  reversed with it; it is in the pre-clock, as program order is. All else that conflicts can be reversed.
- *Locks.* Let A1 R1 A2 be acquire and release by thread 1, then the acquire by thread 2. R1 and A2 are not co-enabled
  (A2 needs the lock free, R1 has it held), so (R1, A2) is no race; (A1, A2) is one, and so the edge R1 -> A2 may not
  count when it is judged, though R1 orders A2 for everything that comes later: that edge is in `post`, not in `pre`.
  Reversal works: where A1 ran the lock was free; what follows A1 (R1 among it) is not in v, and whoever else takes the
  lock in between follows R1, thus A1, too; so A2 is enabled after the rest of v. With A1 R1 A3 R3 A2, only (A3, A2) is
  a race of A2; the run that reverses it has A1 R1 A2 and then (A1, A2).
- *Deadlock.* A thread that never gets its lock executes no A2 from which a race could be judged. So at the end of a
  run the pending steps of all that are stuck are judged as if they came next. In a run cut by sleep these are the ones
  that are not enabled: its continuations were covered by another branch, but reversing such a race leads out of them
  (the sleeper need not run before the reversed pair does). The enabled ones, all asleep, need no such thing. (A run
  that ends at the limit of steps is treated as stuck; it makes the verdict `bounded` anyway.)
- *Trying.* A try-acquire is always enabled, and its answer depends on releases as well: it writes `try:<lock>`, and so
  does every release.
- *Waiting for an event's flag.* If i was the very step that enabled a waiting j (`set`, then `wait`), j cannot come
  before it: no race. But only the flag decides whether j is enabled, and every change of it conflicts with i, hence is
  not in v; so nothing in v could enable j instead. Earlier writers of the flag (`clear`) are still judged. The same
  holds for taking an item out of a queue (`put`, `get`), where other takers are the ones that disable. If j's actor had
  another step to take first when i ran, it is not known whether i enabled j: then i counts as a race, but as one that
  may be impossible to reverse, and hides no earlier one.
- *Timed waits.* Time passes only when nothing else can happen. Then those whose time is up first are the only
  branches, and all of them are tried. Since a time-out needs everything else to have happened, the same steps come
  before it in every schedule that swaps neighbours: it is a wall that no race crosses.
- *Fairness.* A thread that tried in vain some times in a row is not enabled until somebody else has done something.
  What is not explored is only that it tries in vain even longer.
- *If no initial is enabled* (a touch that was not declared exactly, or unfairness), all enabled actors are branches.

1. P. Abdulla, S. Aronis, B. Jonsson, K. Sagonas, *Optimal dynamic partial order reduction*, POPL 2014.
2. C. Flanagan, P. Godefroid, *Dynamic partial-order reduction for model checking software*, POPL 2005.
3. P. Godefroid, *Partial-order methods for the verification of concurrent systems*, LNCS 1032, 1996.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from anabranch.explore._dependence import History, Step, dependent
from anabranch.explore._errors import NotDeterministic
from anabranch.explore._run import Run

_WHY = (
    "Expected a program that depends on the schedule alone. Remove what else it depends on: time, random numbers,"
    " addresses, the order of a set."
)

Sleep = dict[str, Step]
"""actor -> its next step, which was covered already."""


@dataclass(slots=True)
class _Node:
    enabled: frozenset[str]
    sleep: Sleep
    backtrack: set[str]
    done: Sleep = field(default_factory=dict)


class Search:
    """Walks the tree. ``run(prefix, sleep)`` runs the program: the actors of ``prefix`` first, then whoever is enabled
    and not asleep, ``sleep`` being what sleeps *before the last step* of ``prefix``.

    Use: ``while (script := search.next()) is not None: search.take(run(*script))``. ``finished`` says whether the tree
    was walked to its end.
    """

    def __init__(self) -> None:
        self._history = History()
        self._nodes: list[_Node] = []
        self._script: tuple[list[str], Sleep] | None = ([], {})
        self.runs = 0
        self.cut = 0

    @property
    def finished(self) -> bool:
        return self._script is None

    def next(self) -> tuple[list[str], Sleep] | None:
        """The next script to run; None when the tree is finished."""
        return self._script

    def take(self, run: Run) -> None:
        """Learn from the run of the script that :meth:`next` gave, and choose the next one."""
        assert self._script is not None
        prefix, _ = self._script
        self.runs += 1
        self.cut += run.end == "cut"
        start = max(len(prefix) - 1, 0)
        self._extend(run, start, prefix[-1] if prefix else None)
        if run.end in ("deadlock", "steps", "cut"):
            for pending in run.pending:
                self._judge(pending)
        self._script = self._backtrack()

    def _extend(self, run: Run, start: int, branch: str | None) -> None:
        history, nodes = self._history, self._nodes
        if len(run.steps) < start + (branch is not None):
            raise NotDeterministic(
                f"the program ended after {len(run.steps)} steps where the same schedule went on before. {_WHY}"
            )
        for index in range(start):
            step, before = run.steps[index], history.steps[index]
            if step.label != before.label or run.enabled[index] != history.enabled[index]:
                raise NotDeterministic(
                    f"step {index + 1} of {step.actor} was {before.label!r} and is now {step.label!r}. {_WHY}"
                )
        for index in range(start, len(run.steps)):
            step, enabled = run.steps[index], run.enabled[index]
            if index == start and branch is not None:
                node = nodes[index]
                if enabled != node.enabled or step.actor != branch:
                    raise NotDeterministic(
                        f"before step {index} these could go on: {' '.join(sorted(enabled))};"
                        f" under the same schedule it was {' '.join(sorted(node.enabled))} before. {_WHY}"
                    )
            else:
                node = _Node(enabled, self._sleep_after(index), {step.actor})
                # Out of time, any of those whose time is up may be the first; nothing else could be.
                if step.timeout:
                    node.backtrack |= enabled
                nodes.append(node)
            node.done[step.actor] = step
            relations = history.relate(step)
            for i in relations.races:
                self._reverse(i, step, relations.post)
            history.add(step, enabled, relations)

    def _sleep_after(self, index: int) -> Sleep:
        """What sleeps at the node after step index - 1."""
        if index == 0:
            return {}
        node, step = self._nodes[index - 1], self._history.steps[index - 1]
        asleep = {**node.sleep, **node.done}
        return {actor: other for actor, other in asleep.items() if not dependent(other, step)}

    def _judge(self, pending: Step) -> None:
        relations = self._history.relate(pending)
        for i in relations.races:
            self._reverse(i, pending, relations.post)

    def _reverse(self, i: int, step: Step, post: dict[str, int]) -> None:
        node = self._nodes[i]
        begin = self._history.initials(i, step, post)
        if begin & node.backtrack or begin & node.sleep.keys():
            return
        able = begin & node.enabled
        node.backtrack |= {min(able)} if able else node.enabled

    def _backtrack(self) -> tuple[list[str], Sleep] | None:
        nodes = self._nodes
        while nodes:
            node = nodes[-1]
            rest = node.backtrack - node.done.keys() - node.sleep.keys()
            if rest:
                self._history.truncate(len(nodes) - 1)
                branch = min(rest)
                prefix = [step.actor for step in self._history.steps] + [branch]
                return prefix, {**node.sleep, **node.done}
            nodes.pop()
        return None


class Unreduced:
    """Every schedule, to compare with: each run shows, at each of its nodes beyond its prefix, who else could go on.

    Runs may be under way side by side: :meth:`take` them in the order in which :meth:`next` gave their prefixes.
    """

    def __init__(self) -> None:
        self._waiting: list[list[str]] = [[]]
        self._under_way: list[int] = []
        self.given = 0

    @property
    def finished(self) -> bool:
        return not self._waiting and not self._under_way

    def next(self) -> list[str] | None:
        """A prefix to run; None if there is none, or none yet."""
        if not self._waiting:
            return None
        prefix = self._waiting.pop()
        self._under_way.append(len(prefix))
        self.given += 1
        return prefix

    def take(self, run: Run) -> None:
        actors = list(run.schedule)
        for index in range(self._under_way.pop(0), len(actors)):
            for other in sorted(run.enabled[index] - {actors[index]}):
                self._waiting.append([*actors[:index], other])


def diverged(run: Run) -> NotDeterministic:
    """The error for a run that could not follow its script."""
    return NotDeterministic(f"{run.failures[0].message}. {_WHY}")


def search(run: Callable[[Sequence[str], Sleep], Run], *, limit: int | None = None) -> Search:
    """Walk the whole tree, or ``limit`` runs of it."""
    walk = Search()
    while (limit is None or walk.runs < limit) and (script := walk.next()) is not None:
        walk.take(run(*script))
    return walk
