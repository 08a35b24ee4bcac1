"""Sizes that vary in Dynamo's graphs: of ``torch.compile``, and of models that ``torch.export`` refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from anabranch import Dim, Input, dynamo
from anabranch.runtime._compiler import Compiler
from anabranch.runtime._fragment import STEADY
from contract.support import ROUNDING, Fn, assert_same, has_memory, on_threads

SIZES = (4, 7, 5, 2, 33, 1, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 64)


@pytest.fixture(autouse=True)
def no_sizes_of_other_tests() -> None:
    """Dynamo makes symbols of sizes that have varied, by where their code is.

    PyTorch 2.11 does so of all sizes from then on where ``torch.compile(dynamic=True)`` was called on two threads at
    once: each sets a setting of the process, and puts back what it found.
    """
    torch._dynamo.reset()
    torch._dynamo.config.assume_static_by_default = True


class Made:
    """Engines that graphs of ``torch.compile`` have got since the last look."""

    def __init__(self) -> None:
        self._before = set(dynamo._fragments)

    def engines(self) -> list[Any]:
        return [engine for fragment in set(dynamo._fragments) - self._before for engine in fragment.engines]

    def specializations(self) -> int:
        return sum(engine.stats().specializations for engine in self.engines())


@pytest.fixture
def made() -> Iterator[Made]:
    """And dropped after the test, as is what Dynamo keeps."""
    yield Made()
    torch._dynamo.reset()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + sum(shape)))


def mlp() -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    return model.eval().requires_grad_(False)


def compiled(model: Any, backend: str, runtime: str = "auto", dynamic: bool | None = None) -> Any:
    return torch.compile(model, backend="anabranch", dynamic=dynamic, options={"backend": backend, "runtime": runtime})


def check(actual: Any, expected: Any, backend: str, *inputs: Any) -> None:
    rounding = None if backend == "eager" else ROUNDING
    about = str([getattr(x, "shape", x) for x in inputs])
    assert_same(actual(*inputs), expected(*inputs), about, rounding=rounding)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_one_engine_serves_all_sizes(made: Made, runtime: str, backend: str, dynamic: bool | None) -> None:
    model = mlp()
    run = compiled(model, backend, runtime, dynamic)
    counts = {}
    for n in SIZES:
        check(run, model, backend, drawn(n, 8, seed=n))
        counts[n] = made.specializations()
    first = 1 if dynamic else 2  # the first size may be the only one
    assert counts[4] == 1
    assert counts[7] == counts[33] == first
    assert counts[1] == counts[64] == first + 1, "a batch of one has one of its own"
    assert all(engine.runtime == runtime for engine in made.engines())


def test_what_serves_a_size_stays_what_it_was(made: Made) -> None:
    model = mlp()
    run = compiled(model, "inductor", dynamic=True)
    first = {n: run(drawn(n, 8)) for n in (4, 9, 33)}
    for n in (33, 4, 9, 50, 9, 33, 4):
        if n in first:
            assert_same(run(drawn(n, 8)), first[n])
        else:
            run(drawn(n, 8))
    assert made.specializations() == 1


def sizes_as_numbers(x: torch.Tensor) -> Any:
    b, t = x.shape
    return b * t + 1, x.reshape(b * t)[:b], x.new_full((t,), b / 3), x.sum(0) * b, torch.arange(b) + t


def branch(x: torch.Tensor) -> torch.Tensor:
    return x.relu() * 2 if x.shape[0] > 9 else x.sin()


def divides(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 2) * 2 if x.shape[0] % 2 == 0 else torch.cat([x, x[:1]]).view(-1, 2)


def broadcasts(x: torch.Tensor) -> torch.Tensor:
    return x + x[: x.shape[0] // 2 + 1].sum(0, keepdim=True).squeeze(0)


def passes_sizes_on(x: torch.Tensor) -> Any:
    b, t = x.shape
    y = x * 2
    if not has_memory(y):
        y = y + 1
    return y.view(b * t).reshape(t, b) * b, t * 2 + b


def as_many_as_there_are(x: torch.Tensor) -> Any:
    y = x[x > 0]
    torch._dynamo.graph_break()
    return y * y.shape[0] + y.sum()


#: By function, how many specializations there may be: of the first size, all others, one, and those of other branches.
FUNCTIONS: dict[Callable[..., Any], int] = {
    sizes_as_numbers: 3,
    branch: 4,
    divides: 4,
    broadcasts: 3,
    passes_sizes_on: 6,
    as_many_as_there_are: 5,
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_integers_that_are_sizes(made: Made, fn: Any, dynamic: bool | None) -> None:
    run = compiled(fn, "eager", dynamic=dynamic)
    for turn in range(2):
        for n in (*SIZES, 0):
            check(run, fn, "eager", drawn(n, 6, seed=turn))
    assert made.specializations() <= FUNCTIONS[fn] + 2, "and that of what is empty"
    assert made.engines()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_integers_of_the_callers(made: Made, backend: str) -> None:
    def fn(x: torch.Tensor, n: int) -> Any:
        return (x * n)[:n] + n, x.new_full((4,), n) * 2.0, n * 3 + x.shape[0]

    run = compiled(fn, backend)
    for n in (5, 3, 8, 2, 7, 1, 4, 6, 9, 12, 100, 1000):
        check(run, fn, backend, drawn(9, 4, seed=n), n)
    assert made.specializations() <= 4
    for n in (0, -1, -2, -5):
        check(run, fn, backend, drawn(9, 4, seed=-n), n)
    assert made.specializations() <= 4, "what can be no size is left to operators"


def test_integers_of_two_places_are_two(made: Made) -> None:
    def fn(x: torch.Tensor, y: torch.Tensor, n: int) -> Any:
        return x * 2, y[:n] + x.shape[0], torch.cat([x, y])

    run = compiled(fn, "eager", dynamic=True)
    for a, b, n in ((4, 4, 4), (4, 7, 4), (7, 4, 4), (4, 4, 3), (9, 8, 7), (8, 8, 8)):
        check(run, fn, "eager", drawn(a, 3), drawn(b, 3, seed=1), n)
    assert made.specializations() <= 2, "Dynamo takes sizes that are equal at first for one"


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_writes_into_inputs_of_many_sizes(made: Made, backend: str) -> None:
    def fn(x: torch.Tensor, n: int) -> torch.Tensor:
        x[:, n:].mul_(3)
        return x.sum(1) * n

    run = compiled(fn, backend, dynamic=True)
    for n in (5, 2, 9, 4, 12):
        x, y = (drawn(n, n + 3) for _ in range(2))
        assert_same(run(x, n), fn(y, n), rounding=None if backend == "eager" else ROUNDING)
        assert_same(x, y)
    assert made.specializations() == 1


def test_inputs_that_are_not_dense(made: Made) -> None:
    model = mlp()
    run = compiled(model, "eager", dynamic=True)
    for n in (5, 2, 9, 4, 12):
        check(run, model, "eager", drawn(n, 12)[:, 2:10])
        check(run, model, "eager", drawn(8, n).t())
    for n in (5, 2, 9, 4, 12):
        check(run, model, "eager", drawn(n, 8))
        check(run, model, "eager", drawn(n, 12)[:, 2:10])
    assert made.specializations() <= 4


def test_sizes_without_a_range_are_not_compiled_one_by_one(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiler, "_compile_range", lambda *_: "it needs to know")
    model = mlp()
    run = compiled(model, "eager", dynamic=True)
    for n in range(2, 22):
        check(run, model, "eager", drawn(n, 8))
    assert made.specializations() == 0
    assert "it needs to know" in str(dynamo.summary())
    for n in [5] * (STEADY + 1):
        check(run, model, "eager", drawn(n, 8))
    assert made.specializations() == 1


def test_dynamic_false_is_kept(made: Made) -> None:
    model = mlp()
    run = torch.compile(model, backend="anabranch", dynamic=True, options={"backend": "eager", "dynamic": False})
    for n in (5, 2, 9, *[4] * (STEADY + 1)):
        check(run, model, "eager", drawn(n, 8))
    (engine,) = made.engines()
    assert engine.summary()["signatures"][0]["signature"] == "float32[4, 8]"


def test_replaced_parameters_get_an_engine_for_all_sizes(made: Made) -> None:
    model = mlp()
    run = compiled(model, "eager", dynamic=True)
    kept = []
    for turn in range(3):
        kept.append(model[0].weight)
        model[0].weight = nn.Parameter(drawn(16, 8, seed=turn), requires_grad=False)
        for n in (5, 2, 9):
            check(run, model, "eager", drawn(n, 8))
    assert made.specializations() == 3


def test_threads_call_with_many_sizes(made: Made, runtime: str) -> None:
    model = mlp()
    run = compiled(model, "inductor", runtime, dynamic=True)
    given = {n: drawn(n, 8, seed=n) for n in range(2, 30)}
    expected = {n: model(x) for n, x in given.items()}

    def work(i: int) -> None:
        for turn in range(60):
            n = 2 + (turn * (i + 3) + i) % 28
            assert_same(run(given[n]), expected[n], rounding=ROUNDING)

    on_threads(8, work)
    assert {engine.stats().specializations for engine in made.engines()} == {1}


class Broken(nn.Module):
    """``torch.export`` refuses it: a branch on a value, behind which sizes are used once more."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: torch.Tensor) -> Any:
        b, t, c = x.shape
        y = self.mlp(x) + 2
        if y.sum() > -1e9:
            y = y.abs()
        return y.view(b * t, -1).reshape(t, b, -1).mean(1) * t, b * t + c


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_model_in_fragments_of_declared_sizes(runtime: str, backend: str) -> None:
    model = Broken().eval()
    engine = anabranch.compile(model, [Input((Dim("batch", 1, 64), 4, 8))], backend=backend, runtime=runtime)
    assert len(engine.summary()["fragments"]["graphs"]) == 4, "two for all sizes, and two for one"
    assert engine.stats().specializations == 4
    for n in SIZES:
        check(engine, model, backend, drawn(n, 4, 8, seed=n))
    # Inductor may assume that the size is not that of another dimension, which is 4: that one is compiled by itself.
    assert engine.stats().specializations in ((4,) if backend == "eager" else (4, 5))
    assert "float32[*, 4, 8]" in engine.explain()
    assert not any(graph["by_operators"] for graph in engine.summary()["fragments"]["graphs"])
    for n in (0, 65):
        with pytest.raises(anabranch.InputError, match=f"size 0 of input 0 is {n}; 'batch' was declared as 1 to 64"):
            engine(drawn(n, 4, 8))
    check(engine, model, backend, drawn(64, 4, 8))
    engine.close()


def test_a_model_in_fragments_of_two_declared_sizes() -> None:
    model = Broken().eval()
    given = Input((Dim("batch", 1, 64), Dim("length", 2, 16), 8))
    engine = anabranch.compile(model, [given], backend="eager")
    for n in (3, 2, 40, 17):
        for t in (2, 5, 16):
            check(engine, model, "eager", drawn(n, t, 8, seed=n))
    assert engine.stats().specializations == 2
    engine.close()


def test_a_model_in_fragments_whose_sizes_vary_undeclared(runtime: str) -> None:
    model = Broken().eval()
    engine = anabranch.compile(model, [drawn(4, 4, 8)], backend="eager", runtime=runtime)
    assert engine.stats().specializations == 2
    for n in SIZES:
        check(engine, model, "eager", drawn(n, 4, 8, seed=n))
    assert engine.stats().specializations == 4, "each graph for the first size, and for all others"
    assert len(engine.summary()["fragments"]["graphs"]) <= 6
    engine.close()


def test_a_model_in_fragments_with_dynamic_false() -> None:
    model = Broken().eval()
    engine = anabranch.compile(model, [drawn(4, 4, 8)], backend="eager", dynamic=False)
    for n in (4, 7, 5, 2, 9):
        check(engine, model, "eager", drawn(n, 4, 8, seed=n))
    assert engine.stats().specializations == 2
    engine.close()


def test_sizes_of_a_model_in_fragments_cannot_be_rounded_up() -> None:
    given = Input((Dim("batch", 1, 64, pad_to=[16, 64]), 4, 8))
    with pytest.raises(anabranch.UnsupportedModel, match=r"pad_to is for models in one graph, and torch\.export"):
        anabranch.compile(Broken().eval(), [given], backend="eager")


def test_declared_sizes_that_the_model_fixes_are_refused_with_its_line() -> None:
    def fixes(x: torch.Tensor) -> torch.Tensor:
        return x.view(5, 8) * 2

    with pytest.raises(anabranch.UnsupportedModel, match="sizes were declared to vary"):
        anabranch.compile(Fn(fixes), [Input((Dim("batch", 5, 5), 8))], backend="eager")


def test_threads_call_a_model_in_fragments_with_many_sizes(runtime: str) -> None:
    model = Broken().eval()
    engine = anabranch.compile(model, [Input((Dim("batch", 2, 64), 4, 8))], backend="eager", runtime=runtime)
    given = {n: drawn(n, 4, 8, seed=n) for n in range(2, 30)}
    expected: dict[int, Any] = {n: model(x) for n, x in given.items()}

    def work(i: int) -> None:
        for turn in range(60):
            n = 2 + (turn * (i + 3) + i) % 28
            assert_same(engine(given[n]), expected[n], str(threading.get_ident()))

    on_threads(8, work)
    made = [one for graph in engine.summary()["fragments"]["graphs"] for one in graph["engines"]]
    assert {tuple(s["signature"] for s in one["signatures"]) for one in made} == {
        ("float32[*, 4, 8]",),
        ("float32[*, 4, 4]",),
    }, "Dynamo may have traced a graph in several threads"
    engine.close()
