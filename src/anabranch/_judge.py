"""Whether what a call returned is what was expected: the one comparison that tools, programs and tests share.

Compared are the structure and the types (order of keys, named tuples, dataclasses, ``torch.Size``, ``None``, numbers),
then of each tensor its dtype, shape, device, strides, what it shares memory with, and every element. What cannot be
compared raises :class:`~anabranch.errors.CannotJudge`: no tool may call it right.

Elements, in short:

- Integers and booleans are equal or wrong, whatever ``rounding`` is.
- NaN is right where NaN is expected, and only there. Its sign and its payload say nothing: PyTorch's own kernels give
  different ones for the same operator. ``nan_bits`` compares them too, for two results of the same kernels.
- An infinity is right where one of that sign is expected, and only there.
- Without ``rounding`` all other elements must have the same bits: -0.0 is not 0.0, subnormals are not flushed.
- With ``rounding`` an element may be that far from the expected one. ``signed_zeros`` says whether -0.0 for 0.0 is
  reported all the same; the default is no, as the order of a sum can change that sign.
- The real and the imaginary part of a complex number are compared each by itself.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from anabranch.errors import CannotJudge

__all__ = [
    "Pair",
    "Rounding",
    "describe",
    "differences",
    "error",
    "identical",
    "numbers",
    "pair",
    "relative_error",
    "sharing",
    "tensors",
    "unequal",
    "wrong",
]


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How far a right floating-point element may be from the expected one, relative to the largest finite magnitude
    that is expected in its tensor: ``units`` in the last place of the tensor's dtype, at least ``floor`` and at most a
    quarter.

    16 units are 1.9e-6 in float32 (so the floor is what counts there), 1.6e-2 in float16 and 1.3e-1 in bfloat16. The
    quarter is for floats of eight bits, of which 16 units would pass anything. ``least``, where results may be small
    differences of larger values, is how large these are: a tensor's largest magnitude counts as no less.
    """

    units: float = 16
    floor: float = 1e-5
    least: float = 0.0

    def of(self, dtype: torch.dtype) -> float:
        """The bound for a floating or complex dtype; 0 for all others."""
        if dtype in _PACKED or not (dtype.is_floating_point or dtype.is_complex):
            return 0.0
        return min(max(self.units * torch.finfo(dtype).eps, self.floor), 0.25)


class Pair(NamedTuple):
    """A tensor of a result, by name, and the expected one. Same dtype and shape, unless :func:`pair` was told else."""

    name: str
    actual: torch.Tensor
    expected: torch.Tensor


def differences(
    actual: Any,
    expected: Any,
    *,
    rounding: Rounding | None = None,
    signed_zeros: bool | None = None,
    nan_bits: bool = False,
    strides: bool = True,
    inputs: Any = None,
    expected_inputs: Any = None,
) -> list[str]:
    """What is wrong with ``actual``, a line for each difference, most important first; empty where it is right.

    Without ``rounding`` elements must be equal bit for bit. ``strides=False`` leaves memory layout out. ``inputs`` is
    what the call got (any nest of tensors; parameters may be among it): outputs must share memory with the same ones of
    it as the expected outputs do with ``expected_inputs``, which are the same objects unless they are given. Which
    outputs share memory with one another is always compared.

    The host waits for both results; the caller's current stream must be ordered after the work that makes them.
    Raises :class:`~anabranch.errors.CannotJudge` where both are of a kind that cannot be compared (sparse, quantized,
    nested, or on the meta device; objects of unknown types).
    """
    found, pairs = pair(actual, expected, rounding=rounding, strides=strides)
    if not found:
        given = tensors(inputs)
        found += sharing(pairs, given, given if expected_inputs is None else tensors(expected_inputs))
    for p in pairs:
        line = _element_difference(p, rounding, rounding is None if signed_zeros is None else signed_zeros, nan_bits)
        found += [line] if line else []
    return found


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


# -- structure and types ----------------------------------------------------------------------------------------------

#: Compared by ``==``, once their types are the same.
_PLAIN: tuple[type, ...] = (
    *(type(None), type(...), bool, int, str, bytes, bytearray, range, slice, enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


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


# -- elements; on the device, on the current stream, without the host -------------------------------------------------

_PACKED = {getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name)}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unequal(actual: torch.Tensor, expected: torch.Tensor, *, nan_bits: bool = False) -> torch.Tensor:
    """Where two tensors of one dtype and shape do not have the same bits: booleans of their shape (with a last
    dimension of 2 where they are complex), computed on the current stream; the host does not wait.

    NaN equals NaN; with ``nan_bits`` only of the same sign and payload."""
    actual, expected = _real(actual), _real(expected)
    if actual.dtype is torch.bool:
        return actual != expected
    bits = _BITS[actual.element_size()]
    different = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    if nan_bits or not actual.is_floating_point():
        return different
    return different & ~(_widened(actual).isnan() & _widened(expected).isnan())


def wrong(
    actual: torch.Tensor, expected: torch.Tensor, bound: float, *, signed_zeros: bool = False, least: float = 0.0
) -> torch.Tensor:
    """Where an element is further than ``bound`` times the largest finite expected magnitude (or ``least``) from the
    expected one, or is NaN or infinite where that is not expected, or not where it is; shape and stream as
    :func:`unequal`.

    Integers and booleans must be equal. ``actual`` and ``expected`` may be floating dtypes of two sizes."""
    actual, expected = _real(actual), _real(expected)
    if not actual.is_floating_point():
        return unequal(actual, expected)
    actual, expected = _widened(actual), _widened(expected)
    if actual.dtype != expected.dtype:
        actual, expected = actual.double(), expected.double()
    far = ~((actual - expected).abs() <= bound * _scale(expected).clamp_min(least))
    # Neither a NaN nor an infinity has a distance from anything: they must be the same.
    far &= ~((actual == expected) | (actual.isnan() & expected.isnan()))
    far |= actual.isfinite() != expected.isfinite()
    if signed_zeros:
        far |= (actual == 0) & (expected == 0) & (actual.signbit() != expected.signbit())
    return far


def error(actual: torch.Tensor, expected: torch.Tensor, *, least: float = 0.0) -> float:
    """:func:`relative_error` on the host, which waits; quick where all elements are finite."""
    a, e = _real(actual), _real(expected)
    if a.numel() and a.is_floating_point():
        a, e = _widened(a), _widened(e)
        if a.dtype != e.dtype:
            a, e = a.double(), e.double()
        # One pass each, and none where something is not finite: the sums and the largest value then are not, either.
        largest = e.abs().amax()
        far = (a - e).abs().amax()
        if bool(largest.isfinite() & far.isfinite()):
            return float(far / largest.clamp_min(max(torch.finfo(e.dtype).tiny, least)))
    return float(relative_error(actual, expected, least=least))


def identical(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all bits of two tensors of one dtype and shape are the same; the host waits."""
    a, e = _real(actual), _real(expected)
    if a.dtype is torch.bool:
        return torch.equal(a, e)
    bits = _BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), e.contiguous().view(bits))


def relative_error(actual: torch.Tensor, expected: torch.Tensor, *, least: float = 0.0) -> torch.Tensor:
    """The largest distance from an expected element relative to the largest finite expected magnitude (or ``least``),
    as a tensor of no dimension on the current stream. Infinite where :func:`wrong` would not accept an element at any
    bound. 0 for tensors without elements."""
    if not actual.numel():
        return torch.zeros((), device=actual.device)
    actual, expected = _real(actual), _real(expected)
    if not actual.is_floating_point():
        return torch.where(unequal(actual, expected).any(), math.inf, 0.0)
    actual, expected = _widened(actual), _widened(expected)
    if actual.dtype != expected.dtype:
        actual, expected = actual.double(), expected.double()
    error = (actual - expected).abs() / _scale(expected).clamp_min(least)
    error = torch.where((actual == expected) | (actual.isnan() & expected.isnan()), 0.0, error)
    error = torch.where(actual.isfinite() != expected.isfinite(), math.inf, error)
    return error.nan_to_num(nan=math.inf, posinf=math.inf).amax()


def numbers(x: torch.Tensor) -> torch.Tensor:
    """A floating or complex tensor in a dtype that arithmetic is there for, the parts of complex numbers in a last
    dimension; an integer or boolean one as it is."""
    x = _real(x)
    return _widened(x) if x.is_floating_point() else x


def _real(x: torch.Tensor) -> torch.Tensor:
    """With the parts of a complex tensor in a last dimension, and without bits that postpone a conjugate or a minus."""
    x = x.detach().resolve_conj().resolve_neg()
    if x.dtype in _PACKED:
        return x.view(torch.uint8)  # two numbers a byte, and no arithmetic
    return torch.view_as_real(x) if x.is_complex() else x


def _widened(x: torch.Tensor) -> torch.Tensor:
    """In a dtype that arithmetic and comparisons are there for."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _scale(expected: torch.Tensor) -> torch.Tensor:
    """The largest finite magnitude; of a tensor that has none, or only zeros, the least number there is."""
    finite = torch.where(expected.isfinite(), expected.abs(), 0.0)
    largest = finite.amax() if finite.numel() else finite.sum()
    return largest.clamp_min(torch.finfo(expected.dtype).tiny)


def _element_difference(p: Pair, rounding: Rounding | None, signed_zeros: bool, nan_bits: bool) -> str:
    """In words; empty where the elements are right."""
    _, actual, expected = p
    if identical(actual, expected):
        return ""
    if rounding is None:
        mask = unequal(actual, expected, nan_bits=nan_bits)
        if not signed_zeros and _real(actual).is_floating_point():
            mask &= ~((_widened(_real(actual)) == 0) & (_widened(_real(expected)) == 0))
    else:
        bound = rounding.of(expected.dtype)
        mask = wrong(actual, expected, bound, signed_zeros=signed_zeros, least=rounding.least)
    if not bool(mask.any()):
        return ""
    text = describe(p, mask)
    if rounding is not None and math.isfinite(error := float(relative_error(actual, expected))) and error:
        text += f"; largest relative error {error:.1e}, at most {rounding.of(expected.dtype):.1e} allowed"
    return text


def describe(p: Pair, mask: torch.Tensor) -> str:
    """The elements where ``mask`` (as :func:`unequal` returns it) is true, in words; there is one at least."""
    name, actual, expected = p
    flat = int(mask.flatten().to(torch.uint8).argmax())
    first: tuple[int, ...] = ()
    for size in reversed(mask.shape):
        flat, index = divmod(flat, size)
        first = (index, *first)
    got, wanted = (_real(x)[first].item() for x in (actual, expected))
    parts = "parts" if actual.is_complex() else "elements"
    where = f"element {first[:-1] if actual.is_complex() else first}"
    if actual.is_complex():
        where += f", {'imaginary' if first[-1] else 'real'} part"
    text = f"{name} differs in {int(mask.sum())} of {mask.numel()} {parts};"
    text += f" the first is {where}: {got!r}, expected {wanted!r}"
    kinds = _kinds(actual, expected, mask)
    return f"{text} ({', '.join(kinds)})" if kinds else text


def _kinds(actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> Iterable[str]:
    """What sorts of differences there are, where the sort says more than the numbers."""
    if not _real(actual).is_floating_point():
        return []
    a, e = _widened(_real(actual))[mask], _widened(_real(expected))[mask]
    found = {
        "NaN where a number is expected": a.isnan() & ~e.isnan(),
        "a number where NaN is expected": e.isnan() & ~a.isnan(),
        "an infinity where none is expected": a.isinf() & e.isfinite(),
        "no infinity where one is expected": e.isinf() & a.isfinite(),
        "an infinity of the wrong sign": a.isinf() & e.isinf() & (a != e),
        "a zero of the wrong sign": (a == 0) & (e == 0) & (a.signbit() != e.signbit()),
    }
    kinds = [f"{int(where.sum())} with {kind}" for kind, where in found.items() if bool(where.any())]
    if actual.numel() > 1 and not bool((_widened(_real(actual)) != 0).any()):
        kinds.append("all zeros")
    return kinds
