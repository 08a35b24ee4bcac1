"""Clause 8: bad input raises a named error that says what was given, what was expected and what to do, and the engine
stays usable."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from anabranch import errors

pytestmark = pytest.mark.usefixtures("seeded", "runtime")


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, *extra: Any, **more: Any) -> torch.Tensor:
        return self.linear(x)


@pytest.fixture
def model() -> nn.Module:
    return Affine().eval()


@pytest.fixture
def engine(model: nn.Module) -> anabranch.Engine:
    return anabranch.compile(model, [torch.randn(2, 3)], backend="eager")


class Subclass(torch.Tensor):
    pass


def a_sparse() -> torch.Tensor:
    return torch.randn(2, 3).relu().to_sparse()


#: what is passed, the error, and what its message must hold: given, expected, what to do.
BAD_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "requires grad": (
        lambda: (torch.randn(2, 3, requires_grad=True),),
        anabranch.InputError,
        ["input 0", "requires grad", "inference only", ".detach()", "torch.no_grad()"],
    ),
    "another device": (
        lambda: (torch.empty(2, 3, device="meta"),),
        anabranch.InputError,
        ["input 0", "meta", "runs on cpu", "x.to('cpu')"],
    ),
    "sparse": (
        lambda: (a_sparse(),),
        anabranch.InputError,
        ["input 0", "torch.sparse_coo", "torch.strided", "x.to_dense()"],
    ),
    "second input": (
        lambda: (torch.randn(2, 3), torch.empty(1, device="meta")),
        anabranch.InputError,
        ["input 1", "meta"],
    ),
    "lazy conjugate": (
        lambda: (torch.randn(2, 3, dtype=torch.complex64).conj(),),
        anabranch.InputError,
        ["complex64[2, 3]", "model(*inputs)", "Compiled so far: float32[2, 3]"],
    ),
    "lazy conjugate, strided": (
        lambda: (torch.randn(3, 2, dtype=torch.complex64).t().conj(),),
        anabranch.InputError,
        ["complex64[2, 3]", "model(*inputs)", "Compiled so far: float32[2, 3]"],
    ),
    "tensor subclass": (
        lambda: (torch.randn(2, 3).as_subclass(Subclass),),
        anabranch.InputError,
        ["input 0", "Subclass", "plain torch.Tensor"],
    ),
    "unknown type": (
        lambda: (torch.randn(2, 3), {"a": object()}),
        anabranch.InputError,
        ["input 1", "object", "expected tensors, numbers", "register_pytree_node"],
    ),
    "a list of many numbers": (
        lambda: (torch.randn(2, 3).tolist() * 300, "x" * 300),
        anabranch.InputError,
        ["model(*inputs)", "and 1785 more): "],
    ),
    "a set": (lambda: (torch.randn(2, 3), {1, 2}), anabranch.InputError, ["input 1", "set"]),
    "wrong shape": (
        lambda: (torch.randn(2, 7),),
        anabranch.InputError,
        ["float32[2, 7] on cpu", "[2, 7] X [3, 4]", "model(*inputs)", "Compiled so far: float32[2, 3]"],
    ),
    "wrong dtype": (
        lambda: (torch.randint(9, (2, 3)),),
        anabranch.InputError,
        ["int64[2, 3]", "Long and Float", "model(*inputs)", "Compiled so far: float32[2, 3]"],
    ),
    "no input": (lambda: (), anabranch.InputError, ["(none)", "model(*inputs)", "Compiled so far"]),
}


@pytest.mark.clause(8)
@pytest.mark.parametrize("case", list(BAD_CALLS))
def test_a_bad_call_is_refused_by_name_and_the_engine_stays_usable(
    case: str, model: nn.Module, engine: anabranch.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    make, error, words = BAD_CALLS[case]
    given = make()
    for _ in range(2):
        with pytest.raises(error) as info:
            engine(*given)
        for word in words:
            assert word in str(info.value), word
        assert isinstance(info.value, anabranch.AnabranchError)
        assert isinstance(info.value, ValueError)
        x = torch.randn(2, 3)
        assert torch.equal(engine(x), model(x).detach())
    assert engine.stats() == anabranch.Stats(calls=2, direct_calls=2, specializations=1)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]  # the error says it all


@pytest.mark.parametrize("case", list(BAD_CALLS))
def test_a_bad_input_is_refused_at_compile_and_by_warm_too(case: str, model: nn.Module, engine: Any) -> None:
    make, error, _ = BAD_CALLS[case]
    given = make()
    with pytest.raises(error):
        engine.warm(list(given))
    with pytest.raises(anabranch.InputError):
        anabranch.compile(model, list(given), backend="eager")


def test_an_input_of_the_wrong_name_is_refused() -> None:
    engine = anabranch.compile(nn.Linear(3, 4), [torch.randn(2, 3)], backend="eager")
    with pytest.raises(anabranch.InputError, match="other"):
        engine(other=torch.randn(2, 3))
    assert engine(torch.randn(2, 3)).shape == (2, 4)


BAD_COMPILES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "backend": ({"backend": "tvm"}, ["backend='tvm'", "'inductor'", "'eager'"]),
    "runtime": ({"runtime": "rust"}, ["runtime='rust'", "'python'"]),
    "precision": ({"precision": torch.float64}, ["precision=torch.float64", "torch.float16", "torch.bfloat16"]),
    "precision text": ({"precision": "fp16"}, ["precision=fp16", "torch.float16"]),
    "no contexts": ({"max_contexts": 0}, ["max_contexts=0", "at least 1"]),
    "negative contexts": ({"max_contexts": -3}, ["max_contexts=-3", "at least 1"]),
    "memory": ({"memory_limit": -1}, ["memory_limit=-1", "0 or more", "None"]),
}


@pytest.mark.parametrize("case", list(BAD_COMPILES))
def test_a_bad_option_is_refused_with_what_is_possible(case: str, model: nn.Module) -> None:
    options, words = BAD_COMPILES[case]
    with pytest.raises(anabranch.InputError) as info:
        anabranch.compile(model, [torch.randn(2, 3)], **{"backend": "eager", **options})
    for word in words:
        assert word in str(info.value), word


@pytest.mark.parametrize("options", [{"max_contexts": 1}, {"memory_limit": 0}, {"memory_limit": None}])
def test_the_least_options_are_taken(options: dict[str, Any], model: nn.Module) -> None:
    x = torch.randn(2, 3)
    assert torch.equal(anabranch.compile(model, [x], backend="eager", **options)(x), model(x).detach())


@pytest.mark.parametrize("single", [torch.randn(2, 3), torch.randn(1), anabranch.Input((2, 3))], ids=["x", "1", "I"])
def test_a_single_tensor_instead_of_a_list_is_refused(single: Any, model: nn.Module) -> None:
    with pytest.raises(anabranch.InputError, match=r"expected a list: inputs=\[x\]") as info:
        anabranch.compile(model, single, backend="eager")
    assert type(single).__name__ in str(info.value)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(anabranch.InputError, match=r"model is a function; expected an nn\.Module"):
        anabranch.compile(lambda x: x, [torch.randn(2)])  # type: ignore[arg-type]


def test_a_device_without_engines_is_refused() -> None:
    with pytest.raises(anabranch.InputError, match=r"device 'meta' given; engines run on 'cuda', 'cpu' or 'sim'"):
        anabranch.compile(nn.Linear(3, 4), [anabranch.Input((2, 3), device="meta")], backend="eager")


def test_a_model_on_another_device_is_refused_by_parameter_name() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 4, device="meta"))
    with pytest.raises(anabranch.InputError) as info:
        anabranch.compile(model, [torch.randn(2, 3)], backend="eager")
    for word in ("'1.weight'", "meta", "cpu", "model.to('cpu')"):
        assert word in str(info.value)


def test_one_input_on_a_device_without_engines_is_refused(model: nn.Module) -> None:
    with pytest.raises(anabranch.InputError, match="device 'meta' given"):
        anabranch.compile(model, [torch.randn(2, 3), torch.empty(1, device="meta")], backend="eager")


def test_a_failing_backend_raises_build_error_and_says_what_to_do(model: nn.Module, monkeypatch: Any) -> None:
    from torch import _inductor

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(_inductor, "standalone_compile", broken)
    with pytest.raises(anabranch.BuildError) as info:
        anabranch.compile(model, [torch.randn(2, 3)], backend="inductor")
    for word in ("Inductor", "no such compiler", "backend='eager'"):
        assert word in str(info.value)


def test_a_failed_build_of_a_signature_leaves_the_others_usable(monkeypatch: Any, model: nn.Module) -> None:
    from anabranch.backends import _eager

    engine = anabranch.compile(model, [torch.randn(2, 3)], backend="eager")

    def broken(*args: Any, **kwargs: Any) -> None:
        raise anabranch.BuildError("given: a test; expected: nothing; do: nothing")

    with monkeypatch.context() as patch:
        patch.setattr(_eager._Eager, "lower", broken)
        with pytest.raises(anabranch.BuildError):
            engine(torch.randn(5, 3))
        assert engine(torch.randn(2, 3)).shape == (2, 4)
    assert engine(torch.randn(5, 3)).shape == (5, 4)


def test_a_model_that_made_up_values_do_not_suit_is_compiled_all_the_same() -> None:
    class Solve(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.cholesky(x)

    engine = anabranch.compile(Solve(), [torch.eye(4)], backend="eager")
    root = torch.randn(4, 4).tril()
    x = root @ root.t() + torch.eye(4)
    torch.testing.assert_close(engine(x), torch.linalg.cholesky(x))
    with pytest.raises(RuntimeError, match="positive-definite"):
        engine(-x)
    torch.testing.assert_close(engine(x), torch.linalg.cholesky(x))


def test_an_error_inside_a_call_reaches_the_caller_and_the_engine_stays_usable() -> None:
    engine = anabranch.compile(nn.Embedding(5, 2), [torch.tensor([1, 2])], backend="eager")
    with pytest.raises(IndexError, match="out of range"):
        engine(torch.tensor([1, 7]))
    assert engine(torch.tensor([4, 0])).shape == (2, 2)


def test_every_error_is_an_anabranch_error_and_every_warning_a_users() -> None:
    names = [n for n in errors.__all__ if n != "AnabranchError"]
    assert len(names) >= 8
    for name in names:
        error = getattr(errors, name)
        assert issubclass(error, UserWarning if name == "RecompileLimit" else anabranch.AnabranchError)
        assert inspect.getdoc(error)
    assert issubclass(anabranch.InputError, ValueError), "so that callers may catch what Python would raise"


@pytest.mark.parametrize("made", [pickle.dumps, copy.copy, copy.deepcopy], ids=lambda f: f.__name__)
def test_an_engine_is_not_copied(made: Any, runtime: str) -> None:
    holder = nn.Linear(2, 2).eval()
    engine = anabranch.compile(holder, [torch.ones(1, 2)], backend="eager", runtime=runtime)
    with pytest.raises(anabranch.InputError, match=r"was to be copied or pickled.*torch\.export\.save\(\)"):
        made(engine)
    holder.engine = engine
    with pytest.raises(anabranch.InputError, match="was to be copied or pickled"):
        copy.deepcopy(holder)
    assert torch.equal(engine(torch.ones(1, 2)), holder(torch.ones(1, 2)))


def test_what_pytorch_says_at_length_is_cut(runtime: str) -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if sum(n * n for n in x.tolist()) > 3 else -x

    x = torch.arange(80)
    with pytest.raises(anabranch.UnsupportedModel, match=r"Could not guard.* \[\.\.\.\]\. An engine needs") as raised:
        anabranch.compile(Asks(), [x], backend="eager", runtime=runtime, require_full=True)
    assert len(str(raised.value)) < 1000
    engine = anabranch.compile(Asks(), [x], backend="eager", runtime=runtime)
    assert max(map(len, engine.explain().splitlines())) < 1000
    assert torch.equal(engine(x - 1), x - 1)
