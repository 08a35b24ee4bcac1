"""Builds the native runtime's C++ at first use and loads it."""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

from anabranch import _activity, _extension, _sync
from anabranch.errors import BuildError

FOLDER = Path(__file__).parent / "_core"
NAME = "anabranch_runtime"
#: What speaks to Python. pybind11's headers take as long as all others.
BESIDE = ("python/*.cpp",)


def flags() -> list[str]:
    """Of our own; ``ANABRANCH_NATIVE_FLAGS`` adds some, for tests under sanitizers and of planted faults."""
    return ["-O2", *os.environ.get("ANABRANCH_NATIVE_FLAGS", "").split()]


def build() -> Path:
    """Where the library is, compiled if need be (half a minute, once for each PyTorch and Python).

    Raises :class:`~anabranch.errors.BuildError` where there is no compiler.
    """
    came_along = _extension.ahead(NAME, FOLDER)
    if came_along.exists() and not os.environ.get("ANABRANCH_NATIVE_FLAGS"):
        return came_along
    return _extension.build(NAME, FOLDER, flags(), beside=BESIDE)


def build_ahead(target: Path) -> Path:
    """Compile into a package that is being made: ``target`` is its copy of this module's folder."""
    return _extension.build_ahead(NAME, FOLDER, target, flags(), BESIDE)


@cache
def load() -> ModuleType:
    """The runtime's module. Raises as :func:`build` does."""
    core = _extension.load(NAME, build())
    _sync.on_install(lambda factories: core.observe(factories.observer()))
    _activity.also_in_call(core.in_call)
    return core


@cache
def is_available() -> bool:
    """Whether the native runtime can be had; says why not, once, in a warning."""
    try:
        load()
    except (BuildError, ImportError, OSError) as e:
        warnings.warn(
            f"anabranch runs on its Python runtime, which is right but slower: the native one could not be built. {e}",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    return True
