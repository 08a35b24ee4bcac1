"""What a model runs under modes of its own (``torch.enable_grad()``, autocast turned off) becomes part of the graph.

``torch.export`` makes subgraphs of it, which it cannot decompose, or of which nobody can tell afterwards.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops import wrap_with_autocast
from torch.export import ExportedProgram

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
#: PyTorch keeps what is noted so with the operators that it makes of a node.
_NOTES = "custom"
_OFF = "anabranch: autocast is off"


def inline_modes(exported: ExportedProgram) -> None:
    """Put what runs under such modes into the graph itself.

    Whether gradients are on makes no difference, because no tensor requires grad here; but to transforms of torch.func
    that are still to be decomposed. Autocast is off already, where the model has not turned it on around; that it says
    so is what :func:`is_autocast_off` tells.
    """
    gm = exported.graph_module
    modules = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    transforms = any("functorch" in str(n.target) for m in modules for n in m.graph.nodes)
    with gm._set_replace_hook(exported.graph_signature.get_replace_hook()):
        _inline(gm, transforms, False)


def is_autocast_off(node: fx.Node) -> bool:
    """Whether the model turns autocast off around it: it is to be computed in the type that it has."""
    return bool((node.meta.get(_NOTES) or {}).get(_OFF))


def _inline(gm: fx.GraphModule, keep_grad_mode: bool, is_autocast: bool) -> None:
    """``is_autocast``: the model has turned it on around."""
    for node in list(gm.graph.nodes):
        if node.op == "get_attr":
            part = getattr(gm, str(node.target), None)
            if isinstance(part, fx.GraphModule):
                on = any(n.target is wrap_with_autocast and n.args[2] for n in node.users)
                _inline(part, keep_grad_mode, is_autocast or on)
        if node.op != "call_function":
            continue
        if node.target is _GRAD:
            mode, piece, *given = node.args
            _put(gm, node, piece, given, mode if keep_grad_mode else None)
        elif node.target is wrap_with_autocast and not node.args[2] and not is_autocast:
            piece, *given = node.args[4:]
            for inner in getattr(gm, str(piece.target)).graph.nodes:
                inner.meta[_NOTES] = {**(inner.meta.get(_NOTES) or {}), _OFF: True}
            _put(gm, node, piece, given, None)
    gm.recompile()


def _put(gm: fx.GraphModule, node: fx.Node, piece: Any, given: list[Any], grad_mode: Any) -> None:
    """Put the graph of ``piece`` in the place of ``node``, which runs it on ``given``."""
    part = getattr(gm, str(piece.target))
    values: dict[fx.Node, fx.Node] = dict(zip(part.graph.find_nodes(op="placeholder"), given, strict=True))
    with gm.graph.inserting_before(node):
        if grad_mode is not None:
            gm.graph.call_function(torch._C._set_grad_enabled, (grad_mode,))
        for inner in part.graph.nodes:
            if inner.op == "get_attr":
                name = f"{piece.target}_{inner.target}".replace(".", "_")
                setattr(gm, name, getattr(part, inner.target))
                values[inner] = gm.graph.get_attr(name)
            elif inner.op not in ("placeholder", "output"):
                values[inner] = gm.graph.node_copy(inner, values.__getitem__)
        if grad_mode is not None:
            gm.graph.call_function(torch._C._set_grad_enabled, (not grad_mode,))
    results = part.graph.output_node().args[0]
    for user in list(node.users):
        assert user.target is operator.getitem, user
        user.replace_all_uses_with(values[results[user.args[1]]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    if not piece.users:
        gm.graph.erase_node(piece)
