"""Compiled kernels that do not compute what the model says are found when they are made, and never used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import anabranch
from anabranch.backends import get_backend
from anabranch.errors import BuildError
from anabranch.runtime import _comparison

#: What a faulty compiler makes of a result.
FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "other elements": lambda y: y.flip(0),
    "no number": lambda y: torch.where(torch.arange(y.shape[-1]) == 3, torch.nan, y),
    "stale": torch.zeros_like,
    "too large": lambda y: y * 1.5,
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x).tanh())
        return result


class Bfloat(nn.Module):
    """Its rounding is as large as some faults."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(torch.bfloat16) * 100
        return (y + 1).exp2().log2() - y


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[torch.Tensor], torch.Tensor]], None]:
    """Give Inductor's kernels a fault."""
    backend: Any = get_backend("inductor")
    lower = backend.lower

    def plant(fault: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def lowered(*given: Any) -> Any:
            kernels = lower(*given)
            return lambda inputs: [fault(y) for y in kernels(inputs)]

        monkeypatch.setattr(type(backend), "lower", lambda self, *given: lowered(*given))

    return plant


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_found_and_operators_run_instead(
    fault: str, runtime: str, faulty: Any, caplog: pytest.LogCaptureFixture
) -> None:
    faulty(FAULTS[fault])
    model, x = Net().eval(), torch.randn(6, 7)
    with (
        caplog.at_level(logging.WARNING, "anabranch"),
        anabranch.compile(model, [x], backend="inductor", runtime=runtime) as engine,
    ):
        assert torch.equal(engine(x), model(x))
        assert "PyTorch's operators run the model instead" in caplog.text
        assert "backend eager instead of inductor: compiled kernels are off by" in engine.explain()
        assert engine.summary()["signatures"][0]["backend"] == "eager"


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(5, 3)

    def forward(self, n: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.rows(n)
        return y + 1


def test_a_fault_that_integers_other_than_zero_show_is_found(
    runtime: str, faulty: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Looked().eval()
    third = model(torch.tensor(3)).detach()
    faulty(lambda y: torch.where((y == third).all(-1, keepdim=True), y * 2, y))
    n = torch.tensor([[0, 3, 4], [2, 1, 0]])
    with (
        caplog.at_level(logging.WARNING, "anabranch"),
        anabranch.compile(model, [n], backend="inductor", runtime=runtime) as engine,
    ):
        assert torch.equal(engine(n.flip(0)), model(n.flip(0)))
        assert "of the inputs given" in caplog.text
        assert engine.summary()["signatures"][0]["backend"] == "eager"


class Kept(nn.Module):
    """Writes a part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.arange(24.0).reshape(1, 8, 3))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        self.cache.index_copy_(1, at, x)
        return self.cache.sin()


def test_a_fault_is_found_where_state_is_written(faulty: Any, runtime: str) -> None:
    faulty(FAULTS["too large"])
    given = torch.randn(1, 2, 3), torch.tensor([3, 5])
    with anabranch.compile(Kept(), given, backend="inductor", runtime=runtime) as engine:
        assert engine.summary()["signatures"][0]["backend"] == "eager"
        session, model = engine.session(), Kept()
        for at in ([1, 2], [7, 1]):
            x = torch.randn(1, 2, 3)
            assert torch.equal(session(x, torch.tensor(at)), model(x, torch.tensor(at)))


def test_where_everything_has_to_be_compiled_a_fault_is_an_error(faulty: Any) -> None:
    faulty(FAULTS["too large"])
    with pytest.raises(BuildError, match=r"compiled kernels are off by .*: a fault of 'inductor'"):
        anabranch.compile(Net().eval(), [torch.randn(6, 7)], backend="inductor", require_full=True)


@pytest.mark.parametrize("model", [Net(), Bfloat(), nn.Sequential(nn.Dropout(), nn.Linear(7, 3)).train()], ids=str)
def test_what_rounding_explains_is_no_fault(model: nn.Module, runtime: str, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "anabranch"),
        anabranch.compile(model, [torch.randn(6, 7)], backend="inductor", runtime=runtime) as engine,
    ):
        assert not caplog.text
        assert engine.summary()["signatures"][0]["backend"] == "inductor"


def _program(module: nn.Module) -> Any:
    """As much of one as is asked for."""
    graph = module if isinstance(module, torch.fx.GraphModule) else torch.fx.symbolic_trace(module)
    return SimpleNamespace(module=graph, in_place=graph, is_random=False, weights_for_eager=list, written=frozenset())


def test_rounding_is_told_from_faults_by_float64() -> None:
    class Rounded(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [torch.ops.aten.sub.Tensor(torch.ops.aten.add.Tensor(x, 100), 100)]

    x = torch.rand(50, generator=torch.Generator().manual_seed(5)).half()
    program = _program(Rounded())
    # In float16 the sum keeps multiples of 1/16, so that eager is off by half of that.
    assert not _comparison.why_off(program, lambda inputs: [inputs[0] + 0.125], [x], "")
    assert "farther from what float64 gives" in _comparison.why_off(program, lambda inputs: [inputs[0] + 300], [x], "")


@pytest.fixture
def operator() -> Iterator[Callable[[Callable[[torch.Tensor], torch.Tensor]], Any]]:
    """Make an operator of a kernel. Its result is like what it is given."""
    with torch.library._scoped_library("anabranch_tests", "DEF") as library:

        def make(kernel: Callable[[torch.Tensor], torch.Tensor]) -> Any:
            library.define("made(Tensor x) -> Tensor")
            library.impl("made", kernel, "CPU")
            library.impl("made", torch.empty_like, "Meta")
            return torch.ops.anabranch_tests.made.default

        yield make


@pytest.mark.parametrize(("off", "is_fault"), [(0.03, False), (0.5, True)])
def test_an_operator_without_float64_runs_in_what_it_has(operator: Any, off: float, is_fault: bool) -> None:
    """The result is float32's, of values that have been half precision: more is rounding's than its dtype says."""

    def kernel(x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not torch.float16:
            raise RuntimeError(f"'made' not implemented for {x.dtype}")
        return (x + 100) - 100

    only_half = operator(kernel)

    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [torch.ops.aten.mul.Tensor(only_half(x.half()).float(), 3)]

    x = torch.rand(50, generator=torch.Generator().manual_seed(5))
    program = _program(make_fx(Half())(x))
    wide = _comparison._Wide(program.module)
    assert wide.run(x)[0].dtype is torch.float64
    assert wide.alone == ["anabranch_tests.made.default"]
    why = _comparison.why_off(program, lambda inputs: [y * (1 + off) for y in program.module(*inputs)], [x], "")
    assert bool(why) is is_fault


def test_results_that_lie_otherwise_in_float64_have_views(operator: Any) -> None:
    """As attention's do on CUDA: of other strides not everything is a view."""
    otherwise = operator(lambda x: x.t().contiguous().t() if x.dtype is torch.float64 else x.clone())

    class Seen(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [torch.ops.aten.view.default(otherwise(x), [6])]

    x = torch.rand(2, 3)
    wide = _comparison._Wide(make_fx(Seen())(x))
    assert torch.equal(wide.run(x)[0], x.double().reshape(6))
    assert not wide.alone


def test_a_near_tie_is_no_fault() -> None:
    """Kernels that take the other one of two values on one draw alone: a choice, not a fault."""

    class Chosen(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [torch.ops.aten.mul.Tensor(x, 2)]

    draws: list[torch.Tensor] = []

    def kernels(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        draws.append(inputs[0])
        return [inputs[0] * (2 if len(draws) > 1 else -2)]

    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(6)).t()
    assert not _comparison.why_off(_program(Chosen()), kernels, [x], "")
    assert len(draws) == 2
    assert not torch.equal(draws[0], draws[1])
    assert draws[1].stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_cancels_out_is_no_fault(dtype: torch.dtype) -> None:
    """Nothing is expected but zeros, and a product that is not rounded before it is subtracted leaves its rounding."""

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [torch.ops.aten.sub.Tensor(x, x)]

    x = torch.rand(50, generator=torch.Generator().manual_seed(8)).to(dtype)
    assert not _comparison.why_off(_program(Nothing()), lambda inputs: [inputs[0] * torch.finfo(dtype).eps], [x], "")
    assert "off by" in _comparison.why_off(_program(Nothing()), lambda inputs: [inputs[0] * 0.1], [x], "")
    assert "off by" in _comparison.why_off(_program(Nothing()), lambda inputs: [inputs[0] * torch.nan], [x], "")


def test_where_nothing_is_left_in_half_nobody_can_tell() -> None:
    class Small(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [torch.ops.aten.mul.Tensor(torch.ops.aten.mul.Tensor(x, 1e-7), 1e7)]

    x = torch.rand(50, generator=torch.Generator().manual_seed(9)).half() * 0.2
    assert not _comparison.why_off(_program(Small()), lambda inputs: [inputs[0]], [x], "")


# -- inputs that are mixed up ------------------------------------------------------------------------------------------


class Exchanged(nn.Module):
    """PyTorch 2.13's Inductor writes the first before it has read it for the second."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a[:], b[:] = b.clone(), a.clone()
        return a + b


class ExchangedInPart(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        kept = a.clone()
        a.copy_(b * 2)
        b.copy_(kept)
        return a.sum()


class PassedOn(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        x, y, z = b.clone(), c.clone(), a.clone()
        for tensor, new in ((a, x), (b, y), (c, z)):
            tensor.copy_(new)
        return a.sum()


class Turns(nn.Module):
    """The same with state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.arange(4.0))
        self.register_buffer("second", torch.arange(4.0) + 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first.clone()
        self.first.copy_(self.second)
        self.second.copy_(first)
        return x + self.first


@pytest.mark.parametrize("model", [Exchanged(), ExchangedInPart(), PassedOn()], ids=lambda model: type(model).__name__)
def test_inputs_that_are_exchanged_are_as_in_eager(model: nn.Module, runtime: str) -> None:
    def inputs() -> list[torch.Tensor]:
        return [torch.randn(4) for _ in range(3 if isinstance(model, PassedOn) else 2)]

    with anabranch.compile(model, inputs(), backend="inductor", runtime=runtime) as engine:
        for _ in range(2):
            mine = inputs()
            eagers = [x.clone() for x in mine]
            torch.testing.assert_close(engine(*mine), model(*eagers))
            assert all(map(torch.equal, mine, eagers))


def test_state_that_is_exchanged_is_as_in_eager(runtime: str) -> None:
    with anabranch.compile(Turns(), [torch.zeros(4)], backend="inductor", runtime=runtime) as engine:
        session, model = engine.session(), Turns()
        for _ in range(3):
            x = torch.randn(4)
            assert torch.equal(session(x), model(x))


def test_kernels_that_take_one_input_for_another_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Minus(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - b

    backend: Any = get_backend("inductor")
    lower = backend.lower

    def lowered(self: Any, *given: Any) -> Any:
        kernels = lower(*given)
        return lambda inputs: kernels([inputs[1], inputs[0]])

    monkeypatch.setattr(type(backend), "lower", lowered)
    with anabranch.compile(Minus(), [torch.ones(4), torch.ones(4)], backend="inductor") as engine:
        assert engine.summary()["signatures"][0]["backend"] == "eager"
        x, y = torch.randn(4), torch.randn(4)
        assert torch.equal(engine(x, y), x - y)
