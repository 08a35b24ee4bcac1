"""Rewrites that keep Inductor from giving other values than eager, where that costs nothing or next to nothing.

``docs/use.md`` lists the faults with PyTorch's issues, also those that nothing is done about here. Each rewrite is of
the graph that Inductor gets; the plan shows the model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def avoid(module: fx.GraphModule) -> None:
    """Rewrite, in place, what Inductor of PyTorch 2.11 to 2.13 gets wrong."""
    for node in list(module.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if node.target in (_aten.mul.Tensor, _aten.mul.Scalar):
            _keep_product(node)
        elif _is_floor_division(node):
            _floor_divide(node, value)
    module.graph.lint()
    module.recompile()


def _keep_product(node: fx.Node) -> None:
    """Inductor makes x * 0 zeros, whatever x is (pytorch#186281); it leaves x * 0.0 alone."""
    node.args = tuple(0.0 if type(a) is int and a == 0 else a for a in node.args)


def _is_floor_division(node: fx.Node) -> bool:
    if node.target is _aten.floor_divide.default:
        return True
    return node.target in (_aten.div.Tensor_mode, _aten.div.Scalar_mode) and node.kwargs.get("rounding_mode") == "floor"


def _floor_divide(node: fx.Node, value: torch.Tensor) -> None:
    """Inductor computes floor(a / b): it gives 1.0 // 0.1 as 10 and inf // 3 as inf (pytorch#197895, #188048). Eager
    divides what fmod leaves over, and so gives 9 and NaN; these are its steps."""
    graph, dtype = node.graph, value.dtype

    def call(target: Any, *args: Any) -> fx.Node:
        made: fx.Node = graph.call_function(target, args)
        if "stack_trace" in node.meta:
            made.meta["stack_trace"] = node.meta["stack_trace"]
        with value.fake_mode if hasattr(value, "fake_mode") else torch.no_grad():
            made.meta["val"] = target(*[a.meta["val"] if isinstance(a, fx.Node) else a for a in args])
        return made

    def floating(x: Any) -> Any:
        if isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor) and x.meta["val"].dtype != dtype:
            return call(_aten.to.dtype, x, dtype)
        return x

    with graph.inserting_before(node):
        a, b = (floating(x) for x in node.args[:2])
        if not isinstance(a, fx.Node):
            a = call(_aten.full_like.default, b, a)
        scalar = not isinstance(b, fx.Node) or not isinstance(b.meta["val"], torch.Tensor)
        left = call(_aten.fmod.Scalar if scalar else _aten.fmod.Tensor, a, b)
        quotient = call(_aten.div.Tensor, call(_aten.sub.Tensor, a, left), b)
        other_sign = call(
            _aten.ne.Scalar if not isinstance(b, fx.Node) else _aten.ne.Tensor,
            call(_aten.lt.Scalar, left, 0),
            b < 0 if not isinstance(b, fx.Node) else call(_aten.lt.Scalar, b, 0),
        )
        below = call(_aten.logical_and.default, call(_aten.ne.Scalar, left, 0), other_sign)
        quotient = call(_aten.where.self, below, call(_aten.sub.Tensor, quotient, 1.0), quotient)
        whole = call(_aten.floor.default, quotient)
        too_low = call(_aten.gt.Scalar, call(_aten.sub.Tensor, quotient, whole), 0.5)
        whole = call(_aten.where.self, too_low, call(_aten.add.Tensor, whole, 1.0), whole)
        plain = call(_aten.div.Tensor, a, b)
        # A zero has the sign of the quotient.
        whole = call(_aten.where.self, call(_aten.eq.Scalar, quotient, 0), call(_aten.mul.Tensor, plain, 0.0), whole)
        if isinstance(b, fx.Node):
            whole = call(_aten.where.self, call(_aten.eq.Scalar, b, 0), plain, whole)
        elif b == 0:
            whole = plain
    node.replace_all_uses_with(whole)
    graph.erase_node(node)
