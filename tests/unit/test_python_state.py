"""What a model keeps outside of its tensors: caches, counters, random numbers, hooks."""

from __future__ import annotations

import datetime
import functools
import itertools
import os
import random
import secrets
import time
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import anabranch
from anabranch import UnsupportedModel
from anabranch.export import export_program

pytestmark = pytest.mark.usefixtures("seeded")

TABLES: dict[Any, Any] = {}
SEEN: list[Any] = []
STEPS = 0
LATEST: Any = None


class Holder:
    """An object that is no part of any model."""


HOLDER = Holder()


@functools.lru_cache(maxsize=4)
def ramp(n: int) -> torch.Tensor:
    return torch.arange(n) * 0.5


@functools.cache
def ramps(n: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n) * scale, torch.ones(n)


def table(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    if n not in TABLES:
        TABLES[n] = (torch.arange(n) * 2.0, torch.ones(n))
    return TABLES[n]  # type: ignore[no-any-return]


class Model(nn.Module):
    """A function of a module and its input."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.calls = 0
        self.kept: dict[str, Any] = {}
        self.generator = numpy.random.default_rng(0)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def build(function: Callable[[Any, torch.Tensor], Any], *inputs: torch.Tensor) -> anabranch.Engine:
    return anabranch.compile(
        Model(function).eval(), list(inputs) or [torch.randn(2, 3)], backend="eager", runtime="python"
    )


# -- caches -----------------------------------------------------------------------------------------------------------


def _cached(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x + ramp(3) * ramps(3, 0.25)[0] + table(x.shape[0])[0][:, None]


def test_caches_of_the_process_hold_real_tensors_after_compile_and_later_signatures() -> None:
    for cache in (ramp.cache_clear, ramps.cache_clear, TABLES.clear):
        cache()
    engine = build(_cached)
    for n in (2, 5, 7):
        x = torch.randn(n, 3)
        assert torch.equal(engine(x), _cached(None, x))
    held = [ramp(3), *ramps(3, 0.25), *(t for pair in TABLES.values() for t in pair)]
    assert {type(t) for t in held} == {torch.Tensor}
    assert sorted(TABLES) == [2, 5, 7]


def _filled_while_tracing(m: Any, x: torch.Tensor) -> torch.Tensor:
    key = type(x).__name__  # which no real call uses
    if key not in TABLES:
        TABLES[key] = x.new_ones(3), x * 0
    return x + ramps(3, float(len(key)))[0] * 0 + TABLES[key][0]


def test_a_key_first_used_while_tracing_is_taken_out_of_its_cache() -> None:
    TABLES.clear()
    engine = build(_filled_while_tracing)
    assert [key for key in TABLES if "Fake" in str(key)] == []
    assert type(ramps(3, float(len("FakeTensor")))[0]) is torch.Tensor
    (line,) = [line for line in engine.explain().splitlines() if "the model puts tensors into" in line]
    assert f"{__name__}.TABLES" in line
    assert "the cache of ramps()" in line
    x = torch.randn(4, 3)
    assert torch.equal(engine(x), x + 1)


def test_a_list_that_collects_gets_no_stand_ins() -> None:
    SEEN.clear()

    def collect(m: Any, x: torch.Tensor) -> torch.Tensor:
        SEEN.append(x * 2)
        return x + 1

    engine = build(collect)
    assert {type(x) for x in SEEN} <= {torch.Tensor}
    assert f"puts tensors into {__name__}.SEEN; calls do not" in engine.explain()
    held = len(SEEN)
    engine(torch.randn(2, 3))
    assert len(SEEN) == held


def _to_global(m: Any, x: torch.Tensor) -> torch.Tensor:
    global LATEST
    LATEST = x * 2
    return LATEST + 1


def _to_object(m: Any, x: torch.Tensor) -> torch.Tensor:
    HOLDER.latest = x * 2  # type: ignore[attr-defined]
    return x + 1


@pytest.mark.parametrize(("function", "holder"), [(_to_global, "LATEST"), (_to_object, "Holder.latest")])
def test_a_tensor_kept_outside_of_the_model_is_refused_by_the_holders_name(function: Any, holder: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"keeps a tensor .*{__name__}.{holder}"):
        build(function)


def test_attributes_that_a_call_sets_stay_with_the_engine(runtime: str) -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        if "table" not in m.kept:
            m.kept["table"] = torch.arange(3) * 1.5
        m.latest = x * 2
        return x + m.kept["table"]

    model = Model(function).eval()
    engine = anabranch.compile(model, [torch.randn(2, 3)], backend="eager")
    assert model.kept == {}
    assert not hasattr(model, "latest")
    for n in (2, 4):
        x = torch.randn(n, 3)
        assert torch.equal(engine(x), x + torch.arange(3) * 1.5)
    assert model.kept == {}


# -- state that a call changes or reads -------------------------------------------------------------------------------


def _counter(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.calls += 1
    return x * m.calls


def _global_counter(m: Any, x: torch.Tensor) -> torch.Tensor:
    global STEPS
    STEPS += 1
    return x * STEPS


def _kept_counter(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.kept["steps"] = m.kept.get("steps", 0) + 1
    return x[:, : m.kept["steps"] % 3]


STEPS_TAKEN: list[int] = []
NUMBERS = itertools.count()


def _global_list(m: Any, x: torch.Tensor) -> torch.Tensor:
    STEPS_TAKEN.append(1)
    return x * len(STEPS_TAKEN)


def _class_counter(m: Any, x: torch.Tensor) -> torch.Tensor:
    kind = next(kind for kind in type(m).__mro__ if kind.__module__ == __name__)
    kind.steps_of_all = getattr(kind, "steps_of_all", 0) + 1
    return x * kind.steps_of_all


DEPENDS: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "counter": (_counter, "changes self.calls"),
    "global": (_global_counter, "changes .*STEPS"),
    "container": (_kept_counter, "changes self.kept"),
    "random": (lambda m, x: x * random.uniform(1, 2), r"draws from random \(test_python_state.py:\d+\)"),
    "one of two ways": (lambda m, x: x * 2 if random.random() < 0.5 else x, r"draws from random"),
    "own random": (lambda m, x: x + random.Random().random(), r"draws from random \(test_python_state.py:\d+\)"),
    "clock": (lambda m, x: x * (time.time() % 1e3), r"reads the clock \(test_python_state.py:\d+\)"),
    "perf_counter_ns": (
        lambda m, x: x * (time.perf_counter_ns() % 1000),
        r"reads the clock \(test_python_state.py:\d+\)",
    ),
    "datetime": (lambda m, x: x * datetime.datetime.now().microsecond, r"reads the clock \(test_python_state.py:\d+\)"),
    "os.urandom": (lambda m, x: x * int.from_bytes(os.urandom(4), "big"), r"draws from os.urandom \(test_python"),
    "uuid": (lambda m, x: x * (uuid.uuid4().int % 997), r"draws from os.urandom \(uuid.py:\d+\)"),
    "secrets": (lambda m, x: x * (1 + secrets.randbelow(10**6)), "draws from "),
    "global list": (_global_list, "changes .*STEPS_TAKEN"),
    "global iterator": (lambda m, x: x * next(NUMBERS), "changes .*NUMBERS"),
    "class variable": (_class_counter, "changes .*steps_of_all"),
    "numpy": (lambda m, x: x * float(numpy.random.rand()), r"draws from NumPy's.random"),
    "numpy generator": (lambda m, x: x * m.generator.normal(), r"draws from NumPy's Generator"),
}


@pytest.mark.parametrize("name", DEPENDS)
def test_results_that_depend_on_state_of_pythons_are_refused_by_name(name: str) -> None:
    function, words = DEPENDS[name]
    with pytest.raises(UnsupportedModel, match=f"depend on state of Python's: a call .*{words}"):
        build(function)


def _harmless(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.calls += 1
    begun = time.perf_counter()
    if m.training and random.random() < 0.5:
        x = x * 2
    m.kept["seconds"] = time.perf_counter() - begun
    return x + 1 if random.random() >= 0 else x


def test_state_that_results_do_not_depend_on_is_told_by_explain() -> None:
    engine = build(_harmless)
    (line,) = [line for line in engine.explain().splitlines() if "its results did not depend on it" in line]
    for words in (
        "changes self.calls",
        "reads the clock (test_python_state.py:",
        "draws from random (test_python_state",
    ):
        assert words in line
    x = torch.randn(4, 3)
    assert torch.equal(engine(x), x + 1)


def test_compiling_draws_nothing_of_pytorchs_and_writes_no_weight() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.dropout(x, 0.5, True) + torch.rand(3) + torch.randn_like(x).normal_() + torch.randperm(3)
            return self.norm(x)

    model, x = Random().eval(), torch.randn(2, 3)
    state = torch.random.get_rng_state()
    anabranch.compile(model, [x], backend="eager", runtime="python")
    assert torch.equal(torch.random.get_rng_state(), state)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert export_program(model.train(), [x], {}).state
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_call_that_would_never_end_is_given_up() -> None:
    def until_large(m: Any, x: torch.Tensor) -> torch.Tensor:
        while x.sum() < 1e9:
            x = x * 1.0
        return x

    with pytest.raises(UnsupportedModel, match="not depend on the values"):
        build(until_large)


# -- hooks ------------------------------------------------------------------------------------------------------------

FEATURES: dict[str, Any] = {}


def _collect(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    FEATURES["linear"] = output
    SEEN.append(output)


class Collector:
    def __init__(self) -> None:
        self.features: list[Any] = []

    def hook(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.features.append(output)

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.features.append(args)


def test_hooks_write_into_nothing_of_the_users_and_a_warning_names_them() -> None:
    FEATURES.clear()
    SEEN.clear()
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    mine, by_name, local = Collector(), Collector(), list[Any]()
    model[0].register_forward_hook(_collect)
    model[0].register_forward_hook(mine.hook)
    model[1].register_forward_pre_hook(by_name)
    model[1].register_forward_hook(functools.partial(lambda kept, *args: kept.append(args), local))
    model.register_forward_hook(lambda module, args, output: local.append(output))
    with pytest.warns(
        UserWarning, match=r"hooks of yours \(.*_collect on '0', Collector.hook on '0', Collector on '1'"
    ):
        engine = anabranch.compile(model, [torch.randn(2, 3)], backend="eager", runtime="python")
    for n in (2, 5):
        engine(torch.randn(n, 3))
    assert (FEATURES, SEEN, mine.features, by_name.features, local) == ({}, [], [], [], [])
    assert "nothing else of them happens in a call" in engine.explain()
    x = torch.randn(4, 3)
    torch.testing.assert_close(engine(x), model(x).detach())
    assert type(FEATURES["linear"]) is torch.Tensor
    assert len(mine.features) == 1


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_values_that_hooks_change_are_changed_in_calls(backend: str) -> None:
    shift = torch.randn(3)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).eval()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + shift,))
    model[1].register_forward_hook(lambda module, args, kwargs, output: output * args[0], with_kwargs=True)
    with pytest.warns(UserWarning, match="hooks of yours"):
        engine = anabranch.compile(model, [torch.randn(2, 3)], backend=backend, runtime="python")
    handle = model[1].register_forward_hook(lambda module, args, output: output * 100)
    handle.remove()
    x = torch.randn(4, 3) if backend == "eager" else torch.randn(2, 3)
    torch.testing.assert_close(engine(x), model(x).detach())


def test_hooks_of_pytorch_need_no_word() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = nn.utils.weight_norm(nn.Linear(3, 3)).eval()
        engine = anabranch.compile(model, [torch.randn(2, 3)], backend="eager", runtime="python")
    assert said, "the older weight_norm is deprecated, says PyTorch"
    assert not [w for w in said if "hooks of yours" in str(w.message)]
    assert "hooks of yours" not in engine.explain()


def test_a_hook_for_every_module_of_the_process_is_refused_by_name() -> None:
    handle = nn.modules.module.register_module_forward_hook(_collect)
    try:
        with pytest.raises(UnsupportedModel, match="every module of the process \\(_collect\\)"):
            build(lambda m, x: x + 1)
    finally:
        handle.remove()
