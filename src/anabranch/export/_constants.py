"""What a graph computes of nothing, on another device than its own, is computed once, when the model is compiled.

A model may make a mask or a table with ``torch.zeros(n).to(x.device)`` or ``torch.tensor([1, 2]).to(x.device)``, or
keep one on the CPU, as an attribute that ``model.to(device)`` does not move. In each call that is a copy from memory
which a device cannot read by itself, so the host waits; and no such copy can be captured.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from anabranch.export._random import is_random

_aten = torch.ops.aten
#: They take a single number on the CPU for an argument of their kernel, in which halves are computed in float32. What
#: else takes one copies it to the device in each call.
_TAKING_NUMBERS = {
    getattr(_aten, name).Tensor
    for name in (
        *("add", "sub", "rsub", "mul", "div", "remainder", "fmod", "eq", "ne", "lt", "le", "gt", "ge"),
        *("bitwise_and", "bitwise_or", "bitwise_xor"),
    )
} | {
    *(_aten.div.Tensor_mode, _aten.pow.Tensor_Tensor, _aten.floor_divide.default, _aten.atan2.default),
    *(_aten.maximum.default, _aten.minimum.default, _aten.logical_and.default, _aten.logical_or.default),
}


def add_weight(
    gm: fx.GraphModule, weights: dict[fx.Node, tuple[str, torch.Tensor]], name: str, value: torch.Tensor, mode: Any
) -> fx.Node:
    """One more weight of a graph: a placeholder after the last one. ``mode``: that of the graph's fake tensors."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(placeholders[len(weights)] if len(weights) < len(placeholders) else _first(gm)):
        node = gm.graph.placeholder(f"weight_{len(weights)}_{name.rsplit('.', 1)[-1]}")
    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    weights[node] = (name, value)
    return node


def _first(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op != "placeholder")


def compute_constants(
    gm: fx.GraphModule,
    weights: dict[fx.Node, tuple[str, torch.Tensor]],
    device: torch.device,
    storage_of: Callable[[Any], Any],
    aside: Callable[..., Any],
) -> None:
    """Put values in the place of what is computed of nothing on the CPU, in a graph of another ``device``, in place.

    What lies on the CPU in a model of another device counts as made of nothing: a tensor that the model's code makes of
    numbers, and one that the model keeps there, which is no parameter and no buffer. Of a value that may be a result,
    or lie in the memory of one, each call makes a new one. Nodes carry fake tensors under ``meta["val"]``.
    """
    if device.type == "cpu":
        return
    written = {a for n in gm.graph.nodes if _writes(n) for a in n.all_input_nodes}
    known: dict[fx.Node, Any] = {n: t for n, (_, t) in weights.items() if t.device.type == "cpu" and n not in written}
    made_of_nothing: dict[fx.Node, bool] = dict.fromkeys(known, True)
    for node in gm.graph.nodes:
        if node.op != "call_function" or not all(n in made_of_nothing for n in node.all_input_nodes):
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            if _writes(node) or is_random(node):
                continue
        elif node.target is not operator.getitem:
            continue
        # By whether it lies on the CPU, or comes from there.
        made_of_nothing[node] = is_on_cpu(node) or any(made_of_nothing[n] for n in node.all_input_nodes)
    results = {storage_of(n) for n in gm.graph.output_node().all_input_nodes} - {None}
    wanted = [
        n
        for n, from_cpu in made_of_nothing.items()
        if from_cpu
        and isinstance(n.meta.get("val"), torch.Tensor)
        and any(user not in made_of_nothing for user in n.users)
        and storage_of(n) not in results
    ]
    # Each call returns such a one anew: a copy of it, of which the results are views.
    copied = [
        n
        for n, from_cpu in made_of_nothing.items()
        if from_cpu
        and isinstance(n.meta.get("val"), torch.Tensor)
        and not is_on_cpu(n)
        and storage_of(n) in results
        and storage_of(n) not in map(storage_of, n.all_input_nodes)
    ]
    if not wanted and not copied:
        return
    constants: list[tuple[fx.Node, torch.Tensor, Any, list[fx.Node]]] = []

    def compute() -> None:
        _compute([*wanted, *copied], known)
        for node in wanted:
            value, users = known[node], [user for user in node.users if user not in made_of_nothing]
            copying = [user for user in users if copies_from_cpu(user, node)] if value.device.type == "cpu" else []
            for x, by in ((value.to(device), copying), (value, [user for user in users if user not in copying])):
                if by and (x is not value or node.op != "placeholder"):
                    constants.append((node, x, _uniform(x), by))

    try:
        aside(compute, lasting=True)
    except torch.OutOfMemoryError:
        return  # kept on the CPU since there is no room for it, perhaps: copied in each call, as in eager
    mode = (*wanted, *copied)[0].meta["val"].fake_mode
    for node, value, number, users in constants:
        _replace(gm, weights, node, value, number, users, mode)
    for node in copied:
        new = add_weight(gm, weights, f"constant.{node.name}", known[node], mode)
        with gm.graph.inserting_before(node):
            copy = gm.graph.call_function(_aten.clone.default, (new,))
        copy.meta.update(node.meta)
        node.replace_all_uses_with(copy)


def _replace(
    gm: fx.GraphModule,
    weights: dict[fx.Node, tuple[str, torch.Tensor]],
    node: fx.Node,
    value: torch.Tensor,
    number: Any,
    users: Sequence[fx.Node],
    mode: Any,
) -> None:
    """Give these users of a node its value as a constant; ``number``: of which it consists, or None."""
    with gm.graph.inserting_before(_first(gm)):
        if number is not None and value.device.type != "cpu":
            new = gm.graph.call_function(
                _aten.full.default,
                (list(value.shape), number),
                {"dtype": value.dtype, "device": value.device, "pin_memory": False},
            )
            with mode:
                new.meta["val"] = new.target(*new.args, **new.kwargs)  # type: ignore[operator]
        else:
            new = add_weight(gm, weights, f"constant.{node.name}", value, mode)
    new.meta.update({k: v for k, v in node.meta.items() if k != "val"})
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user in users)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_literal(name: str) -> bool:
    """Whether a weight is a tensor that the model's code makes of numbers."""
    return name.rsplit(".", 1)[-1].startswith("lifted_tensor")


def is_on_cpu(node: fx.Node) -> bool:
    """Whether a value of a node lies on the CPU."""
    values = (x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor))
    return any(x.device.type == "cpu" for x in values)


def copies_from_cpu(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operator copies this tensor of the CPU to the device, where its result is, in each call."""
    if is_on_cpu(user):
        return False
    return bool(node.meta["val"].dim()) or user.target not in _TAKING_NUMBERS


def _compute(wanted: Sequence[fx.Node], known: dict[fx.Node, Any]) -> None:
    def value(node: fx.Node) -> Any:
        if node not in known:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[node]

    with torch.no_grad():
        for node in wanted:
            x = value(node)
            # In memory of its own, and no more of it than it fills.
            known[node] = x.detach().clone()


def _uniform(x: torch.Tensor) -> Any:
    """The number of which a tensor consists, so that compilers know it as one; None for any other tensor."""
    narrow = x.is_floating_point() and x.element_size() < 2
    if not x.numel() or not x.dim() or not x.is_contiguous() or x.is_complex() or narrow:
        return None
    first = x.flatten()[0]
    if not bool((x == first).all()) or (x.is_floating_point() and bool((x.signbit() != first.signbit()).any())):
        return None
    return first.item()
