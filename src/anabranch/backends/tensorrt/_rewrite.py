"""Operators written otherwise before they become ONNX: where the exporter's own way gives another result, or none."""

from __future__ import annotations

import importlib
import math
import operator
from typing import Any

import torch
from torch import fx
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils import _pytree as pytree

_aten = torch.ops.aten

_NORM = _aten._native_batch_norm_legit_no_training.default
_ATTENTION = _aten.scaled_dot_product_attention.default
_CAST = _aten._to_copy.default
_CONVOLUTIONS = (
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv3d.default,
    _aten.conv1d.padding,
    _aten.conv2d.padding,
    _aten.conv3d.padding,
)
#: In half precision the exporter leaves float32 results of these behind, or sums of squares that overflow.
_WIDE = (
    _aten.abs.default,
    _aten.sum.default,
    _aten.sum.dim_IntList,
    _aten.cumsum.default,
    _aten.prod.default,
    _aten.prod.dim_int,
    _aten.linalg_vector_norm.default,
    _aten.cosine_similarity.default,
)
#: TensorRT's parser takes these in float16 and float32.
_WIDE_FOR_BFLOAT16 = (_aten.hardswish.default, _aten.mish.default)
_MAX_POOLS_OF_TWO = (
    *(_aten.max_pool2d_with_indices.default, _aten.max_pool3d_with_indices.default),
    *(_aten.adaptive_max_pool2d.default, _aten.adaptive_max_pool3d.default),
)
_MAX_POOLS = (
    *(_aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default),
    *_MAX_POOLS_OF_TWO,
)
_HALVES = (torch.float16, torch.bfloat16)
#: From here on gelu is its input, in float32 as in half precision.
_IDENTICAL = 16
_FP8 = torch.float8_e4m3fn
#: The largest number of ``float8_e4m3fn``.
FP8_MAX = 448


def rewrite(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``module``, whose constants are attributes, that computes the same and exports well."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copied = fx.GraphModule(module, graph)
    for change in (
        *(_quantize_fp8, _quantize_int8, _roots, _keep_ends, _compute_in_float32),
        *(_reduce_all, _share_heads, _empty_rows, _pool_nan, _fold_norms),
    ):
        change(copied)
    graph.eliminate_dead_code()
    copied.recompile()
    return copied


# -- precision ----------------------------------------------------------------------------------------------------


def _fold_norms(module: fx.GraphModule) -> None:
    """Convolutions take up the batch normalization that follows, if nobody else uses their result.

    The exporter would do so as well, but in the weights' own type: in half precision it rounds at each step, and in
    bfloat16 it leaves float32 weights with bfloat16 data, which no parser takes. Here the arithmetic is float32's,
    and only the folded weights are rounded: results are as close to exact ones as those of PyTorch's own operators.
    """
    graph = module.graph
    for norm in graph.find_nodes(op="call_function", target=_NORM):
        conv = norm.args[0]
        if not isinstance(conv, fx.Node) or conv.target not in _CONVOLUTIONS or len(conv.users) > 1:
            continue
        if any(n.target is not operator.getitem or n.args[1] != 0 for n in norm.users):
            continue
        constants: list[Any] = [conv.args[1], conv.args[2] if len(conv.args) > 2 else None, *norm.args[1:5]]
        if not all(n is None or _is_constant(n) for n in constants):
            continue
        tensors: list[Any] = [None if n is None else getattr(module, n.target) for n in constants]
        single: list[Any] = [None if t is None else t.detach().float() for t in tensors]
        weight, bias, scale, shift, mean, var = single
        fused = fuse_conv_bn_weights(weight, bias, mean, var, norm.args[6], scale, shift)
        made = []
        with graph.inserting_before(conv):
            for what, value in zip(("weight", "bias"), fused, strict=True):
                made.append(_constant(module, f"{conv.name}_folded_{what}", value.detach().to(tensors[0].dtype)))
        conv.args = (conv.args[0], *made, *conv.args[3:])
        for picked in list(norm.users):
            picked.replace_all_uses_with(conv)
            graph.erase_node(picked)
        graph.erase_node(norm)


def _compute_in_float32(module: fx.GraphModule) -> None:
    """As PyTorch's kernels do inside, with one rounding at the end."""
    graph = module.graph
    for node in list(graph.nodes):
        dtype = _dtype(module, node)
        wide = dtype in _HALVES and node.target in _WIDE
        if not (wide or (dtype is torch.bfloat16 and node.target in _WIDE_FOR_BFLOAT16)):
            continue
        with graph.inserting_before(node):
            entered = {
                n: graph.call_function(_CAST, (n,), {"dtype": torch.float32})
                for n in node.all_input_nodes
                if _dtype(module, n) in _HALVES
            }
            total = graph.node_copy(node)
            for given, cast in entered.items():
                total.replace_input_with(given, cast)
            if "dtype" in total.kwargs:
                total.kwargs = {k: v for k, v in total.kwargs.items() if k != "dtype"}
            node.replace_all_uses_with(graph.call_function(_CAST, (total,), {"dtype": dtype}))
        graph.erase_node(node)


# -- what the exporter leaves out ---------------------------------------------------------------------------------


def _reduce_all(module: fx.GraphModule) -> None:
    """``amax()`` and ``amin()`` of all dimensions have no ONNX unless the dimensions are named."""
    for node in module.graph.nodes:
        if node.target in (_aten.amax.default, _aten.amin.default) and not (len(node.args) > 1 and node.args[1]):
            reduced = node.args[0]
            if isinstance(reduced.meta.get("val"), torch.Tensor):
                node.args = (reduced, list(range(reduced.meta["val"].dim())), *node.args[2:])


def _share_heads(module: fx.GraphModule) -> None:
    """Of keys and values that several heads share each head gets its own: nothing depends on what the exporter makes of
    them."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        values = [n.meta.get("val") for n in node.args[:3]]
        heads = [v.shape[1] for v in values if isinstance(v, torch.Tensor) and isinstance(v.shape[1], int)]
        if not node.kwargs.get("enable_gqa") or len(heads) < 3:
            continue
        with graph.inserting_before(node):
            for i in (1, 2):
                x = graph.call_function(_aten.unsqueeze.default, (node.args[i], 2))
                x = graph.call_function(_aten.expand.default, (x, [-1, -1, heads[0] // heads[i], -1, -1]))
                node.update_arg(i, graph.call_function(_aten.flatten.using_ints, (x, 1, 2)))
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "enable_gqa"}


def _empty_rows(module: fx.GraphModule) -> None:
    """A query that attends to nothing gets zeros in PyTorch; in ONNX, NaN or the mean of all values."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if not isinstance(mask, fx.Node):
            continue
        given = getattr(module, str(mask.target)) if _is_constant(mask) else None
        is_bool = _dtype(module, mask) is torch.bool
        if given is not None and bool((given if is_bool else given != -torch.inf).any(-1).all()):
            continue
        with graph.inserting_after(node):
            attended = mask if is_bool else graph.call_function(_aten.ne.Scalar, (mask, -torch.inf))
        with graph.inserting_after(attended if not is_bool else node):
            some = graph.call_function(_aten.any.dim, (attended, -1, True))
        with graph.inserting_after(some):
            result = graph.call_function(_aten.where.ScalarOther, (some, node, 0.0))
        _replace(node, result, result)


def _roots(module: fx.GraphModule) -> None:
    """TensorRT's powers of minus infinity are 0 and infinity; roots of it are NaN, as in eager."""
    roots = {0.5: _aten.sqrt.default, -0.5: _aten.rsqrt.default}
    for node in module.graph.find_nodes(op="call_function", target=_aten.pow.Tensor_Scalar):
        if node.args[1] in roots:
            node.target, node.args = roots[node.args[1]], node.args[:1]


def _keep_ends(module: fx.GraphModule) -> None:
    """At the ends of the range the input is the result, or infinity is: TensorRT makes numbers of NaN and of what
    overflows on its way in eager, and infinities where nothing overflows."""
    for node in list(module.graph.nodes):
        dtype, x = _dtype(module, node), node.args[0] if node.args else None
        if node.target in (_aten.hardsigmoid.default, _aten.hardswish.default):
            result = _where(node, _aten.isnan.default, (x,), x)
            if node.target is _aten.hardswish.default and dtype in (torch.float32, torch.bfloat16):
                # Eager multiplies by 6 first, in float32.
                _where(result, _aten.gt.Scalar, (x, torch.finfo(torch.float32).max / 6), math.inf)
        elif node.target is _aten.gelu.default:
            _where(node, _aten.gt.Scalar, (x, _IDENTICAL), x)


def _where(node: fx.Node, condition: Any, arguments: tuple[Any, ...], value: Any) -> fx.Node:
    """Have ``value`` in the place of the elements of ``node`` for which ``condition`` holds."""
    graph = node.graph
    with graph.inserting_after(node):
        chosen = graph.call_function(condition, arguments)
    with graph.inserting_after(chosen):
        choose = _aten.where.self if isinstance(value, fx.Node) else _aten.where.ScalarSelf
        result = graph.call_function(choose, (chosen, value, node))
    result.meta["val"] = node.meta.get("val")
    _replace(node, result, result)
    return result


def _pool_nan(module: fx.GraphModule) -> None:
    """TensorRT's max pooling takes the largest of the other elements where one is NaN, and the smallest finite number
    where all are minus infinity. Of what kind elements are is pooled, too: 2 of NaN, 0 of minus infinity."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target not in _MAX_POOLS or not _may_be_nan(module, node.args[0]):
            continue
        x: Any = node.args[0]
        largest = [node]
        if node.target in _MAX_POOLS_OF_TWO:  # the other are places
            largest = [n for n in node.users if n.target is operator.getitem and n.args[1] == 0]
        with graph.inserting_before(node):
            kinds = [
                graph.call_function(_aten.isnan.default, (x,)),
                graph.call_function(_aten.ne.Scalar, (x, -math.inf)),
            ]
            marks = graph.call_function(
                _aten.add.Tensor,
                tuple(graph.call_function(_CAST, (kind,), {"dtype": _dtype(module, x)}) for kind in kinds),
            )
            pooled = graph.call_function(node.target, (marks, *node.args[1:]), dict(node.kwargs))
            if node.target in _MAX_POOLS_OF_TWO:
                pooled = graph.call_function(operator.getitem, (pooled, 0))
            has_nan = graph.call_function(_aten.gt.Scalar, (pooled, 1))
            is_lowest = graph.call_function(_aten.lt.Scalar, (pooled, 1))
        for y in largest:
            with graph.inserting_after(y):
                lowered = graph.call_function(_aten.masked_fill.Scalar, (y, is_lowest, -math.inf))
            with graph.inserting_after(lowered):
                result = graph.call_function(_aten.masked_fill.Scalar, (lowered, has_nan, math.nan))
            _replace(y, result, lowered)


def _may_be_nan(module: fx.GraphModule, node: Any) -> bool:
    dtype = _dtype(module, node)
    if isinstance(node, fx.Node) and "::dequantize_per" in str(getattr(node.target, "name", str)()):
        return torch.int8 not in node.args
    return dtype is not None and dtype.is_floating_point


# -- quantization: QuantizeLinear and DequantizeLinear around an operator make an int8 or fp8 kernel of it ----------


def _quantize_int8(module: fx.GraphModule) -> None:
    """Constants are quantized now, and ranges that are narrower than the type's are kept: the exporter drops them."""
    qd = _quantized_ops()
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is _aten.fake_quantize_per_tensor_affine.default:
            quantize, dequantize = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default
        elif node.target is _aten.fake_quantize_per_channel_affine.default:
            quantize, dequantize = qd.quantize_per_channel.default, qd.dequantize_per_channel.default
        else:
            continue
        with graph.inserting_before(node):
            parameters = (*node.args[1:], torch.int8)
            q = graph.call_function(quantize, (node.args[0], *parameters))
            out: dict[str, Any] = {} if _dtype(module, node) is torch.float32 else {"out_dtype": _dtype(module, node)}
            node.replace_all_uses_with(graph.call_function(dequantize, (q, *parameters), out))
        graph.erase_node(node)

    for node in list(graph.nodes):
        if node.target not in (qd.quantize_per_tensor.default, qd.quantize_per_channel.default):
            continue
        if node.args[-1] is not torch.int8:
            continue
        arguments = [_known(module, a) for a in node.args]
        if not any(isinstance(a, fx.Node) for a in arguments):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_constant(module, f"{node.name}_ahead", node.target(*arguments)))
        elif node.target is qd.quantize_per_tensor.default:
            x, scale, zero, low, high, _ = node.args
            if (low, high) != (-128, 127):
                with graph.inserting_before(node):
                    kept = graph.call_function(_aten.clamp.default, (x, (low - zero) * scale, (high - zero) * scale))
                node.args = (kept, *node.args[1:])


def _quantize_fp8(module: fx.GraphModule) -> None:
    """Casts to and from float8 become quantizations, together with the scale that is divided or multiplied by.

    ``quantize_per_tensor`` stands for ONNX's ``QuantizeLinear`` here; run by PyTorch it would round to whole numbers.
    """
    qd = _quantized_ops()
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=_CAST):
        source = node.args[0]
        if node.kwargs.get("dtype") is _FP8:
            scaled = _clamped(source)
            x, scale = (source, 1.0) if scaled is None else _divided(module, scaled)
            with graph.inserting_before(node):
                q = graph.call_function(qd.quantize_per_tensor.default, (x, scale, 0, -FP8_MAX, FP8_MAX, _FP8))
            q.meta["val"] = node.meta.get("val")
            node.replace_all_uses_with(q)
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=_CAST):
        source = node.args[0]
        if _dtype(module, source) is not _FP8:
            continue
        dtype = node.kwargs.get("dtype")
        last, scale = node, 1.0
        if len(node.users) == 1:
            (user,) = node.users
            factor = _scalar(module, user.args[1]) if user.target is _aten.mul.Tensor else None
            if factor is not None and user.args[0] is node:
                last, scale = user, factor
        out: dict[str, Any] = {} if dtype is torch.float32 else {"out_dtype": dtype}
        with graph.inserting_before(node):
            arguments = (source, scale, 0, -FP8_MAX, FP8_MAX, _FP8)
            x = graph.call_function(qd.dequantize_per_tensor.default, arguments, out)
        last.replace_all_uses_with(x)


def _clamped(node: fx.Node) -> fx.Node | None:
    """What is clamped to the range of float8, or less, before a cast."""
    if node.target is not _aten.clamp.default or not saturates(node):
        return None
    return node.args[0] if set(map(abs, node.args[1:3])) == {FP8_MAX} else None  # type: ignore[arg-type,return-value]


def saturates(node: Any) -> bool:
    """Whether ``node`` clamps to numbers that float8 has: beyond them casts make 448, or NaN, as the version has it."""
    if not isinstance(node, fx.Node) or node.target is not _aten.clamp.default or len(node.args) < 3:
        return False
    return all(isinstance(bound, int | float) and abs(bound) <= FP8_MAX for bound in node.args[1:3])


def _divided(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, float]:
    """``x`` and ``scale`` where ``node`` is x / scale."""
    if node.target in (_aten.div.Tensor, _aten.mul.Tensor):
        scale = _scalar(module, node.args[1])
        if scale:
            return node.args[0], scale if node.target is _aten.div.Tensor else 1 / scale  # type: ignore[return-value]
    return node, 1.0


def _scalar(module: fx.GraphModule, value: Any) -> float | None:
    if _is_constant(value):
        value = getattr(module, value.target)
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


def _quantized_ops() -> Any:
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers them
    return torch.ops.quantized_decomposed


# -- nodes --------------------------------------------------------------------------------------------------------


def _replace(node: fx.Node, result: fx.Node, reader: fx.Node) -> None:
    """Have ``result`` in the place of ``node`` but for ``reader``, by which it is made of it."""
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not reader)


def _is_constant(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _known(module: fx.GraphModule, value: Any) -> Any:
    """What a node of constants gives, or a constant; any other value as it is."""
    if _is_constant(value):
        return getattr(module, value.target)
    if not isinstance(value, fx.Node) or not isinstance(value.target, torch._ops.OpOverload):
        return value
    args, kwargs = fx.node.map_arg((value.args, value.kwargs), lambda n: _known(module, n))
    known = not any(isinstance(a, fx.Node) for a in pytree.tree_leaves((args, kwargs)))
    return value.target(*args, **kwargs) if known and value.all_input_nodes else value


def _constant(module: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    """A node for a new constant, where the graph inserts."""
    module.register_buffer(name, value, persistent=False)
    return module.graph.get_attr(name)


def _dtype(module: fx.GraphModule, node: Any) -> torch.dtype | None:
    """Of a constant, or of a node of the model's; nothing for what was made here."""
    value = getattr(module, node.target) if _is_constant(node) else node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def quantized_with_rounding(node: fx.Node) -> bool:
    """Whether PyTorch rounds to whole numbers before float8, as TensorRT does not."""
    return "::quantize_per" in node.target.name() and _FP8 in node.args  # type: ignore[union-attr]
