"""Threads that come upon a part of a model at once: it gets one graph, and one engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from anabranch.runtime._graph_key import key_of
from contract.support import on_threads

pytestmark = pytest.mark.usefixtures("seeded")


def key(run: Callable[..., Any], *inputs: Any, autocasts: Any = ()) -> Any:
    """Of the graph that Dynamo makes of a function."""
    found: list[Any] = []

    def backend(gm: Any, examples: Any) -> Any:
        found.append(key_of(gm, examples, autocasts))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(run, backend=backend, dynamic=False)(*inputs)
    (made,) = found
    return made


X = torch.ones(2, 3)


def test_the_same_graph_has_the_same_key() -> None:
    def run(x: torch.Tensor) -> Any:
        return torch.relu(x + 1)[0], x.view(-1)

    assert key(run, X) == key(run, X.clone()) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((lambda x: x + 1, X), (lambda x: x + 1.0, X)),
        ((lambda x: x * 1, X), (lambda x: x * True, X)),
        ((lambda x: x + 1, X), (lambda x: x - 1, X)),
        ((lambda x: x.sum(0), X), (lambda x: x.sum(1), X)),
        ((lambda x, y: (x + 1) - y, X, X), (lambda x, y: y - (x + 1), X, X)),
        ((lambda x: x * 2, X), (lambda x: x * 2, torch.ones(2, 4))),
        ((lambda x: x * 2, X), (lambda x: x * 2, torch.ones(3, 2).t())),
        ((lambda x: x * 2, X), (lambda x: x * 2, X.double())),
        ((lambda x: x * 2, X), (lambda x: x * 2, nn.Parameter(X, requires_grad=False))),
        ((lambda x: x * 2, X), (lambda x: x * 2, X.clone().requires_grad_())),
    ],
)
def test_what_computes_something_else_has_another(one: Any, other: Any) -> None:
    assert key(*one) != key(*other)


def test_modes_are_part_of_it() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with torch.no_grad():
        without = key(run, X)
    assert without != key(run, X)
    assert key(run, X, autocasts=[{"dtype": torch.float16}]) != key(run, X)


def test_of_what_holds_something_nobody_can_tell() -> None:
    def run(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    assert key(run, X) is None


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if y.sum() > 1e3:
            return torch.relu(self.b(y)) * 2
        return torch.tanh(self.b(y)) + 1


@pytest.mark.parametrize("runtime", ["native", "python"])
def test_threads_that_come_upon_a_branch_at_once_share_its_graph(runtime: str) -> None:
    model = Branches().eval().requires_grad_(False)
    engine = anabranch.compile(model, [torch.randn(4, 8)], backend="eager", runtime=runtime)
    assert len(engine.summary()["fragments"]["graphs"]) == 2
    x = 1e6 * model.a.weight.sum(0).sign().repeat(4, 1)
    barrier, results = threading.Barrier(4), [X] * 4

    def work(i: int) -> None:
        barrier.wait()
        for _ in range(5):
            results[i] = engine(x)

    on_threads(4, work)
    for y in results:
        torch.testing.assert_close(y, model(x))
    graphs = engine.summary()["fragments"]["graphs"]
    assert len(graphs) == 3
    assert [g["by_operators"] for g in graphs] == [""] * 3
    assert engine.stats().specializations == 3
