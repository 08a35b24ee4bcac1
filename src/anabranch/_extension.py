"""Builds and loads the package's C++ that speaks to PyTorch: a Python module from a folder of sources.

The result depends on PyTorch and Python, so both are part of the name under which it is kept.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import shutil
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from anabranch import _toolchain


def _where_pytorch_is() -> Any:
    """``torch.utils.cpp_extension``. Where a build for CUDA finds a toolkit and no GPU, importing it logs a warning
    that is nothing to someone who runs on the CPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")

    def is_wanted(record: logging.LogRecord) -> bool:
        return "No CUDA runtime is found" not in record.getMessage()

    logger.addFilter(is_wanted)
    try:
        return importlib.import_module("torch.utils.cpp_extension")
    finally:
        logger.removeFilter(is_wanted)


cpp_extension = _where_pytorch_is()


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
        # Its headers then include the operators that they use, not all of them.
        "-DAT_PER_OPERATOR_HEADERS",
        *(f"-isystem{h}" for h in headers),
        # For which PyTorch: the flags above, which hold its folder, need not differ between two versions.
        f'-DANABRANCH_FOR="{version}"',
    ]


def build(
    name: str, folder: Path, more: Sequence[str] = (), headers: Sequence[Path] = (), beside: Sequence[str] = ()
) -> Path:
    """Where the module's library is, compiled from the ``*.cpp`` of ``folder`` if need be.

    ``more`` are flags, which come last and win; ``headers`` are those outside ``folder`` that the sources include;
    ``beside`` has the names, or patterns of names, of sources that are a translation unit of their own.

    Raises :class:`~anabranch.errors.BuildError` where there is no compiler.
    """
    libraries = cpp_extension.TORCH_LIB_PATH
    second = [source for pattern in beside for source in sorted(folder.glob(pattern))]
    return _toolchain.build(
        name,
        [source for source in sorted(folder.glob("*.cpp")) if source not in second],
        beside=second,
        flags=[*flags(name), *more],
        libraries=[f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"],
        headers=headers,
    )


def ahead(name: str, folder: Path) -> Path:
    """Where a library that came along with the package would be: one for this PyTorch, Python and these sources.

    It is trusted as the package's Python code is, whoever installed both: it lies beside it.
    """
    digest = hashlib.sha256()
    for file in sorted((*folder.rglob("*.cpp"), *folder.rglob("*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    version = f"torch{torch.__version__}-{sysconfig.get_config_var('SOABI')}"
    return folder.parent / "_ahead" / f"{name}-{version}-{digest.hexdigest()[:20]}.so"


def build_ahead(name: str, folder: Path, target: Path, more: Sequence[str] = (), beside: Sequence[str] = ()) -> Path:
    """Compile for a package that is being made, whose copy of ``folder``'s parent is ``target``."""
    path = target / "_ahead" / ahead(name, folder).name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(build(name, folder, more, beside=beside), path)
    return path


def load(name: str, path: Path) -> ModuleType:
    """The module that :func:`build` made."""
    spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, str(path)))
    assert spec is not None
    module = module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module
