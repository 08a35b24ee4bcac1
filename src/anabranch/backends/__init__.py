"""Backends turn a program into kernels that run on the current stream: ``inductor`` and ``eager``."""

from anabranch.backends._backend import BACKENDS, Kernels, get_backend

__all__ = ["BACKENDS", "Kernels", "get_backend"]
