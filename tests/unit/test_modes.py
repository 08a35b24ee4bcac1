"""Parts of a model that run with autocast turned off, or on, or gradients: eager's bits, whatever they return."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import anabranch
from contract.support import assert_same

pytestmark = pytest.mark.usefixtures("seeded")


def off() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def on() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


class Model(nn.Module):
    def __init__(self, run: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.run, self.a, self.b = run, nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))
        self.count: torch.Tensor

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


def returns_its_input(m: Model, x: torch.Tensor) -> Any:
    with off():
        return x, m.a(x), x.view(-1), 3


def several_results(m: Model, x: torch.Tensor) -> Any:
    with off():
        left, right = m.a(x).chunk(2, -1)
    with off():
        product = left @ right.T @ torch.ones(len(x), 2)
    return right, product


def within_one_that_is_on(m: Model, x: torch.Tensor) -> Any:
    with on():
        y = m.a(x)
        with off():
            z = m.b(y.float())
        return z, m.a(z)


def one_that_is_on_within(m: Model, x: torch.Tensor) -> Any:
    with off():
        y = m.a(x)
        with on():
            z = m.b(y)
        return m.a(z.float()), z


def of_another_device(m: Model, x: torch.Tensor) -> Any:
    with torch.autocast("cuda", dtype=torch.float16, enabled=False):
        return m.a(x)


def among_gradients(m: Model, x: torch.Tensor) -> Any:
    with torch.enable_grad(), off():
        with torch.no_grad():
            y = m.a(x)
        return y * 2


def in_a_branch(m: Model, x: torch.Tensor) -> Any:
    def twice(x: torch.Tensor) -> torch.Tensor:
        with off():
            return m.a(x) * 2

    with off():
        return torch.cond(x.sum() > 0, twice, lambda x: m.b(x), (x,))


def draws(m: Model, x: torch.Tensor) -> Any:
    with off():
        return m.a(x) + torch.randn_like(x)


def writes(m: Model, x: torch.Tensor) -> Any:
    with off():
        m.count.add_(x.sum())
        x.mul_(0.5)
    return m.a(x) + m.count


RUNS = (
    *(returns_its_input, several_results, within_one_that_is_on, one_that_is_on_within, of_another_device),
    *(among_gradients, in_a_branch, draws, writes),
)


@pytest.mark.parametrize("runtime", ["native", "python"])
@pytest.mark.parametrize("run", RUNS)
def test_results_are_eagers(run: Callable[[Any, torch.Tensor], Any], runtime: str) -> None:
    model = Model(run).eval()
    peer = copy.deepcopy(model)
    with anabranch.compile(model, [torch.randn(3, 8)], backend="eager", runtime=runtime) as engine:
        call = engine.session() if run is writes else engine
        for sign in (1, -1, 1):
            x = sign * torch.rand(3, 8)
            y = x.clone()
            with torch.no_grad():
                torch.manual_seed(7)
                result = call(x)
                torch.manual_seed(7)
                expected = peer(y)
            assert torch.equal(x, y)
            for a, e in zip(pytree.tree_leaves(result), pytree.tree_leaves(expected), strict=True):
                if isinstance(e, torch.Tensor):
                    assert a.dtype is e.dtype
                    assert_same(a, e)
                    assert (a is x) == (e is y)
                else:
                    assert a == e
