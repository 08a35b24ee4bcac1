"""What PyTorch's tracers and compilers change for every thread of the process, and how it is kept from the others."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let other threads' operators and compiled functions run as before, while this thread traces or compiles.

    PyTorch keeps what a trace is doing in variables of the process, and three of them reach other threads:

    - ``torch.export`` turns cuDNN, oneDNN and NNPACK off for the trace, so that composite operators are not taken apart
      for one library. Others' operators would run other kernels. Nothing is taken apart here, so they stay on.
    - A function that ``torch.compile`` made refuses to run while any thread traces symbolically, unless somebody says
      that it is for a compiler. That is said here.
    - While any thread exports, ``torch.compile`` compiles nothing, and a function that is kept from Dynamo writes
      itself into the notes of the trace under way, whoever's it is; two that do so at once raise ``KeyError``. Here
      only this thread is told that it exports.

    Where a PyTorch version lacks one of these hooks, that part does nothing. Called with the locks of
    ``process.compiling()`` held, so by one thread at a time.
    """
    # Loads half of the compiler, so not at import.
    tracer = importlib.import_module("torch.export._trace")
    here, is_exporting = threading.get_ident(), torch.compiler.is_exporting

    def is_exporting_here() -> bool:
        return threading.get_ident() == here and is_exporting()

    with (
        _replaced(tracer, "_ignore_backend_decomps", contextlib.nullcontext),
        _replaced(torch.compiler, "_is_compiling_flag", True),
        _replaced(torch.compiler, "is_exporting", is_exporting_here),
    ):
        yield


@contextmanager
def _replaced(module: Any, name: str, value: bool | Callable[..., Any]) -> Iterator[None]:
    missing = object()
    before = getattr(module, name, missing)
    if before is missing:
        yield
        return
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
