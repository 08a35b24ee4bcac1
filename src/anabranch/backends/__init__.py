"""Backends turn a program into kernels that run on the current stream: ``inductor``, ``eager`` and ``tensorrt``."""

from anabranch.backends._backend import RESULTS_ONLY, TF32, Instance, Kernels, Options, Stateful, Wrapped, of_one
from anabranch.backends._exceptions import exceptions
from anabranch.backends._registry import BACKENDS, get_backend

__all__ = [
    "BACKENDS",
    "RESULTS_ONLY",
    "TF32",
    "Instance",
    "Kernels",
    "Options",
    "Stateful",
    "Wrapped",
    "exceptions",
    "get_backend",
    "of_one",
]
