"""Attention of a single query as reductions that Inductor makes kernels of.

A language model that makes one token at a time attends with one query. A library's kernel is for many: it is slow to
start, and has keys and values copied first that several heads share. As reductions they are read where they lie.

Sums are taken in float32 (in float64 for that). A query that may look at nothing gets zeros, as by PyTorch's own
reference; libraries' kernels give one thing or another.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from anabranch.backends._steps import Steps

_aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def reduce_single_queries(module: fx.GraphModule) -> None:
    """Rewrite it, in place, where it is on a GPU. Nodes carry fake tensors under ``meta["val"]``."""
    for node in module.graph.find_nodes(op="call_function", target=_aten.scaled_dot_product_attention.default):
        given: dict[str, Any] = {**dict(zip(_ATTENTION, node.args, strict=False)), **node.kwargs}
        if _is_single_query(given):
            _reduce_attention(node, given)
    module.graph.lint()
    module.recompile()


def _is_single_query(given: dict[str, Any]) -> bool:
    q, k, v = (given[name].meta["val"] for name in _ATTENTION[:3])
    mask = given.get("attn_mask")
    return (
        q.is_cuda
        and q.dim() == k.dim() == v.dim() == 4
        and q.shape[2] == 1
        and all(isinstance(n, int) for x in (q, k, v) for n in x.shape)
        and q.shape[0] == k.shape[0] == v.shape[0]
        and k.shape[1] == v.shape[1]
        and k.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0
        and (q.shape[1] == k.shape[1] or bool(given.get("enable_gqa")))
        and k.shape[2] > 0
        and q.dtype.is_floating_point
        and not given.get("dropout_p")
        and not given.get("is_causal")  # which would leave one query with one key
        and (mask is None or _is_of_single_query(mask.meta["val"]))
    )


def _is_of_single_query(mask: torch.Tensor) -> bool:
    return mask.dim() <= 4 and (mask.dim() < 2 or mask.shape[-2] == 1)


def _reduce_attention(node: fx.Node, given: dict[str, Any]) -> None:
    q, k, v = (given[name] for name in _ATTENTION[:3])
    value = node.meta["val"]
    wide = torch.float32 if value.dtype in _HALVES else value.dtype
    steps = Steps(node, value)
    batch, heads, _, size = q.meta["val"].shape
    shared, length = k.meta["val"].shape[1:3]
    per = heads // shared
    scale = given.get("scale")
    scale = 1 / math.sqrt(size) if scale is None else scale
    # [batch, heads that are read, query heads that share each, length, size]
    query = steps(_aten.reshape.default, q, [batch, shared, per, 1, size])
    query = steps(_aten.mul.Tensor, steps(_aten.to.dtype, query, wide), scale)
    keys = steps(_aten.to.dtype, steps(_aten.unsqueeze.default, k, 2), wide)
    scores = steps(_aten.sum.dim_IntList, steps(_aten.mul.Tensor, keys, query), [-1])
    scores = steps(_aten.reshape.default, scores, [batch, heads, 1, length])
    mask = given.get("attn_mask")
    if mask is not None and mask.meta["val"].dtype is torch.bool:
        scores = steps(_aten.masked_fill.Scalar, scores, steps(_aten.logical_not.default, mask), float("-inf"))
    elif mask is not None:
        scores = steps(_aten.add.Tensor, scores, steps(_aten.to.dtype, mask, wide))
    # Of a query that may look at nothing the result is zeros.
    chances = steps(_aten._safe_softmax.default, scores, -1)
    chances = steps(_aten.reshape.default, chances, [batch, shared, per, length, 1])
    values = steps(_aten.to.dtype, steps(_aten.unsqueeze.default, v, 2), wide)
    y = steps(_aten.sum.dim_IntList, steps(_aten.mul.Tensor, values, chances), [-2])
    y = steps(_aten.to.dtype, steps(_aten.reshape.default, y, [batch, heads, 1, v.meta["val"].shape[3]]), value.dtype)
    steps.replace(_with_strides_of(value, y, steps))


def _with_strides_of(value: torch.Tensor, y: fx.Node, steps: Steps) -> fx.Node:
    """``y``, laid out as ``value`` is."""
    if y.meta["val"].stride() == value.stride():
        return y
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda d: (-strides[d], -value.shape[d]))
    back = [order.index(d) for d in range(value.dim())]
    moved = steps(_aten.clone.default, steps(_aten.permute.default, y, order))
    return steps(_aten.permute.default, moved, back)
