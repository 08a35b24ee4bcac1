"""Operators at the ends of the range: one model with all of them, and a strict comparison with eager's results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from anabranch._judge import Rounding
from anabranch.check._boundary import special_inputs

#: Each of an input of shape (2, 3, 8). None of them is random, and none needs an order of sums.
OPERATORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "neg": lambda x: -x,
    "abs": lambda x: x.abs(),
    "sign": lambda x: x.sign(),
    "relu": lambda x: x.relu(),
    "clamp": lambda x: x.clamp(-1, 1),
    "hardtanh": lambda x: F.hardtanh(x),
    "leaky_relu": lambda x: F.leaky_relu(x),
    "x + x": lambda x: x + x,
    "sums of neighbours": lambda x: x[..., ::2] + x[..., 1::2],
    "differences of neighbours": lambda x: x[..., ::2] - x[..., 1::2],
    "x * x": lambda x: x * x,
    "x * 0": lambda x: x * 0,
    "x * 2 / 2": lambda x: (x * 2) / 2,
    "x + x - x": lambda x: (x + x) - x,
    "x / x": lambda x: x / x,
    "1 / x": lambda x: 1 / x,
    "1 - x": lambda x: 1 - x,
    "x % 3": lambda x: x % 3,
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(-1),
    "prod": lambda x: x.prod(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "amax, amin": lambda x: (x.amax(-1), x.amin(-1)),
    "maximum": lambda x: torch.maximum(x, x.flip(-1)),
    "fmax": lambda x: torch.fmax(x, x.flip(-1)),
    "argmax": lambda x: x.argmax(-1),
    "sort": lambda x: x.sort(-1)[0],
    "topk": lambda x: x.topk(2, -1)[0],
    "exp": lambda x: x.exp(),
    "expm1": lambda x: x.expm1(),
    "log": lambda x: x.log(),
    "log1p": lambda x: x.log1p(),
    "sqrt": lambda x: x.sqrt(),
    "rsqrt": lambda x: x.rsqrt(),
    "x ** 2": lambda x: x**2,
    "x ** 3": lambda x: x**3,
    "|x| ** 0.5": lambda x: x.abs() ** 0.5,
    "x ** 0.5": lambda x: x**0.5,
    "x ** -0.5": lambda x: x**-0.5,
    "float_power": lambda x: torch.float_power(x, -0.5),
    "fmod": lambda x: (torch.fmod(x, 0.3), torch.fmod(x.flip(-1), x)),
    "remainder": lambda x: torch.remainder(x.flip(-1), x),
    "sums of squares": lambda x: (x * x).sum(-1),
    "sin": lambda x: x.sin(),
    "asinh": lambda x: x.asinh(),
    "acosh": lambda x: x.acosh(),
    "atanh": lambda x: x.atanh(),
    "atan": lambda x: x.atan(),
    "erf": lambda x: x.erf(),
    "sigmoid": lambda x: x.sigmoid(),
    "tanh": lambda x: x.tanh(),
    "gelu": lambda x: F.gelu(x),
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x),
    "softplus": lambda x: F.softplus(x),
    "elu": lambda x: F.elu(x),
    "mish": lambda x: F.mish(x),
    "hardswish": lambda x: F.hardswish(x),
    "hardsigmoid": lambda x: F.hardsigmoid(x),
    "logsigmoid": lambda x: F.logsigmoid(x),
    "softsign": lambda x: F.softsign(x),
    "softshrink": lambda x: F.softshrink(x),
    "celu": lambda x: F.celu(x, 1.5),
    "selu": lambda x: F.selu(x),
    "logit": lambda x: x.logit(1e-6),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "norm": lambda x: x.norm(dim=-1),
    "group_norm": lambda x: F.group_norm(x, 3),
    "instance_norm": lambda x: F.instance_norm(x),
    "var": lambda x: x.var(-1),
    "std, mean": lambda x: (*torch.var_mean(x, -1), x.std(-1)),
    "max_pool": lambda x: F.max_pool1d(x, 2),
    "avg_pool": lambda x: F.avg_pool1d(x, 2),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool1d(x, 3),
    "interpolate": lambda x: F.interpolate(x[:, None], scale_factor=2, mode="nearest"),
    "interpolate by lines": lambda x: F.interpolate(x[:, None], scale_factor=2, mode="bilinear"),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "where": lambda x: torch.where(x > 0, x, x * 0),
    "lerp": lambda x: torch.lerp(x, x.flip(-1), 0.25),
    "isnan, isinf, ==, <": lambda x: (x.isnan(), x.isinf(), x == x, x < 1),
    "floor, round, trunc": lambda x: (x.floor(), x.round(), x.trunc()),
    "nan_to_num": lambda x: x.nan_to_num(),
    "casts": lambda x: (x.float(), x.half(), x.bfloat16(), x.double()),
}


class Operators(nn.Module):
    """All of them, or those that are named; a dict of their results."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names or tuple(OPERATORS)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {name: OPERATORS[name](x) for name in self.names}


def found(engine: Callable[[torch.Tensor], Any], model: Operators, x: torch.Tensor) -> dict[str, set[str]]:
    """How the results of operators differ from eager's on inputs like ``x`` with special values, by operator."""
    result: dict[str, set[str]] = {}
    tried = list(special_inputs(x))
    assert len(tried) == 24
    for _, special in tried:
        actual, expected = engine(special), model(special)
        for name in model.names:
            if how := differing(actual[name], expected[name]):
                result.setdefault(name, set()).add(how)
    return result


def differing(actual: Any, expected: Any) -> str:
    """How an operator's results differ from eager's, in a word: ``"finite"`` where eager's are not, ``"not finite"``,
    where they are not finite in another way; ``"value"``; or nothing. The signs of zeros do not count."""
    found = ""
    for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        if not e.is_floating_point():
            found = found or ("" if torch.equal(a, e) else "value")
            continue
        if bool((a.isfinite() & ~e.isfinite()).any()):
            return "finite"
        if not torch.equal(_kind(a), _kind(e)):
            found = "not finite"
            continue
        finite = e.isfinite()
        off, top = ((v.double().abs().where(finite, 0.0)).amax() for v in (a.double() - e.double(), e))
        bound = Rounding().of(e.dtype) or Rounding().floor
        # Subnormal numbers of an input that is all subnormal are its values, not rounding.
        found = found or ("value" if off > bound * top else "")
    return found


def _kind(x: torch.Tensor) -> torch.Tensor:
    """0 of numbers, 1 and -1 of infinities, 2 of NaN."""
    return torch.where(x.isnan(), 2.0, torch.where(x.isinf(), x.sign().float(), 0.0))
