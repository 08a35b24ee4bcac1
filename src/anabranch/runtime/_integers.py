"""The integers that a graph of Dynamo's takes beside tensors, as sizes of an engine's inputs.

Dynamo makes a symbol of a size, or of an integer of Python's, that has varied, and passes its value to the graph. An
engine takes tensors, and knows sizes that vary: so an integer is read off the tensor whose size it is. One that is no
size of any tensor is made one: of a tensor without elements.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from anabranch.runtime._ranges import Place

#: Added to an integer that is made a size. Those of 0 and 1 have specializations of their own, and 0 and 1 need none.
_SHIFT = 2


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What takes these items of a sequence."""
    if not positions:
        return lambda given: ()
    if len(positions) == 1:
        only = positions[0]
        return lambda given: (given[only],)
    return operator.itemgetter(*positions)


@dataclass(frozen=True)
class Integers:
    """Which inputs of a graph are tensors of the call, and which integers are sizes of these. Immutable.

    Threads: any. Streams: :meth:`inputs` makes tensors without memory.
    """

    #: Positions of the tensors that an engine is given.
    tensors: Sequence[int]
    #: Integers that an engine need not be given: by position, the size of an input where they are read, if the graph
    #: uses them at all, and what is to be added.
    read: Mapping[int, tuple[Place | None, int]] = field(default_factory=dict)
    #: Positions of those of them that are made a size.
    carried: Sequence[int] = ()
    #: Which sizes of the engine's inputs vary.
    free: frozenset[Place] = frozenset()
    #: Whether one that is a symbol is no size of a tensor, whether or not the graph uses it.
    of_python: bool = False
    _tensors_of: Callable[[Sequence[Any]], Sequence[Any]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tensors_of", picker(self.tensors))

    @classmethod
    def among(cls, placeholders: Sequence[fx.Node], tensors: Sequence[int]) -> Integers:
        """Of the inputs of a graph, of which these are ``tensors`` of the call, as far as Dynamo knows them."""
        sizes = {
            (i, d): symbol
            for i, position in enumerate(tensors)
            for d, n in enumerate(getattr(_value(placeholders[position]), "shape", ()))
            if (symbol := _symbol(n)) is not None
        }
        where = {symbol: place for place, symbol in reversed(sizes.items())}
        read: dict[int, tuple[Place | None, int]] = {}
        carried: list[int] = []
        of_python = False
        for position, node in enumerate(placeholders):
            symbol = _symbol(_value(node))
            if symbol is None:
                continue
            of_python |= symbol not in where
            if not node.users:
                read[position] = None, 0
            elif symbol in where:
                read[position] = where[symbol], 0
            else:
                read[position] = (len(tensors) + len(carried), 0), -_SHIFT
                carried.append(position)
        made = frozenset((len(tensors) + i, 0) for i in range(len(carried)))
        return cls(tensors, read, carried, frozenset(sizes) | made, of_python)

    def inputs(self, given: Sequence[Any]) -> Sequence[Any] | None:
        """What an engine is given in a call of the graph; None where one of the integers can be no size."""
        tensors = self._tensors_of(given)
        if not self.carried:
            return tensors
        numbers = [given[position] for position in self.carried]
        if min(numbers) < 0:
            return None
        beside = next((x for x in tensors if not x.is_cpu), tensors[0])
        # Of bytes, on the engine's device: what is on the CPU beside another device is read there.
        return (*tensors, *(beside.new_empty((n + _SHIFT, 0), dtype=torch.uint8) for n in numbers))

    def of(self, given: Sequence[torch.Tensor]) -> dict[int, Any]:
        """The integers by position, read off what an engine is given."""
        return {
            position: shift if place is None else given[place[0]].shape[place[1]] + shift
            for position, (place, shift) in self.read.items()
        }


def _value(node: fx.Node) -> Any:
    """What Dynamo knows of an input."""
    return node.meta.get("example_value")


def _symbol(n: Any) -> Any:
    """The symbol, or what is computed of symbols, that an integer is to Dynamo; None where it is a number."""
    expr = getattr(n.node, "expr", None) if isinstance(n, torch.SymInt) else None  # a ragged size has none
    return None if expr is None or expr.is_number else expr
