"""PyTorch's layers that have a fast path in inference, which they do not take while they are traced.

Of ``torch.nn.MultiheadAttention``, the results of the two lie in memory in another way: a model may view the one, and
not the other. ``torch.nn.TransformerEncoder`` leaves padded positions out on its fast path, and has zeros there.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
    """While ``module``, which this thread uses alone, is traced: results are as in eager calls."""
    layers = _of_kind(module, torch.nn.MultiheadAttention)
    with padded_as_on_fast_paths(module), _laid_out_as_on_fast_paths(layers):
        yield


def padded_as_on_fast_paths(module: torch.nn.Module) -> AbstractContextManager[None]:
    """While it is on, encoders in ``module``, which this thread uses alone, have zeros where positions are padded."""
    return _replaced_forward(_of_kind(module, torch.nn.TransformerEncoder), _encode)


def _of_kind(module: torch.nn.Module, kind: type[torch.nn.Module]) -> list[torch.nn.Module]:
    """The parts that have the ``forward`` of this class of PyTorch's."""
    return [m for m in module.modules() if type(m).forward is kind.forward and "forward" not in m.__dict__]


@contextmanager
def _replaced_forward(modules: Sequence[torch.nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    for module in modules:
        module.__dict__["forward"] = functools.partial(forward, module)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


# -- encoders ----------------------------------------------------------------------------------------------------------


def _encode(
    encoder: Any,
    src: torch.Tensor,
    mask: torch.Tensor | None = None,
    src_key_padding_mask: torch.Tensor | None = None,
    is_causal: bool | None = None,
) -> torch.Tensor:
    run, norm = torch.nn.TransformerEncoder.forward, encoder.norm
    if not _leaves_out(encoder, src, mask, src_key_padding_mask):
        return run(encoder, src, mask, src_key_padding_mask, is_causal)
    assert src_key_padding_mask is not None
    padding = src_key_padding_mask != 0
    valid = ~padding
    # Only where no position is valid that comes after a padded one.
    is_aligned = (valid[:, 1:] <= valid[:, :-1]).all()
    encoder._modules["norm"] = None
    try:
        output = run(encoder, src, mask, src_key_padding_mask, is_causal)
    finally:
        encoder._modules["norm"] = norm
    output = output.masked_fill((padding & is_aligned)[..., None], 0.0)
    return output if norm is None else norm(output)


def _leaves_out(encoder: Any, src: torch.Tensor, mask: Any, padding: torch.Tensor | None) -> bool:
    """Whether an encoder leaves out what is padded, if all of that is at the end."""
    return (
        padding is not None
        and mask is None
        and src.dim() == 3
        and not src.is_nested
        and bool(getattr(encoder, "use_nested_tensor", False))
        and bool(getattr(encoder, "mask_check", True))
        and not encoder.layers[0].training
        and torch.backends.mha.get_fastpath_enabled()
        and not torch.is_autocast_enabled()
    )


# -- attention ---------------------------------------------------------------------------------------------------------


@contextmanager
def _laid_out_as_on_fast_paths(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
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

    with (
        _replaced_forward(layers, _attend),
        replaced(torch.overrides, "has_torch_function", is_overridden),
        replaced(activation, _NAME, is_traced),
    ):
        yield


def _attend(layer: Any, *args: Any, **kwargs: Any) -> Any:
    _thread.query, _thread.has_asked, _thread.is_fast = args[0] if args else kwargs.get("query"), False, False
    try:
        results, weights = torch.nn.MultiheadAttention.forward(layer, *args, **kwargs)
    finally:
        _thread.query, _thread.has_asked = None, False
    return (results.contiguous() if _thread.is_fast else results), weights
