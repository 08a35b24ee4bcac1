"""Engines are eager on models made up at random; ``benchmarks/generated_models.py`` tries many more of them."""

from __future__ import annotations

import random
import warnings

import generated
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anabranch


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.simplefilter("ignore")  # of operators on few elements


def check(count: int, backend: str, runtime: str, first: int) -> None:
    """``count`` models, ten of them compiled at once."""
    for start in range(first, first + count, 10):
        models = [generated.make(random.Random(s), s, stable=backend == "inductor") for s in range(start, start + 10)]
        refused, found = generated.compare_each(models, backend, runtime)
        assert not found, f"{backend}, {runtime}"
        assert sum(refused.values()) <= 2, refused


@pytest.mark.parametrize("runtime", ["native", "python"])
def test_models_are_as_in_eager(runtime: str) -> None:
    check(100, "eager", runtime, first=0 if runtime == "native" else 100)


def test_models_are_as_in_eager_compiled() -> None:
    check(10, "inductor", "native", first=0)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["native", "python"])
def test_many_models_are_as_in_eager(runtime: str) -> None:
    check(400, "eager", runtime, first=1000 if runtime == "native" else 2000)


@pytest.mark.slow
def test_many_models_are_as_in_eager_compiled() -> None:
    check(40, "inductor", "native", first=1000)


@settings(max_examples=10, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_models_that_hypothesis_makes(rng: random.Random) -> None:
    model = generated.make(rng)
    _, found = generated.refusal(model, "eager", "python")
    assert not found, f"{found}\n{model.source}\n{model.inputs}"


def test_the_comparison_sees_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong engine is found, and its model is cut down to the line that shows it."""
    model = generated.Model(0, {"x0": generated.Input((2, 3), torch.float32, "dense")}, [])
    model.lines = ["v0 = x0 + 1", "v1 = x0 * 2", "v2 = torch.sin(v0)"]
    model.result = "(v0, v1, v2)"
    assert not generated.compare([model], "eager", "python")
    compile = generated.anabranch.compile

    def wrong(*args: object, **options: object) -> object:
        engine = compile(*args, **options)  # type: ignore[arg-type]

        def call(*given: object, **keywords: object) -> object:
            leaves, structure = torch.utils._pytree.tree_flatten(engine(*given, **keywords))
            leaves = [y + (y == y.sin()) + 1e-6 if (y.abs() <= 1).all() else y for y in leaves]
            return torch.utils._pytree.tree_unflatten(leaves, structure)

        return call

    monkeypatch.setattr(generated.anabranch, "compile", wrong)
    model.lines[0] = "v0 = x0 + 5"
    assert generated.compare([model], "eager", "python")
    short = generated.shrunk(model, lambda m: bool(_found(m)))
    assert short.result == "v2"
    assert [line[:2] for line in short.lines] == ["v0", "v2"]


def _found(model: generated.Model) -> list[str]:
    try:
        return generated.compare([model], "eager", "python")
    except anabranch.AnabranchError:  # a line is gone that it needs
        return []
