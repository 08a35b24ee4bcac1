"""Results on a GPU are eager's there: lazy bits, types, layout; and no made-up input costs the process its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from anabranch._judge import Rounding, differences
from gpu.support import Gpu


class Fn(nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn
        self.register_buffer("table", torch.linspace(-1, 1, 40).view(10, 4))

    def forward(self, *args: Any) -> Any:
        return self.fn(self, *args)


def spectrum(m: Fn, z: torch.Tensor) -> Any:
    y = z * 2 - 1j
    return y.conj(), [y, y.mH], y.conj().imag, (y.conj()[1:], y.real), {"size": y.shape, "dtype": y.dtype}


def packs(m: Fn, x: torch.Tensor) -> Any:
    return x.contiguous(), x.reshape(-1), x * 2, (x + 1)[:, 1], x.t()


def writes(m: Fn, x: torch.Tensor) -> Any:
    v = x.sin()
    nn.functional.dropout(v, 0.5, False).mul_(3)
    v.expand(1, *v.shape)[0, 1] = 2.0
    return v, v.t().contiguous().t().triu_()


def complex_numbers(k: int) -> torch.Tensor:
    return torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(k)).cuda()


def real_numbers(k: int) -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(k)).cuda()


INPUTS: dict[str, tuple[Callable[..., Any], Callable[[int], torch.Tensor]]] = {
    "complex": (spectrum, complex_numbers),
    "lazy conjugate": (spectrum, lambda k: complex_numbers(k).conj()),
    "strided": (packs, lambda k: real_numbers(k)[:, ::2]),
    "dense": (packs, real_numbers),
    "writes": (writes, real_numbers),
}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("way", ["graph", "direct"])
@pytest.mark.parametrize("name", INPUTS)
def test_results_are_eagers(gpu: Gpu, name: str, way: str, backend: str, runtime: str) -> None:
    fn, make = INPUTS[name]
    model = Fn(fn).eval().cuda()
    engine = anabranch.compile(model, [make(0)], runtime=runtime, cuda_graphs=way == "graph", backend=backend)
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        for k in range(1, 4):
            x = make(k)
            given, wanted = engine(x), model(x)
            found = differences(given, wanted, rounding=Rounding(), inputs=[x])
            if backend == "inductor" and x.is_complex():  # a view of another complex result can be a copy of it
                found = [line for line in found if "share memory" not in line]
            assert not found
            bits = [
                [(y.is_conj(), y.is_neg()) for y in torch.utils._pytree.tree_leaves(r) if isinstance(y, torch.Tensor)]
                for r in (given, wanted)
            ]
            assert bits[0] == bits[1]


#: What is made of ids that count from one, or of lengths: zeros would be out of range, and end the process.
OF_INTEGERS: dict[str, Callable[[Fn, torch.Tensor], Any]] = {
    "embedding": lambda m, ids: nn.functional.embedding(ids - 1, m.table),
    "gather": lambda m, ids: m.table.gather(0, (ids - 1)[:, None]),
    "index": lambda m, ids: m.table[ids - 1, 1] * 2,
    "index_select": lambda m, ids: m.table.index_select(0, ids - 1),
    "scatter": lambda m, ids: torch.zeros_like(m.table).scatter(0, (ids - 1)[:, None], 1.0),
    "scatter an integer": lambda m, ids: torch.zeros_like(m.table).scatter(0, (ids - 1)[:, None].expand(6, 4), 1),
    "far": lambda m, ids: nn.functional.embedding(ids - 1 + 0 * ids.clamp(3, 3), m.table),
    "data-dependent": lambda m, ids: m.table[ids - 1][m.table[ids - 1] > 0],
}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", OF_INTEGERS)
def test_made_up_integers_are_valid_indices(gpu: Gpu, name: str, backend: str, runtime: str) -> None:
    model = Fn(OF_INTEGERS[name]).eval().cuda()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 11, (6,), generator=generator).cuda()
    engine = anabranch.compile(model, [torch.empty_like(ids)], runtime=runtime, backend=backend)
    for _ in range(3):
        assert not differences(engine(ids), model(ids), rounding=Rounding())
        ids = torch.randint(1, 11, (6,), generator=generator).cuda()
    torch.cuda.synchronize()


def constants(m: Fn, x: torch.Tensor) -> Any:
    y = x.masked_fill(torch.ones(3, 8).tril().bool().logical_not().to(x.device), -5.0)
    y = y + torch.arange(8.0).to(x.device) * torch.tensor([[0.5], [1.5], [2.0]]).to(x.device)
    y = y[:, torch.tensor([2, 0, 3, 7])] + (~torch.zeros(3, 4).to(x.device, torch.bool)).cumsum(1, dtype=x.dtype)
    y = y.to(x.dtype).clone().index_put_((torch.tensor([0, 2]),), torch.tensor(7.0, dtype=x.dtype))
    return torch.where(y > 0, torch.tensor(0.3, dtype=x.dtype), y * torch.tensor(0.1)), x * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_constants_made_on_the_cpu_are_captured(gpu: Gpu, backend: str, dtype: torch.dtype, runtime: str) -> None:
    model = Fn(constants).eval().cuda()
    engine = anabranch.compile(model, [real_numbers(0).to(dtype)], runtime=runtime, backend=backend, cuda_graphs=True)
    for k in range(3):
        x = real_numbers(k).to(dtype)
        assert not differences(engine(x), model(x), rounding=Rounding(), inputs=[x])
    assert engine.stats().graph_calls == 3
