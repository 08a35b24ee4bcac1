"""Tensors that a traced model assigns to attributes of its modules.

``self.h = new`` changes no tensor: it puts another in its place. A graph has no attributes. So while a model is traced,
what was assigned to a registered buffer is copied into that buffer, when all else is done; ``torch.export`` would do so
for buffers of the outermost module alone, and forget the others. Whatever else a module holds it puts back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from anabranch.export._hooks import HOOKS, OF_MODULES

#: Containers within containers that are looked into.
_DEPTH = 3


class Assignments:
    """Of one traced call. Made within it, before the model runs. Holds no tensor that the call computes."""

    def __init__(self, model: torch.nn.Module, inputs: Iterable[Any]) -> None:
        """``inputs``: leaves of the call."""
        self._model = model
        self._inputs = {storage(x) for x in inputs if isinstance(x, torch.Tensor)} - {None}
        self._buffers = {(prefix, key): x for prefix, part in model.named_modules() for key, x in part._buffers.items()}
        self._held = dict(_held(model))
        #: Buffers to which a tensor was assigned, by name.
        self.names: list[str] = []
        #: Of those, the ones that then lie in memory of something else that lasts: what it is.
        self.shared: dict[str, str] = {}
        #: Other tensors that the model holds and has replaced: path, the tensor, and the memory of the new one.
        self.replaced: list[tuple[str, torch.Tensor, int | None]] = []
        #: Why an assignment cannot be kept, if one cannot.
        self.refusal = ""

    def settle(self, values: Sequence[Any], cast: bool) -> list[Any]:
        """Put the buffers back, and copy into each what was assigned to it; returns the call's results, ``values``.

        Those that lie in the memory of such a buffer are copies, made before: what was assigned does not change them.
        ``cast``: an assigned value may be of another floating type, because the model is traced in half precision.
        """
        for path, new in _held(self._model):
            old = self._held.get(path)
            if old is not None and new is not old:
                self.replaced.append((path, old, storage(new)))
        self._held.clear()
        found: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        for prefix, part in self._model.named_modules():
            for key, new in list(part._buffers.items()):
                old = self._buffers.get((prefix, key))
                if old is None or new is None or new is old:
                    continue
                part._buffers[key] = old
                if not _is_same_view(old, new):
                    found.append((f"{prefix}.{key}" if prefix else key, old, new))
        self._buffers.clear()
        found = [(name, old, new) for name, old, new in found if self._fits(name, old, new, cast)]
        if not found or self.refusal:
            return list(values)
        self.names = [name for name, *_ in found]
        written = {storage(old) for _, old, _ in found}
        self._note_shared(found)
        copied: dict[int, torch.Tensor] = {}

        def kept(x: Any) -> Any:
            """``x``, or a copy of it if it lies where something is about to be written."""
            if not isinstance(x, torch.Tensor) or storage(x) not in written:
                return x
            if id(x) not in copied:
                copied[id(x)] = x.clone()
            return copied[id(x)]

        results = [kept(x) for x in values]
        for old, new in [(old, kept(new)) for _, old, new in found]:
            old.copy_(new)
        return results

    def keep_types(self) -> None:
        """Give what a call has assigned to buffers the floating types that they had: it ran in half precision."""
        for prefix, part in self._model.named_modules():
            for key, new in list(part._buffers.items()):
                old = self._buffers.get((prefix, key))
                if old is not None and new is not None and old.is_floating_point() and new.is_floating_point():
                    part._buffers[key] = new.to(old.dtype)

    def _fits(self, name: str, old: torch.Tensor, new: torch.Tensor, cast: bool) -> bool:
        dtypes = new.dtype is old.dtype or (cast and new.is_floating_point() and old.is_floating_point())
        if tuple(new.shape) == tuple(old.shape) and dtypes and new.device == old.device:
            return True
        self.refusal = self.refusal or misfit(name, old, new)
        return False

    def _note_shared(self, found: Sequence[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
        owners: dict[int | None, str] = dict.fromkeys(self._inputs, "an input")
        for named in (self._model.named_parameters(), self._model.named_buffers()):
            owners.update((storage(x), f"{name!r}") for name, x in named)
        for name, old, new in found:
            where = storage(new)
            if where is None or where == storage(old):
                continue
            if where in owners:
                self.shared[name] = owners[where]
            owners.setdefault(where, f"what {name!r} is assigned")


def misfit(name: str, held: torch.Tensor, given: torch.Tensor) -> str:
    """What to say where a buffer is given a value of another shape, type or device."""

    def described(x: torch.Tensor) -> str:
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"

    return (
        f"the model assigns {described(given)} to its buffer {name!r}, which is {described(held)}; state keeps its"
        " shape, type and device from call to call. Register the buffer with those that it will have, and write into a"
        " part of it if that grows."
    )


def storage(x: torch.Tensor) -> int | None:
    """Identity of the memory that a tensor lies in; None for what is no dense tensor."""
    try:
        with torch._C.DisableTorchFunction():
            return x.untyped_storage()._cdata if x.layout is torch.strided and not x.is_nested else None
    except (NotImplementedError, RuntimeError):
        return None


def _is_same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same elements in the same places, as ``x`` and ``x.to(x.dtype)`` are."""
    return (
        storage(a) is not None
        and storage(a) == storage(b)
        and (a.dtype, a.shape, a.stride(), a.storage_offset()) == (b.dtype, b.shape, b.stride(), b.storage_offset())
    )


def _held(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that modules hold and that are neither parameters nor buffers, with their paths."""
    for prefix, part in model.named_modules():
        for key, value in list(part.__dict__.items()):
            if key not in OF_MODULES and key not in HOOKS:
                yield from _within(f"{prefix}.{key}" if prefix else key, value, 0)


def _within(path: str, value: Any, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif depth < _DEPTH and isinstance(value, Mapping):
        for k, v in list(value.items())[:100]:
            yield from _within(f"{path}[{k!r}]", v, depth + 1)
    elif depth < _DEPTH and type(value) in (list, tuple):
        for i, v in enumerate(list(value)[:100]):
            yield from _within(f"{path}[{i}]", v, depth + 1)
