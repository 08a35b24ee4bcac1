"""Direct calls whose sizes and numbers depend on data, on a device with queues: the host waits where it looks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from anabranch.runtime import _guarded
from anabranch.runtime._cost import Cost
from anabranch.runtime._settings import Settings
from contract.numbers import MODELS, assert_eagers, inputs_of
from contract.support import on_threads


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_results_are_the_cpus(model: nn.Module, runtime: str) -> None:
    import anabranch.sim  # makes the device

    on_sim = torch.empty(5, 4, device="sim")
    engine = anabranch.compile(model.eval(), [on_sim], runtime=runtime, backend="eager", cuda_graphs=False)
    for x in inputs_of(29):
        with torch.sim.stream(torch.sim.Stream()):
            assert_eagers(engine(x.to("sim")), model(x), strides=False)


class Halves(nn.Module):
    """A branch on a value, and layers on both sides of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.first(x).tanh() + x
        if y.sum() > 0:
            y = y * 2
        y = self.second(y).sigmoid() - x
        return y


@pytest.mark.parametrize("faster", ["graphs", "operators", "graphs, and nobody asks"])
def test_a_model_in_fragments_runs_as_it_is_where_that_is_faster(
    faster: str, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are the device's; what follows from them is tested here."""
    import anabranch.sim  # makes the device

    model, on_sim = Halves().eval().requires_grad_(False), torch.ones(3, 4, device="sim")
    costs, measure = (Cost(100, 90), Cost(90 if faster == "operators" else 96, 9)), _guarded.measure
    monkeypatch.setattr(_guarded, "measure", lambda *given: (measure(*given), costs)[1])
    if "nobody" not in faster:
        monkeypatch.setattr(Settings, "is_free_to_choose", True)
    engine = anabranch.compile(copy.deepcopy(model).to("sim"), [on_sim], runtime=runtime)

    def serve(thread: int) -> None:
        for k in range(4):
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * thread + k))
            with torch.sim.stream(torch.sim.Stream()):
                torch.testing.assert_close(engine(x.to("sim")).cpu(), model(x))

    on_threads(3, serve)
    what = engine.summary()["fragments"]
    assert bool(what["by_operators"]) == (faster == "operators")
    assert len(what["graphs"]) == (0 if faster == "operators" else len(what["graphs"]) or -1)
    assert engine.is_captured == (faster != "operators")
    assert engine.stats().contexts == 0 or faster != "operators"
    assert ("measured" in engine.explain()) == ("nobody" not in faster)


class Advances(Halves):
    """Changes what it is given: it can be called on the same tensors only so often."""

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        row = y[at] * 2
        at += 1
        return row


def test_a_model_that_changes_what_it_is_given_is_not_timed(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its index would be out of range before long, which on a GPU is the end of the process."""
    import anabranch.sim  # makes the device

    monkeypatch.setattr(Settings, "is_free_to_choose", True)
    model, rows = Advances().eval().requires_grad_(False), 8
    given = [torch.ones(rows, 4, device="sim"), torch.zeros(1, dtype=torch.int64, device="sim")]
    engine = anabranch.compile(copy.deepcopy(model).to("sim"), given, runtime=runtime)
    x, at = torch.randn(rows, 4), torch.zeros(1, dtype=torch.int64)
    on_sim, place = x.to("sim"), at.to("sim")
    for _ in range(rows):
        torch.testing.assert_close(engine(on_sim, place).cpu(), model(x, at))
    assert place.item() == rows
    assert "measured" not in engine.explain()
