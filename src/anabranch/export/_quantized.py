"""Quantizations in a graph, and what is computed of quantized tensors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from anabranch.export._uncaptured import source_of

_aten = torch.ops.aten
#: What values between a quantization and its inverse have in TensorRT.
NARROW = (torch.int8, torch.float8_e4m3fn)
_QUANTIZED = (*NARROW, torch.uint8, torch.float8_e5m2)
_SCALINGS = (_aten.mul.Tensor, _aten.mul.Scalar)
#: Operators that multiply what is quantized as it is.
_KERNELS = (
    "_int_mm",
    "_scaled_mm",
    "_scaled_grouped_mm",
    "_weight_int8pack_mm",
    "_weight_int4pack_mm",
    "qlinear",
    "qconv",
)
_PRODUCTS = ("conv", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")


def is_quantization(node: fx.Node) -> bool:
    """Whether it goes to int8 or float8, or back, or does both."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target.namespace == "quantized_decomposed" or node.target.name().startswith("aten::fake_quantize"):
        return True
    return any(v.dtype in NARROW for n in (node, *node.all_input_nodes) for v in _tensors(n))


def is_dequantized(node: fx.Node, excluded: Collection[str] = ()) -> bool:
    """Whether a tensor comes from int8 or float8, by views and one scale only, and by no node named in ``excluded``."""
    while node.op == "call_function" and node.name not in excluded:
        if is_quantization(node):
            return True
        inputs = node.all_input_nodes
        scales = node.target in _SCALINGS and all(v.numel() == 1 for n in inputs[1:] for v in _tensors(n))
        if not inputs or not (scales or _is_view(node)):
            return False
        node = inputs[0]
    return False


def quantized_lines(graph: fx.Graph, backend: str) -> list[str]:
    """For ``explain()``: what is quantized in a graph, and what a backend computes of that in which type."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)]
    quantizations = [n for n in nodes if is_quantization(n)]
    kernels = [n for n in nodes if _name(n).startswith(_KERNELS)]
    if not quantizations and not kernels:
        return []
    dtypes = {v.dtype for n in quantizations for v in _tensors(n) if v.dtype in _QUANTIZED}
    types = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)) or "types that are simulated"
    lines = [f"quantized: {len(quantizations)} operators, to {types} or back"]
    if kernels:
        lines.append(f"computed in int8 or float8: {_named(kernels)}")
    rest = [n for n in nodes if n not in kernels and _name(n).lstrip("_").startswith(_PRODUCTS)]
    read = [n for n in rest if any(is_dequantized(i) for i in n.all_input_nodes)]
    if read and backend == "tensorrt":
        lines.append(f"for TensorRT to compute in int8 or float8, where it has such a kernel: {_named(read)}")
    elif read:
        wide = {str(v.dtype).removeprefix("torch.") for n in read for v in _tensors(n)}
        lines.append(f"of quantized values, computed in {', '.join(sorted(wide))} as in eager: {_named(read)}")
    return lines


def _named(nodes: list[fx.Node], most: int = 3) -> str:
    names = [f"{_name(n)}{f' ({s})' if (s := source_of(n)) else ''}" for n in nodes]
    return f"{', '.join(names[:most])}{f' and {len(names) - most} more' if len(names) > most else ''}"


def _name(node: fx.Node) -> str:
    return node.target.name().partition("::")[2]  # type: ignore[union-attr]


def _tensors(node: fx.Node) -> list[Any]:
    return [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]


def _is_view(node: fx.Node) -> bool:
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(r.alias_info is not None for r in returns)
