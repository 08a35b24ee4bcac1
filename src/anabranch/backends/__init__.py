"""Backends turn a program into kernels that run on the current stream: ``inductor``, ``eager`` and ``tensorrt``."""

from anabranch.backends._backend import Instance, Kernels, Options, Stateful, Wrapped, of_one
from anabranch.backends._registry import BACKENDS, get_backend

__all__ = ["BACKENDS", "Instance", "Kernels", "Options", "Stateful", "Wrapped", "get_backend", "of_one"]
