"""What an engine is specialized on: the structure of a call's inputs, and shape, dtype and layout of each tensor."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from anabranch.errors import InputError
from anabranch.export._containers import is_container, register_containers
from anabranch.export._sizes import Dim

#: Bytes. PyTorch's allocators hand out more; kernels that load 16 bytes at a time are chosen on this.
ALIGNMENT = 16


@dataclass(frozen=True)
class Input:
    """A tensor to come: what :func:`anabranch.compile` needs to know of it.

    ``shape`` in elements, with a :class:`Dim` (or one of ``torch.export``) for a size that varies; ``device`` defaults
    to the model's; ``memory_format`` is ``torch.contiguous_format``, ``torch.channels_last`` (4-D) or
    ``torch.channels_last_3d`` (5-D).
    """

    shape: tuple[Any, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(Dim.of(n) or int(n) for n in self.shape))
        if any(n < 0 for n in self.shape if isinstance(n, int)):
            raise InputError(f"Input shape {self.shape} given; sizes must be 0 or more")
        rank = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(self.memory_format, len(self.shape))
        if len(self.shape) != rank:
            raise InputError(
                f"Input shape {self.shape} given with memory_format={self.memory_format}, which needs {rank} sizes;"
                " give as many, or leave memory_format out"
            )

    @property
    def dims(self) -> dict[int, Dim]:
        """Sizes that vary."""
        return {d: n for d, n in enumerate(self.shape) if isinstance(n, Dim)}

    def empty(self, device: torch.device, sizes: Mapping[str, int] | None = None) -> torch.Tensor:
        """An uninitialized tensor like this one: nothing at compile reads an input's values.

        ``sizes``: of those that vary, by name.
        """
        device = torch.device(self.device) if self.device is not None else device
        shape = [(sizes or {}).get(n.name, n.example()) if isinstance(n, Dim) else n for n in self.shape]
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=self.memory_format)


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides (elements) and dtype of a tensor as the engine's steps see it.

    ``strides`` are the canonical ones: the tensor's own where it is dense, else those that a dense copy of it gets.
    ``layout`` is None for a tensor with these strides; else what the model sees: see :func:`layout_of`. ``conj`` and
    ``neg``: its values are those in memory, conjugated or negated. Steps read what is in memory, and do the rest.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    layout: tuple[int, ...] | None = None
    conj: bool = False
    neg: bool = False
    #: Whether it is on the CPU, beside an engine of another device.
    on_cpu: bool = False
    #: What made-up integers of it are.
    integer: int = dataclasses.field(default=0, compare=False)
    #: Whether its sizes depend on data: any tensor of its kind is taken as it is.
    is_open: bool = False
    #: Dimensions of which the size varies from call to call; ``shape`` has an example.
    free: tuple[int, ...] = ()
    #: What made-up ones hold, if that is known.
    values: torch.Tensor | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, x: torch.Tensor, device: torch.device | None = None) -> TensorSpec:
        """``device``: the engine's; None: that of ``x``."""
        on_cpu = device is not None and x.device.type == "cpu" != device.type
        return cls(tuple(x.shape), _canonical_strides(x), x.dtype, layout_of(x), x.is_conj(), x.is_neg(), on_cpu)

    def place(self, device: torch.device) -> torch.device:
        """Where it is, for an engine on ``device``."""
        return torch.device("cpu") if self.on_cpu else device

    @property
    def is_lazy(self) -> bool:
        return self.conj or self.neg

    def in_memory(self, x: torch.Tensor) -> torch.Tensor:
        """What lies in memory of a tensor of this spec: ``x`` without its lazy bits, and not copied."""
        if self.conj:
            x = torch._conj(x)
        return torch._neg_view(x) if self.neg else x

    def example(self, device: torch.device) -> torch.Tensor:
        """An uninitialized tensor of memory of its own, as the model of an engine on ``device`` sees it."""
        x = torch.empty_strided(self.shape, self.layout or self.strides, dtype=self.dtype, device=self.place(device))
        return self.in_memory(x)  # its own reverse

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def empty(self, device: torch.device) -> torch.Tensor:
        """An uninitialized tensor that the steps of an engine on ``device`` can read."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.place(device))

    def synthesize(self, device: torch.device, seed: int = 0) -> torch.Tensor:
        """Values for warming up: in [0, 1) for floating point, ``integer`` for integers, zeros otherwise.

        Drawn from a generator of its own: the caller's random state is left alone. ``seed``: another one for each
        input; of two with the same values nobody sees that they were mixed up.
        """
        x = self.empty(device)
        if self.values is not None:
            return x.copy_(self.values)
        if not x.numel():
            return x
        if x.is_floating_point() and x.element_size() >= 2:
            generator = torch.Generator(device=x.device).manual_seed(seed)
            return x.uniform_(0, 1, generator=generator)
        is_integer = not x.is_floating_point() and not x.is_complex()
        return x.fill_(self.integer) if is_integer and self.integer else x.zero_()

    def matches(self, x: torch.Tensor) -> bool:
        """Whether the steps can read ``x`` as it is: same strides where they matter, and aligned."""
        if self.is_open:
            return True
        if x.data_ptr() % ALIGNMENT and x.numel():
            return False
        if self.is_contiguous:
            return x.is_contiguous()
        return x.stride() == (self.strides_for(x.shape) if self.free else self.strides)

    def strides_for(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of a dense tensor of this shape whose dimensions are in the order of this one's."""
        strides, step = [0] * len(shape), 1
        for d in sorted(range(len(shape)), key=lambda d: (self.strides[d], -d)):
            strides[d] = step
            step *= max(shape[d], 1)
        return tuple(strides)

    def empty_like(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        """As :meth:`empty`, with the sizes of ``x``."""
        if not self.free:
            return self.empty(device)
        return torch.empty_strided(x.shape, self.strides_for(x.shape), dtype=self.dtype, device=self.place(device))

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    def __str__(self) -> str:
        sizes = ", ".join("*" if d in self.free else str(n) for d, n in enumerate(self.shape))
        name = f"{str(self.dtype).removeprefix('torch.')}[{sizes}]" + " on the CPU" * self.on_cpu
        if self.is_open:
            return f"{name} (0: depends on data)"
        return name if self.is_contiguous else f"{name} strides {list(self.strides)}"


def _canonical_strides(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.stride()) if x.is_contiguous() else tuple(torch.empty_like(x, device="meta").stride())


def layout_of(x: torch.Tensor) -> tuple[int, ...] | None:
    """Strides that stand for those of ``x`` where it is not dense; None where its strides are the canonical ones.

    Tensors of one such layout can be viewed in the same ways: the same neighbouring dimensions can be merged, and the
    same ones are expanded. How large their gaps are makes no difference to a model, so crops of frames of all sizes
    have one layout.
    """
    shape, strides, canonical = tuple(x.shape), tuple(x.stride()), _canonical_strides(x)
    if not x.numel() or all(n == 1 or a == b for n, a, b in zip(shape, strides, canonical, strict=True)):
        return None
    order = sorted(range(len(shape)), key=lambda d: (canonical[d], -d))
    order = [d for d in order if shape[d] != 1 and strides[d]]
    # Ones that overlap are told apart by their very strides.
    if any(strides[b] < strides[a] * shape[a] for a, b in itertools.pairwise(order)):
        return strides
    made = [0 if strides[d] == 0 else canonical[d] for d in range(len(shape))]
    step = 1
    for i, d in enumerate(order):
        if i == 0:
            made[d] = 1 if strides[d] == 1 else 2
        else:
            before = order[i - 1]
            merges = strides[d] == strides[before] * shape[before]
            made[d] = step if merges else step + 1
        step = made[d] * shape[d]
    return tuple(made)


def layouts_of(leaves: Sequence[Any]) -> tuple[Any, ...] | None:
    """As :attr:`Signature.layouts`, of the leaves of a call."""
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    if all(x.is_contiguous() for x in tensors):
        return None
    layouts = tuple(layout_of(x) for x in tensors)
    return layouts if any(x is not None for x in layouts) else None


def shares_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether the bytes from the first to the last element of ``x`` and those of ``y`` have any in common."""
    if not x.numel() or not y.numel() or x.device != y.device:
        return False
    start, other = x.data_ptr(), y.data_ptr()
    return start < other + _extent(y) and other < start + _extent(x)


def _extent(x: torch.Tensor) -> int:
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.element_size() * (last + 1)


#: Inputs of these kinds are a part of what is compiled, as strings are, and ``torch.export`` does not see them.
CONSTANTS: tuple[type, ...] = (
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum, bytes),
    *(range, type(...)),
)


@functools.cache
def _ordinary_keys(device: str) -> frozenset[int]:
    """Dispatch keys of ordinary dense tensors, made in and out of inference mode."""
    keys = []
    for mode in (False, True):
        with torch.inference_mode(mode):
            keys.append(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(keys)


def leaf_key(x: Any, position: int, device: torch.device, on_cpu: bool = False) -> tuple[Any, ...]:
    """The hashable part of a signature for one leaf of a call; raises what clause 8 of the contract promises.

    ``device``: the engine's. ``on_cpu``: this leaf was a tensor on the CPU at compile, beside others on ``device``.
    """
    kind = type(x)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        # In this order: a nested tensor has no shape to ask for, and a stand-in of vmap has a device.
        is_ordinary = torch._C._dispatch_keys(x).raw_repr() in _ordinary_keys("cpu" if on_cpu else device.type)
        if not is_ordinary:
            _check_tensor(x, position)
        if on_cpu and x.device.type != "cpu":
            raise InputError(
                f"input {position} is on {x.device}; it was on the CPU when the engine was compiled. Pass x.cpu(), or"
                f" compile another engine with this input on {x.device}."
            )
        if not on_cpu and x.device != device:
            raise InputError(
                f"input {position} is on {x.device}; this engine runs on {device}. Pass x.to({str(device)!r}), or"
                f" compile another engine for {x.device}."
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"input {position} requires grad; engines run inference only. Pass x.detach(), or call the engine"
                " under torch.no_grad()."
            )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise InputError(
                f"input {position} has a tangent of forward-mode differentiation; engines run inference only, and it"
                " would be lost. Pass forward_ad.unpack_dual(x).primal, or run the model itself."
            )
        key = (x.shape, x.dtype) if x.is_contiguous() else (x.shape, x.dtype, _canonical_strides(x))
        return key if is_ordinary else (*key, "lazy", x.is_conj(), x.is_neg())
    if isinstance(x, torch.Tensor):
        raise InputError(f"input {position} is a {kind.__name__}; expected a plain torch.Tensor")
    if kind is float or kind is complex:
        return (kind, repr(x))  # as values, 0.0 equals -0.0 and nan does not equal itself
    if kind is range:
        return (kind, x.start, x.stop, x.step)  # those of the same numbers are equal
    if x is None or kind in (int, bool, str) or isinstance(x, CONSTANTS):
        return (kind, x)
    if isinstance(x, torch.Generator):
        return (kind,)  # no graph takes one: whatever is compiled for it is given each call's own
    if kind.__module__ == "numpy":
        what, instead = (
            ("a tensor", "torch.from_numpy(x)")
            if kind.__name__ == "ndarray"
            else ("one of Python's numbers", "x.item()")
        )
        raise InputError(f"input {position} is numpy's {kind.__name__}; expected {what}. Pass {instead}.")
    raise InputError(
        f"input {position} is a {kind.__name__}; expected tensors, numbers, strings, dtypes, devices, members of an"
        " enumeration, None, or containers of them. Register other containers with"
        " torch.utils._pytree.register_pytree_node."
    )


def _check_tensor(x: torch.Tensor, position: int) -> None:
    """Refuse what is not an ordinary dense tensor; one with lazy bits is taken."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise InputError(
            f"input {position} belongs to a torch.func transform (vmap, grad, jvp, ...); engines run inference on plain"
            " tensors. Call the engine outside the transform, on the whole batch for vmap, or transform the model"
            " itself."
        )
    if x.is_nested:
        raise InputError(
            f"input {position} is a nested tensor; expected a dense one. Pass x.to_padded_tensor(0.0), or its"
            " x.unbind() one by one."
        )
    if x.layout is not torch.strided:
        raise InputError(f"input {position} has layout {x.layout}; expected torch.strided. Pass x.to_dense().")
    if x.is_quantized:
        raise InputError(f"input {position} is quantized ({x.dtype}); expected plain values. Pass x.dequantize().")
    # Gone from later versions of PyTorch.
    if getattr(x, "has_names", bool)():
        raise InputError(f"input {position} has named dimensions; expected none. Pass x.rename(None).")
    keys = torch._C._dispatch_keys(x)
    if keys.has(torch._C.DispatchKey.ZeroTensor):
        raise InputError(f"input {position} is a zero without memory of its own. Pass x.clone().")
    for lazy in (torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative):
        keys = keys - torch._C.DispatchKeySet(lazy)
    if keys.raw_repr() not in _ordinary_keys(x.device.type):
        raise InputError(
            f"input {position} is a tensor of another kind ({keys}); expected a plain, dense one. Pass x.clone()."
        )


@dataclass(frozen=True)
class AnyNumber:
    """A number of a signature that serves all its values."""

    kind: type
    #: One that it had.
    example: Any = dataclasses.field(default=0, compare=False)

    def __repr__(self) -> str:
        return f"any {self.kind.__name__}"


@dataclass(frozen=True)
class Signature:
    """Structure of a call, with the spec of each tensor leaf and the value of each other leaf."""

    structure: pytree.TreeSpec
    leaves: tuple[Any, ...]
    #: Of tensors that are made of a call's numbers; the program takes them after the others.
    numbers: tuple[TensorSpec, ...] = ()

    @classmethod
    def of(cls, leaves: Sequence[Any], structure: pytree.TreeSpec, device: torch.device | None = None) -> Signature:
        """Of a call of an engine on ``device``; None: where the tensors are."""
        return cls(structure, tuple(TensorSpec.of(x, device) if isinstance(x, torch.Tensor) else x for x in leaves))

    @property
    def given(self) -> tuple[TensorSpec, ...]:
        """Of the tensors that a call is given."""
        return tuple(x for x in self.leaves if isinstance(x, TensorSpec))

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Of the tensors that a program is given."""
        return (*self.given, *self.numbers)

    @property
    def layouts(self) -> tuple[Any, ...] | None:
        """The layout of each tensor, or None where all are canonical."""
        layouts = tuple(x.layout for x in self.given)
        return layouts if any(x is not None for x in layouts) else None

    def with_integer(self, value: int) -> Signature:
        """The same signature; integers that are made up for it are ``value``."""
        leaves = (replace(x, integer=value) if isinstance(x, TensorSpec) else x for x in self.leaves)
        return Signature(self.structure, tuple(leaves), self.numbers)

    def with_free(self, free: Collection[tuple[int, int]]) -> Signature:
        """The same signature for all values of these sizes: position among the tensors, and dimension."""
        positions = itertools.count()

        def of(x: Any) -> Any:
            if not isinstance(x, TensorSpec):
                return x
            i = next(positions)
            return replace(x, free=tuple(sorted(d for j, d in free if j == i)))

        return Signature(self.structure, tuple(map(of, self.leaves)), self.numbers)

    @property
    def is_range(self) -> bool:
        """Whether it serves many sizes."""
        return any(x.free for x in self.given)

    def with_numbers(self, positions: Sequence[int], tensors: Sequence[TensorSpec]) -> Signature:
        """The same signature for all values of the numbers at ``positions``."""
        leaves = (AnyNumber(type(x), x) if i in positions else x for i, x in enumerate(self.leaves))
        return Signature(self.structure, tuple(leaves), tuple(tensors))

    @property
    def values(self) -> list[Any]:
        """The leaves of a call of this signature, but for its tensors."""
        return [x.example if isinstance(x, AnyNumber) else x for x in self.leaves]

    def examples(self, device: torch.device) -> list[Any]:
        """Leaves to export on: each tensor a new one of its own memory, with no values."""
        return [x.example(device) if isinstance(x, TensorSpec) else x for x in self.leaves]

    def __str__(self) -> str:
        return ", ".join(str(x) if isinstance(x, TensorSpec) else repr(x) for x in self.leaves) or "no inputs"


def flatten_call(
    args: Sequence[Any], kwargs: dict[str, Any], in_order: bool = False
) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure of a call.

    ``in_order``: keywords as the caller ordered them, for a model to which it matters; else they are sorted by name.
    """
    ordered = dict(kwargs) if in_order else {name: kwargs[name] for name in sorted(kwargs)}
    leaves, structure = pytree.tree_flatten((tuple(args), ordered))
    if any(map(is_container, leaves)):
        register_containers(leaves)
        leaves, structure = pytree.tree_flatten((tuple(args), ordered))
    return leaves, structure


def keyword_order_matters(model: Any) -> bool:
    """Whether ``model`` may see the order of a call's keywords: it takes any (``**features``)."""
    if not isinstance(model, torch.nn.Module):
        return False
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
