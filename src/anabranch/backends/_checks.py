"""What eager's kernels on the CPU refuse by its values, and Inductor's take without a word (pytorch#197554).

A negative index counts from the end there, a probability of 1.5 gives a number. So assertions are put before these
operators, in the graph that Inductor gets, with eager's reasons. Indices that are too large Inductor refuses by itself.
On GPUs nothing is added: there an assertion that fails is the end of the process's work on the device, in eager, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from anabranch.backends._steps import Steps

_aten = torch.ops.aten
#: Operators that take no index below 0, and which argument has the indices.
_INDEXED = {
    _aten.index_select.default: 2,
    _aten.index_add.default: 2,
    _aten.index_copy.default: 2,
    _aten.max_unpool2d.default: 1,
    _aten.max_unpool3d.default: 1,
}
#: Those that repeat elements, and which argument says how often.
_REPEATED = {_aten.repeat_interleave.Tensor: 0, _aten.repeat_interleave.self_Tensor: 1}
#: Operators of probabilities: which arguments are some, and what eager says of others.
_PROBABILITIES = {
    _aten.binary_cross_entropy.default: (
        (0, "all elements of input should be between 0 and 1"),
        (1, "all elements of target should be between 0 and 1"),
    ),
    _aten.bernoulli.default: ((0, "expected probabilities between 0 and 1"),),
}
#: Operators of lists of labels, each of which ends with -1.
_LABELLED = (_aten.multilabel_margin_loss.default, _aten.multilabel_margin_loss_forward.default)


def keep_checks(module: fx.GraphModule) -> None:
    """Put the assertions into a graph, in place."""
    for node in list(module.graph.nodes):
        value = node.meta.get("val")
        value = value[0] if node.target is _LABELLED[1] else value
        if node.op == "call_function" and isinstance(value, torch.Tensor) and value.device.type == "cpu":
            step = Steps(node, value)
            for holds, text in _conditions(step):
                step(_aten._assert_async.msg, step(_aten.all.default, holds), text)
    module.graph.lint()
    module.recompile()


def _conditions(step: Steps) -> Iterator[tuple[fx.Node, str]]:
    """Tensors of truths that are to hold where a node is, and what is wrong where they do not."""
    node, args = step.node, step.node.args
    target: Any = node.target
    place: Any = _INDEXED.get(target)
    if place is not None:
        yield step(_aten.ge.Scalar, args[place], 0), "index out of range: expected none below 0"
    for i, text in _PROBABILITIES.get(target, ()):
        inside = step(_aten.ge.Scalar, args[i], 0), step(_aten.le.Scalar, args[i], 1)
        yield step(_aten.logical_and.default, *inside), text  # NaN is not between them
    if target in _LABELLED:
        x, labels = args[:2]
        classes: Any = x.meta["val"].shape[-1] if x.meta["val"].dim() else 1  # type: ignore[union-attr]
        classes = classes if isinstance(classes, int) else step(_aten.sym_size.int, x, -1)
        inside = step(_aten.ge.Scalar, labels, -1), step(_aten.lt.Scalar, labels, classes)
        yield step(_aten.logical_and.default, *inside), "argument #2 'target' is out of range"
    place = _REPEATED.get(target)
    if place is not None:
        repeats: Any = args[place]
        yield step(_aten.ge.Scalar, repeats, 0), "repeats can not be negative"
        given = {a.name: x for a, x in zip(target._schema.arguments, args, strict=False)} | node.kwargs
        shape, size = repeats.meta["val"].shape, given.get("output_size")
        if isinstance(size, int) and len(shape) == 1 and isinstance(shape[0], int) and shape[0] > 1:
            same = step(_aten.eq.Scalar, step(_aten.sum.default, repeats), size)
            yield same, f"allocated size does not match required size: the sum of repeats is not output_size={size}"
