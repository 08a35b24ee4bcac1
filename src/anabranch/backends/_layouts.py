"""Results lie in memory as eager's do, where Inductor's decomposition of an operator would lay them out otherwise.

Inductor computes some operators by others. If a picture lies in ``channels_last``, these may give a result in
``channels_last`` where the operator gives a contiguous one, as for ``pixel_shuffle`` on a GPU and for ``index_select``.
The caller sees that in the result's strides, and views of it fail or copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from anabranch.backends._backend import Kernels
from anabranch.export._signature import layout_of


def keep_layouts(module: fx.GraphModule) -> None:
    """Put a copy behind each operator whose decomposition has other strides than the operator, in place.

    Inductor makes one kernel of the two.
    """
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table()
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in table or not isinstance(node.target, torch._ops.OpOverload):
            continue
        value, returns = node.meta.get("val"), node.target._schema.returns
        if not isinstance(value, Tensor) or any(r.alias_info is not None for r in returns) or not _is_laid_out(node):
            continue
        other = _decomposed(node, table[node.target])
        if other is not None and _order(other) != _order(value):
            _copy(node, _order(value))
    module.graph.lint()
    module.recompile()


def keeping_strides(module: fx.GraphModule, kernels: Kernels) -> Kernels:
    """``kernels`` of ``module``, with a copy of each result that has gaps where the graph's has none.

    Inductor pads a product to sizes that suit the device, and may hand out a view of the larger one. The first run
    shows which results it does that with: all runs are alike, and nobody calls the kernels before one has ended.
    """
    wanted: list[Any] = [n.meta.get("val") for n in module.graph.output_node().args[0]]  # type: ignore[union-attr]
    gaps: list[int] | None = None
    # Of many sizes some are padded, and others not.
    vary = any(isinstance(w, Tensor) and any(not isinstance(n, int) for n in w.shape) for w in wanted)
    if vary:
        dense = [isinstance(w, Tensor) and _is_dense(w) for w in wanted]

        def of_any_size(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            results = list(kernels(inputs))
            for i, y in enumerate(results):
                if dense[i] and not _is_dense(y):
                    results[i] = torch.empty_like(y).copy_(y)
            return results

        return of_any_size

    def without_gaps(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        nonlocal gaps
        results = kernels(inputs)
        if gaps is None:
            pairs = enumerate(zip(results, wanted, strict=True))
            gaps = [i for i, (y, w) in pairs if isinstance(w, Tensor) and _is_dense(w) and not _is_dense(y)]
        if not gaps:
            return results
        kept = list(results)
        for i in gaps:
            w = wanted[i]
            y = torch.empty_strided(tuple(w.shape), tuple(w.stride()), dtype=w.dtype, device=w.device)
            kept[i] = y.copy_(kept[i])
        return kept

    return without_gaps


def _is_dense(x: Tensor) -> bool:
    return x.layout is torch.strided and layout_of(x) is None


def _is_laid_out(node: fx.Node) -> bool:
    """Whether an input lies in memory otherwise than contiguous: of contiguous ones everything is contiguous."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return any(isinstance(v, Tensor) and not v.is_contiguous() for v in values)


def _decomposed(node: fx.Node, decomposition: Any) -> Tensor | None:
    """What the decomposition makes of the node's inputs; None where it makes nothing of them."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = getattr(node.meta["val"], "fake_mode", None)
    try:
        with mode or torch.no_grad():
            result = decomposition(*args, **kwargs)
    except Exception:
        return None  # it needs what is not there while no kernel runs; Inductor then has a kernel of its own
    return result if isinstance(result, Tensor) else None


def _order(x: Tensor) -> tuple[int, ...]:
    """The dimensions of more than one element, the outermost in memory first."""
    return tuple(sorted((d for d in range(x.dim()) if x.shape[d] != 1), key=lambda d: (-x.stride()[d], d)))


def _copy(node: fx.Node, order: tuple[int, ...]) -> None:
    """Let the node's users have a dense copy with its dimensions in this order."""
    value: Tensor = node.meta["val"]
    whole = (*(d for d in range(value.dim()) if d not in order), *order)
    back = tuple(whole.index(d) for d in range(value.dim()))
    users = list(node.users)
    aten = torch.ops.aten
    steps: tuple[tuple[Any, Any, Any], ...] = (
        (aten.permute.default, (list(whole),), {}),
        (aten.clone.default, (), {"memory_format": torch.contiguous_format}),
        (aten.permute.default, (list(back),), {}),
    )
    last = node
    for target, args, kwargs in steps:
        with node.graph.inserting_after(last):
            made = node.graph.call_function(target, (last, *args), kwargs)
        with getattr(value, "fake_mode", None) or torch.no_grad():
            made.meta["val"] = target(last.meta["val"], *args, **kwargs)
        last = made
    for user in users:
        user.replace_input_with(node, last)
