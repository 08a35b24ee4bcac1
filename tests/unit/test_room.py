"""A session whose model would write past the end of its state says so, before anything is queued."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import anabranch
from anabranch import Dim, Input

LENGTH, WIDTH = 6, 3


class Cache(nn.Module):
    """``write(cache, at, x)`` writes the rows of ``x`` at the positions ``at``."""

    def __init__(self, write: Callable[..., object], dtype: torch.dtype = torch.int64) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("rows", torch.zeros(LENGTH, WIDTH))
        self.register_buffer("at", torch.zeros((), dtype=dtype))
        self.places = nn.Embedding(LENGTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.write(self, self.at + torch.arange(x.shape[0]), x)
        self.at.add_(x.shape[0])
        return self.rows.sum(0)


def copied(self: Cache, at: torch.Tensor, x: torch.Tensor) -> None:
    self.rows.index_copy_(0, at, x)


def put(self: Cache, at: torch.Tensor, x: torch.Tensor) -> None:
    self.rows[at] = x


def added(self: Cache, at: torch.Tensor, x: torch.Tensor) -> None:
    self.rows.index_add_(0, at, x)


def scattered(self: Cache, at: torch.Tensor, x: torch.Tensor) -> None:
    self.rows.scatter_(0, at[:, None].expand_as(x), x)


def looked_up(self: Cache, at: torch.Tensor, x: torch.Tensor) -> None:
    self.rows.mul_(0.5).add_(self.places(at).sum(0) + x.sum(0))


def in_a_ring(self: Cache, at: torch.Tensor, x: torch.Tensor) -> None:
    self.rows.index_copy_(0, at % LENGTH, x)


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("write", [copied, put, added, scattered, looked_up])
def test_a_call_past_the_end_is_refused(runtime: str, write: Callable[..., object], dtype: torch.dtype) -> None:
    engine = anabranch.compile(Cache(write, dtype).eval(), [rows(2)], backend="eager", runtime=runtime)
    session = engine.session()
    for _ in range(LENGTH // 2):
        session(rows(2))
    before = session.state
    for _ in range(2):
        with pytest.raises(anabranch.SessionFull, match=r"'at' is 6, .* up to 4\. Call session\.reset\(\)"):
            session(rows(2))
    assert all(torch.equal(x, before[name]) for name, x in session.state.items()), "nothing was written"
    session.reset()
    session(rows(2))


def test_a_ring_has_no_end(runtime: str) -> None:
    session = anabranch.compile(Cache(in_a_ring).eval(), [rows(2)], backend="eager", runtime=runtime).session()
    for _ in range(5 * LENGTH):
        session(rows(2))


def test_the_end_depends_on_how_much_a_call_writes(runtime: str) -> None:
    given = [Input((Dim("count", 1, LENGTH), WIDTH))]
    engine = anabranch.compile(Cache(copied).eval(), given, backend="eager", runtime=runtime)
    session = engine.session()
    session(rows(4))
    with pytest.raises(anabranch.SessionFull, match=r"'at' is 4, .* up to 3"):
        session(rows(3))
    session(rows(2))
    with pytest.raises(anabranch.SessionFull, match="up to 5"):
        session(rows(1))


def test_clones_and_loaded_states_go_on_counting(runtime: str) -> None:
    engine = anabranch.compile(Cache(copied).eval(), [rows(2)], backend="eager", runtime=runtime)
    session = engine.session()
    session(rows(2))
    session(rows(2))
    for other in (session.clone(), engine.session(session.state)):
        other(rows(2))
        with pytest.raises(anabranch.SessionFull):
            other(rows(2))
    session(rows(2))


def test_a_counter_that_the_model_sets_is_not_followed(runtime: str) -> None:
    class Set(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.zeros(LENGTH, WIDTH))
            self.register_buffer("at", torch.zeros((), dtype=torch.int64))

        def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            self.rows.index_copy_(0, self.at + torch.arange(x.shape[0]), x)
            self.at.copy_(at)
            return self.rows.sum(0)

    at = torch.tensor(1)
    session = anabranch.compile(Set().eval(), [rows(2), at], backend="eager", runtime=runtime).session()
    for n in range(3 * LENGTH):
        session(rows(2), at.fill_(n % (LENGTH - 1)))
