"""The stream contract's clauses once more, over a model that ``torch.export`` refuses: graph, Python, graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import anabranch
from contract import clauses
from contract.clauses import *  # noqa: F403
from contract.support import assert_changed_flags_queue_nothing, has_memory


class BrokenMlp(torch.nn.Module):
    """As ``contract.support.Mlp``, with a line in the middle that is no graph, and for which no host waits."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.a, self.b = (torch.nn.Linear(width, width) for _ in range(2))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * (width**-0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.a(x)) * 1.5 + 0.25
        if not has_memory(h):
            h = h + 1
        return torch.tanh(self.b(h)) * 2 + h.roll(1, -1)


class BrokenKeeps(torch.nn.Module):
    """As ``contract.support.Keeps``: the second graph writes into the input."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = BrokenMlp()

    def forward(self, kept: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        old = kept * 2
        kept.mul_(0.5).add_(self.mlp(x))
        return kept, old, kept[1:] + x[1:]


_CAPTURED = "a call inside a caller's capture is refused; see below"
#: Clauses that say nothing of fragments, or that count the contexts of a call: one for each graph.
LEFT_OUT = {
    "test_clause1_starts_after_the_callers_queued_work": "it has models of its own; see below",
    "test_clause3_only_the_held_one_waits_for_the_least_recently_used_context": "two contexts are one call's",
    "test_clause3_the_memory_limit_is_kept": "half of what two contexts take may be enough for one of them",
    "test_clause4_what_is_handed_back_is_the_callers": "it has a model of its own",
    "test_clause6_two_user_graphs_replay_beside_direct_calls_after_the_engine_is_gone": _CAPTURED,
    "test_clause6_an_engine_that_goes_inside_a_capture_does_it_no_harm": _CAPTURED,
    "test_clause6_what_a_graph_has_baked_in_is_freed_with_it": _CAPTURED,
    "test_clause6_what_cannot_be_captured_raises": _CAPTURED,
    "test_clause6_random_models_draw_anew_in_a_users_graph": _CAPTURED,
    "test_clause6_replays_write_into_the_callers_input_again": _CAPTURED,
    "test_clause7_the_same_bits_on_every_path_stream_thread_and_context": _CAPTURED,
    "test_clause7_flags_are_frozen_at_compile": "Python between graphs may read any flag; see below",
}

for _name in LEFT_OUT:
    del globals()[_name]


@pytest.fixture(autouse=True)
def in_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()  # sizes that other tests had, which Dynamo would make symbols of
    monkeypatch.setattr(clauses, "Mlp", BrokenMlp)
    monkeypatch.setattr(clauses, "Keeps", BrokenKeeps)


def test_the_model_is_in_two_graphs(rig: clauses.Rig, compiled: Any, backend: str) -> None:
    engine = compiled(BrokenMlp(), rig.random(4, 256), cuda_graphs=True, backend=backend)
    fragments = engine.summary()["fragments"]
    assert [graph["by_operators"] for graph in fragments["graphs"]] == ["", ""]
    assert [s["captured"] for s in engine.summary()["signatures"]] == [True, True]


@clauses.PATHS
def test_clause1_starts_after_the_callers_queued_work_in_fragments(
    rig: clauses.Rig, compiled: Any, graphs: bool
) -> None:
    source = rig.random(4, 256)
    engine = compiled(BrokenMlp(), source, cuda_graphs=graphs)
    rig.load_kernels(engine, source)
    expected = engine(source * 2)
    rig.build_ahead(engine, contexts=2)  # one for each graph
    s = rig.stream()
    x = torch.full_like(source, float("nan"))
    rig.module.synchronize()
    latch = rig.latch(s)
    with rig.module.stream(s):
        x.copy_(source * 2)
        y = engine(x)
        z = y * 1
    latch.open()
    s.synchronize()
    clauses.assert_same(z, expected)


def test_clause6_a_call_inside_a_capture_raises_before_anything_is_queued(rig: clauses.Rig, compiled: Any) -> None:
    x = rig.random(4, 256)
    engine = compiled(BrokenMlp(), x)
    expected = rig.load_kernels(engine, x)
    g = rig.new_graph()
    with rig.capture(g):
        y = x * 2
        with pytest.raises(anabranch.NotCapturable, match="Python runs between the graphs"):
            engine(x)
    g.replay()
    clauses.assert_same(y, x * 2)
    clauses.assert_same(engine(x), expected)


def test_clause7_the_same_bits_on_every_stream_thread_and_context(
    rig: clauses.Rig, compiled: Any, backend: str
) -> None:
    x = rig.random(65, 256)
    graph = compiled(BrokenMlp(), x, cuda_graphs=True, backend=backend)
    direct = compiled(BrokenMlp(), x, cuda_graphs=False, backend=backend)
    expected = rig.load_kernels(graph, x)
    outputs: list[Any] = [None] * 16

    def work(i: int) -> None:
        with rig.module.stream(rig.stream()):
            outputs[i] = [engine(x) for engine in (graph, direct)]

    rig.module.synchronize()
    clauses.on_threads(16, work)
    rig.module.synchronize()
    for y in (y for ys in outputs for y in ys):
        clauses.assert_same(y, expected)


def test_clause7_flags_are_looked_at_before_anything_is_queued(rig: clauses.Rig, compiled: Any) -> None:
    x = rig.random(64, 256)
    rig.fast_matmul(False)
    engine = compiled(BrokenMlp(), x, cuda_graphs=True)
    assert_changed_flags_queue_nothing(rig, engine, x)


__all__ = sorted(name for name in dict(globals()) if name.startswith("test_") or name == "in_fragments")
