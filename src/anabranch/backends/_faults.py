"""Rewrites that keep Inductor from giving other values than eager, where that costs nothing or next to nothing.

``docs/use.md`` lists the faults with PyTorch's issues, also those that nothing is done about here. Each rewrite is of
the graph that Inductor gets; the plan shows the model's own.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from anabranch.backends._steps import Steps
from anabranch.export import shape_at

_aten = torch.ops.aten
_GRID_SAMPLERS = (_aten.grid_sampler.default, _aten.grid_sampler_2d.default)
_POWERS = (_aten.pow.Tensor_Scalar, _aten.float_power.Tensor_Scalar)
#: Powers that eager has operators of their own for.
_ROOTS = {0.5: _aten.sqrt.default, -0.5: _aten.rsqrt.default, -1.0: _aten.reciprocal.default}
#: Operators that eager computes in float32, and rounds at the end; Inductor makes steps of them, and rounds each.
_IN_FLOAT32 = (_aten.lerp.Scalar, _aten.lerp.Tensor, _aten.glu.default)
#: Operators with a factor, and what they do of it and the second of two tensors.
_SCALED = {_aten.addcmul.default: _aten.mul.Tensor, _aten.addcdiv.default: _aten.div.Tensor}


def avoid(module: fx.GraphModule) -> None:
    """Rewrite, in place, what Inductor of PyTorch 2.11 to 2.13 gets wrong."""
    for node in list(module.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function":
            continue
        if node.target is _aten.native_group_norm.default:
            for step in _results(node):
                _group_norm(step, node, node.args[-2])
        elif node.target is _aten.multilabel_margin_loss_forward.default:
            for step in _results(node):
                _multilabel_margin_loss(step, node)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if node.target in (_aten.mul.Tensor, _aten.mul.Scalar):
            _keep_product(node)
        elif _is_floor_division(node):
            _floor_divide(_Steps(node, value))
        elif node.target in (_aten.remainder.Tensor, _aten.remainder.Scalar):
            _remainder(_Steps(node, value))
        elif node.target is _aten.gelu.default and value.device.type == "cpu":
            _gelu(node, value)
        elif node.target is _aten.logit.default and value.device.type == "cpu":
            _logit(node, value)
        elif node.target in (_aten.fmod.Tensor, _aten.fmod.Scalar):
            _fmod(_Steps(node, value))
        elif node.target is _aten.fake_quantize_per_channel_affine.default and value.device.type != "cpu":
            _fake_quantize(Steps(node, value))
        elif node.target is _aten.softshrink.default:
            _softshrink(Steps(node, value))
        elif node.target in _POWERS and node.args[1] in _ROOTS:
            _root(Steps(node, value))
        elif node.target is _aten.layer_norm.default and value.device.type == "cpu":
            _layer_norm(Steps(node, value))
        elif node.target is _aten.group_norm.default and value.device.type == "cpu":
            _group_norm_of_its_own(Steps(node, value))
        elif node.target in _IN_FLOAT32 and value.dtype is torch.float16:
            _in_float32(Steps(node, value))
        elif node.target in _SMALL_OR_LARGE and value.device.type == "cpu":
            _small_or_large(Steps(node, value))
        elif node.target in _SCALED and value.dtype is not torch.float16 and value.device.type == "cpu":
            _scale_first(Steps(node, value))
        elif node.target is _aten.multilabel_margin_loss.default:
            _multilabel_margin_loss(Steps(node, value), node)
        elif node.target in _GRID_SAMPLERS and value.device.type == "cpu":
            _sample_grid(Steps(node, value))
    module.graph.lint()
    module.recompile()


def _keep_product(node: fx.Node) -> None:
    """Inductor makes x * 0 zeros, whatever x is (pytorch#186281); it leaves x * 0.0 alone."""
    node.args = tuple(0.0 if type(a) is int and a == 0 else a for a in node.args)


def _is_floor_division(node: fx.Node) -> bool:
    if node.target is _aten.floor_divide.default:
        return True
    return node.target in (_aten.div.Tensor_mode, _aten.div.Scalar_mode) and node.kwargs.get("rounding_mode") == "floor"


class _Steps(Steps):
    """Steps of an operator with two operands, which get its dtype."""

    def __init__(self, node: fx.Node, value: torch.Tensor) -> None:
        super().__init__(node, value)
        a, b = (self.cast(x, value.dtype) for x in node.args[:2])
        self.a: fx.Node = a if isinstance(a, fx.Node) else self(_aten.full_like.default, b, a)
        self.b: Any = b

    def round_number(self) -> None:
        """As eager's kernels do, and Inductor does not (pytorch#186875)."""
        if not isinstance(self.b, fx.Node):
            self.b = torch.tensor(self.b, dtype=self.a.meta["val"].dtype).item()

    def overflowing(self, left: fx.Node) -> fx.Node:
        """``left``, what is left over, and NaN where the quotient is too large for a number, if eager's vectors make it
        of that, which depends on the dtype."""
        a, b = self.a, self.b
        value = a.meta["val"]
        few = [torch.full((64,), x, dtype=value.dtype) for x in (torch.finfo(value.dtype).max, 1e-3)]
        if value.device.type != "cpu" or not bool(torch.fmod(*few).isnan().any()):
            return left
        finite = self(_aten.lt.Scalar, self(_aten.abs.default, a), float("inf"))
        too_large = self(_aten.logical_and.default, self(_aten.isinf.default, self(_aten.div.Tensor, a, b)), finite)
        return self(_aten.masked_fill.Scalar, left, too_large, math.nan)

    def left_over(self) -> tuple[fx.Node, fx.Node]:
        """fmod(a, b), and where it is not zero and has not the sign of b."""
        b, number = self.b, not isinstance(self.b, fx.Node)
        left = self(_aten.fmod.Scalar if number else _aten.fmod.Tensor, self.a, b)
        # Not as lt(left, 0) != lt(b, 0): of indices Inductor makes formulas, and its formulas do not compare truths.
        if number:
            other_sign = self(_aten.gt.Scalar if b < 0 else _aten.lt.Scalar, left, 0)
        else:
            is_below, is_above = self(_aten.lt.Scalar, left, 0), self(_aten.gt.Scalar, left, 0)
            other_sign = self(_aten.where.self, self(_aten.lt.Scalar, b, 0), is_above, is_below)
        return left, self(_aten.logical_and.default, self(_aten.ne.Scalar, left, 0), other_sign)


def _remainder(step: _Steps) -> None:
    """Inductor's vectors compute a - b * floor(a / b), which is far off where a / b has lost its last digits. Eager
    uses fmod (pytorch#198057)."""
    step.round_number()
    left, off = step.left_over()
    result = step(_aten.where.self, off, step(_aten.add.Tensor, left, step.b), left)
    step.replace(step.overflowing(result))


def _fmod(step: _Steps) -> None:
    step.round_number()
    step.replace(step.overflowing(step(step.node.target, step.a, step.b)))


def _floor_divide(step: _Steps) -> None:
    """Inductor computes floor(a / b): it gives 1.0 // 0.1 as 10 and inf // 3 as inf (pytorch#197895, #188048). Eager
    divides what fmod leaves over, and so gives 9 and NaN; these are its steps."""
    a, b = step.a, step.b
    left, below = step.left_over()
    quotient = step(_aten.div.Tensor, step(_aten.sub.Tensor, a, left), b)
    quotient = step(_aten.where.self, below, step(_aten.sub.Tensor, quotient, 1.0), quotient)
    whole = step(_aten.floor.default, quotient)
    too_low = step(_aten.gt.Scalar, step(_aten.sub.Tensor, quotient, whole), 0.5)
    whole = step(_aten.where.self, too_low, step(_aten.add.Tensor, whole, 1.0), whole)
    plain = step(_aten.div.Tensor, a, b)
    # A zero has the sign of the quotient.
    whole = step(_aten.where.self, step(_aten.eq.Scalar, quotient, 0), step(_aten.mul.Tensor, plain, 0.0), whole)
    # fmod of vectors is NaN where the quotient is too large for a number.
    finite = step(_aten.lt.Scalar, step(_aten.abs.default, a), float("inf"))
    overflows = step(_aten.logical_and.default, step(_aten.isinf.default, plain), finite)
    whole = step(_aten.where.self, overflows, plain, whole)
    if isinstance(b, fx.Node):
        whole = step(_aten.where.self, step(_aten.eq.Scalar, b, 0), plain, whole)
    step.replace(plain if not isinstance(b, fx.Node) and b == 0 else whole)


@functools.cache
def _eagers_gelu(dtype: torch.dtype, is_contiguous: bool) -> tuple[bool, bool]:
    """Whether it overflows above half of the largest number, and whether it makes NaN of infinity.

    Kept: oneDNN starts PyTorch's threads, which a forked child of a process that has them cannot.
    """
    # As many as fill vectors; of those that are not contiguous each second one.
    step = 1 if is_contiguous else 2
    large, infinite = (
        torch.nn.functional.gelu(torch.full((256,), v, dtype=dtype)[::step])
        for v in (0.75 * torch.finfo(dtype).max, math.inf)
    )
    return bool(large.isinf().all()), bool(infinite.isnan().all())


def _gelu(node: fx.Node, value: torch.Tensor) -> None:
    """Eager has two kernels on the CPU. Inductor computes as one of them does. The other, oneDNN's, is for contiguous
    tensors of types that the machine has instructions for; it halves last, so that more than half of the largest number
    overflows, and makes NaN of infinity. Which of these a kernel does is seen by running it."""
    if node.kwargs.get("approximate", "none") != "none":
        return
    x = node.args[0]
    given = x.meta["val"]  # type: ignore[union-attr]
    layout = torch.empty_strided(shape_at(given.shape), shape_at(given.stride()), dtype=value.dtype, device="meta")
    halves_last, makes_nan = _eagers_gelu(value.dtype, layout.is_contiguous() and layout.numel() > 1)
    if not (halves_last or makes_nan):
        return
    steps = Steps(node, value)
    wide = steps.cast(x, torch.float32)
    # From 0 to 2, as Inductor computes it.
    twice = steps(_aten.add.Tensor, steps(_aten.erf.default, steps(_aten.mul.Tensor, wide, math.sqrt(0.5))), 1)
    if halves_last:
        y = steps(_aten.mul.Tensor, steps(_aten.mul.Tensor, wide, twice), 0.5)
    else:
        y = steps(_aten.mul.Tensor, steps(_aten.mul.Tensor, wide, 0.5), twice)
    if makes_nan:
        y = steps(_aten.masked_fill.Scalar, y, steps(_aten.eq.Scalar, wide, math.inf), math.nan)
    steps.replace(steps.cast(y, value.dtype))


def _fake_quantize(step: Steps) -> None:
    """Inductor has PyTorch's own operator run it, which looks at the zero points on the host: no graph can be captured
    around that. These are its kernel's steps."""
    x, scale, zero, axis, low, high = step.node.args
    value: torch.Tensor = x.meta["val"]  # type: ignore[union-attr]
    shape = [-1 if d == axis else 1 for d in range(value.dim())]
    scale, zero = (step.cast(step(_aten.view.default, s, shape), torch.float32) for s in (scale, zero))
    wide = step.cast(x, torch.float32)
    steps = step(_aten.round.default, step(_aten.mul.Tensor, wide, step(_aten.reciprocal.default, scale)))
    steps = step(_aten.clamp.default, step(_aten.add.Tensor, steps, zero), low, high)
    result = step(_aten.mul.Tensor, step(_aten.sub.Tensor, steps, zero), scale)
    step.replace(step.cast(result, value.dtype))


def _softshrink(step: Steps) -> None:
    """Inductor makes 0 of NaN."""
    x = step.node.args[0]
    step.replace(step(_aten.where.self, step(_aten.isnan.default, x), x, step(step.node.target, *step.node.args)))


def _root(step: Steps) -> None:
    """That of minus infinity is NaN in eager, but for float16 on the CPU, where eager takes the power of C: that is
    infinity or 0. Inductor takes the root for 0.5, and the power of C for the others, whatever eager does."""
    x: Any = step.node.args[0]
    value, exponent = step.node.meta["val"], float(step.node.args[1])  # type: ignore[arg-type]
    if value.device.type == "cpu" and not bool((torch.full((64,), -math.inf, dtype=value.dtype) ** -0.5).isnan().all()):
        if exponent == 0.5:
            below = step(_aten.eq.Scalar, x, -math.inf)
            step.replace(step(_aten.masked_fill.Scalar, step(_aten.sqrt.default, x), below, math.inf))
        return
    step.replace(step(_ROOTS[exponent], step.cast(x, value.dtype)))


def _logit(node: fx.Node, value: torch.Tensor) -> None:
    """Eager's kernel on the CPU rounds the bounds to half precision: 1 - 1e-6 is 1 there, whose logit is infinite."""
    eps = node.args[1] if len(node.args) > 1 else node.kwargs.get("eps")
    if eps is None or value.dtype not in (torch.float16, torch.bfloat16):
        return
    step, low = Steps(node, value), torch.tensor(eps, dtype=value.dtype)
    inside = step(_aten.clamp.default, node.args[0], low.item(), (1 - low).item())
    step.replace(step(_aten.logit.default, inside))


def _in_float32(step: Steps) -> None:
    wide = [step.cast(x, torch.float32) for x in step.node.args]
    step.replace(step.cast(step(step.node.target, *wide), torch.float16))


def _scale_first(step: Steps) -> None:
    """Inductor multiplies by the factor at last: what overflows on the way in eager does not then."""
    factor, (x, a, b) = step.node.kwargs.get("value", 1), step.node.args
    if factor != 1:
        scaled = step(_SCALED[step.node.target], step(_aten.mul.Scalar, a, factor), b)  # type: ignore[index]
        step.replace(step(_aten.add.Tensor, x, scaled))


def _expm1(step: Steps, x: fx.Node) -> fx.Node:
    """Inductor subtracts 1 from the power of e, which leaves few digits near 0."""
    half = step(_aten.tanh.default, step(_aten.mul.Scalar, x, 0.5))
    product = step(_aten.mul.Tensor, half, step(_aten.add.Scalar, step(_aten.exp.default, x), 1))
    is_small = step(_aten.lt.Scalar, step(_aten.abs.default, x), 1e-17)  # half of the smallest number is none
    return step(_aten.where.self, is_small, x, product)


def _atanh(step: Steps, x: fx.Node) -> fx.Node:
    """Likewise: Inductor takes the logarithm of (1 + x) / (1 - x)."""
    below_one = step(_aten.sub.Tensor, step(_aten.ones_like.default, x), x)
    share = step(_aten.div.Tensor, step(_aten.mul.Scalar, x, 2), below_one)
    return step(_aten.mul.Scalar, step(_aten.log1p.default, share), 0.5)


def _acosh(step: Steps, x: fx.Node) -> fx.Node:
    """Inductor squares it, which overflows."""
    of_large = step(_aten.add.Scalar, step(_aten.log.default, x), math.log(2))
    return step(_aten.where.self, step(_aten.gt.Scalar, x, 1e9), of_large, step(_aten.acosh.default, x))


def _asinh(step: Steps, x: fx.Node) -> fx.Node:
    """Inductor squares it, and has few digits near 0."""
    size = step(_aten.abs.default, x)
    square = step(_aten.mul.Tensor, size, size)
    below = step(_aten.add.Scalar, step(_aten.sqrt.default, step(_aten.add.Scalar, square, 1)), 1)
    near = step(_aten.log1p.default, step(_aten.add.Tensor, size, step(_aten.div.Tensor, square, below)))
    of_large = step(_aten.add.Scalar, step(_aten.log.default, size), math.log(2))
    y = step(_aten.where.self, step(_aten.gt.Scalar, size, 1e9), of_large, near)
    return step(_aten.copysign.Tensor, step(_aten.where.self, step(_aten.lt.Scalar, size, 1e-17), size, y), x)


#: Functions that Inductor's vectors on the CPU compute by formulas which lose digits, or overflow, and their steps.
_SMALL_OR_LARGE: dict[Any, Callable[[Steps, fx.Node], fx.Node]] = {
    _aten.expm1.default: _expm1,
    _aten.atanh.default: _atanh,
    _aten.acosh.default: _acosh,
    _aten.asinh.default: _asinh,
}


def _small_or_large(step: Steps) -> None:
    dtype, made = step.node.meta["val"].dtype, _SMALL_OR_LARGE[step.node.target]
    wide = dtype if dtype is torch.float64 else torch.float32
    step.replace(step.cast(made(step, step.cast(step.node.args[0], wide)), dtype))


@functools.cache
def _eagers_norm(size: int, dtype: torch.dtype) -> bool:
    """Whether eager's norms of so many numbers may be NaN where a square overflows: that depends on where in its
    vectors the number stands, and is 0 elsewhere."""
    ends = torch.zeros(2, size, dtype=dtype)
    ends[0, 0] = ends[1, -1] = torch.finfo(dtype).max
    return bool(torch.nn.functional.layer_norm(ends, (size,)).isnan().any())


def _scaling(rest: list[Any]) -> tuple[Any, ...]:
    """Weight, bias and epsilon of a norm, of which a graph may leave out the last ones."""
    return (*rest, *(None, None, 1e-5)[len(rest) :])[:3]


def _layer_norm(step: Steps) -> None:
    """Where the variance overflows compiled kernels give 0. NaN wherever eager may have it, so that none is a number
    where eager has none."""
    x, shape, *rest = step.node.args
    value = x.meta["val"]  # type: ignore[union-attr]
    if not value.numel() or not _eagers_norm(math.prod(shape_at(shape)), value.dtype):  # type: ignore[arg-type]
        return
    made = step(_aten.native_layer_norm.default, x, shape, *_scaling(rest))
    y, scale = step(operator.getitem, made, 0), step(operator.getitem, made, 2)
    step.replace(step(_aten.masked_fill.Scalar, y, step(_aten.eq.Scalar, scale, 0), math.nan))


def _group_norm(step: Steps, made: fx.Node, groups: Any) -> None:
    """As :func:`_layer_norm`. ``made``: by the operator that tells of the variance, too."""
    x: Any = made.args[0]
    value, (channels, *sizes) = x.meta["val"], shape_at(x.meta["val"].shape[1:])
    if value.device.type != "cpu" or not value.numel():
        return
    if not _eagers_norm(channels // groups * math.prod(sizes), value.dtype):
        return
    overflows = step(_aten.eq.Scalar, step(operator.getitem, made, 2), 0)
    each = step(_aten.expand.default, step(_aten.unsqueeze.default, overflows, 2), [-1, -1, channels // groups])
    each = step(_aten.flatten.using_ints, each, 1)
    for _ in sizes:
        each = step(_aten.unsqueeze.default, each, -1)
    step.replace(step(_aten.masked_fill.Scalar, step(operator.getitem, made, 0), each, math.nan))


def _group_norm_of_its_own(step: Steps) -> None:
    x, groups, *rest = step.node.args
    weight, bias, eps = _scaling(rest)
    shape = x.meta["val"].shape  # type: ignore[union-attr]
    sizes = [s if isinstance(s, int) else step(_aten.sym_size.int, x, d) for d, s in enumerate(shape)]
    pixels: Any = 1
    for size in sizes[2:]:
        known = isinstance(pixels, int) and isinstance(size, int)
        pixels = pixels * size if known else step(operator.mul, pixels, size)
    _group_norm(step, step(_aten.native_group_norm.default, x, weight, bias, *sizes[:2], pixels, groups, eps), groups)


def _results(node: fx.Node) -> list[Steps]:
    """Steps in the place of each use of the first of an operator's results."""
    return [Steps(n, n.meta["val"]) for n in list(node.users) if n.args[1] == 0]


def _sample_grid(step: Steps) -> None:
    """Where a coordinate is no number Inductor gives 0. Eager gives NaN where nothing pads the picture, and its first
    row or column where its border does; where its mirror image does, that is so for infinities, too."""
    x, grid, mode, padding, aligned = step.node.args
    value: torch.Tensor = grid.meta["val"]  # type: ignore[union-attr]
    if value.dim() != 4 or mode not in (0, 1) or (mode, padding) == (1, 0):
        return
    is_finite = step(_aten.lt.Scalar, step(_aten.abs.default, grid), math.inf)
    if padding == 0:
        both = step(_aten.logical_not.default, step(_aten.all.dim, is_finite, -1))
        y = step(step.node.target, x, grid, mode, padding, aligned)
        step.replace(step(_aten.masked_fill.Scalar, y, step(_aten.unsqueeze.default, both, 1), math.nan))
        return
    lost = step(_aten.isnan.default, grid) if padding == 1 else step(_aten.logical_not.default, is_finite)
    # The first pixel's, by either way to align.
    step.replace(step(step.node.target, x, step(_aten.masked_fill.Scalar, grid, lost, -1.0), mode, padding, aligned))


def _multilabel_margin_loss(step: Steps, node: fx.Node) -> None:
    """Inductor adds to the loss what it reads where a list of labels has ended."""
    x, labels, *rest = node.args
    if not x.meta["val"].dim():  # type: ignore[union-attr]
        return
    ended = step(_aten.gt.Scalar, step(_aten.cumsum.default, step(_aten.lt.Scalar, labels, 0), -1), 0)
    of_labels = step(_aten.gather.default, x, -1, step(_aten.masked_fill.Scalar, labels, ended, 0))
    # Of each label, and each class.
    apart = step(_aten.sub.Tensor, step(_aten.unsqueeze.default, x, -2), step(_aten.unsqueeze.default, of_labels, -1))
    terms = step(_aten.clamp_min.default, step(_aten.add.Scalar, apart, 1), 0)
    classes = step(_aten.cumsum.default, step(_aten.ones_like.default, labels), -1)
    label = step(_aten.add.Scalar, step(_aten.masked_fill.Scalar, labels, ended, -1), 1)
    same = step(_aten.eq.Tensor, step(_aten.unsqueeze.default, label, -1), step(_aten.unsqueeze.default, classes, -2))
    none = step(_aten.logical_or.default, step(_aten.any.dim, same, -2, True), step(_aten.unsqueeze.default, ended, -1))
    loss = step(_aten.sum.dim_IntList, step(_aten.masked_fill.Scalar, terms, none, 0), [-2])
    loss = step(_aten.mean.dim, loss, [-1])
    reduction = rest[0] if rest else 1
    step.replace(loss if not reduction else step((_aten.mean if reduction == 1 else _aten.sum).default, loss))
