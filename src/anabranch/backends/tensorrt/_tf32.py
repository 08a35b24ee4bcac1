"""Operators that TensorRT-RTX computes in TF32 although the engine is built without it, and that are to be in float32.

Version 1.4 was seen to do so with many products and convolutions, and not with others of the same kinds
(``benchmarks/results/tensorrt_float32_h200.json``): it is no longer asked for any that PyTorch's flags do not allow.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from anabranch.backends._backend import TF32
from anabranch.backends.tensorrt._partition import flops
from anabranch.export import is_dequantized

_aten = torch.ops.aten

#: Products that PyTorch's counter of floating-point operations does not know.
_PRODUCTS = (
    *(_aten.mv, _aten.addmv, _aten.dot, _aten.vdot, _aten.inner, _aten.ger, _aten.addr, _aten.addbmm),
    *(_aten.cdist, _aten._cdist_forward, _aten._euclidean_dist, _aten._trilinear, _aten.bilinear, _aten.einsum),
)
_RECURRENT = (
    *(_aten.lstm, _aten.gru, _aten.rnn_tanh, _aten.rnn_relu),
    *(_aten.lstm_cell, _aten.gru_cell, _aten.rnn_tanh_cell, _aten.rnn_relu_cell, _aten._cudnn_rnn),
)
#: They have int8 and float8 kernels, which read quantized operands.
_QUANTIZABLE = (_aten.linear, _aten.matmul, _aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm)

_ALLOWING = {
    "products": "torch.set_float32_matmul_precision('high')",
    "convolutions": "torch.backends.cudnn.allow_tf32 = True",
    "recurrent": "torch.backends.cudnn.allow_tf32 = True",
}


def kind_of(node: fx.Node) -> str:
    """The field of :class:`TF32` that it is under: products, convolutions or recurrent layers; or nothing."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    packet = node.target.overloadpacket
    if packet in _RECURRENT:
        return "recurrent"
    name = node.target.name().partition("::")[2]
    if name.lstrip("_").startswith(("conv", "cudnn_conv", "miopen_conv", "thnn_conv", "slow_conv", "deform_conv")):
        return "convolutions"
    return "products" if packet in _PRODUCTS or flops(node) else ""


def in_tf32(graph: fx.Graph, allowed: TF32, excluded: Collection[str] = ()) -> dict[str, str]:
    """By name, the nodes that are not to be computed in TF32 and would be, each with the reason.

    ``excluded``: names of nodes that TensorRT does not get. What reads quantized tensors only is left to it: it has
    kernels for these, which do not compute in TF32.
    """
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not _given_float32(node):
            continue
        kind = kind_of(node)
        if kind and not getattr(allowed, kind) and not _is_quantized(node, kind, excluded):
            what = "recurrent layers" if kind == "recurrent" else kind
            found[node.name] = (
                f"TensorRT-RTX may compute {what} of float32 in TF32, off by 1e-3 of the largest value, which is not"
                f" allowed here; {_ALLOWING[kind]} allows it"
            )
    return found


def _given_float32(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if getattr(_value(n), "dtype", None) is torch.float32]


def _value(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value[0] if isinstance(value, tuple | list) and value else value


def _is_quantized(node: fx.Node, kind: str, excluded: Collection[str]) -> bool:
    """Whether all operands come from int8 or float8. (A bias does not.)"""
    if kind != "convolutions" and node.target.overloadpacket not in _QUANTIZABLE:  # type: ignore[union-attr]
        return False
    operands = [n for n in _given_float32(node) if _value(n).dim() > 1]
    return bool(operands) and all(is_dequantized(n, excluded) for n in operands)
