"""Operators that are put in the place of another one in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


class Steps:
    """Puts operators before a node, each with the fake value that it has there."""

    def __init__(self, node: fx.Node, value: torch.Tensor) -> None:
        """``value``: the node's."""
        self.node, self.mode = node, getattr(value, "fake_mode", None)

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        with self.node.graph.inserting_before(self.node):
            made: fx.Node = self.node.graph.call_function(target, args)
        if "stack_trace" in self.node.meta:
            made.meta["stack_trace"] = self.node.meta["stack_trace"]
        with self.mode or torch.no_grad():
            made.meta["val"] = target(*[a.meta["val"] if isinstance(a, fx.Node) else a for a in args])
        return made

    def cast(self, x: Any, dtype: torch.dtype) -> Any:
        """``x`` in this dtype; itself where it has it, or is a number."""
        value = x.meta["val"] if isinstance(x, fx.Node) else None
        return self(torch.ops.aten.to.dtype, x, dtype) if getattr(value, "dtype", dtype) != dtype else x

    def replace(self, result: fx.Node) -> None:
        """Have ``result`` in the place of the node, which goes."""
        self.node.replace_all_uses_with(result)
        self.node.graph.erase_node(self.node)
