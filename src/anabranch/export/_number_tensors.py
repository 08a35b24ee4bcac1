"""Numbers that a program takes as inputs become tensors, so that it can be captured, and compiled, once for all values.

An operator that is given a Python number computes otherwise than with a tensor in its place: the number does not
take part in the choice of the type, and half precision is multiplied by it in float32 and rounded once. Here each
operator gets a tensor of no dimensions, of the type in which it computes, and casts around it. Where the bits would
not be eager's, or nobody has looked at the operator, the number stays a number (:func:`tensorize`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from anabranch.export._numbers import Expression, NumberInput

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALF, torch.float32, torch.float64)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_COMPARED = {getattr(_aten, name).Scalar: getattr(_aten, name).Tensor for name in ("eq", "ne", "lt", "le", "gt", "ge")}
#: Of what lies on the CPU: they give on the device what they give there, moved.
_MOVED = (_aten.stack.default, _aten.cat.default, _aten.unsqueeze.default, _aten.view.default, _aten.reshape.default)


class _Kept(Exception):
    """It has to stay a number."""


def tensorize(program: Any, device: torch.device, exact: bool) -> tuple[str, fx.Node | None]:
    """Change ``program``, which takes numbers as such, into one that takes tensors on ``device``; or say why not.

    Returns the reason, if any, and the operator that is the reason.

    ``exact``: PyTorch runs the operators, and the bits have to be eager's. A compiler's need not.
    """
    made = _Rewriter(program, device, exact)
    try:
        made.run()
    except _Kept as e:
        return str(e), made.node
    program.module = made.module
    program.numbers = replace(program.numbers, inputs=tuple(made.inputs.values()))
    return "", None


class _Rewriter:
    def __init__(self, program: Any, device: torch.device, exact: bool) -> None:
        self.module = fx.GraphModule(program.module, copy.deepcopy(program.module.graph))
        self._graph = self.module.graph
        placeholders = self._graph.find_nodes(op="placeholder")
        given = program.numbers.inputs
        self._numbers: dict[fx.Node, Expression] = {
            n: x.expression for n, x in zip(placeholders[len(placeholders) - len(given) :], given, strict=True)
        }
        self._mode: Any = next(
            (n.meta["val"].fake_mode for n in self._graph.nodes if hasattr(n.meta.get("val"), "fake_mode")), None
        )
        self._device = device
        self._exact = exact
        self._by_kernel = device.type == "cuda"
        #: The operator at which it is.
        self.node: fx.Node | None = None
        self._of: dict[NumberInput, fx.Node] = {}
        #: By node of the new graph's tensors that came from the CPU: whether they are on the device now.
        self._moved: set[fx.Node] = set()

    @property
    def inputs(self) -> dict[fx.Node, NumberInput]:
        return {n: x for x, n in self._of.items()}

    def run(self) -> None:
        if self._mode is None:
            raise _Kept("no tensor is computed")
        for node in list(self._graph.nodes):
            if node.op != "call_function":
                continue
            taken = [n for n in node.all_input_nodes if n in self._numbers]
            moved = [n for n in node.all_input_nodes if n in self._moved]
            if not taken and not moved:
                continue
            self.node = node
            with self._graph.inserting_before(node):
                made = self._followed() if moved else self._rule(node.target)(node)
            self._check(made)
            if made.meta["val"].device != node.meta["val"].device:
                self._moved.add(made)
            made.meta.update({k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")})
            node.replace_all_uses_with(made)
            self._graph.erase_node(node)
        if self._moved & set(self._graph.output_node().all_input_nodes):
            raise _Kept("a result lies on the CPU")
        for n in self._numbers:
            self._graph.erase_node(n)
        self._graph.lint()
        self.module.recompile()

    def _check(self, made: fx.Node) -> None:
        new, old = made.meta["val"], self._node.meta["val"]
        if (new.shape, new.dtype, new.stride()) != (old.shape, old.dtype, old.stride()):
            raise _Kept(f"{self._node.target} gives another layout with a tensor")

    # -- parts -------------------------------------------------------------------------------------------------------

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self._graph.call_function(target, args, kwargs)
        values, keywords = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self._mode, torch.no_grad():
            node.meta["val"] = target(*values, **keywords)
        return node

    def _tensor(self, number: Any, dtype: torch.dtype, finite: bool = False) -> fx.Node:
        """A number, or a constant, as a tensor of this type."""
        if not isinstance(number, fx.Node):
            return self._call(_aten.full.default, [], number, dtype=dtype, device=self._device, pin_memory=False)
        expression = self._numbers[number]
        if dtype not in _FLOATS and (dtype not in _INTEGERS or expression.kind is not int):
            raise _Kept(f"{self._node.target} makes {dtype} of it")
        wanted = NumberInput(expression, dtype, finite)
        if wanted not in self._of:
            with self._graph.inserting_before(next(n for n in self._graph.nodes if n.op != "placeholder")):
                node = self._graph.placeholder(f"number_tensor_{len(self._of)}")
            node.target = node.name  # that of another may be the name that was asked for
            with self._mode:
                node.meta["val"] = torch.empty((), dtype=dtype, device=self._device)
            self._of[wanted] = node
        return self._of[wanted]

    def _as(self, x: Any, dtype: torch.dtype) -> fx.Node:
        """A tensor in this type."""
        if not isinstance(x, fx.Node) or x in self._numbers:
            return self._tensor(x, dtype)
        if x.meta["val"].device != self._device:
            raise _Kept(f"{self._node.target} reads a tensor on the CPU")
        return x if x.meta["val"].dtype is dtype else self._call(_aten._to_copy.default, x, dtype=dtype)

    @property
    def _node(self) -> fx.Node:
        assert self.node is not None
        return self.node

    def _result(self) -> torch.dtype:
        dtype = self._node.meta["val"].dtype
        if dtype not in _FLOATS and dtype not in _INTEGERS:
            raise _Kept(f"{self._node.target} gives {dtype}")
        return dtype

    def _not_exact(self) -> None:
        if self._exact:
            raise _Kept(f"{self._node.target} gives other bits with a tensor")

    def _argument(self, name: str, default: Any = None) -> Any:
        for i, declared in enumerate(self._node.target._schema.arguments):  # type: ignore[union-attr]
            if declared.name == name and name not in self._node.kwargs and i < len(self._node.args):
                return self._node.args[i]
        return self._node.kwargs.get(name, default)

    # -- operators ---------------------------------------------------------------------------------------------------

    def _rule(self, target: Any) -> Callable[[fx.Node], fx.Node]:
        rules: dict[Any, Callable[[fx.Node], fx.Node]] = {
            **dict.fromkeys((_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor), self._arithmetic),
            _aten.rsub.Scalar: self._reversed_sub,
            **dict.fromkeys(_COMPARED, self._comparison),
            **dict.fromkeys((_aten.where.ScalarSelf, _aten.where.ScalarOther, _aten.where.Scalar), self._where),
            _aten.masked_fill.Scalar: self._masked_fill,
            **dict.fromkeys((_aten.full.default, _aten.full_like.default, _aten.new_full.default), self._filled),
            **dict.fromkeys((_aten.fill.Scalar, _aten.scalar_tensor.default), self._filled),
            **dict.fromkeys((_aten.clamp.default, _aten.clamp_min.default, _aten.clamp_max.default), self._clamp),
            **dict.fromkeys((_aten.pow.Tensor_Scalar, _aten.pow.Scalar), self._pow),
            _aten.lerp.Scalar: self._lerp,
        }
        if target not in rules:
            raise _Kept(f"{target} takes a number")
        return rules[target]

    def _arithmetic(self, node: fx.Node) -> fx.Node:
        x, y = node.args[:2]
        result = self._result()
        computed = _computed_in(result)
        alpha = node.kwargs.get("alpha", 1)
        target = node.target
        numbers = [n for n in (x, y) if not isinstance(n, fx.Node) or n in self._numbers]
        if self._exact and not self._by_kernel and target in (_aten.add.Tensor, _aten.sub.Tensor):
            computed = result  # the CPU rounds a number to half precision before it is added
        if numbers and numbers[0] is x and result in _HALF:
            self._not_exact()  # some kernels round it first
        if alpha != 1 or isinstance(alpha, fx.Node):
            if result not in _INTEGERS:
                self._not_exact()  # one kernel does not round in between
            y = self._call(_aten.mul.Tensor, self._as(y, computed), self._tensor(alpha, computed))
        a, b = self._as(x, computed), self._as(y, computed)
        if target is _aten.div.Tensor and self._exact and self._by_kernel and numbers and numbers[0] is y:
            # A division by a number is a product on a GPU, with what float64 has for the number's inverse.
            inverse = self._call(_aten.reciprocal.default, self._as(y, torch.float64))
            target, b = _aten.mul.Tensor, self._as(inverse, computed)
        return self._as(self._call(target, a, b), result)

    def _reversed_sub(self, node: fx.Node) -> fx.Node:
        x, number = node.args[:2]
        result = self._result()
        computed = _computed_in(result)
        alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
        if result in _HALF or isinstance(alpha, fx.Node) or alpha != 1:
            self._not_exact()
        b = self._as(x, computed)
        if isinstance(alpha, fx.Node) or alpha != 1:
            b = self._call(_aten.mul.Tensor, b, self._tensor(alpha, computed))
        return self._as(self._call(_aten.sub.Tensor, self._as(number, computed), b), result)

    def _comparison(self, node: fx.Node) -> fx.Node:
        x, number = node.args
        dtype = torch.result_type(x.meta["val"], number.meta["val"])  # type: ignore[union-attr]
        return self._call(_COMPARED[node.target], self._as(x, dtype), self._tensor(number, dtype))

    def _where(self, node: fx.Node) -> fx.Node:
        condition, x, y = node.args
        result = self._result()
        return self._call(_aten.where.self, condition, self._as(x, result), self._as(y, result))

    def _masked_fill(self, node: fx.Node) -> fx.Node:
        x, mask, number = node.args
        result = self._result()
        return self._call(_aten.where.self, mask, self._tensor(number, result), self._as(x, result))

    def _filled(self, node: fx.Node) -> fx.Node:
        number = next(n for n in node.all_input_nodes if n in self._numbers)
        size = list(node.meta["val"].shape)
        one = self._tensor(number, self._result())
        one = self._call(_aten.expand.default, one, size) if size else one
        return self._call(_aten.clone.default, one, memory_format=torch.contiguous_format)

    def _clamp(self, node: fx.Node) -> fx.Node:
        result = self._result()
        made = self._as(node.args[0], result)
        for name, tensor, scalar, beyond in (
            ("min", _aten.clamp_min.Tensor, _aten.clamp_min.default, _aten.lt.Tensor),
            ("max", _aten.clamp_max.Tensor, _aten.clamp_max.default, _aten.gt.Tensor),
        ):
            bound = self._argument(name)
            if bound is None:
                continue
            if not isinstance(bound, fx.Node):
                made = self._call(scalar, made, bound)
                continue
            limit = self._tensor(bound, result, finite=True)
            if self._by_kernel or not self._exact:
                made = self._call(tensor, made, limit)
            else:  # of two zeros the CPU keeps the tensor's
                made = self._call(_aten.where.self, self._call(beyond, made, limit), limit, made)
        return made

    def _pow(self, node: fx.Node) -> fx.Node:
        self._not_exact()  # some exponents have kernels of their own
        x, y = node.args
        result = self._result()
        if result in _INTEGERS:
            raise _Kept(f"{node.target} gives {result}")
        computed = _computed_in(result)
        made = self._call(_aten.pow.Tensor_Tensor, self._as(x, computed), self._as(y, computed))
        return self._as(made, result)

    def _lerp(self, node: fx.Node) -> fx.Node:
        x, y, weight = node.args
        result = self._result()
        computed = _computed_in(result)
        made = self._call(
            _aten.lerp.Tensor, self._as(x, computed), self._as(y, computed), self._tensor(weight, computed)
        )
        return self._as(made, result)

    def _followed(self) -> fx.Node:
        """What is made on the device, as the tensors that it is made of, and was made on the CPU and copied there."""
        node = self._node
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
        if any(n not in self._moved for n in tensors):
            raise _Kept(f"{node.target} reads a tensor on the CPU")
        if node.target is _aten._to_copy.default:
            if node.meta["val"].device != self._device:
                raise _Kept(f"{node.target} reads a tensor on the CPU")
            kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "non_blocking")}
            return self._call(node.target, *node.args, **kwargs)
        if node.target not in _MOVED:
            raise _Kept(f"{node.target} reads a tensor on the CPU")
        return self._call(node.target, *node.args, **node.kwargs)


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type in which an operator with a result of this one computes."""
    return torch.float32 if dtype in _HALF else dtype
