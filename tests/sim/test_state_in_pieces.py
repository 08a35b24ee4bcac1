"""Models that write, in pieces: captured, direct, captured. What they keep, give and draw is eager's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from anabranch.race import check_plan
from contract.support import Make, Rig, assert_same, on_threads


class Noisy(nn.Module):
    """Draws between two parts that write."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("h", torch.zeros(2, 8))
        self.register_buffer("rows", torch.zeros(6, 8))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = torch.tanh(self.a(x) + self.h) * 0.5
        self.rows.index_copy_(0, (self.count % 6).reshape(1), u[:1])
        w = torch.relu(self.b(u + torch.rand_like(u))) + self.rows.mean(0)
        self.h = w * 0.3 + self.h * 0.7
        self.count.add_(1)
        return w.sum(-1) + self.h.mean()


class Choosing(nn.Module):
    """Depends on data between two parts that write: a buffer twice, and an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.register_buffer("h", torch.zeros(8))

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        u = torch.tanh(self.a(x)) * 2 + self.h
        self.h = self.h * 0.9 + u.mean(0) * 0.1
        chosen = u[u > 0.5]
        out.mul_(0.5).add_(chosen.sum() + u.abs().max()).clamp_(-9, 9)
        y = torch.tanh(u * out.mean() + 1) * chosen.numel()
        self.h.add_(y.mean() * 1e-3)
        return y + self.h.sum()


def given(rig: Rig, kind: type[nn.Module]) -> list[torch.Tensor]:
    return [rig.random(2, 8)] if kind is Noisy else [rig.random(4, 8), rig.random(8)]


def model_of(rig: Rig, kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind().eval().requires_grad_(False).to(rig.device())


@pytest.mark.parametrize("kind", [Noisy, Choosing])
def test_state_inputs_and_draws_are_eagers(rig: Rig, compiled: Make, kind: type[nn.Module]) -> None:
    model = model_of(rig, kind)
    engine: Any = compiled(model, *given(rig, kind), cuda_graphs=True)
    (signature,) = engine.summary()["signatures"]
    assert [piece["captured"] for piece in signature["pieces"]][:3] == [True, False, True]
    kinds = {b.name: b.kind for b in engine.plan.buffers}
    assert kinds["state h"] == "state"
    assert check_plan(engine.plan).ok
    session, own = engine.session(), copy.deepcopy(model)
    stream = rig.stream()
    rig.module.synchronize()  # the copy of the model is there for eager
    for seed in range(8):
        with rig.module.stream(stream):
            xs = given(rig, kind)
            ys = [x.clone() for x in xs]
            torch.manual_seed(seed)
            got = session(*xs)
            torch.manual_seed(seed)
            assert_same(got, own(*ys))
            assert_same(xs, ys)
    assert_same(dict(session.state), {name: b for name, b in own.named_buffers() if name in session.state})


def test_sessions_on_threads_are_each_as_one_alone(rig: Rig, compiled: Make) -> None:
    engine: Any = compiled(model_of(rig, Choosing), *given(rig, Choosing), cuda_graphs=True, max_contexts=4)
    calls = [[given(rig, Choosing) for _ in range(5)] for _ in range(4)]
    alone = []
    for series in calls:
        session = engine.session()
        alone.append([session(x, out.clone()) for x, out in series])
    rig.module.synchronize()

    def work(i: int) -> None:
        session = engine.session()
        streams = [rig.stream(), rig.stream()]
        for k, (x, out) in enumerate(calls[i]):
            with rig.module.stream(streams[k % 2]):
                streams[k % 2].wait_stream(rig.module.default_stream())
                assert_same(session(x, out.clone()), alone[i][k])

    on_threads(4, work)
