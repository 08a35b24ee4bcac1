"""The compiled core and its C interface, loaded with ctypes at first use."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from anabranch._toolchain import build

#: What every function of the core returns.
OK, MALFORMED, FAILED = range(3)

FOLDER = Path(__file__).parent / "_core"


def sources() -> list[Path]:
    """The core's C++ files."""
    return sorted(FOLDER.glob("*.cpp"))


@cache
def load() -> ctypes.CDLL:
    """The core, compiled if need be. Raises :class:`~anabranch.errors.BuildError` when that is impossible."""
    library = ctypes.CDLL(str(build("race", sources())))
    handle, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    for name, result, arguments in (
        ("new", handle, [ctypes.c_uint64]),
        ("delete", None, [handle]),
        ("line", ctypes.c_int, [handle, text, size]),
        ("bytes", ctypes.c_int, [handle, text, size]),
        ("end", ctypes.c_int, [handle]),
        ("error", text, [handle]),
        ("position", ctypes.c_uint64, [handle]),
        ("counts", None, [handle, ctypes.POINTER(ctypes.c_uint64)]),
        ("summary", text, [handle]),
        ("report", text, [handle, ctypes.c_uint64]),
    ):
        function = getattr(library, f"anabranch_race_{name}")
        function.restype = result
        function.argtypes = arguments
    return library
