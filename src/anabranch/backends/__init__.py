"""Backends turn a program into kernels that run on the current stream: ``inductor``, ``eager`` and ``tensorrt``."""

from anabranch.backends._backend import BACKENDS, Instance, Kernels, Options, Stateful, get_backend, of_one

__all__ = ["BACKENDS", "Instance", "Kernels", "Options", "Stateful", "get_backend", "of_one"]
