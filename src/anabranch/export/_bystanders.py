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

    PyTorch keeps what a trace is doing in variables of the process, and four of them reach other threads:

    - ``torch.export`` turns cuDNN, oneDNN and NNPACK off for the trace, so that composite operators are not taken apart
      for one library. Others' operators would run other kernels. Nothing is taken apart here, so they stay on.
    - A function that ``torch.compile`` made refuses to run while any thread traces symbolically, unless somebody says
      that it is for a compiler. That is said here.
    - While any thread exports, ``torch.compile`` compiles nothing, and a function that is kept from Dynamo writes
      itself into the notes of the trace under way, whoever's it is; two that do so at once raise ``KeyError``. Here
      only this thread is told that it exports.
    - Its default generators are set back, see :func:`draws_stay_drawn`.

    Where a PyTorch version lacks one of these hooks, that part does nothing. Called with the locks of
    ``process.compiling()`` held, so by one thread at a time.
    """
    # Loads half of the compiler, so not at import.
    tracer = importlib.import_module("torch.export._trace")
    here, is_exporting = threading.get_ident(), torch.compiler.is_exporting

    def is_exporting_here() -> bool:
        return threading.get_ident() == here and is_exporting()

    with (
        replaced(tracer, "_ignore_backend_decomps", contextlib.nullcontext),
        replaced(torch.compiler, "_is_compiling_flag", True),
        replaced(torch.compiler, "is_exporting", is_exporting_here),
        draws_stay_drawn(),
    ):
        yield


@contextmanager
def draws_stay_drawn() -> Iterator[None]:
    """Keep PyTorch's tracers and compilers, in this thread, from setting the default generators back.

    They do so to be sure that they have drawn nothing, which they do not anyway. What other threads have drawn in the
    meantime would be drawn again.
    """
    here = threading.get_ident()

    def by_others(set_state: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> None:
            if threading.get_ident() != here:
                set_state(*args, **kwargs)

        return call

    with (
        replaced(torch.random, "set_rng_state", by_others(torch.random.set_rng_state)),
        replaced(torch.cuda, "set_rng_state", by_others(torch.cuda.set_rng_state)),
    ):
        yield


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Have another value under a name of a module or a class; nothing where there is no such name."""
    missing = object()
    if not hasattr(module, name):
        yield
        return
    before = vars(module).get(name, missing)  # as it is written there: a class method is bound to no class yet
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(module, name)
        else:
            setattr(module, name, before)
