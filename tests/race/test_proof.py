"""``check_plan``: it counts, it finds what is unordered, and every edge that orders a conflict matters."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from anabranch.errors import AnabranchError, PlanError
from anabranch.plan import Access, Buffer, Edge, Plan, Step
from anabranch.race import check_plan


def _plan(steps: list[Step], edges: list[Edge], buffers: list[Buffer]) -> Plan:
    lanes = tuple(sorted({step.lane for step in steps}))
    return Plan("p", "cuda", "eager", lanes, tuple(buffers), tuple(steps), tuple(edges))


def _step(name: str, lane: str, reads: str = "", writes: str = "", kind: str = "op") -> Step:
    def accesses(names: str) -> tuple[Access, ...]:
        return tuple(Access(n) for n in names.split())

    return Step(name, lane, accesses(reads), accesses(writes), kind=kind)


X, Y, WS = Buffer("x", 16), Buffer("y", 16), Buffer("ws", 64, "workspace")


def test_an_edge_orders() -> None:
    steps = [_step("a", "0", "", "x"), _step("b", "1", "x", "y")]
    assert not check_plan(_plan(steps, [], [X, Y])).ok
    proof = check_plan(_plan(steps, [Edge("a", "b")], [X, Y]))
    assert (proof.ok, proof.pairs) == (True, 1)
    assert proof.raise_if_unordered() is proof


def test_violation_names_steps_bytes_and_the_edge() -> None:
    proof = check_plan(_plan([_step("a", "0", "", "x"), _step("b", "1", "x")], [], [X]))
    (violation,) = proof.violations
    assert (violation.first, violation.second, violation.block) == ("a", "b", "x")
    assert (violation.start, violation.stop) == (0, 16)
    assert violation.fix == "Edge(before='a', after='b')"
    with pytest.raises(PlanError, match=r"step `b` \(lane 1\) is not ordered after the write of temporary `x`"):
        proof.raise_if_unordered()
    assert issubclass(PlanError, AnabranchError)


def test_a_shared_workspace_conflicts_although_no_data_passes() -> None:
    steps = [_step("a", "0", "", "x ws"), _step("b", "1", "", "y ws")]
    (violation,) = check_plan(_plan(steps, [], [X, Y, WS])).violations
    assert "workspace `ws`" in violation.missing


def test_two_names_for_the_same_bytes() -> None:
    arena = [
        Buffer("t", 16, block="arena"),
        Buffer("u", 16, block="arena", offset=8),
        Buffer("v", 8, block="arena", offset=24),
    ]
    steps = [_step("a", "0", "", "t"), _step("b", "1", "", "u"), _step("c", "2", "", "v")]
    proof = check_plan(_plan(steps, [], arena))
    assert [(v.first, v.second, v.start, v.stop) for v in proof.violations] == [("a", "b", 8, 16)]


def test_disjoint_ranges_reads_and_views_do_not_conflict() -> None:
    halves = [
        Step("a", "0", (), (Access("x", 0, 8),)),
        Step("b", "1", (), (Access("x", 8),)),
        Step("c", "1", (), (Access("y", 4, 4),)),
    ]
    assert check_plan(_plan(halves, [], [X, Y])).pairs == 0
    readers = [_step("a", "0", "x"), _step("b", "1", "x")]
    assert check_plan(_plan(readers, [], [X])).ok
    views = [_step("a", "0", "", "x"), _step("v", "1", "x", "y", kind="view")]
    assert check_plan(_plan(views, [], [X, Y])).pairs == 0


def test_order_follows_from_edges_and_lanes_together() -> None:
    steps = [_step("a", "0", "", "x"), _step("b", "1"), _step("c", "1"), _step("d", "2", "x")]
    assert check_plan(_plan(steps, [Edge("a", "b"), Edge("c", "d")], [X])).ok
    assert not check_plan(_plan(steps, [Edge("a", "c"), Edge("b", "d")], [X])).ok


def test_an_access_outside_its_buffer() -> None:
    proof = check_plan(_plan([Step("a", "0", (Access("x", 8, 24),))], [], [X]))
    assert not proof.ok
    assert "covers bytes [8, 24) of a buffer of 16" in str(proof)


def _random_plan(rng: random.Random) -> Plan:
    """Random lanes, accesses and blocks; then every conflicting pair gets an edge unless it is ordered already."""
    lanes = [str(i) for i in range(rng.randrange(2, 5))]
    buffers = []
    for i in range(rng.randrange(2, 7)):
        block = rng.choice(["", "", "arena"])
        kind = rng.choice(("temporary", "workspace", "static", "weight"))
        buffers.append(Buffer(f"b{i}", 16, kind, block, rng.randrange(0, 40, 8) if block else 0))
    steps = []
    for i in range(rng.randrange(3, 14)):

        def some(most: int) -> tuple[Access, ...]:
            chosen = rng.sample(buffers, min(len(buffers), rng.randrange(most)))
            return tuple(Access(b.name, *rng.choice([(0, None), (0, 8), (8, 16)])) for b in chosen)

        steps.append(Step(f"s{i}", rng.choice(lanes), some(3), some(3)))
    plan = Plan("random", "cuda", "eager", tuple(lanes), tuple(buffers), tuple(steps))
    while True:
        violations = check_plan(plan).violations
        if not violations:
            return plan
        v = rng.choice(violations)
        plan = replace(plan, edges=(*plan.edges, Edge(v.first, v.second)))


def _reaches(plan: Plan, a: int, b: int) -> bool:
    """By search, independent of the bit sets."""
    index = {s.name: i for i, s in enumerate(plan.steps)}
    todo, seen = [a], set()
    while todo:
        at = todo.pop()
        if at == b:
            return True
        if at in seen:
            continue
        seen.add(at)
        todo += [index[e.after] for e in plan.edges if index[e.before] == at]
        todo += [j for j in range(at + 1, len(plan.steps)) if plan.steps[j].lane == plan.steps[at].lane]
    return False


def _conflicts(plan: Plan) -> list[tuple[int, int]]:
    buffers = {b.name: b for b in plan.buffers}

    def spans(step: Step) -> list[tuple[str, int, int, bool]]:
        out = []
        for accesses, write in ((step.reads, False), (step.writes, True)):
            for a in accesses:
                b = buffers[a.buffer]
                out.append((b.location, b.offset + a.start, b.offset + (b.nbytes if a.stop is None else a.stop), write))
        return out

    return [
        (i, j)
        for j in range(len(plan.steps))
        for i in range(j)
        for (p, a, b, w) in spans(plan.steps[i])
        for (q, c, d, x) in spans(plan.steps[j])
        if p == q and (w or x) and max(a, c) < min(b, d)
    ]


def test_deleting_each_edge_in_turn() -> None:
    rng = random.Random(11)
    needed = redundant = pairs = 0
    for _ in range(150):
        plan = _random_plan(rng)
        conflicts = _conflicts(plan)
        proof = check_plan(plan)
        assert proof.ok
        assert proof.pairs == len(conflicts)
        pairs += proof.pairs
        if plan.edges and len(plan.steps) > 2:
            # An edge that follows from others, so that redundant ones are tried for sure.
            e = plan.edges[0]
            plan = replace(plan, edges=(*plan.edges, e))
        for i in range(len(plan.edges)):
            cut = replace(plan, edges=plan.edges[:i] + plan.edges[i + 1 :])
            orders_a_conflict = any(not _reaches(cut, a, b) for a, b in conflicts)
            assert check_plan(cut).ok == (not orders_a_conflict)
            needed += orders_a_conflict
            redundant += not orders_a_conflict
    assert needed > 200
    assert redundant > 200
    assert pairs > 1000
