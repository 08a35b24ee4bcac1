"""Results on a device with graphs are the CPU's, whichever way a call runs: lazy bits, types, layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from anabranch._judge import differences
from contract.support import Fn


def spectrum(z: torch.Tensor) -> Any:
    y = z * 2 - 1j
    return y.conj(), [y, y.mH], y.conj().imag, (y.conj()[1:], y.real), {"size": y.shape, "dtype": y.dtype}


def packs(x: torch.Tensor) -> Any:
    return x.contiguous(), x.reshape(-1), x * 2, (x + 1)[:, 1], x.t()


INPUTS: dict[str, tuple[Callable[..., Any], Callable[[], torch.Tensor]]] = {
    "complex": (spectrum, lambda: torch.randn(3, 4, dtype=torch.complex64)),
    "lazy conjugate": (spectrum, lambda: torch.randn(3, 4, dtype=torch.complex64)),
    "strided": (packs, lambda: torch.randn(3, 8)),
    "dense": (packs, lambda: torch.randn(3, 4)),
}


@pytest.mark.parametrize(
    "fn",
    [
        lambda table, ids: nn.functional.embedding(ids - 3, table),
        lambda table, ids: table.gather(0, (ids - 3)[:, None]),
        lambda table, ids: table[ids - 3] + 1,
        lambda table, ids: table[ids - 3][table[ids - 3] > 0.3],
    ],
    ids=["embedding", "gather", "index", "data-dependent"],
)
def test_a_model_that_takes_no_zeros_is_built(fn: Callable[..., torch.Tensor], runtime: str) -> None:
    """On a device with queues, what is wrong with a made-up input would be an error of the device."""
    import anabranch.sim

    table = torch.arange(40.0).view(10, 4).cos()
    on_sim = table.to("sim")
    model = Fn(lambda ids: fn(on_sim if ids.device.type == "sim" else table, ids))
    # Values at compile do not count.
    engine = anabranch.compile(model, [torch.zeros(5, dtype=torch.int64, device="sim")], runtime=runtime)
    for k in range(3):
        ids = torch.tensor([3, 12, 7, 3 + k, 5])
        assert torch.equal(engine(ids.to("sim")).cpu(), model(ids))


@pytest.mark.parametrize("way", ["graph", "direct"])
@pytest.mark.parametrize("name", INPUTS)
def test_results_are_the_cpus(name: str, way: str, runtime: str) -> None:
    import anabranch.sim  # makes the device

    fn, make = INPUTS[name]
    seen = {"lazy conjugate": torch.Tensor.conj, "strided": lambda x: x[:, ::2]}.get(name, lambda x: x)
    engine = anabranch.compile(
        Fn(fn), [seen(make().to("sim"))], runtime=runtime, cuda_graphs=way == "graph", backend="eager"
    )
    for _ in range(2):
        x = make()
        given, wanted = engine(seen(x.to("sim"))), fn(seen(x))
        leaves, structure = torch.utils._pytree.tree_flatten(given)
        bits = [(y.is_conj(), y.is_neg()) for y in leaves if isinstance(y, torch.Tensor)]
        on_cpu = torch.utils._pytree.tree_unflatten(
            [y.cpu() if isinstance(y, torch.Tensor) else y for y in leaves], structure
        )
        expected = [y for y in torch.utils._pytree.tree_leaves(wanted) if isinstance(y, torch.Tensor)]
        assert not differences(
            [y for y in torch.utils._pytree.tree_leaves(on_cpu) if isinstance(y, torch.Tensor)],
            [y.clone() for y in expected],
            strides=False,
        )
        assert [y.stride() for y in leaves if isinstance(y, torch.Tensor)] == [y.stride() for y in expected]
        assert bits == [(y.is_conj(), y.is_neg()) for y in expected]
    stats = engine.stats()
    assert (stats.graph_calls, stats.direct_calls) == ((2, 0) if way == "graph" else (0, 2))
