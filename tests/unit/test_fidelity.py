"""A trace that is of another computation than the model's own call is found when it is made, and never used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.compiler import is_compiling  # under a name of this module's own

import anabranch
from anabranch.errors import UnsupportedModel
from anabranch.export import _program as programs
from contract.support import Fn, on_threads

_aten = torch.ops.aten


class Asks(nn.Module):
    """Computes something else where the answer is yes."""

    def __init__(self, question: Callable[[], bool]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self._question = question

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y * 2 if self._question() else y.tanh()


class Imported(Asks):
    """Asks by a function that this module has imported."""

    def __init__(self) -> None:
        super().__init__(bool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y * 2 if is_compiling() else y.tanh()


class OfType(Asks):
    """Looks at what tensors are, and no function is asked."""

    def __init__(self) -> None:
        super().__init__(bool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.tanh() if type(x) is torch.Tensor else y * 2


ASKING: dict[str, Callable[[], nn.Module]] = {
    "is_compiling": lambda: Asks(lambda: torch.compiler.is_compiling()),
    "is_exporting": lambda: Asks(lambda: torch.compiler.is_exporting()),
    "imported": Imported,
}


@pytest.mark.parametrize("kind", list(ASKING))
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_who_asks_whether_it_is_traced_is_told_no(kind: str, backend: str, runtime: str) -> None:
    model = ASKING[kind]().eval()
    inputs = [[torch.randn(n, 6) for n in (3, 4, 3)] for _ in range(3)]  # the second is another signature
    expected = [[model(x) for x in own] for own in inputs]
    with anabranch.compile(model, [inputs[0][0]], backend=backend, runtime=runtime, require_full=True) as engine:
        assert "the model asks whether it is traced" in engine.explain()

        def work(i: int) -> None:
            for x, y in zip(inputs[i], expected[i], strict=True):
                torch.testing.assert_close(engine(x), y)

        on_threads(3, work)


def test_what_depends_on_data_is_compared_on_the_inputs_given(runtime: str) -> None:
    def chosen(x: torch.Tensor) -> torch.Tensor:
        y = x[x > 100]
        return y * 2 if torch.compiler.is_compiling() else y * 3

    model, x = Fn(chosen).eval(), torch.tensor([1.0, 101.0, 102.0])  # made-up values are below 1
    with anabranch.compile(model, [x], backend="eager", runtime=runtime, require_full=True) as engine:
        assert "the model asks whether it is traced" in engine.explain()
        assert torch.equal(engine(x * 2), model(x * 2))


@pytest.mark.parametrize("kind", list(ASKING))
def test_a_model_that_asks_while_another_is_compiled_is_told_no(kind: str) -> None:
    model = ASKING[kind]().eval()
    x, others = torch.randn(3, 6), [nn.Sequential(nn.Linear(6, n), nn.Tanh()).eval() for n in range(2, 8)]
    expected, over, calls = model(x), threading.Event(), [0]

    def call() -> None:
        while not over.is_set():
            assert torch.equal(model(x), expected)
            calls[0] += 1

    def work(i: int) -> None:
        if i:
            call()
            return
        try:
            for other in others:
                anabranch.compile(other, [x], backend="inductor").close()
        finally:
            over.set()

    on_threads(2, work)
    assert calls[0] > 10


def test_what_tensors_are_while_a_model_is_exported_they_are_not_in_fragments(runtime: str) -> None:
    model, x = OfType().eval(), torch.randn(3, 6)
    with anabranch.compile(model, [x], backend="eager", runtime=runtime) as engine:
        assert torch.equal(engine(x), model(x))
        assert "computes something else than in eager (a result is off by" in engine.summary()["fragments"]["why"]
    with pytest.raises(UnsupportedModel, match=r"else than in eager \(a result is off by .*at the type"):
        anabranch.compile(model, [x], backend="eager", runtime=runtime, require_full=True)


class Branches(Asks):
    """What ``torch.export`` does not take, and Dynamo answers by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + 1 if y.sum() > 100 else y


def test_who_asks_dynamo_runs_as_it_is(runtime: str) -> None:
    model, x = Branches(torch.compiler.is_compiling).eval(), torch.randn(3, 6)
    with anabranch.compile(model, [x], backend="inductor", runtime=runtime) as engine:
        assert "else than in eager (a result is off by" in engine.summary()["fragments"]["by_operators"]
        assert "PyTorch's operators run it as it is" in engine.explain()
        on_threads(3, lambda i: torch.testing.assert_close(engine(x * i), model(x * i), rtol=0, atol=0))


# -- faults ------------------------------------------------------------------------------------------------------------


def _tanh_for_relu(gm: Any) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=_aten.relu.default):
        node.target = _aten.tanh.default


def _row_for_column(gm: Any) -> None:
    for target in (_aten.softmax.int, _aten._softmax.default):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            node.args = (node.args[0], 0, *node.args[2:])


def _forgets_a_write(gm: Any) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=_aten.copy_.default):
        gm.graph.erase_node(node)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
        y = torch.relu(self.linear(x)) * 5  # so that the columns' shares of made-up values differ much, too
        return y.softmax(-1), x.shape[0], y.argmax(-1)


class Writes(Net):
    def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y = super().forward(x)[0]
        cache.add_(y)
        return y


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Give what is done to traced graphs a fault."""
    done = programs.call_cudnn

    def plant(fault: Callable[[Any], None]) -> None:
        def with_fault(gm: Any, *rest: Any) -> None:
            done(gm, *rest)
            fault(gm)

        monkeypatch.setattr(programs, "call_cudnn", with_fault)

    return plant


@pytest.mark.parametrize("fault", [_tanh_for_relu, _row_for_column])
@pytest.mark.parametrize("precision", [None, torch.float16, "mixed"], ids=str)
def test_a_fault_of_a_trace_is_found(fault: Any, precision: Any, faulty: Any) -> None:
    options: dict[str, Any] = {"backend": "eager", "precision": precision, "require_full": True}
    anabranch.compile(Net().eval(), [torch.randn(6, 6)], **options).close()
    faulty(fault)
    with pytest.raises(UnsupportedModel, match="computes something else than in eager"):
        anabranch.compile(Net().eval(), [torch.randn(6, 6)], **options)


@pytest.mark.parametrize("precision", [None, "mixed"], ids=str)
def test_a_write_that_a_trace_forgets_is_found(precision: Any, faulty: Any) -> None:
    given = [torch.randn(6, 6), torch.zeros(6, 6)]
    options: dict[str, Any] = {"backend": "eager", "precision": precision, "require_full": True}
    anabranch.compile(Writes().eval(), given, **options).close()
    faulty(_forgets_a_write)
    with pytest.raises(UnsupportedModel, match="in eager it writes into input 1"):
        anabranch.compile(Writes().eval(), given, **options)


def test_where_graphs_are_wrong_operators_run_the_model(faulty: Any, runtime: str) -> None:
    faulty(_tanh_for_relu)
    model, x = Net().eval(), torch.randn(6, 6)
    with anabranch.compile(model, [x], backend="inductor", runtime=runtime) as engine:
        assert torch.equal(engine(x)[0], model(x)[0])
        (graph,) = engine.summary()["fragments"]["graphs"]
        assert "computes something else" in graph["by_operators"]


def test_a_range_is_looked_at_too(faulty: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU()).eval()

    def of_ranges(gm: Any) -> None:
        x = gm.graph.find_nodes(op="placeholder")[-1].meta["val"]
        if any(isinstance(n, torch.SymInt) for n in x.shape):
            _tanh_for_relu(gm)

    faulty(of_ranges)
    with anabranch.compile(model, [torch.randn(4, 6)], backend="eager", dynamic=True) as engine:
        for n in (4, 5, 6, 7):
            x = torch.randn(n, 6)
            assert torch.equal(engine(x), model(x))
        assert not any(made.is_range for made in engine._table)


# -- what is no fault --------------------------------------------------------------------------------------------------


class Unwritten(nn.Module):
    """A part of its result is memory that nobody wrote."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(len(x) + 1, x.shape[1])
        Unwritten.calls += 1
        if not torch.compiler.is_compiling():
            y.fill_(Unwritten.calls)
        y[1:] = x
        return y

    calls = 0


class Counts(nn.Module):
    """Hooks and attributes are the model's own business."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x * 2


@pytest.mark.parametrize(
    "model",
    [Unwritten(), Counts(), nn.Sequential(nn.Dropout(), nn.Linear(6, 3)).train(), nn.BatchNorm1d(6).train()],
    ids=lambda model: type(model).__name__,
)
def test_what_one_call_cannot_tell_passes(model: nn.Module) -> None:
    with anabranch.compile(model, [torch.randn(5, 6)], backend="eager") as engine:
        assert "fragments" not in engine.summary() or engine.summary()["fragments"] is None
        assert "computes something else" not in engine.explain()


def test_the_model_and_its_inputs_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    x = torch.randn(5, 6)
    kept, state = x.clone(), torch.get_rng_state()
    anabranch.compile(model, [x], backend="eager").close()
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
