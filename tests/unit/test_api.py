"""The public face of the package, and what importing it costs."""

from __future__ import annotations

import importlib.resources
import inspect
import subprocess
from collections.abc import Callable

import pytest
import torch

import anabranch

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


def test_every_public_name_resolves_and_is_documented() -> None:
    assert len(set(anabranch.__all__)) == len(anabranch.__all__)
    for name in anabranch.__all__:
        value = getattr(anabranch, name)
        assert isinstance(value, str) or inspect.getdoc(value), name
    assert sorted(anabranch.__all__) == dir(anabranch)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = anabranch.nonsense


def test_public_classes_say_where_they_are_used_from() -> None:
    from anabranch.runtime import Engine

    assert anabranch.Engine is Engine
    assert isinstance(anabranch.compile(torch.nn.ReLU(), [torch.randn(2)], backend="eager"), Engine)


def test_compile_has_the_promised_signature() -> None:
    parameters = inspect.signature(anabranch.compile).parameters
    assert list(parameters)[:2] == ["model", "inputs"]
    keyword_only = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keyword_only == {
        "kwargs": None,
        "backend": None,
        "runtime": "auto",
        "precision": None,
        "max_contexts": 16,
        "memory_limit": None,
        "cuda_graphs": None,
        "require_full": False,
        "dynamic": None,
    }


def test_the_package_is_typed() -> None:
    assert importlib.resources.files("anabranch").joinpath("py.typed").is_file()
    hints = inspect.get_annotations(anabranch.compile)
    assert hints["return"] == "Engine"
    for name, function in inspect.getmembers(anabranch.Engine, inspect.isfunction):
        if not name.startswith("_"):
            assert "return" in inspect.get_annotations(function), name


def test_importing_loads_no_pytorch(run_python: RunPython) -> None:
    done = run_python("import sys, anabranch; print('torch' in sys.modules, anabranch.InputError.__name__)")
    assert done.stdout.strip() == "False InputError", done.stderr


def test_importing_and_the_lazy_names_touch_no_cuda_and_no_compiler(run_python: RunPython) -> None:
    done = run_python(
        """
        import sys, torch
        before = set(sys.modules)
        import anabranch
        for name in anabranch.__all__:
            getattr(anabranch, name)
        print(torch.cuda.is_initialized())
        print(sorted(m for m in set(sys.modules) - before if m.startswith(("cuda", "triton", "torch._inductor"))))
        """
    )
    assert done.stdout.split("\n")[:2] == ["False", "[]"], done.stdout + done.stderr


def test_importing_takes_under_a_fifth_of_a_second_beyond_pytorch(run_python: RunPython) -> None:
    script = """
        import time, torch
        start = time.perf_counter()
        import anabranch
        print(time.perf_counter() - start)
        """
    fastest = min(float(run_python(script).stdout) for _ in range(3))
    assert fastest < 0.2
