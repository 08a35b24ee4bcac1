"""Recurrent layers on CUDA: what ``torch.export`` cannot trace of them, and how cuDNN gets their weights.

cuDNN wants the weights of a layer in one piece of memory. PyTorch keeps them so, and looks at their addresses at each
call to find out whether they still are. While a model is traced tensors have no addresses, and the look fails.
So a model is traced with weights that lie apart, which ends the look at once, and the graph gets the piece of memory
itself as one more weight. cuDNN then runs as in eager, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from anabranch.export._constants import add_weight

_aten = torch.ops.aten
#: Layers that PyTorch runs with cuDNN where it can; ``data``: of packed sequences.
_LAYERS = {
    overload
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for overload in (getattr(_aten, name).input, getattr(_aten, name).data)
}


@contextmanager
def weights_apart(module: torch.nn.Module) -> Iterator[None]:
    """Give each recurrent layer on CUDA weights that lie in memory of their own, copies, for as long as it is traced.

    ``module`` is used by this thread alone.
    """
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    copies: dict[int, torch.nn.Parameter] = {}
    layers: list[torch.nn.Module] = []
    try:
        for layer in module.modules():
            if not isinstance(layer, torch.nn.RNNBase):
                continue
            for name in layer._flat_weights_names:
                weight = layer._parameters.get(name)
                if weight is None or not weight.is_cuda:
                    continue  # computed by a parametrization, which makes it anew in each call
                if id(weight) not in copies:
                    copies[id(weight)] = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
                replaced.append((layer, name, weight))
                setattr(layer, name, copies[id(weight)])
            # It would look at addresses, to put them in one piece again.
            layer.__dict__["flatten_parameters"] = _leave_apart
            layers.append(layer)
        yield
    finally:
        for layer in layers:
            del layer.__dict__["flatten_parameters"]
        for layer, name, weight in replaced:
            setattr(layer, name, weight)


def _leave_apart() -> None:
    """In the place of ``flatten_parameters``."""


def give_flat_weights(gm: fx.GraphModule, weights: dict[fx.Node, tuple[str, torch.Tensor]]) -> None:
    """Have cuDNN's layers take their weights as one piece of memory, in place; ``weights`` gets one more a layer.

    Where the model's weights lie in one piece, in cuDNN's order, that memory is used; else a copy is made.
    Nodes carry fake tensors under ``meta["val"]``.
    """
    for node in list(gm.graph.nodes):
        if node.target in _LAYERS and any(_is_cuda(n) for n in node.all_input_nodes):
            _take_apart(gm, node)
    for node in gm.graph.find_nodes(op="call_function", target=_aten._cudnn_rnn.default):
        given: Any = node.args[1]
        if node.args[3] is None and all(n in weights for n in given):
            _flatten(gm, node, given, weights)


def _is_cuda(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_cuda


def _take_apart(gm: fx.GraphModule, node: fx.Node) -> None:
    """Put the operators in the place of a layer that PyTorch makes of it, cuDNN's among them."""
    given, structure = pytree.tree_flatten((node.args, node.kwargs))
    nodes = list(dict.fromkeys(x for x in given if isinstance(x, fx.Node)))
    # The binding, not the operator: that has a stand-in in Python, which unrolls the layer step by step.
    call = getattr(torch._VF, node.target._schema.name.rsplit("::")[-1])  # type: ignore[union-attr]

    def layer(*values: torch.Tensor) -> Any:
        by_node = dict(zip(nodes, values, strict=True))
        args, kwargs = pytree.tree_unflatten([by_node[x] if isinstance(x, fx.Node) else x for x in given], structure)
        return call(*args, **kwargs)

    examples = [n.meta["val"] for n in nodes]
    mode = next((m for x in examples if (m := getattr(x, "fake_mode", None)) is not None), None)
    with mode or nullcontext(), torch.no_grad():
        made = make_fx(layer)(*examples)
    values: dict[fx.Node, Any] = dict(zip(made.graph.find_nodes(op="placeholder"), nodes, strict=True))
    with gm.graph.inserting_before(node):
        for inner in made.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                results = [values[x] for x in inner.args[0]]
                continue
            if inner.op == "get_attr":
                raise NotImplementedError(f"a constant in {node.target}")
            values[inner] = copied = gm.graph.node_copy(inner, values.__getitem__)
            copied.meta.update({k: v for k, v in node.meta.items() if k != "val"})
    for user in list(node.users):
        position: Any = user.args[1]
        user.replace_all_uses_with(results[position])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _flatten(
    gm: fx.GraphModule, node: fx.Node, given: list[fx.Node], weights: dict[fx.Node, tuple[str, torch.Tensor]]
) -> None:
    tensors = [weights[n][1] for n in given]
    flat = _piece(tensors, _options(node))
    if flat is None:
        return
    buffer, views = flat
    name = weights[given[0]][0].rsplit(".", 1)[0]
    flat_weights = add_weight(gm, weights, f"{name}.flat_weights", buffer, node.meta["val"][0].fake_mode)
    for n, view in zip(given, views, strict=True):
        weights[n] = (weights[n][0], view)
    node.args = (*node.args[:3], flat_weights, *node.args[4:])


def _options(node: fx.Node) -> tuple[Any, ...]:
    """What cuDNN lays weights out by: their number a layer, and the layer's sizes and kind."""
    given: Any = node.args
    width = given[0].meta["val"].shape[-1]
    stride, mode, hidden, projected, layers, batch_first = (given[i] for i in (2, 6, 7, 8, 9, 10))
    return stride, width, mode, hidden, projected, layers, batch_first, given[13]


def _piece(tensors: list[torch.Tensor], options: tuple[Any, ...]) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
    """The memory of all weights, and the weights in it; None where cuDNN does not take them in one piece."""
    if isinstance(tensors[0], FakeTensor) or not torch.backends.cudnn.is_acceptable(tensors[0]):
        return None
    views = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        buffer = torch._cudnn_rnn_flatten_weight(views, *options)
    first = tensors[0]
    storage = first.untyped_storage()
    together = all(t.untyped_storage()._cdata == storage._cdata for t in tensors)
    places = [v.data_ptr() - buffer.data_ptr() for v in views]
    if (
        together
        and storage.nbytes() == buffer.nbytes
        and [t.data_ptr() - storage.data_ptr() for t in tensors] == places
    ):
        return torch.empty(0, dtype=first.dtype, device=first.device).set_(storage), tensors
    return buffer, views
