"""Rotary embeddings of transformers whose frequencies depend on how far the positions of a call go: "dynamic", which
stretches them beyond a length, and "longrope", which has another set of them there.

Python asks the positions which they are, and keeps the answer in attributes, for later calls as well. A graph can do
neither. So each call computes both, and takes those of its own positions, as a model does that is called first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Where transformers decorates what asks the positions.
_MODULE = "transformers.modeling_rope_utils"


@contextmanager
def without_questions(module: torch.nn.Module) -> Iterator[None]:
    """While ``module``, which this thread uses alone, is called: no rotary embedding asks for values."""
    layers = [(m, rotate) for m in module.modules() if (rotate := _rotation(m)) is not None]
    for layer, rotate in layers:
        layer.__dict__["forward"] = functools.partial(_forward, layer, rotate)
    try:
        yield
    finally:
        for layer, _ in layers:
            del layer.__dict__["forward"]


def _rotation(layer: torch.nn.Module) -> Callable[..., Any] | None:
    """What a layer's ``forward`` does once the frequencies are known; None for a layer of another kind, and for one
    that never asks."""
    kinds = layer.__dict__.get("rope_type")
    asking = [name for name, kind in _named(kinds) if isinstance(kind, str) and _asks(kind)]
    # A forward of its own has been given to it by someone who may do without the decorator, or around it.
    if not asking or "forward" in layer.__dict__ or not all(name in layer._buffers for name in asking):
        return None
    function: Any = inspect.unwrap(type(layer).forward, stop=_is_decorated)
    return function.__wrapped__ if _is_decorated(function) else None


def _is_decorated(function: Any) -> bool:
    # A decorator takes the names of what it decorates, but not what it is written in.
    return hasattr(function, "__wrapped__") and getattr(function, "__globals__", {}).get("__name__") == _MODULE


def _named(kinds: Any) -> Iterator[tuple[str, Any]]:
    """A layer's buffers of frequencies, and the kind of each: one, or one for each type of the model's layers."""
    if isinstance(kinds, dict):
        yield from ((_buffer(layer_type), kind) for layer_type, kind in kinds.items())
    else:
        yield _buffer(None), kinds


def _buffer(layer_type: str | None) -> str:
    return "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"


def _asks(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"


def _forward(
    layer: Any, rotate: Callable[..., Any], x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
) -> Any:
    named = {} if layer_type is None else {"layer_type": layer_type}
    kind = layer.rope_type if layer_type is None else layer.rope_type[layer_type]
    if not _asks(kind):
        return rotate(layer, x, position_ids, **named)
    name = _buffer(layer_type)
    with torch.no_grad():
        chosen = _frequencies(layer, kind, name, x.device, position_ids, named)
        # The layer has them for this call alone: assigned, they would be state.
        before, layer._buffers[name] = layer._buffers[name], chosen
        try:
            return rotate(layer, x, position_ids, **named)
        finally:
            layer._buffers[name] = before


def _frequencies(
    layer: Any, kind: str, name: str, device: torch.device, position_ids: torch.Tensor, named: dict[str, str]
) -> torch.Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    make = functools.partial(ROPE_INIT_FUNCTIONS[kind], layer.config, device, **named)
    prefix = name.removesuffix("inv_freq")
    original = getattr(layer, f"{prefix}original_inv_freq").to(device)
    length = torch.max(position_ids) + 1
    if kind == "longrope":
        parameters = layer.config.rope_parameters
        most = (parameters[named["layer_type"]] if named else parameters)["original_max_position_embeddings"]
        return torch.where(length > most, make(seq_len=most + 1)[0], original)
    most = layer.original_max_seq_len
    # Until a call went beyond, the layer has not gone back to the original ones, which may be of another type.
    cached = getattr(layer, f"{prefix}max_seq_len_cached", layer.max_seq_len_cached)
    near = original if isinstance(cached, torch.Tensor) else layer._buffers[name]
    return torch.where(length > most, make(seq_len=length)[0], near)
