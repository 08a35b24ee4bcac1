"""Numbers among a call's inputs: the first value is compiled in, from the second on it is an input."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import anabranch
from anabranch._judge import differences
from anabranch.runtime import _varying

pytestmark = pytest.mark.usefixtures("seeded")

FLOATS = (0.5, 0.1, 1 / 3, -0.0, 0.0, 2.0, -1.7, math.nan, math.inf, -math.inf)
NAMES = {"0.25": 3.0}
KEPT: list[Any] = []


class Model(nn.Module):
    """A function as a model, with a buffer and an attribute of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.last: Any = None
        self.register_buffer("table", torch.randn(6))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


@pytest.fixture(autouse=True)
def few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_varying, "MOST_VALUES", 3)


def check(
    function: Callable[..., Any], x: torch.Tensor, values: Sequence[Any], **options: Any
) -> tuple[anabranch.Engine, Model]:
    """Compile for the first value, and compare calls with all of them with eager."""
    model = Model(function).eval()
    engine = anabranch.compile(model, [x, values[0]], backend="eager", **options)
    for value in values:
        wrong = differences(engine(x, value), model(x, value))
        assert not wrong, f"{value!r}: {wrong}"
    return engine, model


# -- numbers that become inputs ---------------------------------------------------------------------------------------


def test_a_thousand_floats_take_two_compilations(runtime: str) -> None:
    x = torch.randn(3)
    engine, model = check(lambda m, x, s: x * s + m.table[:3], x, [1.0, 0.5])
    for i in range(1000):
        sigma = math.sin(i) * 10 ** (i % 7 - 3)
        assert torch.equal(engine(x, sigma), model(x, sigma))
    assert engine.stats().specializations == 2
    assert "any float" in engine.explain()
    assert "serves all values of the number(s) at input 1" in engine.explain()


def _arithmetic(m: Any, x: Any, s: Any) -> Any:
    return x + s, x - s, s - x, x * s, x / s, s / x, torch.add(x, x, alpha=s), torch.lerp(x, x * 2, s), x**s


def _choices(m: Any, x: Any, s: Any) -> Any:
    return x > s, x == s, x != s, x <= s, torch.where(x > 0, s, x), torch.where(x > 0, x, s), torch.where(x > 0, s, 1.0)


def _limits(m: Any, x: Any, s: Any) -> Any:
    return x.clamp(min=s), x.clamp(max=s), x.clamp(-1, s), x.masked_fill(x > 0, s), nn.functional.leaky_relu(x, s)


def _filled(m: Any, x: Any, s: Any) -> Any:
    y = x.clone()
    y[0] = s
    return (
        torch.full((3,), s),
        torch.full_like(x, s),
        torch.tensor([s, 1.0]),
        torch.linspace(0, s, 4),
        y,
        x.new_full((2,), s),
        x.new_tensor([s, 2.0]),
        torch.as_tensor(s),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [_arithmetic, _choices, _limits, _filled])
def test_results_are_eagers_for_every_value(function: Any, dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(9) * 3, torch.tensor([0.0, -0.0, math.nan, math.inf, 0.1])]).to(dtype)
    engine, _ = check(function, x, FLOATS, runtime="python")
    assert engine.stats().specializations == 2


def test_integer_tensors_and_integers_of_any_size() -> None:
    def computed(m: Any, x: Any, n: Any) -> Any:
        return x * n, x + n, n - x, x / n if m.table is not None else x, x // 3 * n, x > n, x * (n * 0.5)

    x = torch.arange(-4, 5)
    engine, _ = check(computed, x, [3, 7, -2, 1 << 40, -(1 << 62), 1], runtime="python")
    assert engine.stats().specializations == 2
    with pytest.raises((anabranch.InputError, anabranch.UnsupportedModel)):
        engine(x, 1 << 70)  # eager raises, too
    assert torch.equal(engine(x, 5)[0], x * 5)


def test_python_computes_what_python_computed_and_raises_what_it_raised() -> None:
    def preconditioned(m: Any, x: Any, s: Any) -> Any:
        # A symbolic algebra would say that the first is s, and that the second and the third are equal.
        skip = 1.0 / (s**2 + 0.25)
        return (
            x * ((s + 1e9) - 1e9),
            x * (s * 0.1) * 3,
            x * ((s * 0.1) * 3),
            x * (s // 0.3 + s % 0.3),
            x * skip**0.5 * -s,
        )

    x = torch.randn(5, dtype=torch.float64)
    engine, _model = check(preconditioned, x, [0.7, 0.1, 0.3, 1e-9, -0.0, 12.5], runtime="python")
    assert engine.stats().specializations == 2
    inverse, _ = check(lambda m, x, s: x * (1 / s), x, [0.5, 0.25, 3.0], runtime="python")
    with pytest.raises(anabranch.InputError, match="ZeroDivisionError"):
        inverse(x, 0.0)
    assert torch.equal(inverse(x, 8.0), x * 0.125)
    roots, _ = check(lambda m, x, s: x * s**0.5, x, [4.0, 2.0, 0.3], runtime="python")
    assert torch.equal(roots(x, -2.0), x * (-2.0) ** 0.5)  # a complex number
    assert roots.stats().specializations == 3


def test_keywords_containers_and_two_numbers_of_which_one_varies(runtime: str) -> None:
    model = Model(lambda m, x, scale, more: x * scale + more["shift"] * more["n"]).eval()
    x = torch.randn(4)
    engine = anabranch.compile(model, [x], kwargs={"scale": 2.0, "more": {"shift": 0.5, "n": 3}}, backend="eager")

    def same(scale: float, shift: float, n: int) -> bool:
        given: Any = {"scale": scale, "more": {"shift": shift, "n": n}}
        return torch.equal(engine(x, **given), model(x, **given))

    assert all(same(s, 0.5, 3) for s in (2.0, 3.5, -1.25, 7.75))
    assert engine.stats().specializations == 2
    assert all(same(s, shift, 3) for s, shift in ((2.0, 1.5), (3.5, -2.0), (0.3, 0.7), (2.0, 0.5)))
    assert engine.stats().specializations == 3  # now both are inputs
    assert all(same(s, shift, n) for s, shift, n in ((0.1, 1.5, 4), (3.5, 0.7, 9), (0.3, 0.7, -3), (2.0, 0.5, 8)))
    assert engine.stats().specializations == 4


def test_a_number_that_varied_with_one_shape_is_an_input_with_all() -> None:
    engine, model = check(lambda m, x, s, n=None: x * s + m.table[0], torch.rand(2), [0.5, 0.25], runtime="python")
    for size in (3, 4, 3, 5):
        for s in (0.1 * size, 0.5, 2.0 + size):
            x = torch.rand(size)
            assert torch.equal(engine(x, s), model(x, s))
    assert engine.stats().specializations == 5


def test_a_model_that_depends_on_data_takes_numbers() -> None:
    def chosen(m: Any, x: Any, s: Any) -> Any:
        return x[x > 0] * s, x.nonzero() + 1, x * x.max().item() + s

    engine, _ = check(chosen, torch.randn(9), [0.5, 0.25, -3.0], runtime="python")
    assert engine.stats().specializations == 2


def test_an_integer_and_a_float_of_one_value_are_two_signatures() -> None:
    engine, _ = check(lambda m, x, s: x * s, torch.arange(3), [1, 1.0, 2, 2.0, 3, 3.0, True, False], runtime="python")
    assert engine.stats().specializations == 6


def test_values_from_several_threads_are_compiled_once(runtime: str) -> None:
    x = torch.randn(4)
    engine, model = check(lambda m, x, s: x * s - m.table[:4], x, [1.0])
    gate, wrong = threading.Barrier(6), []

    def calls(k: int) -> None:
        gate.wait()
        for i in range(40):
            sigma = 1 / (i * 6 + k + 2)
            if not torch.equal(engine(x, sigma), model(x, sigma)):
                wrong.append(sigma)

    threads = [threading.Thread(target=calls, args=(k,)) for k in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert engine.stats().specializations == 2


def test_inductor_compiles_once_for_all_values() -> None:
    def step(m: Any, x: Any, s: Any) -> Any:
        kept = (x * s).clamp(-s, s) + torch.tensor([s]) * (1 / (s * s + 1))
        return kept, torch.where(x > s, s, x), torch.full_like(x, s), x**s

    model = Model(step).eval()
    x = torch.rand(6) + 0.5
    engine = anabranch.compile(model, [x, 1.0])
    for s in (1.0, 0.3, 2.5, 1e-3, 0.7):
        torch.testing.assert_close(engine(x, s), model(x, s))
    assert engine.stats().specializations == 2
    assert "operators take them as tensors" in engine.explain()
    # An operator that nobody has looked at runs by itself.
    slope = anabranch.compile(Model(lambda m, x, s: nn.functional.leaky_relu(x, s)).eval(), [x, 0.1])
    for s in (0.1, 0.2, 0.5, 0.01):
        torch.testing.assert_close(slope(x - 1, s), nn.functional.leaky_relu(x - 1, s))
    assert slope.stats().specializations == 2
    assert "takes a number" in slope.explain()


# -- numbers that stay a part of the signature ------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _cached(s: float) -> float:
    return s * 3


def _guarded(s: Any) -> float:
    try:
        return float(s)
    except Exception:
        return 0.0


LOOKS: dict[str, Callable[..., Any]] = {
    "branch": lambda m, x, s: x * s if s > 0.5 else x - s,
    "equal": lambda m, x, s: x if s == 0.25 else x * s,
    "truth": lambda m, x, s: x + 1 if s else x,
    "math": lambda m, x, s: x * math.sqrt(s),
    "float": lambda m, x, s: x * float(s),
    "int": lambda m, x, s: x * int(s * 10),
    "caught": lambda m, x, s: x * _guarded(s),
    "round": lambda m, x, s: x[: round(s * 4)],
    "numpy": lambda m, x, s: x * float(numpy.sqrt(s)),
    "text": lambda m, x, s: x * len(f"{s}"),
    "name": lambda m, x, s: x * NAMES.get(str(s), 1.0),
    "key": lambda m, x, s: x * {0.25: 5.0}.get(s, 2.0),
    "cache": lambda m, x, s: x * _cached(s),
    "set": lambda m, x, s: x * (2.0 if s in (0.25, 0.5) else 1.0),
    "max": lambda m, x, s: x * max(s, 0.3),
    "returned": lambda m, x, s: (x, s, {"twice": s * 2}),
    "epsilon": lambda m, x, s: nn.functional.layer_norm(x, (5,), eps=s),
    "type": lambda m, x, s: x * s if type(s) is float else x,
    "item": lambda m, x, s: x * torch.tensor(s).item(),
    "size": lambda m, x, s: x.new_zeros(int(s * 8)) + 1,
}


@pytest.mark.parametrize("how", LOOKS)
def test_a_model_that_looks_at_a_number_stays_right(how: str) -> None:
    engine, _ = check(LOOKS[how], torch.rand(5), [0.25, 0.75, 0.5, 0.3, 0.125], runtime="python")
    assert len(engine.plans) <= 4  # three, and the one that the engine was compiled for
    if how != "item":
        assert "input 1 (float) varies, and each value is compiled by itself: " in engine.explain()


INTEGERS: dict[str, Callable[..., Any]] = {
    "size": lambda m, x, n: torch.zeros(n) + m.table[0],
    "slice": lambda m, x, n: x[:n] * 2,
    "index": lambda m, x, n: x[n] * 2,
    "roll": lambda m, x, n: x.roll(n) + 1,
    "range": lambda m, x, n: sum((x * i for i in range(n)), x),
    "repeat": lambda m, x, n: x.repeat(n) + torch.cat([x] * (n + 1)).sum(),
    "view": lambda m, x, n: x.expand(n, 6).sum(0) * n,
    "topk": lambda m, x, n: x.topk(n).values,
    "power": lambda m, x, n: x * 2**-n,
}


@pytest.mark.parametrize("how", INTEGERS)
def test_an_integer_that_is_a_size_or_a_place_stays_right(how: str) -> None:
    engine, _ = check(INTEGERS[how], torch.rand(6), [2, 1, 5, 3, 0], runtime="python")
    assert len(engine.plans) <= 4


def test_a_value_that_was_given_up_is_compiled_again(runtime: str) -> None:
    x = torch.rand(3)
    engine, model = check(lambda m, x, s: x * s if s > 0.5 else -x, x, [0.1, 0.2, 0.4, 0.6, 0.7])
    assert len(engine.plans) <= 4
    assert engine.stats().specializations == 5
    assert torch.equal(engine(x, 0.7), model(x, 0.7))
    assert engine.stats().specializations == 5
    assert torch.equal(engine(x, 0.2), model(x, 0.2))
    assert engine.stats().specializations == 6
    assert "were given up" in engine.explain()
    assert engine.plan


def test_one_number_is_an_input_and_the_other_a_size() -> None:
    model = Model(lambda m, x, s, n: x[:n] * s).eval()
    x = torch.rand(6)
    engine = anabranch.compile(model, [x, 1.0, 2], backend="eager", runtime="python")
    for i in range(24):
        s, n = 1 / (i + 2), 2 + i % 3
        assert torch.equal(engine(x, s, n), model(x, s, n))
    assert engine.stats().specializations <= 5
    assert "input 2 (int) varies, and each value is compiled by itself" in engine.explain()


def test_what_a_model_keeps_of_a_number_is_its_value() -> None:
    def keeps(m: Any, x: Any, s: Any) -> Any:
        m.last = s
        KEPT.append(s * 2)
        return x * m.last

    KEPT.clear()
    _, model = check(keeps, torch.rand(3), [0.5, 0.25, 0.125], runtime="python")
    assert type(model.last) is float
    assert {float(s) for s in KEPT} == {1.0, 0.5, 0.25}
    assert sorted(KEPT)[0] + 1 == 1.25
    assert f"{max(KEPT)}" == "1.0"
    assert len(set(KEPT)) == 3


def test_an_exported_program_stays_right() -> None:
    x = torch.rand(3)
    program = torch.export.export(Model(lambda m, x, s: x * s).eval(), (x, 0.5))
    engine = anabranch.compile(program, [x, 0.5], backend="eager", runtime="python")
    assert torch.equal(engine(x, 0.5), x * 0.5)
    with pytest.raises(anabranch.AnabranchError):
        engine(x, 0.25)  # torch.export has written the number into the program


@pytest.fixture(scope="module")
def cast() -> Iterator[anabranch.Engine]:
    linear = nn.Linear(4, 4).eval()
    model = Model(lambda m, x, s: linear(x) * s)
    with anabranch.compile(model.eval(), [torch.zeros(2, 4), 1.0], backend="eager", precision=torch.bfloat16) as engine:
        yield engine


def test_with_a_precision(cast: anabranch.Engine) -> None:
    x = torch.rand(2, 4)
    results = {s: cast(x, s) for s in (1.0, 0.5, 0.25, 3.0)}
    assert all(torch.allclose(y, results[1.0] * s, rtol=1e-2) for s, y in results.items())
    assert cast.stats().specializations == 2
