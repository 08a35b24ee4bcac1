"""Recurrent layers on CUDA: what ``torch.export`` cannot trace of them, and how cuDNN gets their weights.

cuDNN wants the weights of a layer in one piece of memory. PyTorch keeps them so, and looks at their addresses at each
call to find out whether they still are. While a model is traced tensors have no addresses, and the look fails.
So a model is traced with weights that lie apart, which ends the look at once, and the graph gets the piece of memory
itself as one more weight. cuDNN then runs as in eager, and nothing is copied.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from anabranch.export._constants import add_weight

_aten = torch.ops.aten
#: Layers, with cuDNN's number for each.
_LAYERS: dict[Any, int] = {
    _aten.rnn_relu.input: 0,
    _aten.rnn_tanh.input: 1,
    _aten.lstm.input: 2,
    _aten.gru.input: 3,
}


def keep_weights_in_place(module: torch.nn.Module) -> None:
    """Stop recurrent layers of a copy of a model from moving their weights together, into memory of their own.

    The copy has the model's memory, where they lie together already, or apart, as the model's user has it.
    """
    for layer in module.modules():
        if isinstance(layer, torch.nn.RNNBase):
            layer.__dict__["flatten_parameters"] = _leave


def _leave() -> None:
    """In the place of ``flatten_parameters``."""


@contextmanager
def weights_apart(module: torch.nn.Module) -> Iterator[None]:
    """Give each recurrent layer on CUDA weights that lie in memory of their own, for as long as it is traced.

    ``module`` is used by this thread alone, and runs on no values meanwhile.
    """
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    copies: dict[int, torch.nn.Parameter] = {}
    try:
        for layer in module.modules():
            if not isinstance(layer, torch.nn.RNNBase):
                continue
            for name in layer._flat_weights_names:
                weight = layer._parameters.get(name)
                if weight is None or not weight.is_cuda:
                    continue  # computed by a parametrization, which makes it anew in each call
                if id(weight) not in copies:
                    copies[id(weight)] = torch.nn.Parameter(torch.empty_like(weight), weight.requires_grad)
                replaced.append((layer, name, weight))
                setattr(layer, name, copies[id(weight)])
        yield
    finally:
        for layer, name, weight in replaced:
            setattr(layer, name, weight)


def call_cudnn(gm: fx.GraphModule, weights: dict[fx.Node, tuple[str, torch.Tensor]], aside: Callable[..., Any]) -> None:
    """Have recurrent layers call cuDNN where eager would, in place, with their weights as one piece of memory.

    ``weights`` gets one more a layer. Where the model's weights lie in one piece, in cuDNN's order, it is that memory;
    else a copy is made. Packed sequences are left alone. Nodes carry fake tensors under ``meta["val"]``.
    """
    for node in list(gm.graph.nodes):
        if node.target not in _LAYERS:
            continue
        layer: Any = node.args
        x, parameters, dropout, train = layer[0].meta["val"], layer[2], layer[5], layer[6]
        given = [weights[n][1] for n in parameters if n in weights]
        if not given or isinstance(given[0], FakeTensor) or not x.is_cuda or not x.numel() or (train and dropout):
            continue
        if torch.cudnn_is_acceptable(given[0]):
            _call_cudnn(gm, node, given if len(given) == len(parameters) else [], weights, aside)


def _call_cudnn(
    gm: fx.GraphModule,
    node: fx.Node,
    given: list[torch.Tensor],
    weights: dict[fx.Node, tuple[str, torch.Tensor]],
    aside: Callable[..., Any],
) -> None:
    """``given``: the layer's weights, if all of them are weights of the model."""
    arguments: Any = node.args
    x, state, parameters, has_biases, layers, dropout, train, bidirectional, batch_first = arguments
    h, c = state if isinstance(state, list | tuple) else (state, None)
    hidden = (h if c is None else c).meta["val"].shape[-1]
    last = h.meta["val"].shape[-1]
    projected = 0 if last == hidden else last
    mode, each = _LAYERS[node.target], (4 if has_biases else 2) + bool(projected)
    flat: fx.Node | None = None
    if given:
        width = x.meta["val"].shape[-1]
        sizes: Any = (each, width, mode, hidden, projected, layers, batch_first, bidirectional)
        pieces: list[Any] = []
        aside(lambda: pieces.append(_piece(given, sizes)), lasting=True)
        buffer, views = pieces[0]
        name = weights[parameters[0]][0].rsplit(".", 1)[0]
        flat = add_weight(gm, weights, f"{name}.flat_weights", buffer, x.meta["val"].fake_mode)
        for n, view in zip(parameters, views, strict=True):
            weights[n] = (weights[n][0], view)
    meta = {k: v for k, v in node.meta.items() if k != "val"}

    def insert(target: Any, *given: Any) -> fx.Node:
        made = gm.graph.call_function(target, given)
        values = fx.node.map_arg(given, lambda n: n.meta["val"])
        with torch.no_grad(), x.meta["val"].fake_mode:
            made.meta = {**meta, "val": target(*values)}
        return made

    # As cuDNN's layers do with batches first; their stand-in for traces forgets that results are transposed then.
    with gm.graph.inserting_before(node):
        given_x = insert(_aten.transpose.int, x, 0, 1) if batch_first else x
        sizes = (mode, hidden, projected, layers, False, dropout, train, bidirectional)
        made = insert(_aten._cudnn_rnn.default, given_x, parameters, each, flat, h, c, *sizes, [], None)
        outputs = insert(operator.getitem, made, 0)
        if batch_first:
            outputs = insert(_aten.transpose.int, outputs, 0, 1)
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(outputs)
            gm.graph.erase_node(user)
    node.replace_all_uses_with(made)  # the states are its second and third result, as before
    gm.graph.erase_node(node)


def _piece(tensors: list[torch.Tensor], options: tuple[Any, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The memory of all weights in cuDNN's order, and the weights in it; ``options``: what it depends on."""
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
        and places == [t.data_ptr() - storage.data_ptr() for t in tensors]
    ):
        return torch.empty(0, dtype=first.dtype, device=first.device).set_(storage), tensors
    return buffer, views
