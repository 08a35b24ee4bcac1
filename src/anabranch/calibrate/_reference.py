"""What errors are measured against: a float32 model computed as it is, or with all that is float32 in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from anabranch.export import Run

_HALVES = (torch.float16, torch.bfloat16)
#: What reads the bits of a number: another type has others.
OF_BITS = (torch.ops.aten.view.dtype,)


class Reference:
    """``dtype``: ``torch.float32`` or ``torch.float64``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def given(self, values: Any) -> Any:
        """What the model has in float32, as ``dtype``."""
        return pytree.tree_map_only(torch.Tensor, lambda x: x.to(self.dtype) if x.dtype is torch.float32 else x, values)

    def widened(self, values: Any) -> Any:
        """Tensors in half precision and in float32 as ones of ``dtype``."""
        narrower = (*_HALVES, torch.float32)
        return pytree.tree_map_only(torch.Tensor, lambda x: x.to(self.dtype) if x.dtype in narrower else x, values)

    def compute(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What an operator of the model's gives. Its operands are of ``dtype`` where the model has float32."""
        if self.dtype is torch.float32:
            return target(*args, **kwargs)
        wide = [self.dtype if x is torch.float32 else x for x in pytree.tree_leaves((args, kwargs))]
        given, named = pytree.tree_unflatten(wide, pytree.tree_structure((args, kwargs)))
        try:
            if target in OF_BITS:
                raise TypeError("float64 has other bits than float32")
            result = target(*given, **named)
        except (RuntimeError, TypeError):  # an operator of float32 only
            narrow = pytree.tree_map_only(
                torch.Tensor, lambda x: x.float() if x.dtype is self.dtype else x, (args, kwargs)
            )
            result = target(*narrow[0], **narrow[1])
        return self.given(result)


class Values(Run):
    """Runs a graph on a reference, and keeps the value of every node."""

    def __init__(self, gm: fx.GraphModule, reference: Reference) -> None:
        super().__init__(gm)
        self.garbage_collect_values = False
        self.reference = reference
        self.kept: dict[fx.Node, Any] = {}

    def seen(self, node: fx.Node, value: Any) -> Any:
        self.kept[node] = value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.reference.compute(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.reference.given(super().get_attr(target, args, kwargs))

    def behind(self, node: fx.Node, value: Any) -> Any:
        """What the graph returns if the value of ``node`` is ``value``: only what depends on it is computed again."""
        other: dict[fx.Node, Any] = {node: value}
        for n in self.graph.nodes:
            if n is node or not any(i in other for i in n.all_input_nodes):
                continue
            args, kwargs = fx.map_arg((n.args, n.kwargs), lambda i: other[i] if i in other else self.kept[i])
            if n.op == "output":
                return args[0]
            if n.target is torch.ops.aten.copy_.default:
                other[n] = args[0]
            else:
                other[n] = self.call_function(n.target, args, kwargs) if n.op == "call_function" else self.kept[n]
        return self.kept[self.graph.output_node()]
