"""Inputs that share memory at compile or at a first call are still inputs of their own."""

from __future__ import annotations

import pytest
import torch

import anabranch
from anabranch.runtime._context import StaticOutputs


class _Sum(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * 2 + b * 3


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("first_call", [False, True], ids=["compile", "first call"])
def test_one_tensor_passed_twice_is_two_inputs(backend: str, first_call: bool) -> None:
    x, a, b = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 5)
    if first_call:
        engine = anabranch.compile(_Sum(), [torch.randn(2), torch.randn(2)], backend=backend)
        assert torch.allclose(engine(x, x), x * 5)
    else:
        engine = anabranch.compile(_Sum(), [x, x], backend=backend)
    assert torch.allclose(engine(a, b), a * 2 + b * 3)
    assert torch.allclose(engine(x, x), x * 2 + x * 3)


def test_slices_of_one_buffer_are_two_inputs() -> None:
    class Views(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return a.view(-1), a + b

    buffer = torch.randn(8, 5)
    engine = anabranch.compile(Views(), [buffer[:4], buffer[4:]], backend="eager")
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    flat, total = engine(a, b)
    assert flat.data_ptr() == a.data_ptr()
    assert torch.equal(total, a + b)


def test_a_view_that_is_handed_back_follows_the_callers_strides() -> None:
    class Flat(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.reshape(-1), x + 1

    first, second, plain = torch.randn(4, 12)[:, ::2], torch.randn(4, 20)[:, :6], torch.randn(4, 6)
    engine = anabranch.compile(Flat(), [first], backend="eager")
    for x in (first, second, plain):
        flat, plus = engine(x)
        assert torch.equal(flat, x.reshape(-1))
        assert torch.equal(plus, x + 1)
    assert engine(plain)[0].data_ptr() == plain.data_ptr()


def test_outputs_that_overlap_or_have_gaps_are_copied_as_they_lie() -> None:
    y = torch.randn(2, 5)
    for result in (
        y[:, :1].expand(2, 3),
        y[:1].expand(3, 5),
        y[:, ::2],
        y.t(),
        y[0],
        torch.randn(0, 3),
        torch.tensor(2.5),
    ):
        (new,), copies = StaticOutputs([result]).allocate()
        for destination, source in copies:
            destination.copy_(source)
        assert torch.equal(new, result)
        assert new.stride() == result.stride()
        assert new.data_ptr() != result.data_ptr() or not new.numel()
