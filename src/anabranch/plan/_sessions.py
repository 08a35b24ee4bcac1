"""Two calls of a model that keeps state, as one plan: what sessions have to order, and what they need not."""

from __future__ import annotations

from dataclasses import replace

from anabranch.plan._plan import Access, Edge, Plan


def two_calls(plan: Plan, same_session: bool) -> Plan:
    """``plan`` twice, on two streams and in two contexts, by one session or by two.

    Calls of one session use the same state, and the second waits for the first. Calls of two sessions have nothing in
    common but the weights, and no order.
    """
    is_common = {b.name: b.kind == "weight" or (b.kind == "state" and same_session) for b in plan.buffers}
    lanes, buffers, steps = [], dict.fromkeys(b for b in plan.buffers if is_common[b.name]), []
    for call in (1, 2):
        prefix = f"call {call}: "

        def named(accesses: tuple[Access, ...], prefix: str = prefix) -> tuple[Access, ...]:
            return tuple(a if is_common[a.buffer] else replace(a, buffer=prefix + a.buffer) for a in accesses)

        lanes += [prefix + lane for lane in plan.lanes]
        for b in plan.buffers:
            if not is_common[b.name]:
                buffers[replace(b, name=prefix + b.name, block=b.block and prefix + b.block)] = None
        steps += [
            replace(s, name=prefix + s.name, lane=prefix + s.lane, reads=named(s.reads), writes=named(s.writes))
            for s in plan.steps
        ]
    count = len(plan.steps)
    edges = [Edge(prefix + e.before, prefix + e.after) for prefix in ("call 1: ", "call 2: ") for e in plan.edges]
    if same_session and count:
        edges.append(Edge(steps[count - 1].name, steps[count].name))
    return replace(
        plan,
        name=f"{plan.name}, called twice by {'one session' if same_session else 'two sessions'}",
        lanes=tuple(lanes),
        buffers=tuple(buffers),
        steps=tuple(steps),
        edges=tuple(edges),
        pieces=(),
    )
