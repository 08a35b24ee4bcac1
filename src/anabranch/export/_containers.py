"""Containers of tensors that PyTorch's pytree does not know by itself: dataclasses, and the static caches of
transformers. They are registered with it when a call first brings one.

A cache is taken apart into its attributes: tensors become inputs of a call, which writes them where the model does; all
else (sizes, flags) is part of the call's signature. What comes back is an object of the same class over the same
tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from anabranch.errors import InputError

#: Where transformers has them.
_MODULE = "transformers.cache_utils"
#: Classes of caches, and of their layers, that keep what they count in tensors.
_CACHES = ("StaticCache", "EncoderDecoderCache", "StaticLayer")
#: What a layer counts in Python's numbers, so that a graph would have it frozen.
_COUNTED_IN_PYTHON = "cumulative_length_int"
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def register_containers(value: Any) -> None:
    """Register the type of each dataclass and of each static cache in ``value`` with pytree, so that it is taken apart
    and put together again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(value))
        for f in dataclasses.fields(value):
            register_containers(getattr(value, f.name))
    elif is_cache(value):
        _register_caches()
    elif isinstance(value, Mapping):
        for v in value.values():
            register_containers(v)
    elif isinstance(value, list | tuple):
        for v in value:
            register_containers(v)


def is_container(value: Any) -> bool:
    """Whether a leaf of pytree's is a container of ours, of a type that was not registered yet."""
    return (dataclasses.is_dataclass(value) and not isinstance(value, type)) or is_cache(value)


def is_cache(value: Any) -> bool:
    """Whether it is a cache of transformers whose tensors keep their places."""
    return type(value).__module__ == _MODULE and type(value).__name__ in _CACHES


def _register_caches() -> None:
    module = sys.modules[_MODULE]
    for name in _CACHES:
        kind = getattr(module, name)
        if kind not in pytree.SUPPORTED_NODES:
            pytree.register_pytree_node(
                kind,
                _take_apart,
                functools.partial(_put_together, kind),
                serialized_type_name=f"{_MODULE}.{name}",
                flatten_with_keys_fn=_take_apart_with_keys,
            )


def _take_apart(value: Any) -> tuple[list[Any], Any]:
    """Its attributes: those with tensors in them, and a description of the others."""
    children, names, plain = list[Any](), list[str](), list[tuple[str, Any]]()
    for name, x in sorted(vars(value).items()):
        _check(value, name, x)
        if isinstance(x, _PLAIN):
            plain.append((name, x))
        else:
            names.append(name)
            children.append(x)
    return children, (tuple(names), tuple(plain))


def _take_apart_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
    children, context = _take_apart(value)
    return [(pytree.GetAttrKey(name), x) for name, x in zip(context[0], children, strict=True)], context


def _put_together(kind: Any, children: Iterable[Any], context: Any) -> Any:
    names, plain = context
    made = kind.__new__(kind)
    vars(made).update(plain)
    vars(made).update(zip(names, children, strict=True))
    return made


def _check(value: Any, name: str, x: Any) -> None:
    kind = type(value).__name__
    if name == "is_initialized" and not x:
        raise InputError(
            f"a {kind} of transformers is given whose tensors are not made yet; expected them to be there, since a call"
            " writes them. Call cache.early_initialization(batch_size, num_heads, head_dim, dtype, device) first."
        )
    for layer in x if name == "layers" and isinstance(x, list) else ():
        if hasattr(layer, _COUNTED_IN_PYTHON):
            raise InputError(
                f"a {kind} of transformers is given with a {type(layer).__name__}, which counts tokens in a Python"
                " number: a graph would repeat the count that it saw, and attend to the wrong tokens. Expected layers"
                " that count in tensors. Use anabranch.generation.Decoder(model, length), whose windows are right."
            )
        if not is_cache(layer):
            raise InputError(
                f"a {kind} of transformers is given with a {type(layer).__name__}; expected layers of fixed size"
                " (StaticLayer). Use anabranch.generation.Decoder(model, length), or a model without such layers."
            )
