"""Compiles the native runtime into the wheel where PyTorch is at hand: ``pip wheel . --no-build-isolation``.

In an isolated build there is no PyTorch to compile for. The wheel is then a pure one, and the runtime is compiled at
its first use. The rest of the project's metadata is in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

HAS_TORCH = importlib.util.find_spec("torch") is not None


class Build(build_py):
    def run(self) -> None:
        super().run()
        # An editable install runs from the sources, which may change: nothing is built ahead for it.
        if HAS_TORCH and not self.editable_mode:
            sys.path.insert(0, str(Path(__file__).parent / "src"))
            from anabranch.runtime import _library

            print("built", _library.build_ahead(Path(self.build_lib) / "anabranch" / "runtime"))


class Wheel(Distribution):
    def has_ext_modules(self) -> bool:
        return HAS_TORCH


setup(cmdclass={"build_py": Build}, distclass=Wheel)
