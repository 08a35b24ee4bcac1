"""The interface of a backend, and the table of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from anabranch.errors import BuildError
from anabranch.export import Program

#: ``kernels(inputs) -> computed tensors``: queues its work on the calling thread's current stream and allocates from
#: that stream's memory. Holds the weights. Any number of threads may call it once it has run a first time.
Kernels = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


class Backend(Protocol):
    """Turns a program into kernels. Called with the build lock held."""

    name: str

    def lower(self, program: Program, examples: Sequence[torch.Tensor]) -> Kernels:
        """Compile ``program``; ``examples`` are inputs of its shapes, strides and dtypes.

        Raises :class:`~anabranch.errors.BuildError` with the compiler's message.
        """


BACKENDS = ("inductor", "eager")


def get_backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise BuildError(f"backend {name!r} given; expected one of {', '.join(map(repr, BACKENDS))}")
    backend: Backend = importlib.import_module(f"anabranch.backends._{name}").BACKEND
    return backend
