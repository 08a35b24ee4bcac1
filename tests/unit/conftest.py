"""What the tests of the compile path share."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


# First, so that the tiers are counted with these marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a push both runtimes are tested with the backend eager; Inductor, which takes seconds, with the native one."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if (
            item.path.parent == Path(__file__).parent
            and "inductor" in item.name
            and parameters.get("runtime") == "python"
        ):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Random inputs that differ from test to test and are the same in each run."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
        yield


@pytest.fixture(params=["native", "python"])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The runtime of every engine that the test compiles without naming one."""
    from anabranch.runtime import _compile

    name = str(request.param)
    monkeypatch.setitem(_compile.compile.__kwdefaults__, "runtime", name)
    return name


@pytest.fixture
def run_python() -> RunPython:
    """Run a script in a fresh interpreter; a hang fails the test after ``timeout`` seconds."""

    def run(script: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, "PYTHONPATH": str(SRC)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
