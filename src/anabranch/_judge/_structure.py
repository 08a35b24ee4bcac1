"""What a result consists of: its nest and types, its tensors' forms, and the memory that they share."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from anabranch._judge._elements import Pair, Rounding
from anabranch.errors import CannotJudge

#: Compared by ``==``, once their types are the same.
_PLAIN: tuple[type, ...] = (
    *(type(None), type(...), bool, int, str, bytes, bytearray, range, slice, enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def pair(
    actual: Any,
    expected: Any,
    *,
    rounding: Rounding | None = None,
    strides: bool = True,
    dtypes: bool = True,
    devices: bool = True,
) -> tuple[list[str], list[Pair]]:
    """What differs but for elements and shared memory, and the tensors whose elements can be compared, in order.

    ``rounding`` holds for Python's floats among the outputs. Reads no tensor's elements, so the host does not wait. A
    tensor of another shape or dtype is told and is not among the pairs; ``dtypes=False`` compares the kinds of dtypes
    only (an integer for a float is told, float16 for float32 is not). Raises :class:`~anabranch.errors.CannotJudge` as
    :func:`differences` does.
    """
    walk = _Walk(rounding, strides, dtypes, devices)
    try:
        walk.compare("the output", actual, expected)
    except RecursionError:
        raise CannotJudge("the output holds itself, or is nested too deeply; return its tensors in a list") from None
    return walk.found, walk.pairs


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a nest, in order. Raises :class:`~anabranch.errors.CannotJudge` as :func:`differences` does."""
    return [p.actual for p in pair(value, value)[1]]


class _Walk:
    """Goes through both values side by side."""

    def __init__(self, rounding: Rounding | None, strides: bool, dtypes: bool, devices: bool) -> None:
        self.rounding, self.strides, self.dtypes, self.devices = rounding, strides, dtypes, devices
        self.found: list[str] = []
        self.pairs: list[Pair] = []

    def compare(self, name: str, actual: Any, expected: Any) -> None:
        if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
            self._tensors(name, actual, expected)
            return
        if type(actual) is not type(expected):
            self.found.append(f"{name} is {_a(actual)}, expected {_a(expected)}")
            return
        if isinstance(expected, float | complex):
            near = self.rounding is not None and abs(actual - expected) <= self.rounding.floor * abs(expected)
            if not near and _number_bits(actual) != _number_bits(expected):
                self.found.append(f"{name} is {actual!r}, expected {expected!r}")
        elif isinstance(expected, _PLAIN) or (actual is expected and isinstance(expected, type)):
            if actual != expected:
                self.found.append(f"{name} is {actual!r}, expected {expected!r}")
        elif isinstance(expected, set | frozenset):
            if any(isinstance(x, torch.Tensor) for x in expected):
                raise CannotJudge(f"{name} is a set of tensors, which has no order; return a list or a dict")
            if actual != expected:
                self.found.append(f"{name} is {actual!r}, expected {expected!r}")
        else:
            children = _children(actual), _children(expected)
            if children[0] is None or children[1] is None:
                if type(expected).__module__ == "numpy":
                    self._arrays(name, actual, expected)
                    return
                raise CannotJudge(
                    f"{name} is {_a(expected)}, which cannot be compared; return tensors, numbers, strings, None, and"
                    " lists, tuples, dicts or dataclasses of these"
                )
            names = [[key for key, _ in c] for c in children if c is not None]
            if names[0] != names[1]:
                self.found.append(f"{name} has {_keys(names[0])}, expected {_keys(names[1])}")
                return
            for (key, a), (_, e) in zip(children[0], children[1], strict=True):
                self.compare(f"output{key}" if name == "the output" else f"{name}{key}", a, e)

    def _arrays(self, name: str, actual: Any, expected: Any) -> None:
        """NumPy's arrays and scalars: by dtype, shape and bytes."""
        if expected.dtype.hasobject:
            raise CannotJudge(f"{name} is an array of Python objects; return a tensor")
        if actual.dtype != expected.dtype or actual.shape != expected.shape:
            given, wanted = (f"{x.dtype}{list(x.shape)}" for x in (actual, expected))
            self.found.append(f"{name} is an array {given}, expected {wanted}")
        elif actual.tobytes() != expected.tobytes():
            self.found.append(f"{name}, an array, differs from the expected one")

    def _tensors(self, name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
        kinds = _kind(actual), _kind(expected)
        if kinds[0] != kinds[1]:
            self.found.append(f"{name} is {kinds[0] or 'a plain tensor'}, expected {kinds[1] or 'a plain tensor'}")
            return
        if kinds[1]:
            raise CannotJudge(f"{name} is {kinds[1]}, whose elements cannot be compared; return {_instead(kinds[1])}")
        same = actual.dtype == expected.dtype
        if not (same if self.dtypes else same or _family(actual.dtype) == _family(expected.dtype)):
            self.found.append(f"{name} is {_dtype(actual)}, expected {_dtype(expected)}")
            return
        if actual.shape != expected.shape:
            self.found.append(f"{name} has shape {list(actual.shape)}, expected {list(expected.shape)}")
            return
        if self.devices and actual.device != expected.device:
            self.found.append(f"{name} is on {actual.device}, expected on {expected.device}")
            return
        if actual.is_inference() and not expected.is_inference():
            self.found.append(f"{name} is an inference tensor, expected an ordinary one")
        if self.strides and _strides(actual) != _strides(expected):
            self.found.append(f"{name} has strides {list(actual.stride())}, expected {list(expected.stride())}")
        self.pairs.append(Pair(name, actual, expected))


def _children(value: Any) -> list[tuple[str, Any]] | None:
    """What a container holds, each with what is appended to the container's name; None: this is no container."""
    if isinstance(value, Mapping):
        return [(f"[{k!r}]", v) for k, v in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{k}", v) for k, v in zip(value._fields, value, strict=True)]
    if isinstance(value, list | tuple | deque):
        return [(f"[{i}]", v) for i, v in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
    node = pytree.SUPPORTED_NODES.get(type(value))
    if node is None:
        return None
    inside, context = node.flatten_fn(value)
    # What distinguishes two values of this type beside what they hold is the context.
    return [(f"<{i}>", v) for i, v in enumerate(inside)] + ([("<context>", repr(context))] if context else [])


def _keys(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing in it"


def _a(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, bool | int | float | complex | str | torch.dtype):
        return f"the {type(value).__name__} {value!r}"
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ in ("builtins", "torch") else f"{kind.__module__}.{kind.__qualname__}"
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _number_bits(value: float | complex) -> tuple[Any, ...]:
    """Equal for equal numbers; NaN equals NaN, -0.0 is not 0.0."""
    if isinstance(value, complex):
        return (*_number_bits(value.real), *_number_bits(value.imag))
    return ("nan",) if math.isnan(value) else (value, math.copysign(1.0, value))


def _kind(x: torch.Tensor) -> str:
    """What makes a tensor more than plain strided memory; empty: nothing does."""
    # A parameter that is handed back is as good as a plain tensor of the same memory.
    if type(x) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return _a(x)
    if x.is_nested:
        return "a nested tensor"
    if x.layout is not torch.strided:
        return f"a tensor of layout {str(x.layout).removeprefix('torch.')}"
    if x.is_quantized:
        return f"a quantized tensor ({_dtype(x)})"
    if x.device.type == "meta":
        return "a tensor on the meta device"
    return ""


def _instead(kind: str) -> str:
    for word, what in (
        ("layout", "y.to_dense()"),
        ("quantized", "y.dequantize()"),
        ("nested", "y.to_padded_tensor(0.0), or its tensors in a list"),
        ("meta", "a tensor on a device that has values"),
    ):
        if word in kind:
            return what
    return "plain tensors"


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _family(dtype: torch.dtype) -> object:
    """Dtypes that a model computes in instead of one another; integers and booleans are a family each."""
    return "complex" if dtype.is_complex else "floating" if dtype.is_floating_point else dtype


def _strides(x: torch.Tensor) -> list[int]:
    """Those that lead anywhere: along sizes of 2 and more, of a tensor that has elements."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1] if x.numel() else []


# -- shared memory ----------------------------------------------------------------------------------------------------


def sharing(
    pairs: Sequence[Pair], inputs: Sequence[torch.Tensor], expected_inputs: Sequence[torch.Tensor]
) -> list[str]:
    """Outputs that share memory with an input or another output and should not, or the other way round; and those at
    another place in that memory. Reads no elements."""
    if len(inputs) != len(expected_inputs):
        raise ValueError(f"{len(inputs)} inputs given and {len(expected_inputs)} expected_inputs; expected as many")
    found = []
    before: list[tuple[str, torch.Tensor, torch.Tensor]] = [
        (f"input {i}", x, y) for i, (x, y) in enumerate(zip(inputs, expected_inputs, strict=True))
    ]
    for name, actual, expected in pairs:
        for other, a, e in before:
            shares, should = _shares(actual, a), _shares(expected, e)
            if shares != should:
                wanted = "expected to share it" if should else "expected memory of its own"
                found.append(f"{name} {'shares' if shares else 'does not share'} memory with {other}; {wanted}")
            elif shares and _apart(actual, a) != _apart(expected, e):
                found.append(f"{name} begins at another element of {other}'s memory than expected")
        before.append((name, actual, expected))
    return found


def _shares(x: torch.Tensor, y: torch.Tensor) -> bool:
    if not x.numel() or not y.numel():
        return False  # nothing to share
    return x.device == y.device and x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _apart(x: torch.Tensor, y: torch.Tensor) -> int:
    """Bytes between their first elements."""
    return x.data_ptr() - y.data_ptr()
