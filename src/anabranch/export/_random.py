"""Which operators draw random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

#: An operator that is tagged as random draws nothing where one of its arguments says so.
_SAYS_NOT = {"train": False, "training": False, "dropout": 0.0, "dropout_p": 0.0}


def is_random(node: fx.Node) -> bool:
    """Whether an operator of a graph draws random numbers, with the arguments that it has."""
    return draws(node.target, node.args, node.kwargs)


def draws(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operator does."""
    if not isinstance(op, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    for i, argument in enumerate(op._schema.arguments):
        if argument.name in _SAYS_NOT:
            value = kwargs.get(argument.name, args[i] if i < len(args) else argument.default_value)
            if value == _SAYS_NOT[argument.name]:
                return False
    return True
