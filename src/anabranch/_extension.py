"""Builds and loads the package's C++ that speaks to PyTorch: a Python module from a folder of sources.

The result depends on PyTorch and Python, so both are part of the name under which it is kept.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

from anabranch import _native


def flags(name: str) -> list[str]:
    """What the compiler needs to find PyTorch's headers, which are not ours to warn about."""
    headers = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    version = f"torch-{torch.__version__}-{sysconfig.get_config_var('SOABI')}"
    return [
        "-std=c++20",
        "-g0",
        f"-DTORCH_EXTENSION_NAME={name}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        # PyTorch's own headers have some.
        "-Wno-unused-parameter",
        *(f"-isystem{h}" for h in headers),
        # For which PyTorch: the flags above, which hold its folder, need not differ between two versions.
        f'-DANABRANCH_FOR="{version}"',
    ]


def build(name: str, folder: Path, more: Sequence[str] = (), headers: Sequence[Path] = ()) -> Path:
    """Where the module's library is, compiled from the ``*.cpp`` of ``folder`` if need be.

    ``more`` are flags, which come last and win; ``headers`` are those outside ``folder`` that the sources include.

    Raises :class:`~anabranch.errors.BuildError` where there is no compiler.
    """
    libraries = cpp_extension.TORCH_LIB_PATH
    return _native.build(
        name,
        sorted(folder.glob("*.cpp")),
        flags=[*flags(name), *more],
        libraries=[f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"],
        headers=headers,
    )


def load(name: str, path: Path) -> ModuleType:
    """The module that :func:`build` made."""
    spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, str(path)))
    assert spec is not None
    module = module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module
