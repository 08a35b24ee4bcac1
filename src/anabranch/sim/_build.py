"""Builds the C++ backend at first use and loads it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from types import ModuleType

from anabranch import _extension

FOLDER = Path(__file__).parent / "_core"
NAME = "anabranch_sim"
#: What includes PyTorch's operators. The others need few of its headers, but Python's and pybind11's.
BESIDE = ("autocast.cpp", "copy.cpp", "infer.cpp", "ops.cpp", "random.cpp", "shapes.cpp", "twins.cpp", "views.cpp")
#: What the native runtime asks of a device.
SEAM = Path(__file__).parents[1] / "runtime" / "_core" / "device.h"


def build() -> Path:
    """Where the backend's library is, compiled if need be (half a minute, once for each PyTorch and Python).

    ``ANABRANCH_SIM_FLAGS`` adds flags of the compiler's, for the tests under sanitizers.

    Raises :class:`~anabranch.errors.BuildError` where there is no compiler.
    """
    more = ["-O1", *os.environ.get("ANABRANCH_SIM_FLAGS", "").split()]
    return _extension.build(NAME, FOLDER, more, [SEAM], BESIDE)


@cache
def load() -> ModuleType:
    """The backend's module. Raises as :func:`build` does."""
    return _extension.load(NAME, build())
