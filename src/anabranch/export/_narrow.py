"""What a narrow floating type does to each operator: which gain by it, which lose nothing, which must not have it.

Products and convolutions gain: their kernels sum in float32, and only operands and results are rounded. Between them,
what moves elements, or computes each within the range of its operands, follows them, so that nothing is cast to and
fro. Whatever is not named here is computed in the model's own type: norms, softmax, sums, exponentials, and operators
that nobody has looked at.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def _packets(*names: str) -> frozenset[Any]:
    return frozenset(getattr(_aten, name) for name in names if hasattr(_aten, name))


PRODUCTS = _packets(
    *("mm", "bmm", "addmm", "baddbmm", "addbmm", "linear", "matmul", "mv", "addmv", "dot", "einsum", "bilinear"),
    *("convolution", "_convolution", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_cudnn_attention", "_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu"),
)
ATTENTION = _packets("scaled_dot_product_attention")
#: Products of which both operands may be computed, and which do not scale them.
_BARE = _packets("mm", "bmm", "baddbmm", "matmul", "einsum")

#: These are exact: they give what is in memory already, or choose among it.
VIEWS = _packets(
    *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice"),
    *("select", "unflatten", "flatten", "split", "split_with_sizes", "chunk", "unbind", "alias", "narrow", "detach"),
    *("diagonal", "movedim", "swapaxes", "numpy_T", "mT", "contiguous", "pixel_shuffle", "pixel_unshuffle", "unfold"),
)
_MOVES = _packets(
    *("clone", "cat", "stack", "flip", "roll", "repeat", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"),
    *("index_select", "gather", "channel_shuffle", "max_pool1d", "max_pool2d", "max_pool3d", "dropout"),
    *("max_pool2d_with_indices", "adaptive_max_pool2d", "upsample_nearest2d", "relu", "hardtanh", "relu6", "neg"),
    *("abs", "pad"),
)
#: These compute in float32 within their kernels and give no larger value than they are given; they round once.
_BOUNDED = _packets(
    *("gelu", "silu", "elu", "leaky_relu", "sigmoid", "tanh", "hardsigmoid", "hardswish", "mish", "softplus"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"),
    *("upsample_bilinear2d", "upsample_linear1d", "upsample_trilinear3d"),
)
#: Their parameters and statistics stay in float32; so does the arithmetic of the kernels.
BATCH_NORMS = _packets(
    *("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm"),
)
_SUMS = _packets("add", "sub")
_SCALINGS = _packets("mul", "div")
#: What only moves numbers.
EXACT = VIEWS | _MOVES | {operator.getitem}
#: These give what they are given in another type.
_CASTS = _packets("_to_copy", "to")
FOLLOWERS = VIEWS | _MOVES | _BOUNDED | BATCH_NORMS | _SUMS | _SCALINGS | {operator.getitem}

_SOFTMAX = _packets("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "logsumexp", "exp")
#: What stands between a product and the softmax of it.
_ON_THE_WAY = VIEWS | _packets("mul", "div", "add", "sub", "masked_fill", "where", "tanh", "clamp", "clone", "neg")

#: Why an operator is left in float32, by its name.
_WHY = (
    (_SOFTMAX | _packets("pow", "square", "rsqrt", "reciprocal", "log", "log1p", "expm1", "sqrt", "cosh", "sinh"),
     "exponentials, logarithms and powers leave the range, or lose digits"),
    (_packets("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "rms_norm", "_fused_rms_norm",
              "instance_norm", "linalg_vector_norm", "norm", "var", "var_mean", "std"),
     "a norm: squares are summed"),
    (_packets("sum", "mean", "cumsum", "cumprod", "prod", "nansum"), "a reduction: many terms are summed"),
)  # fmt: skip


def packet(node: fx.Node) -> Any:
    """An operator without its overload; of what is none, the function."""
    target: Any = node.target
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def why_wide(node: fx.Node) -> str:
    """Why an operator that is neither a product nor a follower is computed in float32."""
    return next((why for packets, why in _WHY if packet(node) in packets), "not known to be safe in half precision")


def are_whole_numbers(node: fx.Node) -> bool:
    """Whether its elements were made of integers: of those half precision has all up to 2,048 (float16), or 256."""
    while packet(node) in EXACT and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if packet(node) is _aten.arange:
        return True
    given = node.all_input_nodes[0].meta.get("val") if packet(node) in _CASTS and node.all_input_nodes else None
    return (
        isinstance(given, torch.Tensor)
        and not (given.is_floating_point() or given.is_complex())
        and given.dtype is not torch.bool
    )


def are_scores(node: fx.Node, is_weight: Callable[[fx.Node], bool]) -> bool:
    """Whether it is a product of two computed tensors of which a softmax is taken: rounding errors of a large result
    become factors there, and it may overflow where the softmax would not."""
    operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if packet(node) not in _BARE or any(map(is_weight, operands)):
        return False
    seen, ahead = {node}, [node]
    while ahead:
        for user in ahead.pop().users:
            if packet(user) in _SOFTMAX:
                return True
            if packet(user) in _ON_THE_WAY and user not in seen:
                seen.add(user)
                ahead.append(user)
    return False


class Followers:
    """Which operators can go on in half precision behind those that are in it. Asked in the order of the graph."""

    def __init__(self, is_weight: Callable[[fx.Node], bool], fits: Callable[[fx.Node], bool]) -> None:
        """``fits``: whether the values of a weight survive in half precision."""
        self._is_weight, self._fits = is_weight, fits
        #: Of values that are normalized, channel by channel: they are of one magnitude, and a few of them may be added.
        self._normalized: set[fx.Node] = set()

    def follows(self, node: fx.Node, data: Iterable[fx.Node], asked: bool = False) -> str:
        """Why it does not, or nothing. ``data``: its floating operands; those that are no weights are in half
        precision. ``asked``: the user wants it."""
        kind = packet(node)
        data = list(data)
        computed = [n for n in data if not self._is_weight(n)]
        if kind in BATCH_NORMS:
            self._normalized.add(node)
            return ""
        if kind in _SUMS | _SCALINGS:
            why = self._why_arithmetic(node, data, computed)
            if why and not asked:
                return why
        elif len(computed) < len(data):
            return "takes a weight that is no product's"
        if all(n in self._normalized for n in computed) and kind not in _SCALINGS:
            self._normalized.add(node)
        return ""

    def _why_arithmetic(self, node: fx.Node, data: list[fx.Node], computed: list[fx.Node]) -> str:
        kind = packet(node)
        numbers = [x for x in (*node.args, *node.kwargs.values()) if isinstance(x, int | float)]
        if kind in _SCALINGS:
            if len(data) > 1:
                return "a product of elements may leave the range"
            grows = any(abs(x) < 1 for x in numbers) if kind is _aten.div else any(abs(x) > 1 for x in numbers)
            return "scales up, and may leave the range" if grows or not numbers else ""
        if any(abs(x) > _LARGEST_ADDED for x in numbers):
            return "adds a large number"
        if len(computed) == len(data) > 1 and not all(n in self._normalized for n in computed):
            return "adds to a stream of values, which may grow"
        if not all(self._fits(n) for n in data if self._is_weight(n)):
            return "adds a weight that half precision cannot hold"
        return ""


#: So much added to values near one loses few of their digits.
_LARGEST_ADDED = 8
