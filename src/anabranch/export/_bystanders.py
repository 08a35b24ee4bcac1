"""What PyTorch's tracers and compilers change for every thread of the process, and how it is kept from the others."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
    - A function that is kept from Dynamo writes itself into the notes of the trace under way, whoever's it is; two that
      do so at once raise ``KeyError``. Here only this thread's do.

    Where a PyTorch version lacks one of these hooks, that part does nothing. Called with the locks of
    ``process.compiling()`` held, so by one thread at a time.
    """
    # Loads half of the compiler, so not at import.
    tracer = importlib.import_module("torch.export._trace")
    notes = importlib.import_module("torch.fx.traceback")
    here, annotate = threading.get_ident(), getattr(notes, "annotate", None)

    def annotate_here(*args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        assert annotate is not None
        return annotate(*args, **kwargs) if threading.get_ident() == here else contextlib.nullcontext()

    with (
        _replaced(tracer, "_ignore_backend_decomps", contextlib.nullcontext),
        _replaced(torch.compiler, "_is_compiling_flag", True),
        _replaced(notes, "annotate", annotate_here),
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
