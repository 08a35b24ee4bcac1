"""Models that ``torch.export`` refuses: Dynamo's graphs as engines, with the model's Python between them."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from anabranch._judge import differences
from anabranch.runtime import _dynamo_settings, _guarded
from contract.support import on_threads

pytestmark = pytest.mark.usefixtures("seeded", "runtime")


class Branches(nn.Module):
    """Two branches on values: three paths, of results that differ in number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        y = self.first(x).relu()
        if y.max() > 2:
            y = y * 2 - x
        z = self.second(y).sigmoid()
        if z.mean() > 0.5:
            return z + self.shift, len(x)
        return z - self.shift, z[z > 0.4], self.second.bias


def inputs(count: int, rows: int = 4) -> list[torch.Tensor]:
    return [torch.randn(rows, 8) * (0.1 + i % 7) for i in range(count)]


@pytest.fixture
def model() -> Branches:
    torch._dynamo.reset()
    return Branches().eval().requires_grad_(False)


def test_every_path_and_size_is_eagers(model: Branches) -> None:
    engine = anabranch.compile(model, inputs(1), backend="eager")
    paths = set()
    for rows in (4, 4, 6, 4, 1, 3):
        for x in inputs(10, rows):
            expected = model(x)
            paths.add((len(expected), bool(model.first(x).relu().max() > 2)))
            assert differences(engine(x), expected) == []
    assert len(paths) >= 3


def test_threads_get_their_own_results(model: Branches) -> None:
    engine = anabranch.compile(model, inputs(1), backend="eager")
    wrong: list[str] = []

    def work(number: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            mine = inputs(25, 4 + number % 2)
        for x in mine:
            wrong.extend(differences(engine(x), model(x)))

    on_threads(8, work)
    assert wrong == []
    assert engine.stats().calls == 200


class Steps(nn.Module):
    """One function that is compiled for each of its steps, and Python between them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def step(self, x: torch.Tensor, number: int) -> torch.Tensor:
        y: torch.Tensor = self.steps[number](x) * number
        return y.tanh() + x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(5):
            x = self.step(x, number)
            if x.abs().max() > 1000:
                x = x / 2
        return x


@pytest.fixture
def threads_take_turns_often() -> Iterable[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("threads_take_turns_often")
@pytest.mark.parametrize("way", ["anabranch.compile", "torch.compile"])
def test_threads_compile_nothing_that_is_there(way: str) -> None:
    torch._dynamo.reset()
    model, options = Steps().eval().requires_grad_(False), {"backend": "eager"}
    given = [inputs(4) for _ in range(4)]
    if way == "anabranch.compile":
        compiled: Any = anabranch.compile(model, inputs(1), **options)
    else:
        compiled = torch.compile(model, backend="anabranch", options=options)
    for x in (x for own in given for x in own):
        compiled(x)

    def graphs() -> int:
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    before, wrong = graphs(), []

    def work(number: int) -> None:
        for i in range(150):
            x = given[number][i % 4] + i
            wrong.extend(differences(compiled(x), model(x)))

    with torch.no_grad():
        on_threads(4, work)
    assert wrong == []
    assert graphs() == before


class Catches(nn.Module):
    """Takes another way where an operator does not take what it is given."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(8, 8), how

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        if y.sum() > 1e6:
            y = y / 2
        try:
            return y.view(4, 8).tanh() if self.how == "by size" else y.index_select(1, at) * 2
        except (RuntimeError, IndexError):
            return y + 1


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("how", ["by size", "by value"])
def test_what_a_model_catches_in_later_calls(how: str, backend: str) -> None:
    torch._dynamo.reset()
    model, at = Catches(how).eval().requires_grad_(False), torch.tensor([0, 3])
    engine = anabranch.compile(model, [torch.randn(4, 8), at], backend=backend)
    assert engine.summary()["fragments"]["graphs"]

    def work(number: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            given = [(torch.randn(rows, 8), at + 6 * (i % 2)) for i, rows in enumerate((4, 4, 3, 3, 5, 4))]
        for x, places in given:
            torch.testing.assert_close(engine(x, places), model(x, places))

    on_threads(3, work)
    with pytest.raises(anabranch.InputError, match="does not accept"):
        engine(torch.randn(4, 7), at)


class CatchesLate(Catches):
    """Has changed what it was given by then."""

    def forward(self, x: torch.Tensor, seen: Any) -> torch.Tensor:  # type: ignore[override]
        if isinstance(seen, list):
            seen[0] = seen[0] + 1
        else:
            seen.add_(1)
        return super().forward(x, torch.tensor([0, 3]))


@pytest.mark.parametrize("make", [lambda: [1], lambda: torch.ones(2)], ids=["list", "tensor"])
def test_no_call_is_made_again_that_has_changed_what_it_was_given(make: Any) -> None:
    torch._dynamo.reset()
    model = CatchesLate("by size").eval().requires_grad_(False)
    engine = anabranch.compile(model, [torch.randn(4, 8), make()], backend="eager")
    for rows in (4, 3, 3):
        x, mine, others = torch.randn(rows, 8), make(), make()
        expected = model(x, others)
        try:
            result = engine(x, mine)
        except anabranch.InputError:
            assert rows == 3
        else:
            torch.testing.assert_close(result, expected)
            torch.testing.assert_close(mine, others)
        assert (mine[0] if isinstance(mine, list) else float(mine[0])) <= 2


def test_what_is_cut_and_why_is_listed(model: Branches) -> None:
    engine = anabranch.compile(model, inputs(1), backend="eager")
    fragments = json.loads(json.dumps(engine.summary()))["fragments"]
    assert "test_fragments.py" in fragments["why"]
    first = fragments["graphs"][0]
    assert first["ends"]["source"].startswith("test_fragments.py:")
    assert "branch on the value" in first["ends"]["reason"]
    assert first["python_us"] > 0
    assert first["engines"]
    text = engine.explain()
    assert f"cut at {first['ends']['source']}" in text
    assert "us of Python until the next graph" in text
    assert anabranch.compile(nn.ReLU(), inputs(1), backend="eager").summary()["fragments"] is None


def test_a_parameter_that_is_returned_is_the_models_own(model: Branches) -> None:
    engine = anabranch.compile(model, inputs(1), backend="eager")
    results = next(y for y in map(engine, inputs(40)) if len(y) == 3)
    assert results[2] is model.second.bias


def test_closing_and_what_cannot_be(model: Branches) -> None:
    with pytest.raises(anabranch.UnsupportedModel, match=r"torch\.cond"):
        anabranch.compile(model, inputs(1), backend="eager", require_full=True)
    engine = anabranch.compile(model, inputs(1), backend="eager")
    with pytest.raises(anabranch.InputError, match="does not accept"):
        engine(torch.randn(4, 7))
    (x,) = inputs(1)
    assert differences(engine(x), model(x)) == []
    engine.close()
    with pytest.raises(anabranch.EngineClosed):
        engine(x)


def test_dropping_the_engine_frees_those_of_its_graphs(model: Branches) -> None:
    engine = anabranch.compile(model, inputs(1), backend="eager")
    graphs = [weakref.ref(e) for e in engine._guarded.engines()]  # type: ignore[union-attr]
    assert graphs
    whole = weakref.ref(engine)
    del engine
    gc.collect()
    assert whole() is None
    assert [g() for g in graphs] == [None] * len(graphs)


class Scales(nn.Module):
    """Scales that values choose, and an operator that takes no symbol in the place of one."""

    def forward(self, x: torch.Tensor, most: int = 0) -> torch.Tensor:
        y = x.cos()
        scales = [int(x.max())] if most else [2, 1]
        for i in range(len(scales)):  # Dynamo leaves a function as it is that is cut in a loop
            if not most and x.mean() > 4:
                scales[i] *= 2
            y = y + i
        for scale in scales:
            y = self.scaled(y, scale)
        return y

    def scaled(self, y: torch.Tensor, scale: int) -> torch.Tensor:
        large = nn.functional.interpolate(
            y * scale, scale_factor=scale * 2, mode="bilinear", align_corners=False, recompute_scale_factor=False
        )
        return large.sin()[..., : y.shape[-2], : y.shape[-1]] + y


def cut_at_operators(engine: Any) -> list[str]:
    """What its graphs say of operators that they are cut at, since they took no symbol."""
    ends = [graph["ends"] for graph in engine.summary()["fragments"]["graphs"]]
    return [end["reason"] for end in ends if end is not None and "fake tensor" in end["reason"]]


def test_a_number_that_an_operator_takes_no_symbol_for_cuts_nothing() -> None:
    torch._dynamo.reset()
    model, given = Scales(), [torch.rand(1, 2, 4, 4) * (1 + 9 * (i % 2)) for i in range(8)]
    expected = [model(x) for x in given]
    engine = anabranch.compile(model, given[:1], backend="eager")
    results: list[list[Any]] = [[] for _ in range(4)]

    def work(number: int) -> None:
        results[number] = [(i % 8, engine(given[i % 8])) for i in range(number, number + 40)]

    on_threads(4, work)
    for i, result in (pair for mine in results for pair in mine):
        assert torch.equal(result, expected[i])
    assert sum(map(len, results)) == 160
    for x in given * 2:
        engine(x)
    graphs = engine.summary()["fragments"]["graphs"]
    assert graphs
    assert cut_at_operators(engine) == []
    assert not any(graph["by_operators"] for graph in graphs if graph["operators"] > 2)


def test_of_many_such_numbers_none_has_a_graph_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph each would be as many as there are numbers: beyond some, they are symbols again."""
    torch._dynamo.reset()
    monkeypatch.setattr(_guarded, "MOST_FIXED", 8)
    model = Scales()
    engine = anabranch.compile(model, [torch.rand(1, 2, 4, 4) + 3, 1], backend="eager")

    def graphs_after(numbers: Iterable[int]) -> int:
        for n in numbers:
            x = torch.rand(1, 2, 4, 4) * n
            x[0, 0, 0, 0] = n
            assert torch.equal(engine(x, 1), model(x, 1))
        return len(engine.summary()["fragments"]["graphs"])

    few = graphs_after((2, 3, 4))
    assert cut_at_operators(engine) == []
    assert graphs_after((5, 6)) > few
    settled = graphs_after((*range(7, 16), 3, 7, 19))
    assert graphs_after(range(20, 32)) == settled
    assert cut_at_operators(engine)


class Loops(nn.Module):
    """Cut inside of a loop, so that Dynamo makes no graph of the function at all."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Sequential(nn.Linear(16, 8), nn.Tanh()))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for scale in (1.0, 2.0, 3.0):
            y = self.body(x * scale)
            if y.max() > 0.5:
                y = y - 0.25
            found.append(y)
        return self.encoder(torch.cat(found)[None])[0]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_what_a_loop_calls_of_pytorchs_modules_has_graphs(backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(3)
    model = Loops().eval().requires_grad_(False)
    kinds = [type(part) for part in model.modules()]
    engine = anabranch.compile(model, inputs(1), backend=backend)
    for x in inputs(8):
        torch.testing.assert_close(engine(x), model(x))
    graphs = engine.summary()["fragments"]["graphs"]
    assert [bool(graph["engines"]) for graph in graphs] == [True, True], engine.explain()
    assert graphs[0]["operators"] == 4
    assert [type(part) for part in model.modules()] == kinds


class Counts(nn.Module):
    """Keeps state, of one kind or the other."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.register_buffer("seen", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "buffer":
            self.seen += 1
        else:
            self.calls += 1
        return x * 2 if x.sum() > 0 else x * self.calls + self.seen


@pytest.mark.parametrize(("kind", "why"), [("buffer", "'seen' in place"), ("attribute", r"self\.calls")])
def test_a_model_that_keeps_state_is_refused_and_left_alone(kind: str, why: str) -> None:
    torch._dynamo.reset()
    model = Counts(kind).eval()
    with pytest.raises(anabranch.UnsupportedModel, match=why):
        anabranch.compile(model, inputs(1), backend="eager")
    assert model.calls == 0
    assert torch.equal(model.seen, torch.ones(8))


def test_engines_of_one_class_do_not_use_up_each_others_limit(model: Branches) -> None:
    x, *_ = inputs(1)
    for _ in range(4):
        other = Branches().eval().requires_grad_(False)
        engine = anabranch.compile(other, [x], backend="eager")
        assert differences(engine(x), other(x)) == []
        assert engine.summary()["fragments"]["graphs"][0]["engines"]
    # Nor the user's own: `torch.compile` of the model itself begins with none.
    graphs: list[Any] = []

    def count(gm: Any, _: Any) -> Any:
        graphs.append(gm)
        return gm

    compiled = torch.compile(model, backend=count)
    assert differences(compiled(x), model(x)) == []
    assert graphs
    past = engine.summary()["fragments"]["past_limit"]  # of the process: other tests' functions may be among them
    assert not [function for function in past if Path(__file__).name in function]


def halved(x: torch.Tensor, by: float) -> torch.Tensor:
    y = x / by
    return y.tanh() if y.abs().max() < 2 else y.sigmoid()


class Halves(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return halved(x + 1, self.by) * 2


def test_nor_do_models_that_call_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(_dynamo_settings, "MOST_GRAPHS", 5)
    # As if no other test had made models before.
    monkeypatch.setattr(_guarded, "dynamo_settings", _dynamo_settings._DynamoSettings())
    for by in range(2, 10):
        model = Halves(by).eval()
        engine = anabranch.compile(model, inputs(1), backend="eager")
        for x in inputs(7):
            assert differences(engine(x), model(x)) == []
        fragments = engine.summary()["fragments"]
        assert not [function for function in fragments["past_limit"] if "'halved'" in function]
        assert len(fragments["graphs"]) > 2, "functions of Dynamo's own are past the limit"


class Nested(nn.Module):
    """Calls an engine between graphs, on half of its input: its own, once it has one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.tanh() * 2
        if y.max() > 100:
            y = y * 0
        if len(x) > 2:
            y = y + self._half(x[:2]).sum()
        return y * 3 + 1

    @torch.compiler.disable
    def _half(self, x: torch.Tensor) -> torch.Tensor:
        return HOLDER[-1](x) if HOLDER else x.tanh() * 6 + 1


HOLDER: list[Any] = []


def test_a_model_may_call_its_own_engine() -> None:
    torch._dynamo.reset()
    HOLDER.clear()
    model = Nested().eval()
    engine = anabranch.compile(model, inputs(1), backend="eager", max_contexts=1)
    HOLDER.append(engine)
    try:
        for x in inputs(6):
            half = x[:2].tanh() * 6 + 1
            assert differences(engine(x), (x.tanh() * 2 + half.sum()) * 3 + 1) == []
    finally:
        HOLDER.clear()
    assert engine.stats().calls >= 12
