"""Whether a model can tell how its inputs lie in memory.

Steps of an engine read inputs with canonical strides: one that is not dense is copied first. To most models that makes
no difference. It does to one that asks for ``x.contiguous()``, which is ``x`` itself or a copy, or for
``x.is_contiguous()``: it is exported for each layout by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten

#: What gives or does another thing for another layout of its first argument.
_TELLING = {
    *(torch.Tensor.contiguous, torch.Tensor.is_contiguous, torch.Tensor.stride),
    *(torch.Tensor.reshape, torch.reshape, torch.Tensor.reshape_as, torch.Tensor.view, torch.Tensor.view_as),
    *(torch.Tensor.flatten, torch.flatten, torch.Tensor.ravel, torch.ravel),
    *(torch.Tensor.as_strided, torch.as_strided),
}


class LayoutWatch(TorchFunctionMode):
    """While it is on, notes whether the layout of one of ``inputs``, or of a view of one, is looked at."""

    def __init__(self, inputs: Iterable[Any]) -> None:
        super().__init__()
        self._inputs = {_storage(x) for x in inputs if isinstance(x, torch.Tensor)} - {None}
        self.was_read = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.was_read and self._inputs:
            tells = func in _TELLING or (func is torch.Tensor.to and kwargs.get("memory_format") is not None)
            x = args[0] if args else kwargs.get("self", kwargs.get("input"))
            if tells and isinstance(x, torch.Tensor):
                self.was_read = _storage(x) in self._inputs
        return func(*args, **kwargs)


def _storage(x: torch.Tensor) -> int | None:
    try:
        with torch._C.DisableTorchFunction():
            return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None  # no dense tensor


def keep_copies(gm: fx.GraphModule, fresh: set[fx.Node]) -> None:
    """Have each of ``fresh`` be memory of its own, although the operator would hand its input back.

    ``fresh``: nodes whose values were new tensors when the graph ran on the inputs as the model sees them. Nodes carry
    fake tensors of canonical inputs under ``meta["val"]``.
    """
    for node in fresh & aliases(gm.graph):
        with gm.graph.inserting_after(node):
            copy = gm.graph.call_function(_aten.clone.default, (node,))
        value = node.meta["val"]
        with value.fake_mode:
            copy.meta = {**node.meta, "val": value.clone()}
        node.replace_all_uses_with(copy)
        copy.args = (node,)


def aliases(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value lies in the memory of something that they are given."""
    found = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            given = {_storage(n.meta["val"]) for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)}
            if _storage(value) in given - {None}:
                found.add(node)
    return found
