"""What an engine is specialized on: the structure of a call's inputs, and shape, dtype and layout of each tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from anabranch.errors import InputError

#: Bytes. PyTorch's allocators hand out more; kernels that load 16 bytes at a time are chosen on this.
ALIGNMENT = 16


@dataclass(frozen=True)
class Input:
    """A tensor to come: what :func:`anabranch.compile` needs to know of it.

    ``shape`` in elements; ``device`` defaults to the model's; ``memory_format`` is ``torch.contiguous_format``,
    ``torch.channels_last`` (4-D) or ``torch.channels_last_3d`` (5-D).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if any(n < 0 for n in self.shape):
            raise InputError(f"Input shape {self.shape} given; sizes must be 0 or more")
        rank = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(self.memory_format, len(self.shape))
        if len(self.shape) != rank:
            raise InputError(
                f"Input shape {self.shape} given with memory_format={self.memory_format}, which needs {rank} sizes;"
                " give as many, or leave memory_format out"
            )

    def empty(self, device: torch.device) -> torch.Tensor:
        """An uninitialized tensor like this one: nothing at compile reads an input's values."""
        device = torch.device(self.device) if self.device is not None else device
        return torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=self.memory_format)


@dataclass(frozen=True)
class TensorSpec:
    """Shape, strides (elements) and dtype of a tensor as the engine's steps see it.

    ``strides`` are the canonical ones: the tensor's own where it is dense, else those that a dense copy of it gets.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: torch.Tensor) -> TensorSpec:
        return cls(tuple(x.shape), _canonical_strides(x), x.dtype)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)

    def synthesize(self, device: torch.device) -> torch.Tensor:
        """Values for warming up: in [0, 1) for floating point, zeros (which are valid indices) otherwise.

        Drawn from a generator of its own: the caller's random state is left alone.
        """
        x = self.empty(device)
        if not x.numel():
            return x
        if x.is_floating_point() and x.element_size() >= 2:
            generator = torch.Generator(device=device).manual_seed(0)
            return x.uniform_(0, 1, generator=generator)
        return x.zero_()

    def matches(self, x: torch.Tensor) -> bool:
        """Whether the steps can read ``x`` as it is: same strides where they matter, and aligned."""
        if x.data_ptr() % ALIGNMENT and x.numel():
            return False
        return x.is_contiguous() if self.is_contiguous else x.stride() == self.strides

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    def __str__(self) -> str:
        name = f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"
        return name if self.is_contiguous else f"{name} strides {list(self.strides)}"


def _canonical_strides(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.stride()) if x.is_contiguous() else tuple(torch.empty_like(x, device="meta").stride())


def leaf_key(x: Any, position: int, device: torch.device) -> tuple[Any, ...]:
    """The hashable part of a signature for one leaf of a call; raises what clause 8 of the contract promises."""
    kind = type(x)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        if x.device != device:
            raise InputError(
                f"input {position} is on {x.device}; this engine runs on {device}. Pass x.to({str(device)!r}), or"
                f" compile another engine for {x.device}."
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"input {position} requires grad; engines run inference only. Pass x.detach(), or call the engine"
                " under torch.no_grad()."
            )
        if x.layout is not torch.strided:
            raise InputError(f"input {position} has layout {x.layout}; expected torch.strided. Pass x.to_dense().")
        if x.is_conj() or x.is_neg():
            raise InputError(
                f"input {position} is a lazy conjugate or negative; expected its values in memory. Pass"
                " x.resolve_conj().resolve_neg()."
            )
        if x.is_contiguous():
            return (x.shape, x.dtype)
        return (x.shape, x.dtype, _canonical_strides(x))
    if isinstance(x, torch.Tensor):
        raise InputError(f"input {position} is a {kind.__name__}; expected a plain torch.Tensor")
    if kind is float or kind is complex:
        return (kind, repr(x))  # as values, 0.0 equals -0.0 and nan does not equal itself
    if x is None or kind in (int, bool, str):
        return (kind, x)
    raise InputError(
        f"input {position} is a {kind.__name__}; expected tensors, numbers, strings, None, or containers of them."
        " Register other containers with torch.utils._pytree.register_pytree_node."
    )


@dataclass(frozen=True)
class Signature:
    """Structure of a call, with the spec of each tensor leaf and the value of each other leaf."""

    structure: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, leaves: Sequence[Any], structure: pytree.TreeSpec) -> Signature:
        return cls(structure, tuple(TensorSpec.of(x) if isinstance(x, torch.Tensor) else x for x in leaves))

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(x for x in self.leaves if isinstance(x, TensorSpec))

    def empty(self, device: torch.device) -> list[Any]:
        """Leaves like these: each tensor a new one of its own memory, with canonical strides and no values."""
        return [x.empty(device) if isinstance(x, TensorSpec) else x for x in self.leaves]

    def __str__(self) -> str:
        return ", ".join(str(x) if isinstance(x, TensorSpec) else repr(x) for x in self.leaves) or "no inputs"


def flatten_call(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure of a call. Keyword order does not matter, so names are sorted."""
    ordered = {name: kwargs[name] for name in sorted(kwargs)}
    leaves, structure = pytree.tree_flatten((tuple(args), ordered))
    if any(dataclasses.is_dataclass(x) and not isinstance(x, type) for x in leaves):
        register_dataclasses(leaves)
        leaves, structure = pytree.tree_flatten((tuple(args), ordered))
    return leaves, structure


def register_dataclasses(value: Any) -> None:
    """Register each dataclass type in ``value`` with pytree, so that it is taken apart and put together again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(value))
        for f in dataclasses.fields(value):
            register_dataclasses(getattr(value, f.name))
    elif isinstance(value, Mapping):
        for v in value.values():
            register_dataclasses(v)
    elif isinstance(value, list | tuple):
        for v in value:
            register_dataclasses(v)
