"""Operators written otherwise before they become ONNX: where the exporter's own way loses accuracy or is refused."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch.export import ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_weights

_aten = torch.ops.aten

_NORM = _aten._native_batch_norm_legit_no_training.default
_CONVOLUTIONS = (
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv3d.default,
    _aten.conv1d.padding,
    _aten.conv2d.padding,
    _aten.conv3d.padding,
)


def fold_norms(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``module`` in which convolutions take up the batch normalization that follows, if nobody else does.

    The exporter would do so as well, but in the weights' own type: in half precision it rounds at each step, and in
    bfloat16 it leaves float32 weights with bfloat16 data, which no parser takes. Here the arithmetic is float32's,
    and only the folded weights are rounded: results are as close to exact ones as those of PyTorch's own operators.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    folded = fx.GraphModule(module, graph)
    for norm in graph.find_nodes(op="call_function", target=_NORM):
        conv = norm.args[0]
        if not isinstance(conv, fx.Node) or conv.target not in _CONVOLUTIONS or len(conv.users) > 1:
            continue
        if any(n.target is not operator.getitem or n.args[1] != 0 for n in norm.users):
            continue
        constants: list[Any] = [conv.args[1], conv.args[2] if len(conv.args) > 2 else None, *norm.args[1:5]]
        if not all(n is None or (isinstance(n, fx.Node) and n.op == "get_attr") for n in constants):
            continue
        tensors: list[Any] = [None if n is None else getattr(folded, n.target) for n in constants]
        single: list[Any] = [None if t is None else t.detach().float() for t in tensors]
        weight, bias, scale, shift, mean, var = single
        fused = fuse_conv_bn_weights(weight, bias, mean, var, norm.args[6], scale, shift)
        made = []
        with graph.inserting_before(conv):
            for what, value in zip(("weight", "bias"), fused, strict=True):
                name = f"{conv.name}_folded_{what}"
                folded.register_buffer(name, value.detach().to(tensors[0].dtype), persistent=False)
                made.append(graph.get_attr(name))
        conv.args = (conv.args[0], *made, *conv.args[3:])
        for picked in list(norm.users):
            picked.replace_all_uses_with(conv)
            graph.erase_node(picked)
        graph.erase_node(norm)
    graph.eliminate_dead_code()
    folded.recompile()
    return folded


def decompose(exported: ExportedProgram) -> ExportedProgram:
    """Batch normalizations that are left compute in float32, as PyTorch's kernels do, and round their results once."""
    return exported.run_decompositions(get_decompositions([_NORM, _aten._native_batch_norm_legit.default]))
