"""At the ends of the range results on a GPU are eager's there, in that precision, on every path.

What a compiler does otherwise is what ``explain()`` names, and never a number where eager gives infinity or NaN.
"""

from __future__ import annotations

import functools

import pytest
import torch

import anabranch
from contract.boundary import OPERATORS, Operators, found
from contract.support import PATHS, Make
from gpu.support import Gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@functools.cache
def is_named(name: str, dtype: torch.dtype, backend: str) -> bool:
    """Whether ``explain()`` says that this operator's kernels differ."""
    inputs = [torch.rand(2, 3, 8, dtype=dtype, device="cuda")]
    with anabranch.compile(Operators(name), inputs, backend=backend) as engine:
        return "at the ends of the range, other than eager: " in engine.explain()


@DTYPES
@PATHS
@pytest.mark.parametrize("backend", ["eager", "inductor", "tensorrt"])
def test_what_differs_from_eager_is_named(
    gpu: Gpu, compiled: Make, backend: str, graphs: bool, dtype: torch.dtype
) -> None:
    if backend == "tensorrt":
        pytest.importorskip("tensorrt_rtx")
    model, x = Operators(), (gpu.random(2, 3, 8) * 2 - 1).to(dtype)
    engine = compiled(model, x, backend=backend, cuda_graphs=graphs)
    got = found(engine, model, x)
    assert not {name for name, how in got.items() if "finite" in how}
    assert set(got) == {name for name in got if backend != "eager" and is_named(name, dtype, backend)}


def test_numbers_that_overflow_between_operators_do_so_in_every_kernel(gpu: Gpu, compiled: Make) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (x + x) - x, (x * 2) / 2

    x = gpu.random(64, 33, dtype=torch.float16) * 0.4 + 3e4
    x[:, ::3] = 4e4
    expected = Model()(x)
    assert all(bool(y[:, ::3].isinf().all()) and bool(y[:, 1::3].isfinite().all()) for y in expected)
    for y, e in zip(compiled(Model(), x, backend="inductor")(x), expected, strict=True):
        assert torch.equal(y, e)
    assert set(OPERATORS) >= {"x + x - x", "x * 2 / 2"}
