"""At the ends of the range results on a device with graphs are the CPU's: captured and direct, in both runtimes."""

from __future__ import annotations

import pytest
import torch

from anabranch.check._boundary import special_inputs
from contract.boundary import Operators, differing

#: A device of its own lacks some operators of the CPU; these are run on it.
NAMES = (
    *("neg", "abs", "relu", "clamp", "hardtanh", "leaky_relu", "x + x", "sums of neighbours", "x * x", "x * 0"),
    *("x * 2 / 2", "x + x - x", "x / x", "1 / x", "1 - x", "sum", "mean", "amax, amin", "maximum"),
    *("exp", "log", "sqrt", "sigmoid", "tanh", "gelu", "silu", "elu", "softmax", "log_softmax"),
    *("layer_norm", "max_pool", "avg_pool", "matmul", "where", "isnan, isinf, ==, <", "nan_to_num", "casts"),
)


@pytest.mark.parametrize("graphs", [True, False], ids=["captured", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_results_are_the_cpus(dtype: torch.dtype, graphs: bool, runtime: str) -> None:
    import anabranch.sim  # makes the device

    model, x = Operators(*NAMES), (torch.rand(2, 3, 8) * 2 - 1).to(dtype)
    engine = anabranch.compile(model, [x.to("sim")], runtime=runtime, cuda_graphs=graphs)
    assert engine.plan.captured is graphs
    for name, special in special_inputs(x):
        actual, expected = engine(special.to("sim")), model(special)
        for key in NAMES:
            on_cpu = torch.utils._pytree.tree_map(lambda t: t.cpu(), actual[key])
            assert not differing(on_cpu, expected[key]), (key, name)
    engine.close()
