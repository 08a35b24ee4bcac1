"""Direct calls: operators, and the numbers between them, run in C++ as Python runs them in eager."""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from anabranch.runtime import _flags
from anabranch.runtime._flat import NUMBERS
from contract.numbers import MODELS, assert_eagers, inputs_of, same

core = pytest.importorskip("anabranch.runtime._native").core

# -- numbers ---------------------------------------------------------------------------------------------------------

INTEGERS = [0, 1, -1, 2, 3, -3, 7, -7, 40, 2**31, -(2**31), 2**53 - 1, 2**53 + 1, 2**62, 2**63 - 1, -(2**63)]
FLOATS = [0.0, -0.0, 0.5, -2.5, 3.0, -7.25, 1e-300, 1e300, -1e19, math.inf, -math.inf, math.nan]
VALUES = [*INTEGERS, *FLOATS, True, False]
#: These are done without Python, whatever else is.
SMALL = [0, 1, -1, 3, -3, 7, -7, 40, 0.5, -2.5, 3.0, -7.25, True, False]
ONE = {"neg", "pos", "abs", "not", "floor", "ceil", "int", "float", "sqrt"}


def by_python(function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    """None where it raises, or the result is no number of 64 bits."""
    try:
        result = function(*given)
    except (ArithmeticError, ValueError, TypeError, AssertionError):
        return None
    if isinstance(result, complex) or (isinstance(result, int) and not -(2**63) <= result < 2**63):
        return None
    return result


@pytest.mark.parametrize(("function", "name"), NUMBERS.items(), ids=lambda x: getattr(x, "__name__", x))
def test_arithmetic_is_pythons(function: Callable[..., Any], name: str) -> None:
    if name in ONE:
        all_given: list[tuple[Any, ...]] = [(x,) for x in VALUES]
    elif name == "ite":
        all_given = [(c, a, b) for c in (True, False) for a, b in itertools.product(SMALL, SMALL)]
    elif name == "pow":
        all_given = [(a, b) for a in VALUES for b in (*FLOATS, 0, 1, 2, 3, -1, -2, 62, 63, 64, True, False)]
    else:
        all_given = list(itertools.product(VALUES, VALUES))
    done = 0
    for given in all_given:
        expected = by_python(function, (given,) if name == "sum" else given)
        actual = core.compute(name, list(given))
        if actual is None:
            # What is large may be left to Python, and so may powers of what is not positive, and sums of floats.
            small = all(any(same(x, y) for y in SMALL) for x in given)
            assert expected is None or not small or name == "pow" or (name == "sum" and float in map(type, given)), (
                given
            )
            continue
        assert same(actual, expected), (name, given, actual, expected)
        done += 1
    assert done > 10
    if name == "sum":
        assert core.compute(name, [3, -7, True, 40]) == 37
        assert core.compute(name, [2**63 - 1, 1]) is None


# -- programs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["native", "python"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_results_are_eagers(model: nn.Module, runtime: str) -> None:
    engine = anabranch.compile(model.eval(), [torch.randn(5, 4)], backend="eager", runtime=runtime)
    for x in inputs_of(17):
        assert_eagers(engine(x), model(x))
    if runtime == "native":
        assert "through Python" not in engine.explain()
        assert engine.stats().direct_calls == 4


class Bounded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n: Any = (x > 0).sum().item()
        torch._check(n >= 2)
        torch._check(n <= 5)
        return x.reshape(-1).narrow(0, 0, n)


def test_a_check_that_fails_raises_what_python_raises() -> None:
    x = torch.tensor([1.0, -1, 2, 3, -4, -5, -6])
    errors = []
    for runtime in ("python", "native"):
        engine = anabranch.compile(Bounded(), [x], backend="eager", runtime=runtime)
        assert torch.equal(engine(x), x[:3])
        with pytest.raises(RuntimeError, match="assertion failed") as few:
            engine(-torch.rand(7))
        with pytest.raises(RuntimeError, match="assertion failed") as many:
            engine(torch.rand(7) + 1)
        assert torch.equal(engine(-x), -x[:4])  # it goes on
        errors.append((type(few.value), str(few.value), type(many.value), str(many.value)))
    assert errors[0] == errors[1]
    assert "through Python" not in engine.explain()


class Grows(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        n: Any = x.sum().item()
        return x + 1, n * 3, n + 1


def test_what_numbers_of_64_bits_do_not_hold_python_computes() -> None:
    x = torch.tensor([5, 2])
    engine = anabranch.compile(Grows(), [x], backend="eager", runtime="native")
    _, three, one = engine(x)
    assert (three, one) == (21, 8)
    y, three, one = engine(torch.tensor([2**62, 7]))
    assert torch.equal(y, torch.tensor([2**62 + 1, 8]))
    assert (three, one) == (3 * (2**62 + 7), 2**62 + 8)
    assert engine.stats().direct_calls == 2


class Scaled(nn.Module):
    """With numbers of the call: broken and whole, beside tensors, as sizes' parts and as what they come to."""

    def forward(self, x: torch.Tensor, factor: float, k: int) -> Any:
        kept = x[x > factor]
        return x * factor, (x * 3).long() + k, kept / (kept.shape[0] + 1) - factor**2, torch.clamp(x, min=factor)


@pytest.mark.parametrize("runtime", ["native", "python"])
def test_numbers_of_the_call_are_taken_as_they_are(runtime: str) -> None:
    model = Scaled()
    engine = anabranch.compile(model, [torch.randn(5, 4), 0.5, 3], backend="eager", runtime=runtime)
    for x in inputs_of(5):
        for factor, k in ((0.25, 7), (-1.5, -7), (0.5, 3), (1e9, 2**40)):
            assert_eagers(engine(x, factor, k), model(x, factor, k))
    assert "any float, any int" in engine.explain()
    assert "through Python" not in engine.explain()


class Nested(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.higher_order.while_loop(lambda y: y.sum() < 10, lambda y: (y + 1,), (x,), ())[0]


def test_what_cannot_be_translated_says_why() -> None:
    engine = anabranch.compile(Nested(), [torch.zeros(2)], backend="eager", runtime="native")
    assert torch.equal(engine(torch.tensor([1.0, 2.0])), torch.tensor([5.0, 6.0]))
    assert "through Python, when direct: while_loop" in engine.explain()
    assert "is no operator" in engine.explain()


# -- threads and flags -----------------------------------------------------------------------------------------------


class Long(nn.Module):
    """A tenth of a second, then numbers and many small operators."""

    def forward(self, x: torch.Tensor) -> Any:
        y = (x @ x @ x)[:2, :2]
        n: Any = (y > 0).sum().item()
        for _ in range(30):
            y = (y + n) * 0.5
        return y[y > 0.5].sum(), y.new_ones(2) * (n + 1)


def test_operators_run_while_another_thread_has_the_interpreter() -> None:
    x = torch.randn(1200, 1200)
    engine = anabranch.compile(Long().eval(), [x], backend="eager", runtime="native")
    expected = engine(x)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(engine(x)))
    interval, before, end = sys.getswitchinterval(), engine.stats().direct_calls, time.monotonic() + 60
    try:
        thread.start()
        while core.calls_under_way() == 0 and not results and time.monotonic() < end:
            time.sleep(0)
        # From here on this thread keeps the interpreter. The call is inside, and has to go on without it.
        sys.setswitchinterval(1e6)
        while engine.stats().direct_calls == before and time.monotonic() < end:
            pass
        counted, returned = engine.stats().direct_calls - before, len(results)
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert (counted, returned) == (1, 0)
    assert all(torch.equal(a, b) for a, b in zip(results[0], expected, strict=True))


def _backends() -> Iterator[tuple[str, Any, str]]:
    b = torch.backends
    yield from ((f"cudnn.{n}", b.cudnn, n) for n in ("enabled", "benchmark", "deterministic"))
    yield "mkldnn.enabled", b.mkldnn, "enabled"
    yield "reduced fp16", b.cuda.matmul, "allow_fp16_reduced_precision_reduction"
    yield "reduced bf16", b.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    yield "fp16 sums", b.cuda.matmul, "allow_fp16_accumulation"


@pytest.mark.parametrize(("owner", "name"), [x[1:] for x in _backends()], ids=[x[0] for x in _backends()])
def test_a_flag_is_seen_without_python(owner: Any, name: str) -> None:
    before, value = core.flags(), getattr(owner, name)
    setattr(owner, name, not value)
    changed = core.flags()
    setattr(owner, name, value)
    assert changed != before
    assert core.flags() == before


@pytest.mark.parametrize("name", ["flash", "mem_efficient", "math", "cudnn"])
def test_a_kernel_of_attention_is_seen_without_python(name: str) -> None:
    is_on, turn = (
        getattr(torch.backends.cuda, f"{name}_sdp_enabled"),
        getattr(torch.backends.cuda, f"enable_{name}_sdp"),
    )
    before, value = core.flags(), is_on()
    turn(not value)
    changed = core.flags()
    turn(value)
    assert changed != before
    assert core.flags() == before


@pytest.mark.parametrize(
    ("backend", "operation"),
    [
        ("cuda", "matmul"),
        ("cuda", "conv"),
        ("cuda", "rnn"),
        ("mkldnn", "matmul"),
        ("mkldnn", "conv"),
        ("mkldnn", "rnn"),
    ],
)
def test_a_precision_is_seen_without_python(backend: str, operation: str) -> None:
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    before, value = core.flags(), get(backend, operation)
    put(backend, operation, "ieee" if value == "tf32" else "tf32" if backend == "cuda" else "bf16")
    changed = core.flags()
    put(backend, operation, value)
    assert changed != before
    assert core.flags() == before


def test_cpp_looks_at_each_flag_that_python_looks_at() -> None:
    # And at whether determinism only warns. Each of them is changed by a test above or below.
    assert len(core.flags()) == len(_flags._CUDA | _flags._CPU) + 1


def test_determinism_and_products_are_seen_without_python() -> None:
    before = core.flags()
    seen = []
    for warn_only in (False, True):
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        seen.append(core.flags())
        torch.use_deterministic_algorithms(False)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    seen.append(core.flags())
    torch.set_float32_matmul_precision(precision)
    assert before not in seen
