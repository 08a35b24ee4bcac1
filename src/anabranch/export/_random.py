"""Which operators draw random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten

#: Tagged random, but only with a positive dropout probability: (op, position of p or train, value that is not random).
_RANDOM_IF = {
    _aten.scaled_dot_product_attention.default: ("dropout_p", 4, 0.0, 0.0),
    _aten._scaled_dot_product_flash_attention.default: ("dropout_p", 3, 0.0, 0.0),
    _aten._scaled_dot_product_efficient_attention.default: ("dropout_p", 5, 0.0, 0.0),
    _aten._scaled_dot_product_cudnn_attention.default: ("dropout_p", 5, 0.0, 0.0),
    _aten._scaled_dot_product_flash_attention_for_cpu.default: ("dropout_p", 3, 0.0, 0.0),
    _aten._scaled_dot_product_attention_math.default: ("dropout_p", 4, 0.0, 0.0),
    _aten.dropout.default: ("train", 2, None, False),
    _aten.native_dropout.default: ("train", 2, None, False),
}


def is_random(node: fx.Node) -> bool:
    """Whether an operator of a graph draws random numbers, with the arguments that it has."""
    return draws(node.target, node.args, node.kwargs)


def draws(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operator does."""
    if not isinstance(op, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    rule = _RANDOM_IF.get(op)
    if rule is None:
        return True
    name, position, default, deterministic = rule
    value = kwargs.get(name, args[position] if len(args) > position else default)
    return bool(value != deterministic)
