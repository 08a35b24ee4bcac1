"""Which steps depend on each other, and which of those pairs could have come in the other order.

A step carries *touches*: ``(key, lo, hi, mode)``. Two touches meet if their keys are equal and their ranges overlap;
what two modes mean when they meet is the table below. Two steps of different actors are

- in **conflict** if some touches of theirs conflict: either order is possible where both are enabled, and the results
  may differ;
- **ordered only** if none conflict but some are ordered: they do not commute, but they are never enabled side by side
  (a lock's release and its next acquire), or one cannot come before the other (an op's step and its queueing);
- **independent** otherwise: swapping them where they are neighbours gives the same state.

The equivalence classes of schedules under such swaps are Mazurkiewicz's traces; the search runs one schedule of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Touch = tuple[str, int, int, int]

READ, WRITE, ADD, GIVE, NEED, ACQUIRE, RELEASE, HOST_ASYNC, HOST, AWAIT = range(10)
MODES = ("read", "write", "add", "give", "need", "acquire", "release", "host-async", "host", "await")

ORDER, ENABLES, CONFLICT = 1, 2, 3
"""What two touches are to each other. ENABLES is a conflict that is no race when the earlier step enabled the later
one (an event's ``set`` and the ``wait`` that it woke)."""

_RELATIONS = {
    (READ, WRITE): CONFLICT,
    (WRITE, WRITE): CONFLICT,
    (ADD, READ): CONFLICT,
    (ADD, WRITE): CONFLICT,
    (ACQUIRE, ACQUIRE): CONFLICT,
    (AWAIT, WRITE): ENABLES,
    (HOST_ASYNC, HOST): CONFLICT,
    # Two copies may use one pinned buffer.
    (HOST_ASYNC, HOST_ASYNC): CONFLICT,
    (GIVE, NEED): ORDER,
    (RELEASE, ACQUIRE): ORDER,
}


def _table() -> list[list[int]]:
    table = [[0] * len(MODES) for _ in MODES]
    for (a, b), relation in _RELATIONS.items():
        table[a][b] = table[b][a] = relation
    return table


_TABLE = _table()


def is_thread(actor: str) -> bool:
    """Host threads are ``T0``, ``T0.1``, ...; every other actor is a queue of the device."""
    return actor.startswith("T")


@dataclass(slots=True)
class Step:
    """One step of a schedule: who, what, which touches; ``timeout`` if a timed wait gave up here."""

    actor: str
    label: str
    touches: Sequence[Touch]
    timeout: bool = False


def dependent(a: Step, b: Step) -> bool:
    """Whether two steps of different actors do not commute. Steps of one actor, and time-outs, always depend."""
    if a.actor == b.actor or a.timeout or b.timeout:
        return True
    a_host, b_host = is_thread(a.actor), is_thread(b.actor)
    for key, lo, hi, mode in a.touches:
        if mode == HOST_ASYNC and b_host:
            return True
        row = _TABLE[mode]
        for other, lo2, hi2, mode2 in b.touches:
            if key == other and row[mode2] and lo < hi2 and lo2 < hi:
                return True
    return a_host and any(touch[3] == HOST_ASYNC for touch in b.touches)


Clock = dict[str, int]
"""actor -> index of its last step that happens before (or is) this one."""


@dataclass(slots=True)
class Relations:
    """A step that is about to be added: what it must come after whatever the order (``pre``), what it comes after in
    this schedule (``post``), and the steps that it could have preceded (``races``, latest first)."""

    pre: Clock
    post: Clock
    races: list[int]


@dataclass
class History:
    """The steps of one schedule with their vector clocks, indexed by key.

    ``enabled[i]`` are the actors that could have gone on before step i.
    """

    steps: list[Step] = field(default_factory=list)
    clocks: list[Clock] = field(default_factory=list)
    enabled: list[frozenset[str]] = field(default_factory=list)
    _by_actor: dict[str, list[int]] = field(default_factory=dict)
    _by_key: dict[str, list[tuple[int, int, int, int]]] = field(default_factory=dict)
    _asynchronous: list[int] = field(default_factory=list)
    _timeouts: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)

    def truncate(self, length: int) -> None:
        """Forget the steps from ``length`` on."""
        while len(self.steps) > length:
            step = self.steps.pop()
            self.clocks.pop()
            self.enabled.pop()
            self._by_actor[step.actor].pop()
            index = len(self.steps)
            for key in {touch[0] for touch in step.touches}:
                entries = self._by_key[key]
                while entries and entries[-1][0] == index:
                    entries.pop()
            if self._asynchronous and self._asynchronous[-1] == index:
                self._asynchronous.pop()
            if self._timeouts and self._timeouts[-1] == index:
                self._timeouts.pop()

    def add(self, step: Step, enabled: Iterable[str], relations: Relations) -> None:
        index = len(self.steps)
        self.steps.append(step)
        self.enabled.append(frozenset(enabled))
        relations.post[step.actor] = index
        self.clocks.append(relations.post)
        self._by_actor.setdefault(step.actor, []).append(index)
        for key, lo, hi, mode in step.touches:
            self._by_key.setdefault(key, []).append((index, lo, hi, mode))
            if mode == HOST_ASYNC and (not self._asynchronous or self._asynchronous[-1] != index):
                self._asynchronous.append(index)
        if step.timeout:
            self._timeouts.append(index)

    def relate(self, step: Step) -> Relations:
        """What ``step`` would be to the steps so far, if it came next.

        A race of step j is a step i of another actor that conflicts with j, that need not come before j (it is not in
        ``pre``: program order and the givers of what j needs, with all that these come after), and that is not merely
        ordered before j *through* a later such i'. The relation of ``post`` also has j's own conflicts and the release
        that freed the lock it takes; those are the orders that another schedule may reverse, so races are not judged
        by them.
        """
        actor = step.actor
        own = self._by_actor.get(actor)
        pre = dict(self.clocks[own[-1]]) if own else {}
        if self._timeouts:
            _join(pre, self.clocks[self._timeouts[-1]])
        found: dict[int, int] = {}
        for key, lo, hi, mode in step.touches:
            if mode == HOST_ASYNC:
                for other, indices in self._by_actor.items():
                    if is_thread(other):
                        found.update(dict.fromkeys(indices, CONFLICT))
            entries = self._by_key.get(key)
            if not entries:
                continue
            row = _TABLE[mode]
            for i, lo2, hi2, mode2 in reversed(entries):
                relation = row[mode2]
                if not relation or lo >= hi2 or lo2 >= hi or self.steps[i].actor == actor:
                    continue
                if mode == NEED:
                    _join(pre, self.clocks[i])
                else:
                    found[i] = max(relation, found.get(i, 0))
        if is_thread(actor):
            found.update(dict.fromkeys(self._asynchronous, CONFLICT))
        post = dict(pre)
        if step.timeout:
            # A time-out waits until nothing else can happen: it is a wall between what is before and after it.
            for indices in self._by_actor.values():
                if indices:
                    _join(post, self.clocks[indices[-1]])
            return Relations(post, dict(post), [])
        races: list[int] = []
        reversible: list[int] = []
        for i in sorted(found, reverse=True):
            other = self.steps[i].actor
            relation = found[i]
            if (
                relation != ORDER
                and i > pre.get(other, -1)
                and not any(self.before(i, c) for c in reversible)
                and not (relation == ENABLES and self._enabled_by(i, actor))
            ):
                races.append(i)
                # Whether a step that may have enabled this one can be reversed with it is not known when its actor had
                # something else to do at the time: what lies behind such a step must be judged by itself.
                if relation == CONFLICT:
                    reversible.append(i)
            if i > post.get(other, -1):
                _join(post, self.clocks[i])
        return Relations(pre, post, races)

    def before(self, i: int, j: int) -> bool:
        """Whether step i happens before step j (both in the history)."""
        return i <= self.clocks[j].get(self.steps[i].actor, -1)

    def initials(self, i: int, step: Step, post: Clock) -> set[str]:
        """Who can begin ``notdep(i).step``: the steps after i that do not happen after it, then ``step``.

        These are the actors whose first step there has no predecessor there: running any of them in place of step i
        leads to where ``step`` comes before step i.
        """
        first: dict[str, int] = {}
        begin: set[str] = set()
        actor = self.steps[i].actor

        def follows(clock: Clock, own: str) -> bool:
            return any(other != own and clock.get(other, -1) >= k for other, k in first.items())

        for k in range(i + 1, len(self.steps)):
            clock, other = self.clocks[k], self.steps[k].actor
            if other in first or clock.get(actor, -1) >= i:
                continue
            if not follows(clock, other):
                begin.add(other)
            first[other] = k
        if step.actor not in first and not follows(post, step.actor):
            begin.add(step.actor)
        return begin

    def _enabled_by(self, i: int, actor: str) -> bool:
        """Whether the pending step of ``actor`` was its pending one at i too, and disabled there."""
        own = self._by_actor.get(actor)
        return (not own or own[-1] < i) and actor not in self.enabled[i]


def _join(clock: Clock, other: Clock) -> None:
    for actor, index in other.items():
        if index > clock.get(actor, -1):
            clock[actor] = index
