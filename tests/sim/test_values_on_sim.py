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


#: Models that make tensors on the CPU, whatever the device of their input.
MAKE_CONSTANTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a ramp": lambda x: x + torch.arange(4.0).to(x.device),
    "a mask": lambda x: x.masked_fill(torch.ones(3, 4).tril().bool().logical_not().to(x.device), -5.0),
    "one number all over": lambda x: x * torch.full((4,), 3).to(x.device),
    "zeros, and more made of them": lambda x: x + (~torch.zeros(3, 4).to(x.device, torch.bool)).cumsum(1),
    "numbers of the code": lambda x: x * torch.tensor([1.5, 2.0, -1.0, 0.25]).to(x.device),
    "an index": lambda x: x[:, torch.tensor([2, 0, 3])] + x[:, torch.arange(3)],
    "a written index": lambda x: x.clone().index_put_((torch.tensor([0, 2]),), torch.tensor(7.0)),
    "single numbers": lambda x: torch.where(x > 0, torch.tensor(0.3), x * torch.tensor(0.1)),
    "strides": lambda x: x + torch.arange(12.0).view(4, 3).t().to(x.device),
    "a result": lambda x: (x + 1, torch.arange(4.0).to(x.device), torch.zeros(2, 2).to(x.device)[0]),
    "results in one memory": lambda x: shared(torch.arange(8.0).view(2, 4).to(x.device), x),
    "a result, and used": lambda x: used(torch.arange(4.0).to(x.device), x),
}


def shared(table: torch.Tensor, x: torch.Tensor) -> Any:
    return x + table[1], table, table[1], table.t()


def used(table: torch.Tensor, x: torch.Tensor) -> Any:
    return x + table.cumsum(0), table[1:], x * table


@pytest.mark.parametrize("name", MAKE_CONSTANTS)
def test_constants_are_where_the_work_is(name: str, runtime: str) -> None:
    import anabranch.sim

    fn = MAKE_CONSTANTS[name]
    engine = anabranch.compile(Fn(fn), [torch.empty(3, 4, device="sim")], runtime=runtime, backend="eager")
    for k in range(3):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(k))
        given, wanted = engine(x.to("sim")), fn(x)
        given = given if isinstance(given, tuple) else (given,)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        assert not differences([y.cpu() for y in given], [w.clone() for w in wanted], strides=False)
        places = [[y.untyped_storage().data_ptr() for y in ys] for ys in (given, wanted)]
        assert [p.index(own) for p in places[:1] for own in p] == [p.index(own) for p in places[1:] for own in p]
        for y in given:
            y.fill_(-1.0)  # no later call may return it again
    on_cpu = [s for s in engine.plan.steps if "cpu" in str(s).lower()]
    assert not on_cpu
    assert engine.stats().graph_calls == 3


class Keeps(nn.Module):
    """Keeps tensors on the CPU that are no buffers: ``to`` does not move them."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn
        self.line = torch.tensor([1.5, 2.0, -1.0, 0.25])
        self.lines = [torch.arange(4.0), (torch.tensor([0.5, 3.0, 1.0, -2.0]), torch.ones(3, 4).tril() > 0)]
        self.order = {"columns": torch.tensor([2, 0, 3])}
        self.number = torch.tensor(0.7)
        self.scale = nn.Parameter(torch.tensor([3.0, 1.0, 2.0, 0.5]), requires_grad=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(self, x)


KEPT: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "moved": lambda m, x: x * m.line.to(x.device) + m.scale,
    "in containers": lambda m, x: (x + m.lines[0].to(x)).masked_fill(m.lines[1][1].to(x.device), 0.5),
    "computed with, and moved": lambda m, x: x + torch.cat([m.line[:2].clamp(0, 1), m.lines[1][0][2:]]).to(x.device),
    "joined with what the code makes": lambda m, x: x - (m.line + torch.arange(4)).to(x.device) * m.scale,
    "an index": lambda m, x: x[:, m.order["columns"]] * 2,
    "a single number": lambda m, x: torch.where(x > m.number, x * m.number, m.number.to(x.device)),
    "a result, too": lambda m, x: (x * m.line.to(x.device), m.line.to(x.device) * 2, m.line * 3),
}


@pytest.mark.parametrize("name", KEPT)
def test_tensors_that_a_model_keeps_on_the_cpu_are_no_reason_for_direct_calls(name: str, runtime: str) -> None:
    import anabranch.sim  # makes the device

    model = Keeps(KEPT[name]).eval()
    placed = Keeps(KEPT[name]).eval().to("sim")
    engine = anabranch.compile(placed, [torch.empty(3, 4, device="sim")], runtime=runtime, backend="eager")
    for k in range(3):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(k))
        given, wanted = engine(x.to("sim")), model(x)
        given = given if isinstance(given, tuple) else (given,)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for y, w in zip(given, wanted, strict=True):
            assert torch.equal(y.cpu(), w)
            y.fill_(-1.0)
    if name != "a result, too":
        assert engine.stats().graph_calls == 3, engine.explain()
    assert torch.equal(placed.line, model.line)


def test_of_a_model_in_fragments_likewise(runtime: str) -> None:
    import anabranch.sim  # makes the device

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x * m.line.to(x.device) + m.lines[1][0].clamp(0, 1).to(x.device)
        if y.sum() > 0:
            y = y - m.lines[0].to(x)
        return (y * m.scale).tanh()

    model, placed = Keeps(forward).eval(), Keeps(forward).eval().to("sim")
    engine = anabranch.compile(placed, [torch.ones(3, 4, device="sim")], runtime=runtime, backend="eager")
    for k in range(6):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(k))
        assert torch.equal(engine(x.to("sim")).cpu(), model(x))
    graphs = engine.summary()["fragments"]["graphs"]
    assert len(graphs) >= 2
    assert all(made["captured"] for graph in graphs for e in graph["engines"] for made in e["signatures"])


def test_a_tensor_on_the_cpu_that_a_model_writes_is_refused(runtime: str) -> None:
    import anabranch.sim  # makes the device

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.line += 1
        y: torch.Tensor = x * m.line.to(x.device)
        return y

    placed = Keeps(forward).eval().to("sim")
    with pytest.raises(anabranch.UnsupportedModel, match="changes 'line' from call to call"):
        anabranch.compile(placed, [torch.ones(3, 4, device="sim")], runtime=runtime, backend="eager")
    assert torch.equal(placed.line, torch.tensor([1.5, 2.0, -1.0, 0.25]))


#: Models with a result on the CPU.
ON_CPU: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "made of nothing": lambda m, x: (x + m.scale, torch.arange(4) * 2),
    "of what is kept there": lambda m, x: (x * 2, m.line * 3, m.line[1:]),
    "copied from the device": lambda m, x: (x + 1, x.cpu() - m.line, (x * m.scale).sum().cpu()),
    "beside a graph": lambda m, x: ((x * m.scale + 1).tanh().softmax(1).cumsum(0) - x, torch.zeros(2, 3)),
    "of sizes": lambda m, x: (x + 1, torch.tensor([x.shape[0], 7])),
}


@pytest.mark.parametrize("name", ON_CPU)
def test_a_result_on_the_cpu_is_there_and_new_in_each_call(name: str, runtime: str) -> None:
    import anabranch.sim  # makes the device

    model, placed = Keeps(ON_CPU[name]).eval(), Keeps(ON_CPU[name]).eval().to("sim")
    engine = anabranch.compile(placed, [torch.ones(3, 4, device="sim")], runtime=runtime, backend="eager")
    kept = []
    for k in range(4):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(k))
        given, wanted, where = engine(x.to("sim")), model(x), placed(x.to("sim"))
        assert [y.device for y in given] == [y.device for y in where]
        kept.append((given, [w.clone() for w in wanted]))
    for given, wanted in kept:  # of all calls: no later one has written an earlier one's
        torch.testing.assert_close([y.cpu() for y in given], wanted)
    assert "works on the CPU" in engine.explain()
    captured = engine.stats().graph_calls == 4
    assert captured == (name == "beside a graph"), engine.explain()
