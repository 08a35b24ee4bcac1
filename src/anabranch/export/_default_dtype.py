"""What an operator takes from PyTorch's default dtype, written into the graph.

``torch.ones(3)`` asks for the default at each call, and so do an integer tensor times 2.5 and ``torch.where(mask, 0.0,
-1e9)``. The default belongs to the whole process: another thread that builds a model in half precision must not change
what a call returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten

#: Arguments that choose among values, and take no part in their type.
_CHOOSE = ("condition", "mask", "index", "indices")
_COMPLEX_OF = {
    torch.float16: torch.complex32,
    torch.float32: torch.complex64,
    torch.float64: torch.complex128,
}


def pin_default_dtype(gm: fx.GraphModule) -> list[fx.Node]:
    """Write today's default dtype into the graph of ``gm``; returns the operators that will ask for it all the same.

    The result is the same under today's default. Nodes carry fake tensors under ``meta["val"]``.
    """
    left: list[fx.Node] = []
    for node in list(gm.graph.nodes):
        if node.op == "get_attr":
            part = getattr(gm, str(node.target), None)
            if isinstance(part, fx.GraphModule):  # a branch, or the body of a loop
                left += pin_default_dtype(part)
                part.recompile()
        elif node.op == "call_function" and _asks(node) and not _pin(gm.graph, node):
            left.append(node)
    return left


def _values(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_inexact(value: Any) -> bool:
    """A floating point or complex value: a tensor, or a number."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, float | complex | torch.SymFloat)


def _given(node: fx.Node, name: str) -> Any:
    """An operator's argument by its name in the schema; None where it is left out."""
    for i, declared in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if declared.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[i] if i < len(node.args) and not declared.kwarg_only else None
    return None


def _takes_dtype(node: fx.Node) -> bool:
    return any(a.name == "dtype" for a in node.target._schema.arguments)  # type: ignore[union-attr]


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if any(isinstance(v, torch.Tensor) for v in _values(n))]


def _numbers(node: fx.Node) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), found.append)
    return [n.meta.get("val") if isinstance(n, fx.Node) else n for n in found]


def _asks(node: fx.Node) -> bool:
    """Whether the operator computes in the default dtype because nothing that it is given says another."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    tensors = _tensors(node)
    if any(_is_inexact(v) for n in tensors for v in _values(n)) or _given(node, "dtype") is not None:
        return False
    if any(_is_inexact(v) for v in _values(node) if isinstance(v, torch.Tensor)):
        return True
    # A comparison of integers with 2.5 computes in the default dtype, too; a filled tensor keeps its own.
    return (
        bool(tensors)
        and not _takes_dtype(node)
        and any(isinstance(v, torch.Tensor) for v in _values(node))
        and any(_is_inexact(v) for v in _numbers(node) if not isinstance(v, torch.Tensor))
    )


def _pin(graph: fx.Graph, node: fx.Node) -> bool:
    """Have the node compute in today's default dtype for good; False where it is not known how."""
    default = torch.get_default_dtype()
    tensors = _tensors(node)
    if _takes_dtype(node):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or _try(node, {}, {"dtype": value.dtype}) is None:
            return False
        node.update_kwarg("dtype", value.dtype)
        return True
    if node.target is _aten.where.Scalar:
        return _pin_where(graph, node)
    if not tensors or node.target.namespace != "aten":  # type: ignore[union-attr]
        return False  # nobody knows what somebody's own operator asks for
    is_complex = any(isinstance(v, complex) for v in _numbers(node))
    dtype = _COMPLEX_OF.get(default, default) if is_complex else default
    cast: dict[fx.Node, Any] = {}
    chosen: set[fx.Node] = set()
    for name in _CHOOSE:
        fx.node.map_arg(_given(node, name), chosen.add)
    for n in tensors:
        if n not in chosen and isinstance(n.meta["val"], torch.Tensor):
            cast[n] = _with(n.meta["val"], lambda x: x.to(dtype))
    made = _try(node, cast, {})
    if made is None:
        return False
    for n, fake in cast.items():
        with graph.inserting_before(node):
            new = graph.call_function(_aten._to_copy.default, (n,), {"dtype": dtype})
        new.meta = {**n.meta, "val": fake}
        node.replace_input_with(n, new)
    return True


def _pin_where(graph: fx.Graph, node: fx.Node) -> bool:
    """``where(condition, 1.0, 2.0)`` with its numbers as tensors of a type."""
    condition, *numbers = node.args
    value = node.meta.get("val")
    given = [x.meta.get("val") if isinstance(x, fx.Node) else x for x in numbers]
    if not isinstance(value, torch.Tensor) or len(numbers) != 2 or any(isinstance(x, torch.Tensor) for x in given):
        return False
    typed: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    with graph.inserting_before(node):
        made = [graph.call_function(_aten.scalar_tensor.default, (x,), typed) for x in numbers]
    for new, x in zip(made, given, strict=True):
        new.meta = {**node.meta, "val": _with(value, lambda _, x=x: _aten.scalar_tensor.default(x, **typed))}
    node.target = _aten.where.self
    node.args = (condition, *made)
    return True


def _with(value: torch.Tensor, compute: Any) -> Any:
    """``compute(value)`` on fake tensors."""
    with value.fake_mode:  # type: ignore[attr-defined]
        return compute(value)


def _try(node: fx.Node, cast: dict[fx.Node, Any], more: dict[str, Any]) -> Any:
    """The node's value with other arguments, if it is of the same types, shapes and strides; else None."""

    def value(n: fx.Node) -> Any:
        return cast.get(n, n.meta.get("val"))

    before = _values(node)
    fakes = [v for v in before if isinstance(v, torch.Tensor)]
    try:
        args, kwargs = fx.node.map_arg((node.args, {**node.kwargs, **more}), value)
        made = _with(fakes[0], lambda _: node.target(*args, **kwargs))  # type: ignore[operator]
    except Exception:
        return None
    after = list(made) if isinstance(made, list | tuple) else [made]
    same = len(after) == len(before) and all(
        (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        for a, b in zip(after, before, strict=True)
        if isinstance(b, torch.Tensor)
    )
    return made if same else None
