"""Make a traced graph safe to functionalize: views and writes stay what they are in eager.

``torch.export`` first records the operators as they ran, writes included, and then turns each write into a new value.
It goes by what operators declare about memory, and that loses in four places, each of which is put right here, in the
recorded graph, where the tensors' memory is still known:

- An operator that hands back memory of its input without declaring it (``dropout`` in eval mode, ``einsum`` of one
  operand, ``meshgrid``, ``broadcast_tensors``, ``type_as``): a later write through the one would not show in the other.
- A write through ``expand``: undoing it takes a difference and a sum, which round, and turn infinities into NaN.
- A write whose new value lies in memory in another order than the tensor that it is written to (``triu_`` of a
  transposed one).
- A write through an expanded view, which changes several elements at once: there is no right way to undo it.
"""

from __future__ import annotations

import contextlib
import importlib
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from anabranch.errors import UnsupportedModel
from anabranch.export._bystanders import replaced
from anabranch.export._signature import layout_of
from anabranch.export._stand_ins import is_stand_in
from anabranch.export._trial import written

_aten = torch.ops.aten
_EXPANDS = {_aten.expand.default, _aten.expand_as.default, _aten.broadcast_to.default}
#: These change what the tensor itself looks like, not what is in its memory.
RESHAPES = (
    *("squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "as_strided_", "resize_", "resize_as_"),
    "set_",
)
_NO_WRITES = (*RESHAPES, "detach_", "requires_grad_", "rename_")
#: What they write lies in memory as the tensor did.
_KEEP_ORDER = ("copy_", "set_")
#: What functionalization takes out, puts copies in for, or adds to.
_NO_OPERATORS = {
    *(_aten.lift_fresh_copy.default, _aten.lift_fresh.default, _aten.lift.default),
    *(_aten.detach.default, _aten.alias.default, _aten._assert_tensor_metadata.default, _aten.view.dtype),
}
#: Of the operators that are made of others, those that it leaves as they are.
_KEPT = {
    *(_aten.linear.default, _aten.matmul.default, _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.layer_norm.default, _aten.softmax.int, _aten.log_softmax.int, _aten.scaled_dot_product_attention.default),
}
#: What eager says of an assertion without a text.
_NOT_TRUE = "Expected Tensor with single nonzero value, but got zero"
#: A pass over what it has functionalized, by the names that versions of PyTorch have for it.
_REMOVE_COPIES = ("_remove_unnecessary_copy_op_pass", "_remove_unneccessary_copy_op_pass")
#: PyTorch takes these apart even where no decomposition is asked for, and other zeros come out.
_TAKEN_APART = (_aten.softshrink.default, _aten.hardshrink.default)


def prepare(exported: ExportedProgram, source_of: Callable[[fx.Node], str]) -> None:
    """Put the places right in a program that was recorded and not yet functionalized.

    Nodes carry fake tensors under ``meta["val"]``. ``source_of``: the model's line of a node, for messages. Raises
    :class:`UnsupportedModel` for a write through an expanded view.
    """
    gm = exported.graph_module
    with gm._set_replace_hook(exported.graph_signature.get_replace_hook()):
        for part in gm.modules():
            if isinstance(part, fx.GraphModule):
                _prepare(part.graph, source_of)
                part.recompile()


def _prepare(graph: fx.Graph, source_of: Callable[[fx.Node], str]) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        maker = _maker(node)
        target = maker.target
        if not isinstance(target, torch._ops.OpOverload):
            continue
        if target is _aten._assert_async.default:
            # Without a text PyTorch takes it for an operator whose result nobody uses.
            node.target, node.args = _aten._assert_async.msg, (*node.args, _NOT_TRUE)
        elif target._schema.is_mutable:
            if maker is node:
                _mend_write(graph, node, source_of)
        elif target in _EXPANDS or _hides_aliases(target):
            views = (_as_views(graph, node, base) for base in _bases(node))
            found = next((v for v in views if v is not None), None)
            if found is not None and found is not node:
                node.replace_all_uses_with(found)
                graph.erase_node(node)
                # Left in place it would run once more, and what it hands back would count as made by it.
                if maker is not node and not maker.users:
                    graph.erase_node(maker)


def _hides_aliases(target: torch._ops.OpOverload) -> bool:
    """Whether an operator may hand back memory of its input without saying so. Of those that are made of others only:

    What a single kernel does is declared; a stand-in of PyTorch's for one may still share memory that a kernel copies.
    """
    return target._can_decompose() and not any(r.alias_info for r in target._schema.returns)


def _value(node: Any) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return None
    return value if value.layout is torch.strided and not value.is_nested else None


def _maker(node: fx.Node) -> fx.Node:
    """The operator that made ``node``: itself, or, of several results, what it is taken out of."""
    maker = node.args[0] if node.target is operator.getitem else node
    assert isinstance(maker, fx.Node)
    return maker


def _bases(node: fx.Node) -> list[fx.Node]:
    """Of what its operator was given, that in whose memory ``node`` lies."""
    value, maker = _value(node), _maker(node)
    if value is None:
        return []
    if maker.target is _aten.dropout.default:
        # Recorded as if it made a new tensor.
        return maker.all_input_nodes if len(maker.args) == 3 and maker.args[2] is False else []
    found = []
    for given in maker.all_input_nodes:
        x = _value(given)
        if x is not None and x.untyped_storage()._cdata == value.untyped_storage()._cdata:
            found.append(given)
    return found


def _as_views(graph: fx.Graph, node: fx.Node, base: fx.Node) -> fx.Node | None:
    """``node`` as views of ``base`` that say that they are views; None where it takes others than are tried here."""
    x, y = _value(base), _value(node)
    assert x is not None
    assert y is not None
    if x.dtype is not y.dtype or x.storage_offset() != y.storage_offset():
        return None
    if x.is_conj() != y.is_conj() or x.is_neg() != y.is_neg():
        return None
    if node.target is _aten.dropout.default or (x.shape == y.shape and x.stride() == y.stride()):
        return base
    if not y.numel():
        return None
    kept = [d for d in range(y.ndim) if y.shape[d] != 1 and y.stride(d)]
    left = [d for d in range(x.ndim) if x.shape[d] != 1]
    order = []
    for d in kept:
        match = next((e for e in left if x.shape[e] == y.shape[d] and x.stride(e) == y.stride(d)), None)
        if match is None:
            return None
        left.remove(match)
        order.append(match)
    if left:
        return None  # a diagonal, say
    ones = [d for d in range(x.ndim) if x.shape[d] == 1]
    expanded = tuple(y.shape) != tuple(y.shape[d] if d in kept else 1 for d in range(y.ndim))
    if expanded and node.target in _EXPANDS:
        return node
    steps: list[tuple[Any, Any]] = [(_aten.squeeze.dims, ones)] if ones else []
    squeezed = [d for d in range(x.ndim) if d not in ones]
    permutation = [squeezed.index(d) for d in order]
    if permutation != sorted(permutation):
        steps.append((_aten.permute.default, permutation))
    steps += [(_aten.unsqueeze.default, d) for d in range(y.ndim) if d not in kept]
    if expanded:
        steps.append((_aten.expand.default, list(y.shape)))
    made = base
    with graph.inserting_before(node):
        for target, argument in steps:
            before, value = made, _value(made)
            made = graph.call_function(target, (before, argument))
            made.meta = {k: v for k, v in node.meta.items() if k != "val"}
            made.meta["val"] = target(value, argument)
    return made


def _mend_write(graph: fx.Graph, node: fx.Node, source_of: Callable[[fx.Node], str]) -> None:
    name = node.target._schema.name.rsplit("::")[-1]  # type: ignore[union-attr]
    if name in _NO_WRITES:
        return
    targets = [x for x in written(node.target, node.args, node.kwargs) if isinstance(x, fx.Node)]
    for x in targets:
        _check_alone(x, node, source_of)
    if len(targets) != 1 or name in _KEEP_ORDER:
        return
    x, value = targets[0], _value(targets[0])
    if value is None or all(_is_in_order(n) for n in node.all_input_nodes):
        return
    pointwise = torch.Tag.pointwise in node.target.tags and name.endswith("_")  # type: ignore[union-attr]
    if pointwise and layout_of(value) is None:
        return  # it is dense, and the operator goes by its order
    first = bool(node.args) and node.args[0] is x and "out" not in node.kwargs
    if not first and node.kwargs.get("out") is not x:
        return
    # Into a copy, and from there into the tensor itself, whose order in memory stays as it is.
    with graph.inserting_before(node):
        copy = graph.call_function(_aten.clone.default, (x,))
        copy.meta = dict(x.meta)
    with graph.inserting_after(node):
        back = graph.call_function(_aten.copy_.default, (x, copy))
        back.meta = dict(node.meta)
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    if first:
        node.args = (copy, *node.args[1:])
    else:
        node.kwargs = {**node.kwargs, "out": copy}


def _is_in_order(node: fx.Node) -> bool:
    value = _value(node)
    return value is None or value.is_contiguous()


def _check_alone(x: fx.Node, write: fx.Node, source_of: Callable[[fx.Node], str]) -> None:
    """Refuse a write into a view whose elements are several at one place, or that was taken of such a view."""
    seen: fx.Node | None = x
    while seen is not None:
        value = _value(seen)
        if value is None:
            return
        if any(n > 1 and not s for n, s in zip(value.shape, value.stride(), strict=True)):
            raise UnsupportedModel(
                f"the model writes into an expanded tensor ({source_of(write) or write.target}), where one place in"
                " memory stands for several elements; torch.export cannot express that. Call .clone() first, or write"
                " before it is expanded."
            )
        seen = next(iter(_bases(seen)), None) if seen.op == "call_function" else None


def fold_literals(graph: fx.Graph, literals: Mapping[fx.Node, torch.Tensor]) -> None:
    """Have what writes a number of the model's code (``x[0] = 2.0``) write a number, in a functionalized graph.

    ``literals``: placeholders of tensors that the code makes of numbers, with their values. They are on the CPU, and a
    copy from there cannot be captured.
    """
    for node, value in literals.items():
        if value.dim() or value.device.type != "cpu":
            continue
        ways = [node]
        while ways:
            number = ways.pop()
            for user in list(number.users):
                if user.target in (_aten.clone.default, _aten.lift_fresh_copy.default, _aten.detach.default):
                    ways.append(user)
                elif user.target in (_aten.copy.default, _aten.fill.Tensor) and user.args[0] is not number:
                    user.target = _aten.fill.Scalar
                    user.args, user.kwargs = (user.args[0], value.item()), {}


def is_functional(exported: ExportedProgram) -> bool:
    """Whether functionalization would leave a recorded program as it is, and need not be asked to.

    It has a list made of all operators that PyTorch has, which takes longer than to record a small model.
    """
    gm = exported.graph_module
    return all(not isinstance(m, fx.GraphModule) for n, m in gm.named_modules() if n) and all(
        _is_functional(node) for node in gm.graph.nodes
    )


def _is_functional(node: fx.Node) -> bool:
    if is_stand_in(node):
        return True
    values = node.meta.get("val")
    found = values if isinstance(values, list | tuple) else (values,)
    if any(not isinstance(x, torch.Tensor) or x.is_complex() or x.is_neg() for x in found):
        return node.op == "output"
    target = node.target
    if node.op != "call_function" or target is operator.getitem:
        return node.op in ("call_function", "placeholder", "output")
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or target in _NO_OPERATORS:
        return False
    return not target._schema.is_mutable and (target in _KEPT or not target._can_decompose())


@contextmanager
def kept_whole() -> Iterator[None]:
    """Keep PyTorch from taking operators apart, or away, that nobody asked it to. Called with the build lock held.

    Other threads' traces meanwhile keep them as well, which gives them eager's values too.
    """
    programs: Any = importlib.import_module("torch.export.exported_program")
    key = torch._C.DispatchKey.Autograd
    removed = [(op, op.py_kernels.pop(key)) for op in _TAKEN_APART if key in op.py_kernels]
    for op, _ in removed:
        op._dispatch_cache.clear()
    try:
        # A copy into a whole buffer is not its source: types, strides and broadcast sizes may differ.
        with contextlib.ExitStack() as stack:
            for name in _REMOVE_COPIES:
                stack.enter_context(replaced(programs, name, lambda gm, signature: (gm, signature)))
            yield
    finally:
        for op, kernel in removed:
            op.py_kernels[key] = kernel
            op._dispatch_cache.clear()
