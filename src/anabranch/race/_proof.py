"""The proof that a plan cannot race with itself: every pair of conflicting accesses is ordered."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from anabranch.errors import PlanError
from anabranch.plan import Access, Edge, Plan, Step

__all__ = ["PlanProof", "Violation", "check_plan"]


@dataclass(frozen=True)
class Violation:
    """Two steps of a plan that touch the same bytes, at least one writing, with no order between them.

    With ``second`` empty, ``first`` reaches outside a buffer instead. ``start`` and ``stop`` are bytes of ``block``.
    """

    first: str
    second: str
    block: str
    start: int
    stop: int
    first_access: str
    second_access: str
    missing: str
    fix: str

    def __str__(self) -> str:
        return f"block `{self.block}`, bytes [{self.start}, {self.stop}): {self.missing}\n  fix: {self.fix}"


@dataclass(frozen=True)
class PlanProof:
    """What :func:`check_plan` found. ``pairs`` is how many conflicting pairs of accesses it checked."""

    plan: str
    pairs: int
    violations: tuple[Violation, ...]

    @property
    def ok(self) -> bool:
        """True when every conflicting pair is ordered and no access reaches outside its buffer."""
        return not self.violations

    def raise_if_unordered(self) -> PlanProof:
        """Return this proof, or raise :class:`~anabranch.errors.PlanError` that lists the violations."""
        if self.ok:
            return self
        raise PlanError(str(self))

    def __str__(self) -> str:
        if self.ok:
            return f"plan {self.plan!r}: {self.pairs} conflicting pairs, all ordered"
        rows = [str(v) for v in self.violations[:20]]
        if len(self.violations) > 20:
            rows.append(f"... and {len(self.violations) - 20} more")
        head = f"plan {self.plan!r}: {len(self.violations)} violations ({self.pairs} conflicting pairs checked)"
        return "\n".join([head, *rows])


@dataclass(frozen=True)
class _Use:
    index: int  # of the step
    start: int  # bytes of the block
    stop: int
    write: bool
    buffer: str
    kind: str


def check_plan(plan: Plan) -> PlanProof:
    """Check that every two steps that touch the same bytes, at least one of them writing, are ordered.

    Order comes from a lane (its steps run in the listed order), from edges, and from what follows from both. The same
    bytes are those of overlapping ranges in one block, whatever the buffers are called: workspaces and temporaries
    count like any other buffer. A step of kind ``view`` does no device work, so it touches nothing. Never raises for
    an unordered plan: :meth:`PlanProof.raise_if_unordered` does.

    Time and memory are quadratic in the steps at worst (a bit a pair of steps, a look a pair of accesses of a block).
    """
    ancestors = _ancestors(plan)
    uses, violations = _uses(plan)
    pairs = 0
    for block, users in uses.items():
        if not any(use.write for use in users):
            continue
        users.sort(key=lambda use: use.start)
        active: list[_Use] = []
        reported: set[tuple[int, int]] = set()
        # A sweep over the bytes: only ranges that overlap meet.
        for use in users:
            active = [other for other in active if other.stop > use.start]
            for other in active:
                if other.index == use.index or not (other.write or use.write):
                    continue
                pairs += 1
                first, second = sorted((other, use), key=lambda u: u.index)
                if ancestors[second.index] >> first.index & 1 or (first.index, second.index) in reported:
                    continue
                reported.add((first.index, second.index))
                violations.append(_unordered(plan, block, first, second))
            active.append(use)
    order = {step.name: i for i, step in enumerate(plan.steps)}
    violations.sort(key=lambda v: (order[v.first], order.get(v.second, -1), v.block, v.start))
    return PlanProof(plan=plan.name, pairs=pairs, violations=tuple(violations))


def _ancestors(plan: Plan) -> list[int]:
    """For each step the set of steps that happen before it, as bits."""
    index = {step.name: i for i, step in enumerate(plan.steps)}
    into: dict[str, list[Edge]] = defaultdict(list)
    for edge in plan.edges:
        into[edge.after].append(edge)
    latest: dict[str, int] = {}
    found: list[int] = []
    for i, step in enumerate(plan.steps):
        before = [index[edge.before] for edge in into[step.name]]
        if step.lane in latest:
            before.append(latest[step.lane])
        bits = 0
        for j in before:
            bits |= found[j] | 1 << j
        found.append(bits)
        latest[step.lane] = i
    return found


def _uses(plan: Plan) -> tuple[dict[str, list[_Use]], list[Violation]]:
    """Every access, by block; and those that reach outside their buffer."""
    buffers = {buffer.name: buffer for buffer in plan.buffers}
    uses: dict[str, list[_Use]] = defaultdict(list)
    outside: list[Violation] = []

    def add(step: Step, index: int, access: Access, write: bool) -> None:
        buffer = buffers[access.buffer]
        stop = buffer.nbytes if access.stop is None else access.stop
        if access.start < 0 or stop > buffer.nbytes or access.start > stop:
            mode = "write" if write else "read"
            outside.append(
                Violation(
                    first=step.name,
                    second="",
                    block=buffer.location,
                    start=buffer.offset + access.start,
                    stop=buffer.offset + stop,
                    first_access=f"{mode} of {buffer.name}",
                    second_access="",
                    missing=f"the {mode} of `{buffer.name}` by step `{step.name}` covers bytes "
                    f"[{access.start}, {stop}) of a buffer of {buffer.nbytes}",
                    fix=f"keep the range within [0, {buffer.nbytes})",
                )
            )
        if access.start < stop:
            uses[buffer.location].append(
                _Use(index, buffer.offset + access.start, buffer.offset + stop, write, buffer.name, buffer.kind)
            )

    for i, step in enumerate(plan.steps):
        if step.kind == "view":
            continue
        for access in step.reads:
            add(step, i, access, False)
        for access in step.writes:
            add(step, i, access, True)
    return uses, outside


def _unordered(plan: Plan, block: str, first: _Use, second: _Use) -> Violation:
    a, b = plan.steps[first.index], plan.steps[second.index]

    def access(use: _Use) -> str:
        return f"{'write' if use.write else 'read'} of {use.kind} `{use.buffer}`"

    return Violation(
        first=a.name,
        second=b.name,
        block=block,
        start=max(first.start, second.start),
        stop=min(first.stop, second.stop),
        first_access=access(first),
        second_access=access(second),
        missing=f"the {access(second)} by step `{b.name}` (lane {b.lane}) is not ordered after the {access(first)} by "
        f"step `{a.name}` (lane {a.lane})",
        fix=f"Edge(before={a.name!r}, after={b.name!r})",
    )
