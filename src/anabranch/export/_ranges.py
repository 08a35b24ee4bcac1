"""How large the values in a graph are: it runs once, operator by operator, on inputs that were given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree


class Run(fx.Interpreter):
    """Runs a graph that writes nothing: what it would write into its inputs, it leaves away."""

    def run_node(self, n: fx.Node) -> Any:
        into = n.args[0] if n.target is torch.ops.aten.copy_.default else None
        if isinstance(into, fx.Node) and into.op == "placeholder":
            return self.fetch_args_kwargs_from_env(n)[0][0]
        return self.seen(n, super().run_node(n))

    def seen(self, node: fx.Node, value: Any) -> Any:
        """What becomes of the value of a node."""
        return value

    def on(self, given: Mapping[fx.Node, Any]) -> Any:
        """Run with these values in the place of the placeholders."""
        return self.run(*(given[n] for n in self.graph.find_nodes(op="placeholder")), enable_io_processing=False)


class _Largest(Run):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: dict[fx.Node, torch.Tensor] = {}

    def seen(self, node: fx.Node, value: Any) -> Any:
        tensors = [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor) and x.numel()]
        tops = [magnitude(x) for x in tensors if x.is_floating_point()]
        if tops:
            self.found[node] = torch.stack([t.double() for t in tops]).amax()
        return value


def magnitude(x: torch.Tensor) -> torch.Tensor:
    """The largest finite magnitude of a floating tensor that has elements, as a tensor of no dimensions."""
    return x.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax()


def largest_values(gm: fx.GraphModule, given: Mapping[fx.Node, Any]) -> dict[fx.Node, float]:
    """Of each node that gives floating tensors: their largest finite magnitude. The host waits for the current stream.

    ``given``: a value for each placeholder; they are not written into. Random operators draw.
    """
    run = _Largest(gm)
    with torch.no_grad():
        run.on(given)
    if not run.found:
        return {}
    tops = torch.stack([t.to(next(iter(run.found.values())).device) for t in run.found.values()]).tolist()
    return dict(zip(run.found, tops, strict=True))
