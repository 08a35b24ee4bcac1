"""Which graphs of Dynamo's are one: threads that come upon code of a model at once each have it traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx


class _Place:
    """A node of a graph, by its place."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def key_of(gm: fx.GraphModule, examples: Sequence[Any], autocasts: Sequence[Any]) -> Any | None:
    """Of graphs that compute the same, at one place of a model, of inputs of the same kinds and sizes these are equal.
    None: nobody can tell, because the graph holds something.

    ``autocasts``: what is on around it.
    """
    places: dict[fx.Node, Any] = {}
    steps = []
    for number, node in enumerate(gm.graph.nodes):
        if node.op in ("get_attr", "call_module"):
            return None
        # By their text: 1, 1.0 and True are equal, and an object that has no text of its own is told by where it lies.
        args, kwargs = (repr(fx.map_arg(given, places.__getitem__)) for given in (node.args, node.kwargs))
        target = node.target if node.op.startswith("call") else ""
        # Of two places in a model that compute the same each has its own.
        steps.append((node.op, target, args, kwargs, node.meta.get("stack_trace")))
        places[node] = _Place(number)
    kinds = [
        (_kind(n.meta.get("example_value")), _kind(x))
        for n, x in zip(gm.graph.find_nodes(op="placeholder"), examples, strict=True)
    ]
    return steps, kinds, list(autocasts), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _kind(x: Any) -> Any:
    """Sizes by their text, which has the names of symbols."""
    if not isinstance(x, torch.Tensor):
        return type(x), repr(x)
    if x.layout is not torch.strided:
        return object()  # equal to no other
    layout = str(tuple(x.shape)), str(x.stride()), str(x.storage_offset())
    return isinstance(x, torch.nn.Parameter), x.dtype, x.device, layout, x.requires_grad
