"""The proof that nothing of a number's value has leaked into the program that takes the number as an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from anabranch.export._random import is_random
from anabranch.export._state import writes_of

_aten = torch.ops.aten
#: Elements of a tensor that is looked at.
_MOST = 1 << 16


def same_computation(made: Any, reference: Any, leaves: Sequence[Any]) -> bool:
    """Whether a program that takes numbers computes what ``reference`` does, which has those of ``leaves`` written in.

    A model may have asked for the type of a number, which a stand-in cannot hide. What the reference computed of
    numbers while it was compiled (``torch.tensor(sigma)``) is compared by value.
    """
    if (
        made.structure != reference.structure
        or made.direct_only != reference.direct_only
        or made.data_dependent != reference.data_dependent
        or made.absolute != reference.absolute
        or made.reads_layout != reference.reads_layout
        or made.written != reference.written
        or [s.name for s in made.state] != [s.name for s in reference.state]
        or not _same_outputs(made.outputs, reference.outputs)
    ):
        return False
    values = [x.expression.of(leaves) for x in made.numbers.inputs]
    return _Comparison(made, reference, values).is_same()


def _same_outputs(a: Sequence[Any], b: Sequence[Any]) -> bool:
    def plain(output: Any) -> Any:
        if hasattr(output, "weight"):  # handed back
            view = output.view.code if output.view is not None else None
            place = None if output.weight is None else (output.weight.data_ptr(), output.weight.shape)
            return output.position, place, view
        return repr(output)

    return len(a) == len(b) and all(type(x) is type(y) and plain(x) == plain(y) for x, y in zip(a, b, strict=True))


class _Unknown(Exception):
    """A node depends on inputs, or is too large to be looked at."""


class _Comparison:
    def __init__(self, made: Any, reference: Any, values: Sequence[Any]) -> None:
        self._names: dict[fx.Node, Any] = {}
        self._known: dict[fx.Node, Any] = {}
        self._same: dict[tuple[fx.Node, fx.Node], bool] = {}
        self._outputs = []
        for program, numbers in ((made, values), (reference, ())):
            graph = program.module.graph
            placeholders = graph.find_nodes(op="placeholder")
            n = len(program.weights)
            for node, name, tensor in zip(placeholders, program.weight_names, program.weights, strict=False):
                self._names[node] = name
                if tensor.numel() <= _MOST and ("lifted_tensor" in name or name.startswith("constant.")):
                    self._known[node] = tensor
            end = len(placeholders) - len(numbers)
            for i, node in enumerate(placeholders[n:end]):
                self._names[node] = i
            self._known.update(zip(placeholders[end:], numbers, strict=True))
            for node in graph.nodes:
                if node.op == "call_function" and node.all_input_nodes and self._is_closed(node):
                    self._known[node] = None  # computed where it is asked for
            self._outputs.append((*graph.output_node().args[0], *writes_of(graph)))

    def _is_closed(self, node: fx.Node) -> bool:
        return isinstance(node.target, torch._ops.OpOverload) and all(
            n in self._known or (n.op == "call_function" and not n.all_input_nodes) for n in node.all_input_nodes
        )

    def is_same(self) -> bool:
        a, b = self._outputs
        return len(a) == len(b) and all(self._alike(x, y) for x, y in zip(a, b, strict=True))

    def _alike(self, a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            # Not by recursion alone: graphs are deep.
            stack = [(a, b)]
            while stack:
                pair = stack[-1]
                if pair in self._same:
                    stack.pop()
                    continue
                waiting = [p for p in _pairs(*pair) if p not in self._same]
                if waiting:
                    stack += waiting
                    continue
                self._same[pair] = self._alike_nodes(*stack.pop())
            return self._same[a, b]
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            return self._alike_values(a, b)
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return len(a) == len(b) and all(self._alike(x, y) for x, y in zip(a, b, strict=True))
        return type(a) is type(b) and repr(a) == repr(b)

    def _alike_nodes(self, a: fx.Node, b: fx.Node) -> bool:
        if a.op == b.op == "placeholder":
            if a in self._names and b in self._names and self._names[a] == self._names[b]:
                return a not in self._known or self._alike_values(a, b)
        elif a.op == b.op == "call_function" and a.target is b.target and a.kwargs.keys() == b.kwargs.keys():
            if a.target is _aten.fill.Scalar and self._alike(a.args[0], b.args[0]):
                return self._alike_values(self._written(a), self._written(b))
            pairs = [(a.args, b.args), *((a.kwargs[k], b.kwargs[k]) for k in a.kwargs)]
            if all(self._alike(x, y) for x, y in pairs):
                return True
        elif (a.target, b.target) == (_aten.fill.Scalar, _aten.copy.default) and self._alike(a.args[0], b.args[0]):
            return self._alike_values(self._written(a), self._written(b))
        return self._alike_values(a, b)

    def _written(self, node: fx.Node) -> torch.Tensor | None:
        """The one value that ``fill`` or ``copy`` writes everywhere; None if it is not known, or not one."""
        try:
            value = self._value(node.args[1])
        except Exception:
            return None
        if isinstance(value, torch.Tensor) and value.dim():
            return None
        # What is known may have been rounded to the type already.
        return torch.as_tensor(value, dtype=node.meta["val"].dtype)

    def _alike_values(self, a: Any, b: Any) -> bool:
        try:
            x, y = self._value(a), self._value(b)
        except Exception:
            return False
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return (
                x.shape == y.shape
                and x.dtype is y.dtype
                and torch.equal(x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8))
            )
        return type(x) is type(y) and type(x) in (int, float) and repr(x) == repr(y)

    def _value(self, x: Any) -> Any:
        """On the CPU."""
        if not isinstance(x, fx.Node):
            return x
        if self._known.get(x) is None:
            value = x.meta["val"]
            if not isinstance(x.target, torch._ops.OpOverload) or value.numel() > _MOST or is_random(x):
                raise _Unknown
            if x.all_input_nodes and x not in self._known:
                raise _Unknown

            def of(y: Any) -> Any:
                if isinstance(y, fx.Node):
                    return self._value(y)
                return torch.device("cpu") if isinstance(y, torch.device) else y

            args, kwargs = fx.node.map_aggregate((x.args, x.kwargs), of)
            with torch.no_grad():
                self._known[x] = x.target(*args, **kwargs)
        found = self._known[x]
        return found.cpu() if isinstance(found, torch.Tensor) else found


def _pairs(a: fx.Node, b: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Inputs of two nodes that stand at the same places."""
    x, y = a.all_input_nodes, b.all_input_nodes
    return list(zip(x, y, strict=True)) if a.target is b.target and len(x) == len(y) else []
