"""The stream contract's clauses once more, over engines whose kernels are for many sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anabranch
from anabranch import Dim, Input
from contract import clauses
from contract.clauses import *  # noqa: F403
from contract.support import ROUNDING, Fn, Mlp, assert_same, on_threads

#: Clauses that a range makes untrue.
LEFT_OUT = {"test_clause6_what_cannot_be_captured_raises": "a new shape can be captured; see below"}

for _name in LEFT_OUT:
    del globals()[_name]


@pytest.fixture(autouse=True)
def in_ranges(rig: clauses.Rig) -> None:
    rig.defaults["dynamic"] = True


def test_one_specialization_serves_all_sizes(rig: clauses.Rig, compiled: Any, backend: str) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=True, backend=backend)
    served = [signature["signature"] for signature in engine.summary()["signatures"]]
    assert served == ["float32[4, 256]", "float32[*, 256]"]
    for n in (7, 5, 7):
        y = rig.random(n, 256)
        rows = torch.cat([engine(row) for row in y.split(1)])
        assert_same(engine(y), rows, rounding=ROUNDING)
    assert engine.stats().specializations == 2, "and what is of size 1"


def test_no_call_of_a_size_with_its_own_specialization_waits_for_a_context(
    rig: clauses.Rig, compiled: Any, backend: str
) -> None:
    """Size 1 is compiled by itself. Where its context is in use, a call runs direct, and one more is built aside."""
    wanted = Input((Dim("batch", 1, 64), 256), device=rig.random(1).device)
    engine = compiled(Mlp(), wanted, cuda_graphs=True, backend=backend)
    x = rig.random(1, 256)
    expected = rig.load_kernels(engine, x)
    engine._shapes.wait()
    before = engine.stats()
    streams = [rig.stream() for _ in range(before.contexts + 1)]
    for stream in streams:  # memory of each, taken before they are held still
        with rig.module.stream(stream):
            torch.full_like(x, float("nan")).sum()
    rig.module.synchronize()
    # What is built aside would wait for streams that are held still, and calls for what it holds of the driver's.
    held, results = not rig.builds_ahead, []
    if held:
        rig.latch(*streams)
    for stream in streams:
        with rig.module.stream(stream):
            results.append(engine(x))
    after = engine.stats()
    assert after.direct_calls > before.direct_calls or not held
    assert after.waits_for_build == before.waits_for_build
    rig.open_all()
    for y in results:
        assert_same(y, expected, rounding=ROUNDING)
    engine._shapes.wait()
    assert engine.stats().contexts > before.contexts or not held


def test_sizes_that_are_rounded_up_have_graphs_of_the_listed_sizes_only(
    rig: clauses.Rig, compiled: Any, backend: str
) -> None:
    plain = compiled(Mlp(), rig.random(4, 256), backend=backend)
    wanted = Input((Dim("batch", 2, 32, pad_to=[8, 32]), 256), device=rig.random(1).device)
    engine = compiled(Mlp(), wanted, cuda_graphs=True, backend=backend)
    sources = [rig.random(n, 256) for n in (3, 5, 8, 17, 31, 32)]
    expected = [rig.load_kernels(plain, x) for x in sources]

    def work(i: int) -> None:
        with rig.module.stream(rig.stream()):
            for k in range(12):
                x, right = sources[(i + k) % 6], expected[(i + k) % 6]
                given = torch.full_like(x, float("nan"))
                given.copy_(x)
                y = engine(given)
                given.fill_(float("nan"))
                kept = y.clone()
                y.fill_(float("nan"))
                assert_same(kept, right, rounding=ROUNDING)

    on_threads(4, work)
    engine._shapes.wait()
    captured = {made.signature.given[0].shape[0] for made in engine._table if not made.is_range}
    assert captured == {8, 32}
    assert engine.stats().specializations == 1
    engine(sources[0])  # a context that no other stream waits for may have to be built first, aside
    engine._shapes.wait()
    before = engine.stats().graph_calls
    assert_same(engine(sources[1]), expected[1], rounding=ROUNDING)
    assert engine.stats().graph_calls == before + 1


def test_clause6_a_new_shape_can_be_captured_and_what_depends_on_data_cannot(rig: clauses.Rig, compiled: Any) -> None:
    x, other = rig.random(4, 256), rig.random(5, 256)
    engine, data = compiled(Mlp(), x), compiled(Fn(lambda x: x[x > 0]), x)
    expected = rig.load_kernels(engine, other)
    graph = rig.new_graph()
    with rig.capture(graph):
        with pytest.raises(anabranch.NotCapturable, match=r"nonzero|data-dependent"):
            data(x)
        y = engine(other)
    other.mul_(0.5)
    graph.replay()
    rig.module.synchronize()
    assert_same(y, engine(other))
    other.mul_(2)
    graph.replay()
    rig.module.synchronize()
    assert_same(y, expected)


__all__ = sorted(name for name in dict(globals()) if name.startswith("test_") or name == "in_ranges")
