"""Calls of several pieces on the simulated device: captured, direct, captured. Results and draws are eager's."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import anabranch
from anabranch._judge import differences
from anabranch.plan import Plan
from anabranch.race import check_plan
from contract.pieces import DATA, MODELS, RANDOM, PieceMlp
from contract.support import Fn, Make, Rig, assert_same, in_time, on_threads


def pieces_of(engine: Any) -> list[bool]:
    """Of each piece, whether it is captured."""
    (signature,) = engine.summary()["signatures"]
    return [piece["captured"] for piece in signature["pieces"]]


@pytest.mark.parametrize("name", MODELS)
def test_results_and_draws_are_eagers(rig: Rig, compiled: Make, name: str) -> None:
    model = MODELS[name]()
    engine = compiled(model, rig.random(4, 256), cuda_graphs=True)
    assert pieces_of(engine)[:3] == [True, False, True]
    for seed in range(4):
        x = rig.random(4, 256)
        torch.manual_seed(seed)
        with rig.module.stream(rig.stream()):
            got = engine(x)
            torch.manual_seed(seed)
            assert not differences(got, model(x), inputs=[x])
    stats = engine.stats()
    assert (stats.calls, stats.graph_calls, stats.direct_calls) == (4, 4, 0)


@pytest.mark.parametrize("name", DATA)
def test_threads_on_streams_that_take_turns(rig: Rig, compiled: Make, name: str) -> None:
    model = MODELS[name]()
    sources = [rig.random(4, 256) for _ in range(12)]
    engine = compiled(model, sources[0], cuda_graphs=True, max_contexts=6)
    assert engine.warm(contexts=8) * sum(pieces_of(engine)) == 6
    expected = [model(x) for x in sources]
    rig.module.synchronize()

    def work(i: int) -> None:
        streams = [rig.stream(), rig.stream()]
        for k in range(3):
            with rig.module.stream(streams[k % 2]):
                x = sources[3 * i + k] * 1
                y = engine(x)
                del x
                assert_same(y, expected[3 * i + k])

    on_threads(4, work)
    assert engine.stats().calls == engine.stats().graph_calls == 12
    assert engine.stats().contexts == 6


def test_a_held_stream_holds_no_other_call_and_pieces_follow_each_other_on_it(rig: Rig, compiled: Make) -> None:
    x1, x2 = rig.random(4, 256), rig.random(4, 256)
    engine = compiled(PieceMlp(), x1, cuda_graphs=True)
    assert pieces_of(engine) == [True, False, True]
    expected1, expected2 = rig.load_kernels(engine, x1), rig.load_kernels(engine, x2)
    s1, s2 = rig.stream(), rig.stream()
    x = rig.poisoned(x1, s1)
    latch = rig.latch(s1)
    with rig.module.stream(s1):
        y1 = engine(x.copy_(x1))
        del x
        junk = [torch.full_like(x1, float("nan")) for _ in range(8)]  # where values between pieces were
    with rig.module.stream(s2):
        y2 = engine(x2)
    s2.synchronize()
    assert_same(y2, expected2)
    latch.open()
    s1.synchronize()
    assert_same(y1, expected1)
    del junk


@pytest.mark.parametrize("name", DATA)
def test_nobody_waits_for_a_context_whose_holder_waits_for_the_device(rig: Rig, compiled: Make, name: str) -> None:
    """The one context is used on a stream that a latch holds; the call's host then waits in its direct piece."""
    model = MODELS[name]()
    x1, x2 = rig.random(4, 256), rig.random(4, 256)
    engine = compiled(model, x1, cuda_graphs=True, max_contexts=1)
    expected = [model(x) for x in (x1, x2)]
    rig.module.synchronize()
    latch = rig.latch(s1 := rig.stream())
    outputs: list[Any] = [None, None]
    is_in = rig.module.Event()

    def held() -> None:
        with rig.module.stream(s1):
            is_in.record()
            outputs[0] = engine(x1)

    def other() -> None:
        # Waits on the device for the context, and in the next piece on the host, until the latch opens.
        with rig.module.stream(rig.stream()):
            outputs[1] = engine(x2)

    def both() -> None:
        on_threads(3, lambda i: (held, other, latch.open)[i]())

    assert in_time(both, 60), "a deadlock"
    rig.module.synchronize()
    assert_same(outputs, expected)
    assert engine.stats().contexts == 1
    assert engine.stats().calls == 2


@pytest.mark.parametrize("name", DATA)
def test_in_a_callers_capture_nothing_is_queued_where_a_piece_cannot_be_captured(
    rig: Rig, compiled: Make, name: str
) -> None:
    x = rig.random(4, 256)
    model = MODELS[name]()
    engine = compiled(model, x, cuda_graphs=True)
    before = engine.stats()
    g = rig.new_graph()
    with rig.capture(g):
        y = x * 2
        captured = rig.module.current_stream()
        allocated = rig.module.memory_allocated()
        with pytest.raises(anabranch.NotCapturable, match="data-dependent"):
            engine(x)
        assert rig.module.memory_allocated() == allocated
        assert rig.module.current_stream() == captured
        z = y + 1
    g.replay()
    rig.module.synchronize()
    assert_same(z, x * 2 + 1)
    assert engine.stats() == before
    assert_same(engine(x), model(x))


@pytest.mark.parametrize("name", [n for n in RANDOM if n != "sampled"])
def test_in_a_callers_capture_random_models_run_as_a_whole(rig: Rig, compiled: Make, name: str) -> None:
    x = rig.random(4, 256)
    engine = compiled(MODELS[name](), x, cuda_graphs=True)
    g = rig.new_graph()
    with rig.capture(g):
        y = engine(x)
    y = y[0] if isinstance(y, tuple) else y
    g.replay()
    first = y.clone()
    g.replay()
    rig.module.synchronize()
    assert not torch.equal(first, y)
    assert engine.stats().calls_in_captures == engine.stats().calls == 1


def test_an_input_on_the_cpu_is_read_in_a_direct_piece(rig: Rig, runtime: str) -> None:
    def model(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x * 2 + 1) * 3
        h = h + (mask * 3).cumsum(0).to(h.device)
        return torch.relu(h * 2 - 1).sin()

    made = rig.random(4, 8), rig.random(8).cpu()
    engine = anabranch.compile(Fn(model).eval(), list(made), runtime=runtime)
    assert pieces_of(engine) == [True, False, True]
    for _ in range(3):
        given = rig.random(4, 8), rig.random(8).cpu()
        with rig.module.stream(rig.stream()):
            assert_same(engine(*given), model(*given))
    with rig.capture(rig.new_graph()), pytest.raises(anabranch.NotCapturable, match="the values of this call"):
        engine(*made)


def test_limits_hold_for_all_pieces_and_trim_gives_back(rig: Rig, compiled: Make) -> None:
    x = rig.random(4, 256)
    engine = compiled(PieceMlp(), x, cuda_graphs=True, max_contexts=4)
    expected = rig.load_kernels(engine, x)
    assert engine.warm(contexts=8) == 2
    stats = engine.stats()
    assert (stats.contexts, stats.captures) == (4, 4)
    (signature,) = engine.summary()["signatures"]
    assert signature["contexts"] == 4
    assert signature["bytes"] == stats.bytes > signature["bytes_per_context"] > 0
    engine.trim()
    assert rig.comes_true(lambda: engine.stats().contexts == 0)
    assert_same(engine(x), expected)
    assert engine.stats().contexts == 2
    assert engine.stats().captures == 6


def test_a_call_counts_once_and_waits_are_counted_by_piece(rig: Rig, compiled: Make) -> None:
    x = rig.random(4, 256)
    engine = compiled(PieceMlp(), x, cuda_graphs=True, max_contexts=2)
    streams = [rig.stream(), rig.stream()]
    for k in range(5):
        with rig.module.stream(streams[k % 2]):
            engine(x)
    stats = engine.stats()
    assert (stats.calls, stats.graph_calls, stats.direct_calls, stats.waits) == (5, 5, 0, 8)


def test_the_plan_covers_all_pieces_and_is_proved(rig: Rig, compiled: Make) -> None:
    engine = compiled(MODELS["written"](), rig.random(4, 256), cuda_graphs=True)
    plan = engine.plan
    assert [piece.captured for piece in plan.pieces] == [True, False, True]
    assert {step.piece for step in plan.steps} == {0, 1, 2}
    assert [step.piece for step in plan.steps] == sorted(step.piece for step in plan.steps)
    for piece in (0, 2):
        names = [step.name for step in plan.steps if step.piece == piece and step.kind == "copy"]
        assert any("copy in" in n for n in names)
        assert any("copy out" in n for n in names)
    proof = check_plan(plan)
    assert proof.ok
    assert proof.pairs > 0
    # What a piece reads of an earlier one is a conflict that the lane orders, and nothing else.
    split = json.loads(plan.to_json())
    split["lanes"] = ["main", "other"]
    for step in split["steps"]:
        step["lane"] = "other" if step["piece"] == 1 else "main"
    found = check_plan(Plan.from_json(json.dumps(split)))
    assert {v.first[0] + v.second[0] for v in found.violations} == {"01", "12"}
    assert Plan.from_json(plan.to_json()) == plan
    text = str(plan)
    assert all(f"piece {k}: {how}" in text for k, how in enumerate(("captured", "direct", "captured")))


def test_a_plan_from_before_there_were_pieces_is_read() -> None:
    old = '{"name": "p", "device": "sim:0", "backend": "eager", "lanes": ["main"], "buffers": [], "steps": '
    old += '[{"name": "a", "lane": "main", "reads": [], "writes": [], "kind": "op", "op": "", "source": ""}], '
    old += '"edges": [], "captured": true, "reason": "", "notes": {}}'
    plan = Plan.from_json(old)
    assert plan.pieces == ()
    assert plan.steps[0].piece == 0


def test_explain_and_summary_list_the_pieces(rig: Rig, compiled: Make) -> None:
    engine = compiled(MODELS["masked"](), rig.random(4, 256), cuda_graphs=True)
    text = engine.explain()
    assert "in 3 pieces, 2 of them captured" in text
    assert "piece 0: captured, eager, 5 operators" in text
    assert "piece 1: direct, " in text
    assert "data-dependent: aten.masked_select.default (pieces.py:" in text
    (signature,) = engine.summary()["signatures"]
    assert 0 < signature["operators"]["share_captured"] < 1
    assert signature["flops"]["captured"] == 2 * 2 * 4 * 256 * 256
    assert [piece["why"] != "" for piece in signature["pieces"]] == [False, True, False]
    json.dumps(engine.summary())


@pytest.mark.parametrize("graphs", [False, None])
def test_without_graphs_and_with_no_time_to_measure(rig: Rig, compiled: Make, graphs: bool | None) -> None:
    model, x = MODELS["masked"](), rig.random(4, 256)
    engine = compiled(model, x, cuda_graphs=graphs)
    assert pieces_of(engine) == ([] if graphs is False else [True, False, True])
    assert_same(engine(x), model(x))
    assert engine.stats().graph_calls == (0 if graphs is False else 1)


def test_where_no_integer_is_valid_between_pieces_all_runs_direct(rig: Rig, runtime: str) -> None:
    """An index into one row and one into the rows behind it: no integer is good for both."""

    def model(x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x * 2 + 1) * 3
        found = torch.stack([torch.nonzero(h[:, 0] * 0 + 1).view(-1).max(), torch.nonzero(h > 9).sum()])
        first, last = h.index_select(0, found[:1] - 3), h[:1].index_select(0, found[1:])
        return torch.relu(first * 2 + last).sin() * 3 + torch.tanh(h[:1].index_select(0, found[1:] * 1)) * 2

    x = rig.random(4, 8)
    engine = anabranch.compile(Fn(model).eval(), [x], runtime=runtime)
    assert pieces_of(engine) == []
    assert "not in pieces: InputError: an engine is built on made-up inputs" in engine.explain()
    assert_same(engine(x), model(x))
    assert engine.stats().direct_calls == 1


def test_where_a_capture_fails_all_runs_direct(rig: Rig, compiled: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MODELS["masked"](), rig.random(4, 256)

    def fail(*args: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(type(rig.seam), "capture", fail)
    engine = compiled(model, x)
    assert pieces_of(engine) == []
    assert "not in pieces: capture failed: RuntimeError: planted" in engine.explain()
    assert_same(engine(x), model(x))
    assert engine.stats().contexts == 0
    assert engine.stats().calls == engine.stats().direct_calls == 1


def test_a_second_signature_and_a_closed_engine(rig: Rig, compiled: Make) -> None:
    model = MODELS["twice"]()
    engine = compiled(model, rig.random(4, 256), cuda_graphs=True)
    for rows in (4, 6, 4):
        x = rig.random(rows, 256)
        assert_same(engine(x), model(x))
    assert len(engine.plans) == 2
    assert engine.stats().calls == engine.stats().graph_calls == 3
    engine.close()
    with pytest.raises(anabranch.EngineClosed):
        engine(rig.random(4, 256))


def test_sizes_that_vary_run_direct_where_graphs_were_not_asked_for(rig: Rig, compiled: Make) -> None:
    model = MODELS["twice"]()
    engine = compiled(model, rig.random(4, 256))
    for rows in (4, 6, 5, 6):
        x = rig.random(rows, 256)
        assert_same(engine(x), model(x))
    assert engine.stats().specializations == 2
    assert "float32[*, 256]: direct" in engine.explain()


def test_strided_and_misaligned_inputs(rig: Rig, compiled: Make) -> None:
    model = MODELS["dropout"]()
    x = rig.random(4, 256)
    engine = compiled(model, x, cuda_graphs=True)
    strided = torch.stack([x, x], -1)[..., 0]
    misaligned = torch.empty(x.numel() + 1, device=x.device)[1:].view_as(x).copy_(x)
    for given in (x, strided, misaligned):
        torch.manual_seed(1)
        got = engine(given)
        torch.manual_seed(1)
        assert_same(got, model(x))


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", RANDOM)
def test_a_build_leaves_the_generator_alone(rig: Rig, compiled: Make, name: str, graphs: bool) -> None:
    model = MODELS[name]()
    torch.manual_seed(2)
    engine = compiled(model, rig.random(4, 256), cuda_graphs=graphs)
    first = torch.rand(8, device=rig.device())
    torch.manual_seed(2)
    assert_same(first, torch.rand(8, device=rig.device()))
    x = rig.random(6, 256)
    torch.manual_seed(3)
    got = engine(x)  # compiled in the call
    torch.manual_seed(3)
    assert_same(got, model(x))


def test_dropout_between_layers_is_not_the_same_draw_twice(rig: Rig, compiled: Make) -> None:
    class Layers(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in range(4):
                x = torch.tanh(x * 1.5 + i) * 2 - x.sin()
                x = F.dropout(x, 0.3, training=True)
            return x

    model = Layers()
    engine = compiled(model, rig.random(4, 256), cuda_graphs=True)
    assert pieces_of(engine) == [True, False] * 4
    x = rig.random(4, 256)
    torch.manual_seed(5)
    got = [engine(x) for _ in range(3)]
    torch.manual_seed(5)
    assert_same(got, [model(x) for _ in range(3)])
    assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize("name", ["masked", "dropout"])
@pytest.mark.parametrize("faster", [True, False])
def test_where_there_is_time_pieces_are_measured_and_what_is_slower_is_not_taken(
    rig: Rig, compiled: Make, monkeypatch: pytest.MonkeyPatch, name: str, faster: bool
) -> None:
    from anabranch.runtime import _builder, _pieces
    from anabranch.runtime._cost import Cost

    ran: list[list[Any]] = []

    def of_pieces(ways: Any, inputs: Any, stream: Any) -> list[Cost]:
        ran.append([way(x) for way in ways for x in inputs])
        return [Cost(100, 1), Cost(1000 if faster else 50, 1)]

    monkeypatch.setattr(type(rig.seam), "has_time", True)
    monkeypatch.setattr(_builder, "measure", lambda ways, inputs, stream: [Cost(1, 1), Cost(2, 2)])
    monkeypatch.setattr(_pieces, "measure", of_pieces)
    model = MODELS[name]()
    engine = compiled(model, rig.random(4, 256), backend="eager")
    assert pieces_of(engine) == ([True, False, True] if faster else [])
    assert ("not in pieces: measured" if not faster else "pieces: measured") in engine.explain()
    # Of what depends on data each captured piece by itself, else the whole.
    assert len(ran) == (2 if name == "masked" else 1)
    for a, b, c, d in ran:
        if name == "masked":
            assert_same([*a, *b], [*c, *d])
        assert [y.shape for y in a] == [y.shape for y in c]
    stats = engine.stats()
    assert (stats.calls, stats.graph_calls, stats.direct_calls, stats.waits) == (0, 0, 0, 0)
    (signature,) = engine.summary()["signatures"]
    assert signature["measured_us"].keys() == {"pieces", "direct"}
    x = rig.random(4, 256)
    torch.manual_seed(1)
    got = engine(x)
    torch.manual_seed(1)
    assert_same(got, model(x))
    stats = engine.stats()
    assert (stats.calls, stats.graph_calls, stats.direct_calls) == (1, int(faster), int(not faster))
