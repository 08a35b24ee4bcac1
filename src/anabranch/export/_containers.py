"""Containers of tensors that PyTorch's pytree does not know by itself: dataclasses, dicts and ``UserDict`` of classes
of the user's, and the static caches of transformers. They are registered with it when a call first brings one.

What a user's dict has in attributes, beside its items, is part of it. A cache is taken apart into its attributes:
tensors become inputs of a call, which writes them where the model does; all else (sizes, flags) is part of the call's
signature. What comes back is an object of the same class over the same tensors.
"""

from __future__ import annotations

import collections
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
#: What transformers' tokenizers and processors give. They refer to texts, too, which no model sees.
_ENCODINGS = (
    "transformers.tokenization_utils_base.BatchEncoding",
    "transformers.feature_extraction_utils.BatchFeature",
)
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def register_containers(value: Any) -> None:
    """Register the type of each dataclass, of each dict of a class of the user's and of each static cache in ``value``
    with pytree, so that it is taken apart and put together again."""
    if is_dataclass(value):
        if type(value) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(value))
        for f in dataclasses.fields(value):
            register_containers(getattr(value, f.name))
    elif is_cache(value):
        _register_caches()
    elif isinstance(value, Mapping):
        if type(value) not in pytree.SUPPORTED_NODES and is_users_dict(value):
            _register_users_dict(type(value))
        for v in value.values():
            register_containers(v)
    elif isinstance(value, list | tuple):
        for v in value:
            register_containers(v)


def is_container(value: Any) -> bool:
    """Whether a leaf of pytree's is a container of ours, of a type that was not registered yet."""
    return is_dataclass(value) or is_cache(value) or is_users_dict(value)


def is_dataclass(value: Any) -> bool:
    """Whether it is an instance of one."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def is_users_dict(value: Any) -> bool:
    """Whether it is a dict, or a ``UserDict``, all of which its items and ``__dict__`` tell."""
    if not isinstance(value, dict | collections.UserDict) or isinstance(value, collections.defaultdict):
        return False
    return not any(getattr(kind, "__slots__", ()) for kind in type(value).__mro__)


def is_cache(value: Any) -> bool:
    """Whether it is a cache of transformers whose tensors keep their places."""
    return type(value).__module__ == _MODULE and type(value).__name__ in _CACHES


def items_of(value: Any) -> Any:
    """A user's dict as one of Python's, whatever its class does when it is asked."""
    if isinstance(value, collections.UserDict):
        return value.data
    kind = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
    return {key: dict.__getitem__(value, key) for key in kind.__iter__(value)}


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _register_users_dict(kind: type) -> None:
    pytree.register_pytree_node(
        kind,
        _take_dict_apart,
        functools.partial(_put_dict_together, kind),
        serialized_type_name=_name_of(kind),
        flatten_with_keys_fn=_take_dict_apart_with_keys,
    )


def _take_dict_apart(value: Any) -> tuple[list[Any], Any]:
    """Its items, and then all of its attributes; beside them its keys, and whether it is its own attributes."""
    items, attributes = items_of(value), dict(getattr(value, "__dict__", {}))
    is_itself = getattr(value, "__dict__", None) is value
    if is_itself or _name_of(type(value)) in _ENCODINGS:
        attributes = {}
    elif isinstance(value, collections.UserDict):
        attributes.pop("data", None)
    return [*items.values(), attributes], (tuple(items), is_itself)


def _take_dict_apart_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
    children, context = _take_dict_apart(value)
    keys = [*map(pytree.MappingKey, context[0]), pytree.GetAttrKey("__dict__")]
    return list(zip(keys, children, strict=True)), context


def _put_dict_together(kind: Any, children: Iterable[Any], context: Any) -> Any:
    keys, is_itself = context
    *values, attributes = children
    items = dict(zip(keys, values, strict=True))
    if _name_of(kind) in _ENCODINGS:
        return kind(items)
    made = kind.__new__(kind)
    if issubclass(kind, collections.UserDict):
        vars(made).update(attributes, data=items)
        return made
    base = collections.OrderedDict if issubclass(kind, collections.OrderedDict) else dict
    for key, value in items.items():
        base.__setitem__(made, key, value)
    if is_itself:
        object.__setattr__(made, "__dict__", made)
    elif attributes:
        vars(made).update(attributes)
    return made


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
