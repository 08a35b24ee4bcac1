"""Models are built on integers for which their indices and divisors are valid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import anabranch
from anabranch.export import Signature, export_program, valid_integer


class Embeds(nn.Module):
    """Ids count from ``first``."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 4)
        self.first = first

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids - self.first).cumsum(0)


class Last(nn.Module):
    """The last element of each row that counts."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return x.gather(1, (lengths - 1)[:, None])


class Divides(nn.Module):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return x + 12 // n


@pytest.mark.parametrize("runtime", ["python", "native"])
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Embeds(1), [torch.tensor([1, 5, 12])]),
        (Embeds(7), [torch.tensor([7, 9, 18, 8])]),
        (Last(), [torch.rand(3, 5), torch.tensor([1, 5, 2])]),
        (Divides(), [torch.rand(4), torch.tensor([1, 5, 2, 3])]),
    ],
    ids=["from one", "from seven", "lengths", "divisors"],
)
def test_a_model_that_takes_no_zeros_is_compiled(model: nn.Module, inputs: list[Any], runtime: str) -> None:
    engine = anabranch.compile(model, inputs, backend="eager", runtime=runtime)
    with torch.no_grad():
        assert torch.equal(engine(*inputs), model(*inputs))
        shorter = [x[:2] for x in inputs]
        assert torch.equal(engine(*shorter), model(*shorter))


def graph_of(model: nn.Module, inputs: list[torch.Tensor]) -> tuple[fx.Graph, Any]:
    program = export_program(model.eval(), inputs, {})
    return program.module.graph, Signature.of(inputs, program.structure).tensors


def test_the_smallest_valid_integer_is_taken() -> None:
    assert valid_integer(*graph_of(Embeds(0), [torch.tensor([1, 5, 11])])) == (0, "")
    assert valid_integer(*graph_of(Embeds(7), [torch.tensor([7, 9, 18])])) == (7, "")
    assert valid_integer(*graph_of(Last(), [torch.rand(3, 5), torch.tensor([1, 5, 2])])) == (1, "")
    integer, why = valid_integer(*graph_of(Embeds(300), [torch.tensor([300, 301])]))
    assert integer == 0
    assert "range" in why


@torch.library.custom_op("anabranch_test::elsewhere", mutates_args=(), device_types="cuda")
def elsewhere(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@elsewhere.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_what_the_cpu_cannot_compute_is_not_held_against_the_inputs() -> None:
    class Elsewhere(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return elsewhere(ids) * 2

    assert valid_integer(*graph_of(Elsewhere(), [torch.tensor([1, 2])])) == (0, "")


def test_values_that_were_given_serve_where_no_integer_does() -> None:
    ids = torch.tensor([300, 304, 311])
    model = Embeds(300).eval()
    engine = anabranch.compile(model, [ids], backend="eager", runtime="python")
    with torch.no_grad():
        assert torch.equal(engine(ids), model(ids))


def test_inputs_at_fault_are_named() -> None:
    with pytest.raises(anabranch.InputError, match="does not run on inputs like these"):
        anabranch.compile(Embeds(300), [torch.tensor([40, 2])], backend="eager", runtime="python")
