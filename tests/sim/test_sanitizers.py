"""Backend and native runtime under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = (
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=vptr -fno-omit-frame-pointer"
    # Sanitizers see as much without optimization, which would double what the build takes.
    " -O0"
)

_RUN = """
import pytest, sys
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def _library(compiler: str, name: str) -> str:
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return path.strip()


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    from anabranch.runtime import _library as runtime
    from anabranch.sim import _build as sim

    with pytest.MonkeyPatch.context() as m:
        m.setenv("ANABRANCH_SIM_FLAGS", FLAGS)
        m.setenv("ANABRANCH_NATIVE_FLAGS", FLAGS)
        # Not in the process below, where the compiler would run under the sanitizers too.
        sim.build()
        runtime.build()
        environment = dict(os.environ)
    libraries = [_library("gcc", "libasan.so"), _library("gcc", "libubsan.so"), _library("g++", "libstdc++.so")]
    environment["LD_PRELOAD"] = " ".join(libraries)
    # Python and PyTorch never free what they made once; only what is wrong in what we do counts.
    environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_odr_violation=0:abort_on_error=1"
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    # What Python frees is seen as freed, too: its own allocator would hide it.
    environment["PYTHONMALLOC"] = "malloc"
    environment["PYTHONPATH"] = str(ROOT / "src")
    return environment


def test_a_planted_error_is_seen(environment: dict[str, str]) -> None:
    # A kernel that reads beyond its block: the sanitizer is really there, and knows the machine's memory.
    code = """
import ctypes, torch, anabranch.sim as sim
x = torch.ones(4, device="sim")
sim.launch("stray", lambda t: ctypes.memmove((ctypes.c_char * 8)(), t.data_ptr() + 512, 8), reads=[x])
torch.accelerator.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_both_libraries_are_the_instrumented_ones(environment: dict[str, str]) -> None:
    code = """
import anabranch.sim, subprocess
from anabranch.runtime import _library
for path in (anabranch.sim.core.__file__, _library.load().__file__):
    print("__asan_init" in subprocess.run(["nm", "-D", path], capture_output=True, text=True, env={}).stdout)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "True"], done.stdout + done.stderr


#: On a push, under sanitizers: calls that wait, free, hand back and capture, in graphs and direct.
WITNESSES = "native and lazy and ({})".format(
    " or ".join(("starts_after and mlp", "freed_right_after", "in_flight and anywhere", "user_graphs and relaxed"))
)


def everything(*tests: str, name: str) -> Any:
    return pytest.param(list(tests), id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "tests",
    [
        pytest.param(["tests/sim/test_device_contract.py", "-k", WITNESSES], id="witnesses"),
        everything("tests/sim/test_ops.py", name="ops"),
        everything(
            "tests/sim/test_device_seam.py", "tests/sim/test_device_contract.py", "-k", "not python", name="device"
        ),
        everything("tests/sim/test_faults.py", "-k", "not python and not first_call and not WithState", name="faults"),
        everything("tests/sim/test_mutants.py", "-k", "exhaustive", name="explorer"),
    ],
)
def test_the_suite_is_clean(environment: dict[str, str], tests: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *tests], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
    assert "runtime error" not in done.stdout + done.stderr
