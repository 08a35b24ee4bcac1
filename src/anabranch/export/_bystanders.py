"""What PyTorch's tracers and compilers change for every thread of the process, and how it is kept from the others."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
      itself into the notes of the trace under way, whoever's it is; two that do so at once raise ``KeyError``. And code
      that asks whether it is traced is told yes, in any thread. Here only this thread is.
    - Its default generators are set back, see :func:`draws_stay_drawn`.

    Where a PyTorch version lacks one of these hooks, that part does nothing. Called with the locks of
    ``process.compiling()`` held, so by one thread at a time.
    """
    # Loads half of the compiler, so not at import.
    tracer = importlib.import_module("torch.export._trace")
    here, exports = _Here(), getattr(tracer, "_compiling_state_context", contextlib.nullcontext)

    def exporting() -> AbstractContextManager[None]:
        # Another thread may export, too: PyTorch does not mind.
        return replaced(torch.compiler, "_is_exporting_flag", here) if here.is_here else exports()

    with (
        replaced(tracer, "_ignore_backend_decomps", contextlib.nullcontext),
        replaced(tracer, "_compiling_state_context", exporting),
        replaced(torch.compiler, "_is_compiling_flag", here),
        draws_stay_drawn(),
    ):
        yield


class _Here:
    """A flag of the process that is true in the thread that made it.

    PyTorch's functions hand it on as it is, whatever name a module has imported them under, and who asks looks whether
    it is true, or computes with it.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    @property
    def is_here(self) -> bool:
        """Whether this is that thread."""
        return threading.get_ident() == self._thread

    def __bool__(self) -> bool:
        if sys._getframe(1).f_code is torch.fx._symbolic_trace.is_fx_symbolic_tracing.__code__:
            return True  # the refusal to run while others trace, unless it is for a compiler
        return self.is_here and not _asking.is_told_no

    def __or__(self, other: Any) -> Any:
        return bool(self) | other

    def __and__(self, other: Any) -> Any:
        return bool(self) & other

    def __xor__(self, other: Any) -> Any:
        return bool(self) ^ other

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))

    def __int__(self) -> int:
        return int(bool(self))

    def __repr__(self) -> str:
        return repr(bool(self))

    __ror__, __rand__, __rxor__ = __or__, __and__, __xor__


class _Asking(threading.local):
    is_told_no = False


_asking = _Asking()


@contextmanager
def told_as_in_eager() -> Iterator[None]:
    """While it is on, code of this thread that asks whether it is traced or exported is told no, though it is."""
    before, _asking.is_told_no = _asking.is_told_no, True
    try:
        yield
    finally:
        _asking.is_told_no = before


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
