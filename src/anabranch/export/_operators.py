"""Operators of ours that stand in a trace for PyTorch's own, until the graph gets those."""

from __future__ import annotations

import functools

import torch

#: In front of their names: ``torch.ops.anabranch``.
NAMESPACE = "anabranch"


@functools.cache
def library() -> torch.library.Library:
    """Where they are defined, at the first trace that needs them. Kept: what is defined in a library goes with it."""
    return torch.library.Library(NAMESPACE, "FRAGMENT")
