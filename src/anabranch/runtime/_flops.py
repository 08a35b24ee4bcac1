"""Floating-point operations of a program, by ``torch.utils.flop_counter``'s formulas.

Counted from the shapes that export found: nothing is computed, and no thread but the caller's is disturbed
(``FlopCounterMode`` itself hooks every module of the process). Biases, activations and copies count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_aten = torch.ops.aten


def flops_of(graph: fx.Graph) -> dict[str, int | None]:
    """Operations of each operator that has any, by its node's name; None where a size depends on data."""
    found: dict[str, int | None] = {}
    formulas = _formulas()
    with _disable_current_modes(), torch.no_grad():
        for node in graph.nodes:
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                n = _of(node, formulas)
                if n != 0:
                    found[node.name] = n
    return found


def result_type(node: fx.Node) -> torch.dtype | None:
    """The type that an operator computes in: that of its result, or of the first of them."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return next((x.dtype for x in leaves if isinstance(x, torch.Tensor)), None)


def _of(node: fx.Node, formulas: Mapping[Any, Callable[..., Any]]) -> int | None:
    target: Any = node.target
    formula = formulas.get(target._overloadpacket)
    if formula is None and not _may_compute(target):
        return 0
    args, kwargs, value = fx.map_arg((node.args, node.kwargs, node), lambda n: n.meta.get("val"))
    if not _has_sizes((args, kwargs, value)):
        return None
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=value))
    args, kwargs = pytree.tree_map_only(torch.Tensor, _stand_in, (args, kwargs))
    counter = _Counter(formulas)
    try:
        with counter:
            target(*args, **kwargs)
    except (RuntimeError, NotImplementedError):  # it cannot be taken apart without values
        return 0
    return counter.flops


def _may_compute(target: Any) -> bool:
    """Whether an operator without a formula may consist of some that have one."""
    views = any(r.alias_info is not None for r in target._schema.returns)
    if views or torch.Tag.pointwise in target.tags:
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"))


def _has_sizes(values: Any) -> bool:
    return not any(
        isinstance(x, torch.SymInt)
        or (isinstance(x, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in x.shape))
        for x in pytree.tree_leaves(values)
    )


def _stand_in(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class _Counter(TorchDispatchMode):
    """Counts what an operator consists of."""

    def __init__(self, formulas: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.flops = 0
        self._formulas = formulas

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


def _formulas() -> dict[Any, Callable[..., Any]]:
    # Half of the compiler comes with it, so not at import.
    from torch.utils.flop_counter import flop_registry

    own: dict[str, Callable[..., Any]] = {
        "scaled_dot_product_attention": _attention,
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_fused_attention_overrideable": _attention,
        "_scaled_dot_product_efficient_attention": _attention,  # PyTorch 2.11's own do not know shared heads
        "_scaled_dot_product_flash_attention": _attention,
        "_scaled_dot_product_cudnn_attention": _attention,
        "mv": _vector_product,
        "addmv": lambda x, a, b, *_, **__: 2 * a.numel(),
        "dot": _vector_product,
        "vdot": _vector_product,
        "_grouped_mm": _grouped_product,
        "lstm": _recurrent,
        "gru": _recurrent,
        "rnn_tanh": _recurrent,
        "rnn_relu": _recurrent,
    }
    return {**flop_registry, **{getattr(_aten, name): f for name, f in own.items() if hasattr(_aten, name)}}


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    """Scores and their product with the values; heads of keys may serve several of queries."""
    *batch, length, width = query.shape
    return 2 * math.prod(batch) * length * key.shape[-2] * (width + value.shape[-1])


def _vector_product(a: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel()


def _grouped_product(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    """Where only one of them has a dimension of groups, each row or column of the other belongs to one group."""
    groups = int(a.shape[0]) if a.ndim == b.ndim == 3 else 1
    return 2 * groups * a.shape[-2] * math.prod(b.shape[-2:])


def _recurrent(x: torch.Tensor, *given: Any, **_: Any) -> int:
    """Each step of each sequence meets every weight matrix once."""
    weights = next(v for v in given if _is_weights(v))
    steps = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return 2 * steps * sum(w.numel() for w in weights if w.ndim == 2)


def _is_weights(value: Any) -> bool:
    tensors: Sequence[Any] = value if isinstance(value, list | tuple) else ()
    return any(isinstance(w, torch.Tensor) and w.ndim == 2 for w in tensors)
