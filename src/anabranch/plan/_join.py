"""Plans of the pieces of a call, joined into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from anabranch.plan._plan import Access, Buffer, Plan, PlanPiece, Step
from anabranch.plan._planner import Planned


def join_plans(
    planned: Sequence[tuple[Planned, Sequence[int]]],
    results: Sequence[int],
    inputs: Sequence[tuple[str, str]],
    backend: str,
    notes: Mapping[str, str],
) -> Plan:
    """The plan of a call that runs these one after another, on one lane: the caller's stream.

    ``planned``: of each piece its plan, and which values its inputs are. Values are numbered: first what the call is
    given, ``inputs``, names and kinds of buffers; then the results of each piece in turn. ``results``: which values the
    call's results are.
    """
    buffers: dict[str, Buffer] = {}
    steps: list[Step] = []
    #: The buffers that each value lies in.
    values: list[tuple[Access, ...]] = [(Access(name),) for name, _ in inputs]
    kinds = dict(inputs)
    for k, (piece, takes) in enumerate(planned):
        plan = piece.plan
        names = {f"input {i}": _only(values[v]) for i, v in enumerate(takes)}
        for offset, accesses in enumerate(piece.results):
            v = len(values) + offset
            called = f"output {results.index(v)}" if v in results else f"value {v}"
            for a in accesses:
                names.setdefault(a.buffer, called if len(accesses) == 1 else f"{called} of {a.buffer}")
        for b in plan.buffers:
            # Weights, and the workspace of the caller's stream, are what other pieces use too.
            is_shared = b.kind == "weight" or (b.kind == "workspace" and not plan.captured)
            name = names.setdefault(b.name, b.name if is_shared else f"{k}: {b.name}")
            kind = kinds.get(name, b.kind)
            if name.startswith("value ") and kind == "output":
                kind = "temporary"
            elif name.startswith("output "):
                kind = "output"
            buffers.setdefault(name, replace(b, name=name, kind=kind))
        values += [tuple(replace(a, buffer=names[a.buffer]) for a in accesses) for accesses in piece.results]

        def renamed(accesses: Sequence[Access], names: Mapping[str, str] = names) -> tuple[Access, ...]:
            return tuple(replace(a, buffer=names[a.buffer]) for a in accesses)

        steps += [
            replace(s, name=f"{k}: {s.name}", reads=renamed(s.reads), writes=renamed(s.writes), piece=k)
            for s in plan.steps
        ]
    first = planned[0][0].plan
    pieces = tuple(PlanPiece(p.plan.captured, p.plan.backend, p.plan.reason) for p, _ in planned)
    return Plan(
        name=first.name,
        device=first.device,
        backend=backend,
        lanes=first.lanes,
        buffers=tuple(buffers.values()),
        steps=tuple(steps),
        captured=any(piece.captured for piece in pieces),
        reason=f"in {len(pieces)} pieces",
        notes=dict(notes),
        pieces=pieces,
    )


def _only(accesses: Sequence[Access]) -> str:
    """The one buffer that a value which a piece takes lies in."""
    (access,) = accesses
    return access.buffer
