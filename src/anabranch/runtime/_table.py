"""The specializations of one engine, by the signatures of its calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from anabranch import _sync
from anabranch.export import Dim, Signature, flatten_call, layouts_of, leaf_key
from anabranch.runtime._padding import Padded, Padding
from anabranch.runtime._ranges import Place, Ranges, resized
from anabranch.runtime._specialization import Specialization
from anabranch.runtime._varying import Varying, has_numbers, used


@_sync.atomics("primary")
class Table:
    """Threads: any may look up; the rest with the build lock held."""

    def __init__(self, device: torch.device, in_order: bool, dynamic: bool | None = None) -> None:
        """``in_order``: whether the order of keywords is a part of a signature. ``dynamic``: see :class:`Ranges`."""
        self._device, self._in_order = device, in_order
        #: Written with the build lock held; read without, which a dict allows.
        self._specializations: dict[Any, Specialization] = _sync.dict_("specializations")
        #: The one that the engine was compiled for.
        self.primary: Specialization | None = None
        self.varying = Varying()
        self.ranges = Ranges(dynamic)
        #: Of sizes that are rounded up, once that was shown to be right.
        self.padding: Padding | None = None
        #: Positions among a call's leaves.
        self._on_cpu: frozenset[int] = frozenset()
        #: By structure of a call, what stands for it in keys.
        self._structures: dict[pytree.TreeSpec, object] = _sync.dict_("structures")

    def __iter__(self) -> Iterator[Specialization]:
        return iter([*self._specializations.values(), *self.ranges])

    def __len__(self) -> int:
        return len(self._specializations) + len(list(self.ranges))

    def keep_on_cpu(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Inputs that are on the CPU now, beside an engine of another device, are to be there in every call."""
        if self._device.type != "cpu":
            tensors = ((i, x) for i, x in enumerate(self.flatten(args, kwargs)[0]) if isinstance(x, torch.Tensor))
            self._on_cpu = frozenset(i for i, x in tensors if x.device.type == "cpu")

    def declare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], dims: Sequence[tuple[torch.Tensor, Mapping[int, Dim]]]
    ) -> None:
        """These sizes of inputs vary; ``dims`` has tensors that are among the leaves of the call."""
        if not dims:
            return
        leaves, key = self.key(args, kwargs)
        self.ranges.declare(
            key, {(i, d): dim for i, x in enumerate(leaves) for y, own in dims if x is y for d, dim in own.items()}
        )

    def declared_others(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
        """Calls like this one with other sizes, as they were declared: ordinary ones first, and where one size varies
        and may be 1, that."""
        leaves, key = self.key(args, kwargs)
        dims = {dim.name: dim for dim in self.ranges.declared(key).values()}
        taken = {n for x in leaves if isinstance(x, torch.Tensor) for n in x.shape}
        sizes: dict[str, int] = {}
        for name, dim in dims.items():
            sizes[name] = dim.example((*taken, *sizes.values()))
        ones = {name: 1 for name, dim in dims.items() if len(dims) == 1 and dim.takes(1)}
        structure = self.flatten(args, kwargs)[1]
        made = [resized(leaves, self.ranges.declared(key), given) for given in (sizes, ones) if given]
        return [pytree.tree_unflatten(given, structure) for given in made]

    def vary(self, tensors: Sequence[torch.Tensor], places: frozenset[Place]) -> None:
        """These sizes of such inputs vary; see :meth:`Ranges.vary`."""
        if places:
            self.ranges.vary(self.key(tuple(tensors), {})[1], places)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
        """Leaves and structure of a call."""
        return flatten_call(args, kwargs, self._in_order)

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Any], Any]:
        """Leaves of a call, validated, and the key of its specialization."""
        device = self._device
        if not kwargs and all(type(x) is torch.Tensor for x in args):
            return args, tuple([leaf_key(x, i, device, i in self._on_cpu) for i, x in enumerate(args)])
        leaves, structure = self.flatten(args, kwargs)
        # A structure's hash is slow, and a call with numbers is looked up several times.
        token = self._structures.get(structure) or self._structures.setdefault(structure, object())
        return leaves, (token, *[leaf_key(x, i, device, i in self._on_cpu) for i, x in enumerate(leaves)])

    def find(self, key: Any, leaves: Sequence[Any]) -> Specialization | None:
        """The specialization for a call, if there is one: for its very numbers and sizes, or for others too."""
        found = self.look_up(key, leaves)
        if has_numbers(key):
            if found is None:
                any_value = self.varying.key_of(key)
                found = self.look_up(any_value, leaves) if any_value is not None else None
                if found is not None and not found.unit.takes(leaves):
                    return None
            if found is not None:
                used(found)
        return found if found is not None else self.ranges.find(key, leaves)

    def padded(self, found: Specialization, leaves: Sequence[Any]) -> Padded | None:
        """The larger call that ``found``, which serves one with these leaves, is to be given; None: that very one."""
        return self.padding.of(found, leaves) if self.padding is not None else None

    def look_up(self, key: Any, leaves: Sequence[Any]) -> Specialization | None:
        found = self._specializations.get(key)
        if found is not None and not found.program.reads_layout:
            return found
        # The model looks at how its inputs lie in memory, or may: nothing was compiled so far.
        layouts = layouts_of(leaves)
        return found if layouts is None else self._specializations.get((key, layouts))

    def add(self, key: Any, signature: Signature, made: Specialization) -> Any:
        """A specialization is ready for calls; returns the key under which it is found."""
        if made.program.reads_layout and signature.layouts is not None:
            key = (key, signature.layouts)
        self._specializations[key] = made
        return key

    def give_up(self, made: Specialization) -> bool:
        """Calls under way keep it alive. False: it stays, for what the engine shows of itself."""
        if made is self.primary:
            return False
        for key in [k for k, other in self._specializations.items() if other is made]:
            self._specializations.pop(key)
        return True

    def clear(self) -> None:
        """Give up all."""
        self._specializations.clear()
        self.varying.clear()
        self.ranges.clear()
        self.primary = None

    def __str__(self) -> str:
        return "; ".join(str(s.signature) for s in self) or "nothing"
