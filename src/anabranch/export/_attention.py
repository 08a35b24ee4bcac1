"""Attention over lengths that vary: by kernels that take any length.

cuDNN's attention, which PyTorch prefers on some GPUs, builds a plan for each length that it has not met in the process:
the host waits for that in the middle of a call, for as long as hundreds of calls take. FlashAttention has one kernel
for all lengths. Its results differ from cuDNN's by rounding.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
#: Of a head, in the kernels.
_LARGEST_HEAD = 256
_DTYPES = (torch.float16, torch.bfloat16)
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def take_any_length(module: fx.GraphModule) -> None:
    """Have FlashAttention compute what cuDNN might, where lengths are symbols. What one has chosen globally holds."""
    backends = torch.backends.cuda
    if not (backends.flash_sdp_enabled() and backends.is_flash_attention_available()):
        return
    for node in module.graph.find_nodes(op="call_function", target=_aten.scaled_dot_product_attention.default):
        given: dict[str, Any] = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
        if _fits(node, given):
            _replace(node, given)
    module.recompile()


def _fits(node: fx.Node, given: dict[str, Any]) -> bool:
    tensors = [given[name].meta["val"] for name in _NAMES[:3]]
    q, k, v = tensors
    heads = {x.shape[-1] for x in tensors}
    if (
        given.get("attn_mask") is not None
        or given.get("dropout_p", 0.0)
        or given.get("enable_gqa", False)
        or any(user.op == "output" for user in node.users)  # its strides are eager's
        or any(
            x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16) or x.dim() != 4 for x in tensors
        )
        or all(isinstance(n, int) for x in tensors for n in x.shape)
        or len(heads) > 1
    ):
        return False
    (head,) = heads
    if not isinstance(head, int) or head % 8 or head > _LARGEST_HEAD:
        return False
    # Broadcast batches and heads are not for these kernels.
    same = all(_is_same(a, b) for x in (k, v) for a, b in zip(q.shape[:2], x.shape[:2], strict=True))
    if given.get("is_causal", False) and not _is_same(q.shape[2], k.shape[2]):
        return False  # where lengths differ, FlashAttention lines up the ends and not the beginnings
    packed = all(isinstance(x.stride(-1), int) and x.stride(-1) == 1 for x in tensors)
    return same and packed and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same, without asking anything of symbols."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)


def _replace(node: fx.Node, given: dict[str, Any]) -> None:
    graph, target = node.graph, _aten._scaled_dot_product_flash_attention.default
    args = (given["query"], given["key"], given["value"], 0.0, given.get("is_causal", False))
    scale = {"scale": given["scale"]} if given.get("scale") is not None else {}
    with graph.inserting_before(node):
        flash = graph.call_function(target, args, scale)
        result = graph.call_function(operator.getitem, (flash, 0))
    values: list[Any] = [x.meta["val"] if isinstance(x, fx.Node) else x for x in args]
    with values[0].fake_mode:
        flash.meta = {**node.meta, "val": target(*values, **scale)}
    result.meta = {**node.meta, "val": flash.meta["val"][0]}
    node.replace_all_uses_with(result)
    graph.erase_node(node)
