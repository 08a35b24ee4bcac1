"""``torch.nn.MultiheadAttention`` has a fast path that it does not take while it is traced, and the results of the two
lie in memory in another way: a model may view the one, and not the other.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules import activation

from anabranch.export._bystanders import replaced

_NAME = "_is_make_fx_tracing"


class _Thread(threading.local):
    #: Of the layer that this thread calls, until it asks whether anybody overrides PyTorch's functions for it.
    query: Any = None
    #: Whether it has asked that, and not yet whether it is traced.
    has_asked = False
    #: Whether it has found nothing against its fast path but that it is traced.
    is_fast = False


_thread = _Thread()


@contextmanager
def as_on_fast_paths(module: torch.nn.Module) -> Iterator[None]:
    """While ``module``, which this thread uses alone, is traced: results lie in memory as they do in eager calls."""
    kind = torch.nn.MultiheadAttention
    layers = [m for m in module.modules() if type(m).forward is kind.forward and "forward" not in m.__dict__]
    before: Any = getattr(activation, _NAME, None)
    if not layers or before is None:
        yield
        return
    overridden = torch.overrides.has_torch_function

    def is_overridden(tensors: Any) -> bool:
        if _thread.query is None or not any(x is _thread.query for x in tensors):
            return overridden(tensors)
        _thread.query, _thread.has_asked = None, True
        return False  # by what traces it, and nobody else

    def is_traced() -> bool:  # the last thing that a layer asks
        if not _thread.has_asked:
            return bool(before())
        _thread.has_asked, _thread.is_fast = False, True
        return True

    for layer in layers:
        layer.__dict__["forward"] = functools.partial(_forward, layer)
    try:
        with (
            replaced(torch.overrides, "has_torch_function", is_overridden),
            replaced(activation, _NAME, is_traced),
        ):
            yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    _thread.query, _thread.has_asked, _thread.is_fast = args[0] if args else kwargs.get("query"), False, False
    try:
        results, weights = torch.nn.MultiheadAttention.forward(layer, *args, **kwargs)
    finally:
        _thread.query, _thread.has_asked = None, False
    return (results.contiguous() if _thread.is_fast else results), weights
