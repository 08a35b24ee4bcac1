"""A trace of another computation than the model's call is found on a device with streams, and nobody waits for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from contract.support import PATHS, Make, Rig, assert_same


class Asks(nn.Module):
    """Computes something else where it is told that it is traced, and a mask hides nothing."""

    def __init__(self, told: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self._told = told

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        is_traced = torch.compiler.is_compiling() if self._told else type(x) is not torch.Tensor
        return y.masked_fill(mask, 0.0) if not is_traced else y


def inputs(rig: Rig) -> list[torch.Tensor]:
    return [rig.random(4, 8), rig.random(4, 8) > 0]


@PATHS
def test_masks_that_are_given_show_what_made_up_ones_do_not(rig: Any, compiled: Make, graphs: bool) -> None:
    rig.core.policy("fifo", 0)  # else the stream still has poison to write where something was freed
    engine = compiled(Asks(), *inputs(rig), cuda_graphs=graphs, require_full=True)
    assert "the model asks whether it is traced" in engine.explain()
    with pytest.raises(anabranch.UnsupportedModel, match="computes something else than in eager"):
        compiled(Asks(told=False), *inputs(rig), cuda_graphs=graphs, require_full=True)


@PATHS
def test_a_call_with_another_signature_waits_for_no_stream(rig: Rig, compiled: Make, graphs: bool) -> None:
    """Inputs are compared on where they are there already; here they are not."""
    model = Asks().to(rig.device())
    engine = compiled(model, *inputs(rig), cuda_graphs=graphs, dynamic=False)
    x, mask = rig.random(6, 8), rig.random(6, 8) > 0
    expected = engine(x, mask)
    stream = rig.stream()
    other = compiled(model, *inputs(rig), cuda_graphs=graphs, dynamic=False)
    latch = rig.latch(stream)
    with rig.module.stream(stream):
        y = other(x, mask)
    latch.open()
    stream.synchronize()
    assert_same(y, expected)
