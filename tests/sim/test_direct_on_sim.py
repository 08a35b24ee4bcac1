"""Direct calls whose sizes and numbers depend on data, on a device with queues: the host waits where it looks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from contract.numbers import MODELS, assert_eagers, inputs_of


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_results_are_the_cpus(model: nn.Module, runtime: str) -> None:
    import anabranch.sim  # makes the device

    on_sim = torch.empty(5, 4, device="sim")
    engine = anabranch.compile(model.eval(), [on_sim], runtime=runtime, backend="eager", cuda_graphs=False)
    for x in inputs_of(29):
        with torch.sim.stream(torch.sim.Stream()):
            assert_eagers(engine(x.to("sim")), model(x), strides=False)
