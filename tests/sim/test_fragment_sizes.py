"""Dynamo's graphs with symbols on the simulated device: shapes that repeat are captured aside, while threads call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from anabranch import Dim, Input, dynamo
from contract.support import Rig, assert_same, has_memory, in_time, on_threads, runtime  # noqa: F401  # a fixture

pytestmark = pytest.mark.parametrize("rig", ["lazy"], indirect=True)
SIZES = (3, 7, 4, 2, 9)


class Broken(nn.Module):
    """In two graphs, and the second one needs the sizes of the first one's inputs."""

    def forward(self, x: torch.Tensor) -> Any:
        n, t = x.shape
        y = (x * 2 + n).tanh()
        if not has_memory(y):
            y = y + 1
        return (y * 3 + t).reshape(n * t) + x.reshape(t * n).exp(), n * t


@pytest.fixture(autouse=True)
def no_sizes_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _check_on_threads(rig: Rig, run: Any, engines: list[Any]) -> None:
    model = Broken()
    given = {n: rig.random(n, 5) for n in SIZES}
    expected = {n: model(x) for n, x in given.items()}
    rig.module.synchronize()
    results: list[list[Any]] = [[] for _ in range(8)]

    def work(i: int) -> None:
        with rig.module.stream(rig.stream()):
            results[i] = [(n, run(given[n])) for turn in range(12) for n in [SIZES[(turn // 3 + i) % len(SIZES)]]]

    on_threads(8, work)
    rig.module.synchronize()
    for n, result in (pair for own in results for pair in own):
        assert_same(result, expected[n], f"of {n} rows")
    for n in (n for n in SIZES for _ in range(2)):  # one at a time is built, and another may not have been asked for
        run(given[n])
        assert all(in_time(engine._shapes.wait) for engine in engines)
    before = [engine.stats().graph_calls for engine in engines]
    for n in SIZES:
        assert_same(run(given[n]), expected[n], f"of {n} rows, once more")
    for engine, calls in zip(engines, before, strict=True):
        stats = engine.stats()
        assert stats.specializations == 1
        assert stats.captures >= len(SIZES)
        assert stats.graph_calls == calls + len(SIZES)


def test_shapes_of_torch_compiles_graphs_are_captured_aside(rig: Rig, runtime: str) -> None:  # noqa: F811
    before = set(dynamo._fragments)
    options = {"backend": "eager", "runtime": runtime, "cuda_graphs": True}
    run = torch.compile(Broken(), backend="anabranch", dynamic=True, options=options)
    x = rig.random(6, 5)
    assert_same(run(x), Broken()(x))
    engines = [engine for fragment in set(dynamo._fragments) - before for engine in fragment.engines]
    assert len(engines) == 2
    _check_on_threads(rig, run, engines)


def test_shapes_of_a_model_in_fragments_are_captured_aside(rig: Rig, runtime: str) -> None:  # noqa: F811
    given = Input((Dim("batch", 2, 64), 5), device="sim")
    with anabranch.compile(Broken(), [given], backend="eager", runtime=runtime, cuda_graphs=True) as engine:
        _check_on_threads(rig, engine, engine._guarded.engines())
