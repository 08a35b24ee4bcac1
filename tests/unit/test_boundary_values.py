"""At the ends of the range results are eager's in that precision, in backends and runtimes. What differs is pinned."""

from __future__ import annotations

import pytest
import torch
from torch import __version__ as version

import anabranch
from anabranch.backends._exceptions import EXCEPTIONS, exceptions
from anabranch.check._boundary import special_inputs
from anabranch.export import export_program
from contract.boundary import Operators, found

pytestmark = pytest.mark.usefixtures("seeded")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

_NOT_FINITE = ("var", "std, mean", "interpolate by lines", "fmod", "remainder")
_NORMS = ("layer_norm", "group_norm", "instance_norm")

#: Of Inductor's kernels on the CPU: by dtype, each operator that differs and how. None is finite where eager is not.
PINNED: dict[torch.dtype, dict[str, set[str]]] = {
    torch.float32: {
        **{name: {"not finite"} for name in (*_NORMS, "var", "std, mean", "interpolate by lines")},
        **{name: {"value"} for name in ("erf", "elu", "celu", "selu")},
    },
    torch.float16: {
        **{name: {"not finite"} for name in ("std, mean", "interpolate by lines")},
        "layer_norm": {"value"},
    },
    torch.bfloat16: {
        **{name: {"not finite"} for name in _NOT_FINITE},
        **{name: {"value"} for name in ("elu", "celu", "selu")},
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_of_pytorch_are_eagers(dtype: torch.dtype, runtime: str) -> None:
    model, x = Operators(), (torch.rand(2, 3, 8) * 2 - 1).to(dtype)
    with anabranch.compile(model, [x], backend="eager") as engine:
        assert found(engine, model, x) == {}
        assert "ends of the range" not in engine.explain()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_kernels_are_eagers_but_for_what_is_pinned(dtype: torch.dtype, runtime: str) -> None:
    model, x = Operators(), (torch.rand(2, 3, 8) * 2 - 1).to(dtype)
    with anabranch.compile(model, [x], backend="inductor") as engine:
        got = found(engine, model, x)
        if dtype is not torch.float32:  # of subnormal numbers, by the instructions that the machine has
            assert got.pop("gelu", {"value"}) == {"value"}
        if version.startswith("2.13"):
            assert got == PINNED[dtype]
        else:  # some do not differ
            assert got.items() <= PINNED[dtype].items()
        text = engine.explain()
    assert "instead of inductor" not in text
    assert text.count("at the ends of the range, other than eager: ") == 7
    assert len([e for e in EXCEPTIONS if not e.devices or "cpu" in e.devices]) == 7
    assert len(EXCEPTIONS) <= 12


def test_what_differs_on_one_device_is_not_said_of_another() -> None:
    for name, on_cpu, on_gpus in (("relu", 0, 0), ("gelu", 1, 0), ("fmod", 1, 0), ("var", 1, 1), ("acosh", 0, 1)):
        graph = export_program(Operators(name), [torch.rand(2, 3, 8)], {}).module.graph
        assert len(exceptions(graph, "cpu")) == on_cpu
        assert len(exceptions(graph, "cuda")) == on_gpus


@pytest.mark.parametrize("name", ["gelu", "var", "layer_norm", "erf", "elu", "relu"])
def test_explain_names_what_a_model_meets(name: str) -> None:
    engine = anabranch.compile(Operators(name), [torch.randn(2, 3, 8)], backend="inductor", runtime="python")
    lines = [line for line in engine.explain().splitlines() if "ends of the range" in line]
    if name == "relu":
        assert not lines
    else:
        (line,) = lines
        assert {"layer_norm": "norm", "var": "variance"}.get(name, name) in line


def test_sums_just_overflow_in_every_dtype() -> None:
    for dtype in (*DTYPES, torch.float64):
        tried = dict(special_inputs(torch.ones(4, 6, dtype=dtype)))
        over, under = tried["input whose sums just overflow"], tried["input whose sums just do not overflow"]
        assert bool((over[..., ::2] + over[..., 1::2]).isinf().all())
        assert bool((under[..., ::2] + under[..., 1::2] == torch.finfo(dtype).max).all())
        assert bool(over.isfinite().all())
        smallest = min(float(x[0, 0].abs()) for x in tried.values() if float(x[0, 0].abs()) > 0)
        assert smallest == torch.finfo(dtype).tiny * torch.finfo(dtype).eps
