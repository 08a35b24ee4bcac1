"""Draws on the simulated device: eager's under a seed, and never the same twice, from threads on streams of their own.

What surrounds a draw is captured; the draw itself runs direct, in a piece of its own or in Python between two graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from anabranch._judge import differences
from contract.draws import NETWORKS, WIDTH, Given, Held, as_bytes, assert_all_differ, assert_drawn_as_in_eager
from contract.support import Make, Rig, on_threads

THREADS, CALLS, ROWS = 8, 3, 16
#: For models in fragments, which take seconds to build.
SELDOM = pytest.mark.parametrize("runtime", ["native", pytest.param("python", marks=pytest.mark.slow)], indirect=True)


@pytest.fixture
def afresh() -> Iterator[None]:
    """Dynamo remembers of each code whether sizes have varied."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def on_streams(rig: Rig, inputs: list[list[tuple[Any, ...]]], call: Callable[..., Any]) -> list[list[Any]]:
    """Each thread's results, on a stream of its own that is held until all threads have queued all of their calls."""
    streams = [rig.stream() for _ in inputs]
    latch = rig.latch(*streams)
    results: list[list[Any]] = [[] for _ in inputs]

    def work(i: int) -> None:
        with rig.module.stream(streams[i]):
            results[i] += [call(*args) for args in inputs[i]]

    on_threads(len(inputs), work)
    latch.open()
    rig.module.synchronize()
    return results


@pytest.mark.parametrize("name", NETWORKS)
def test_consecutive_calls_draw_what_eager_draws(rig: Rig, compiled: Make, name: str) -> None:
    model = NETWORKS[name]()
    inputs = [rig.random(ROWS, WIDTH) for _ in range(5)]
    engine = compiled(model, rig.random(ROWS, WIDTH), cuda_graphs=True)
    if name == "between":
        (signature,) = engine.summary()["signatures"]
        assert [piece["captured"] for piece in signature["pieces"]] == [True, False, True]

    def session(call: Callable[..., Any]) -> Any:
        torch.manual_seed(2991)
        with rig.module.stream(rig.stream()):
            made = [(call(x), torch.rand(3, device=rig.kind)) for x in inputs]
        rig.module.synchronize()
        return made

    got = session(engine)
    assert not differences(got, session(model))
    assert_all_differ(drawn for (_, drawn), _ in got)


@pytest.mark.parametrize("name", NETWORKS)
def test_threads_that_share_the_default_generator_never_draw_the_same(rig: Rig, compiled: Make, name: str) -> None:
    model = NETWORKS[name]()
    engine = compiled(model, rig.random(ROWS, WIDTH), cuda_graphs=True)
    inputs = [[(rig.random(ROWS, WIDTH),) for _ in range(CALLS)] for _ in range(THREADS)]
    torch.manual_seed(11)
    drawn = [made[1] for results in on_streams(rig, inputs, engine) for made in results]
    following = torch.rand(3, device=rig.kind).cpu()
    assert len(drawn) == THREADS * CALLS
    if assert_drawn_as_in_eager(name, drawn, model, inputs, 11):
        assert torch.equal(following, torch.rand(3, device=rig.kind).cpu())


@SELDOM
@pytest.mark.usefixtures("afresh")
def test_threads_with_a_generator_each_draw_what_eager_draws(rig: Rig, compiled: Make) -> None:
    """One engine, which is given the calling thread's generator: graphs, and Python that draws between them."""
    model = Given()
    seeds = [*range(20, 20 + THREADS - 1), 20]
    x = rig.random(ROWS, WIDTH)
    engine = compiled(model, x, torch.Generator(rig.kind), cuda_graphs=True)
    assert engine.is_captured
    inputs = [[rig.random(ROWS, WIDTH) for _ in range(CALLS)] for _ in seeds]

    def generators() -> list[torch.Generator]:
        return [torch.Generator(rig.kind).manual_seed(seed) for seed in seeds]

    torch.manual_seed(7)
    given, fresh = generators(), generators()
    expected = [[model(x, g) for x in xs] for xs, g in zip(inputs, fresh, strict=True)]
    got = on_streams(rig, [[(x, g) for x in xs] for xs, g in zip(inputs, given, strict=True)], engine)
    assert not differences(got, expected)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(given, fresh, strict=True))
    following = torch.rand(3, device=rig.kind).cpu()
    torch.manual_seed(7)
    assert torch.equal(following, torch.rand(3, device=rig.kind).cpu()), "somebody drew from the default generator"
    assert_all_differ(drawn for results in got[:-1] for _, drawn in results)
    assert [as_bytes(drawn) for _, drawn in got[-1]] == [as_bytes(drawn) for _, drawn in got[0]]


@SELDOM
@pytest.mark.usefixtures("afresh")
def test_engines_whose_models_hold_a_generator_draw_what_eager_draws(rig: Rig, compiled: Make) -> None:
    seeds = [30, 31]
    models, references = ([Held(seed, rig.kind).to(rig.kind) for seed in seeds] for _ in range(2))
    x = rig.random(ROWS, WIDTH)
    states = [model.generator.get_state() for model in models]
    engines = [compiled(model, x, cuda_graphs=True) for model in models]
    assert all(torch.equal(m.generator.get_state(), s) for m, s in zip(models, states, strict=True)), "a build drew"
    inputs = [[(i, rig.random(ROWS, WIDTH)) for _ in range(CALLS)] for i in range(len(seeds))]
    got = on_streams(rig, inputs, lambda i, x: engines[i](x))
    expected = [[reference(x) for _, x in xs] for reference, xs in zip(references, inputs, strict=True)]
    assert not differences(got, expected)
    assert_all_differ(drawn for results in got for _, drawn in results)


class Seeds(Given):
    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        torch.manual_seed(3)
        return super().forward(x)


@SELDOM
@pytest.mark.usefixtures("afresh")
def test_a_model_that_seeds_does_so_in_each_call(rig: Rig, compiled: Make) -> None:
    model = Seeds()
    engine = compiled(model, rig.random(ROWS, WIDTH), cuda_graphs=True)
    for seed in range(2):
        x = rig.random(ROWS, WIDTH)
        torch.manual_seed(seed)
        got = engine(x), torch.rand(3, device=rig.kind)
        torch.manual_seed(seed)
        assert not differences(got, (model(x), torch.rand(3, device=rig.kind)))
