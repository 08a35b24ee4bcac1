"""Builds the C++ backend at first use and loads it."""

from __future__ import annotations

import os
import sysconfig
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

from anabranch import _native

FOLDER = Path(__file__).parent / "_core"
NAME = "anabranch_sim"


def sources() -> list[Path]:
    """The backend's C++ files."""
    return sorted(FOLDER.glob("*.cpp"))


def flags() -> list[str]:
    """What the compiler needs to find PyTorch's headers, which are not ours to warn about."""
    headers = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    return [
        "-std=c++20",
        "-O1",
        "-g0",
        f"-DTORCH_EXTENSION_NAME={NAME}",
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        # PyTorch's own headers have some.
        "-Wno-unused-parameter",
        *(f"-isystem{h}" for h in headers),
        # A build of its own, for the tests under sanitizers.
        *os.environ.get("ANABRANCH_SIM_FLAGS", "").split(),
    ]


def build() -> Path:
    """Where the backend's library is, compiled if need be (about a minute, once for each PyTorch and Python).

    Raises :class:`~anabranch.errors.BuildError` where there is no compiler.
    """
    # The name says for which PyTorch: the flags, which hold its folder, need not differ between two versions.
    version = f"torch-{torch.__version__}-{sysconfig.get_config_var('SOABI')}"
    folder = cpp_extension.TORCH_LIB_PATH
    return _native.build(
        NAME,
        sources(),
        flags=[*flags(), f'-DANABRANCH_FOR="{version}"'],
        libraries=[f"-L{folder}", f"-Wl,-rpath,{folder}", "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"],
    )


@cache
def load() -> ModuleType:
    """The backend's module. Raises as :func:`build` does."""
    path = build()
    spec = spec_from_file_location(NAME, path, loader=ExtensionFileLoader(NAME, str(path)))
    assert spec is not None
    module = module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module
