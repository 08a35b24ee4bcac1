"""Rewrites that keep Inductor from giving other values than eager, where that costs nothing or next to nothing.

``docs/use.md`` lists the faults with PyTorch's issues, also those that nothing is done about here. Each rewrite is of
the graph that Inductor gets; the plan shows the model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from anabranch.backends._steps import Steps

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
            _floor_divide(_Steps(node, value))
        elif node.target in (_aten.remainder.Tensor, _aten.remainder.Scalar):
            _remainder(_Steps(node, value))
    module.graph.lint()
    module.recompile()


def _keep_product(node: fx.Node) -> None:
    """Inductor makes x * 0 zeros, whatever x is (pytorch#186281); it leaves x * 0.0 alone."""
    node.args = tuple(0.0 if type(a) is int and a == 0 else a for a in node.args)


def _is_floor_division(node: fx.Node) -> bool:
    if node.target is _aten.floor_divide.default:
        return True
    return node.target in (_aten.div.Tensor_mode, _aten.div.Scalar_mode) and node.kwargs.get("rounding_mode") == "floor"


class _Steps(Steps):
    """Steps of an operator with two operands, which get its dtype."""

    def __init__(self, node: fx.Node, value: torch.Tensor) -> None:
        super().__init__(node, value)
        a, b = (self._floating(x, value.dtype) for x in node.args[:2])
        self.a: fx.Node = a if isinstance(a, fx.Node) else self(_aten.full_like.default, b, a)
        self.b: Any = b

    def _floating(self, x: Any, dtype: torch.dtype) -> Any:
        value = x.meta["val"] if isinstance(x, fx.Node) else None
        return self(_aten.to.dtype, x, dtype) if isinstance(value, torch.Tensor) and value.dtype != dtype else x

    def left_over(self) -> tuple[fx.Node, fx.Node]:
        """fmod(a, b), and where it is not zero and has not the sign of b."""
        b, number = self.b, not isinstance(self.b, fx.Node)
        left = self(_aten.fmod.Scalar if number else _aten.fmod.Tensor, self.a, b)
        # Not as lt(left, 0) != lt(b, 0): of indices Inductor makes formulas, and its formulas do not compare truths.
        if number:
            other_sign = self(_aten.gt.Scalar if b < 0 else _aten.lt.Scalar, left, 0)
        else:
            is_below, is_above = self(_aten.lt.Scalar, left, 0), self(_aten.gt.Scalar, left, 0)
            other_sign = self(_aten.where.self, self(_aten.lt.Scalar, b, 0), is_above, is_below)
        return left, self(_aten.logical_and.default, self(_aten.ne.Scalar, left, 0), other_sign)


def _remainder(step: _Steps) -> None:
    """Inductor's vectors compute a - b * floor(a / b), which is far off where a / b has lost its last digits. Eager
    uses fmod (pytorch#198057). On the CPU it rounds a number b to float16 or bfloat16 first (pytorch#186875)."""
    value = step.a.meta["val"]
    if not isinstance(step.b, fx.Node) and value.device.type == "cpu":
        step.b = torch.tensor(step.b, dtype=value.dtype).item()
    left, off = step.left_over()
    step.replace(step(_aten.where.self, off, step(_aten.add.Tensor, left, step.b), left))


def _floor_divide(step: _Steps) -> None:
    """Inductor computes floor(a / b): it gives 1.0 // 0.1 as 10 and inf // 3 as inf (pytorch#197895, #188048). Eager
    divides what fmod leaves over, and so gives 9 and NaN; these are its steps."""
    a, b = step.a, step.b
    left, below = step.left_over()
    quotient = step(_aten.div.Tensor, step(_aten.sub.Tensor, a, left), b)
    quotient = step(_aten.where.self, below, step(_aten.sub.Tensor, quotient, 1.0), quotient)
    whole = step(_aten.floor.default, quotient)
    too_low = step(_aten.gt.Scalar, step(_aten.sub.Tensor, quotient, whole), 0.5)
    whole = step(_aten.where.self, too_low, step(_aten.add.Tensor, whole, 1.0), whole)
    plain = step(_aten.div.Tensor, a, b)
    # A zero has the sign of the quotient.
    whole = step(_aten.where.self, step(_aten.eq.Scalar, quotient, 0), step(_aten.mul.Tensor, plain, 0.0), whole)
    # fmod of vectors is NaN where the quotient is too large for a number.
    finite = step(_aten.lt.Scalar, step(_aten.abs.default, a), float("inf"))
    overflows = step(_aten.logical_and.default, step(_aten.isinf.default, plain), finite)
    whole = step(_aten.where.self, overflows, plain, whole)
    if isinstance(b, fx.Node):
        whole = step(_aten.where.self, step(_aten.eq.Scalar, b, 0), plain, whole)
    step.replace(plain if not isinstance(b, fx.Node) and b == 0 else whole)
