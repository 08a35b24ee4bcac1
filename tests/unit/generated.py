"""Small models, made up at random, and the comparison of an engine with eager on them.

A model is a list of Python lines, each of which ran in eager when it was chosen; so every model is valid, and its text
is its reproduction. :func:`make` takes any ``random.Random``: hypothesis' own for tests, one from a seed elsewhere.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import anabranch
from anabranch._judge import Rounding, differences

Pair = namedtuple("Pair", "left right")

# -- operators --------------------------------------------------------------------------------------------------------
#
# A template's letters in braces stand for values that there are so far and for numbers:
#   t: a real tensor, f: floating point, i: int64, b: bool, c: complex, a: any;
#   o: floating point that may be written in place, oi: int64 likewise; m: a tensor of the first one's shape and dtype
#   s: a number, p: a positive one, k: a small integer, d, e: dimensions of the first tensor, n: an index of dimension d
#   sh: a shape that the first tensor can be viewed as

_SMOOTH = [
    "torch.sin",
    "torch.cos",
    "torch.tanh",
    "torch.sigmoid",
    "torch.atan",
    "torch.asinh",
    "torch.erf",
    "torch.erfc",
    "torch.square",
    "torch.abs",
    "torch.neg",
    "torch.positive",
    "torch.deg2rad",
    "torch.rad2deg",
    "torch.sinc",
    "F.relu",
    "F.relu6",
    "F.silu",
    "F.mish",
    "F.softsign",
    "F.tanhshrink",
    "F.logsigmoid",
    "F.elu",
    "F.selu",
    "F.celu",
    "F.hardtanh",
    "F.hardswish",
    "F.hardsigmoid",
    "F.leaky_relu",
    "F.softplus",
    "F.gelu",
    "torch.nan_to_num",
    "torch.exp2",
    "torch.i0",
    "torch.special.ndtr",
    "torch.special.i0e",
    "torch.special.i1e",
    "torch.special.log_ndtr",
    "F.softshrink",
]

_ROUGH = [
    "torch.exp",
    "torch.expm1",
    "torch.log",
    "torch.log2",
    "torch.log10",
    "torch.log1p",
    "torch.sqrt",
    "torch.rsqrt",
    "torch.reciprocal",
    "torch.tan",
    "torch.sinh",
    "torch.cosh",
    "torch.acos",
    "torch.asin",
    "torch.acosh",
    "torch.atanh",
    "torch.lgamma",
    "torch.digamma",
    "torch.erfinv",
    "torch.logit",
    "torch.special.entr",
    "torch.special.i1",
    "torch.special.erfcx",
    "torch.floor",
    "torch.ceil",
    "torch.round",
    "torch.trunc",
    "torch.frac",
    "torch.sign",
    "torch.sgn",
    "F.hardshrink",
]

_ANY_UNARY = ["torch.isnan", "torch.isfinite", "torch.isinf", "torch.signbit", "torch.logical_not", "torch.isneginf"]

#: Whose results are as good as exact, or vary little where their inputs do: compiled kernels may round otherwise.
STABLE: list[str] = [
    *(f"{name}({{f}})" for name in _SMOOTH),
    "F.gelu({f}, approximate='tanh')",
    "torch.sqrt(torch.abs({f}) + 1)",
    "torch.log(torch.abs({f}) + 1.5)",
    "torch.rsqrt(torch.square({f}) + {p})",
    "torch.exp(-torch.abs({f}))",
    "torch.add({t}, {t})",
    "torch.add({t}, {t}, alpha={k})",
    "torch.sub({f}, {t}, alpha={s})",
    "torch.rsub({t}, {s})",
    "torch.mul({t}, {t})",
    "{t} * {s}",
    "{s} - {t}",
    "{t} / {p}",
    "torch.div({t}, {p})",
    "torch.div({i}, {k}, rounding_mode='floor')",
    "torch.div(other={k}, rounding_mode='trunc', input={i})",
    "{i} // {k}",
    "{i} % {k}",
    "torch.fmod({i}, {k})",
    "torch.maximum({t}, {t})",
    "torch.minimum({t}, {t})",
    "torch.fmax({f}, {f})",
    "torch.fmin({f}, {f})",
    "torch.hypot({f}, {m})",
    "torch.copysign({f}, {s})",
    "torch.lerp({f}, {m}, {p})",
    "torch.addcmul({f}, {m}, {m}, value={s})",
    "torch.logaddexp({f}, {m})",
    "torch.where({b}, {t}, {t})",
    "torch.where({b}, {t}, {s})",
    "torch.where({b}, {s}, {t})",
    "torch.where({b}, {s}, {s})",
    "torch.clamp({t}, min=-{p}, max={p})",
    "torch.clamp(max={p}, input={f})",
    "{t}.clamp({s})",
    "torch.clamp_min({t}, {s})",
    "torch.logical_and({b}, {t})",
    "torch.logical_or({b}, {b})",
    "torch.logical_xor({b}, {b})",
    "{b} & {b}",
    "{b} | {i}",
    "~{b}",
    "~{i}",
    "{i} & {k}",
    "{i} ^ {i}",
    "{i} << {k}",
    "{i} >> {k}",
    "torch.gcd({i}, {i})",
    "{i} == {i}",
    "{i} > {s}",
    "torch.eq({i}, {s})",
    "torch.ge({i}, {i})",
    "{b} != {b}",
    *(f"{name}({{i}})" for name in ("torch.abs", "torch.neg", "torch.sign", "torch.square")),
    # reductions
    "torch.sum({t})",
    "{t}.sum({d})",
    "{t}.sum(dim={d}, keepdim=True)",
    "{t}.sum(({d},), dtype=torch.float64)",
    "{f}.mean()",
    "{f}.mean(keepdim=True, dim={d})",
    "{t}.amax({d})",
    "{t}.amin({d}, keepdim=True)",
    "torch.max({t}, {d})[0]",
    "torch.min({i}, {d}).indices",
    "torch.aminmax({t})",
    "{i}.argmax({d})",
    "{i}.argmin()",
    "{b}.any()",
    "{t}.all({d})",
    "torch.count_nonzero({i}, {d})",
    "torch.logsumexp({f}, {d})",
    "torch.linalg.vector_norm({f})",
    "{t}.cumsum({d})",
    "torch.cumsum({i}, {d}, dtype=torch.float32)",
    "{i}.cummax({d})[0]",
    "{i}.sort({d}, stable=True)",
    "torch.argsort({i}, dim={d}, stable=True)",
    "{i}.topk(1, {d})[0]",
    "torch.diff({t}, dim={d})",
    "torch.var({f}, {d}, correction=0)",
    "torch.var_mean({f}, dim={d}, correction=0)",
    # views
    "{a}.t()",
    "{a}.mT",
    "{a}.transpose({d}, {e})",
    "{a}.permute(*reversed(range({a0}.ndim)))",
    "{a}.reshape({sh})",
    "{a}.view({sh})",
    "{a}.flatten()",
    "{a}.flatten({d})",
    "{a}.ravel()",
    "{a}.unsqueeze({d})",
    "{a}.squeeze()",
    "{a}.squeeze({d})",
    "{a}.expand(2, *{a0}.shape)",
    "{a}.expand_as({m})",
    "torch.broadcast_to({a}, (3, *{a0}.shape))",
    "{a}.narrow({d}, {n}, 1)",
    "{a}.select({d}, {n})",
    "{a}[{n}]",
    "{a}[..., {n}:]",
    "{a}[..., ::2]",
    "{a}[None]",
    "{a}[:, None]",
    "{a}.diagonal()",
    "{a}.diagonal(offset=1, dim1={d}, dim2={e})",
    "{a}.unfold({d}, 1, 1)",
    "{a}.unfold({d}, 2, 1)",
    "{a}.split(1, {d})[0]",
    "{a}.chunk(2, {d})[-1]",
    "{a}.unbind({d})[0]",
    "torch.tensor_split({a}, 2, {d})",
    "{a}.movedim({d}, {e})",
    "torch.swapaxes({a}, {d}, {e})",
    "torch.atleast_2d({a})",
    "{a}.unflatten({d}, (1, -1))",
    "{a}.detach()",
    "{a}.contiguous()",
    "{a}.to(memory_format=torch.contiguous_format)",
    "{f}.view(torch.int32)",
    "{i}.view(torch.float64)",
    "{i}.view(torch.int32)",
    "{a}.clone()",
    "{a}.clone(memory_format=torch.contiguous_format)",
    # moving elements
    "torch.cat([{t}, {m}], {d})",
    "torch.cat(({t}, {t}), dim={d})",
    "torch.stack([{a}, {m}], {d})",
    "torch.hstack(({a}, {m}))",
    "torch.vstack(({a}, {m}))",
    "{a}.repeat(2, *[1] * {a0}.ndim)",
    "torch.tile({a}, (2,))",
    "{a}.repeat_interleave(2, {d})",
    "{a}.flip({d})",
    "torch.roll({a}, 1, {d})",
    "torch.rot90({a})",
    "torch.tril({t})",
    "torch.triu({a}, 1)",
    "torch.diag_embed({t})",
    "torch.diag({t})",
    "F.pad({t}, (1, 2), value={s})",
    "F.pad({f}, (1, 0), mode='replicate')",
    "torch.outer({t}.flatten(), {t}.flatten())",
    "torch.kron({t}, {t})",
    "torch.meshgrid({t}.flatten(), {t}.flatten(), indexing='ij')",
    "torch.index_select({a}, {d}, torch.tensor([{n}, 0]))",
    "torch.gather({t}, {d}, torch.zeros_like({t0}, dtype=torch.int64))",
    "torch.take({t}, {i} % {t0}.numel())",
    "{a}[{i} % {a0}.shape[0]]",
    "{a}[..., {i} % {a0}.shape[-1]]",
    "{t}.masked_fill({b}, {s})",
    "torch.index_fill({t}, {d}, torch.tensor([{n}]), {k})",
    "torch.index_add({t}, {d}, torch.tensor([0]), {t0}.narrow({d}, 0, 1))",
    "torch.scatter({t}, {d}, torch.zeros_like({t0}, dtype=torch.int64), {k})",
    "torch.scatter_add({t}, {d}, torch.zeros_like({t0}, dtype=torch.int64), {t0})",
    "torch.select_scatter({t}, {t0}.select({d}, 0) * 2, {d}, {n})",
    "torch.slice_scatter({t}, {t0}.narrow({d}, 0, 1), {d}, 0, 1)",
    "torch.index_put({t}, (torch.tensor([{n} * 0]),), torch.ones((), dtype={t0}.dtype))",
    "F.one_hot({i} % 3, 3)",
    "F.embedding({i} % 3, torch.arange(6.0).view(3, 2))",
    "torch.searchsorted(torch.arange(4), {i})",
    "torch.bucketize({i}, torch.arange(4))",
    "torch.isin({i}, torch.arange(3))",
    # products and layers
    "{f} @ {m}.mT",
    "torch.matmul({f}, {m}.flatten(0, -2).t())",
    "torch.bmm({f}.flatten(0, -3), {f0}.flatten(0, -3).mT)",
    "torch.einsum('...i,...i->...', {f}, {m})",
    "torch.tensordot({f}, {m}, dims=[[0], [0]])",
    "torch.addmm({f}, {f}.flatten(0, -2), {f}.flatten(0, -2).t(), beta={p})",
    "torch.dot({f}.flatten(), {m}.flatten())",
    "F.linear({f}, torch.ones(2, {f0}.shape[-1], dtype={f0}.dtype))",
    "self.layer({f}.flatten()[:3].float())",
    "self.weight + {f}",
    "self.weight",
    "self.table[{i} % 3]",
    "F.conv1d({f}.flatten().view(1, 1, -1), torch.ones(2, 1, 2, dtype={f0}.dtype), padding=1)",
    "F.conv2d({f}.flatten().view(1, 1, 1, -1), torch.ones(2, 1, 1, 1, dtype={f0}.dtype))",
    "F.avg_pool1d({f}.flatten().view(1, 1, -1), 2, padding=1)",
    "F.max_pool1d({f}.flatten().view(1, 1, -1), 1)",
    "F.adaptive_avg_pool1d({f}.flatten().view(1, 1, -1), 2)",
    "F.layer_norm({f}, {f0}.shape[-1:], eps=0.1)",
    "F.group_norm({f}.flatten().view(1, 1, -1), 1, eps=0.1)",
    "F.softmax({f}, {d})",
    "F.log_softmax({f}, dim={d})",
    "F.softmax({f}, dim={d}, dtype=torch.float64)",
    "F.normalize({f}, dim={d}, eps=0.5)",
    "F.mse_loss({f}, {m})",
    "F.l1_loss({f}, {m}, reduction='none')",
    "F.smooth_l1_loss({f}, {m})",
    "F.huber_loss({f}, {m}, reduction='sum')",
    "F.glu(torch.cat([{f}, {f0}], -1))",
    "F.interpolate({f}.flatten().view(1, 1, -1), scale_factor=2)",
    "F.prelu({f}, torch.tensor(0.2, dtype={f0}.dtype))",
    # Of a lazy negative the product is taken otherwise in eager, and rounds otherwise.
    "F.scaled_dot_product_attention(*[{f}.flatten().resolve_neg().view(1, 1, -1, 1)] * 3)",
    # new tensors
    "torch.zeros_like({a})",
    "torch.ones_like({t}, dtype=torch.float64)",
    "torch.full_like({t}, {k})",
    "{t}.new_zeros((2, 1))",
    "{t}.new_full((3,), {k})",
    "torch.arange({k})",
    "torch.arange(0, {p}, 0.25)",
    "torch.linspace(0, {p}, 3)",
    "torch.eye(2)",
    "torch.full((2, 1), {s})",
    "torch.tensor([{s}, {s}])",
    "torch.scalar_tensor({s})",
    # types
    "{t}.float()",
    "{t}.double()",
    "{b}.long()",
    "{i}.int()",
    "{i}.bool()",
    "{t}.to(torch.float64)",
    "{t}.to(dtype=torch.float32, copy=True)",
    "{t}.type_as({f})",
    "{i}.to(torch.uint8)",
    "{f}.to({f0}.dtype)",
    "torch.complex({f}, {m})",
    "{c}.real",
    "{c}.imag",
    "{c}.conj()",
    "{c}.mH",
    "{c} * {s}",
    "{c} + {c}",
    "torch.view_as_real({c}.resolve_conj())",
    "{c}.conj().resolve_conj()",
    "{c}.conj().imag",
    "torch.abs({c})",
    "torch.fft.fft({f})",
    "torch.fft.rfft({f}, dim={d})",
    "torch.fft.irfft({c}, n=4)",
    "torch.fft.fftshift({a})",
]

#: As they are in eager, bit for bit, where the same kernels run.
ROUGH: list[str] = [
    *(f"{name}({{f}})" for name in _ROUGH),
    *(f"{name}({{t}})" for name in _ANY_UNARY),
    "torch.div({t}, {t})",
    "torch.div({t}, {t}, rounding_mode='floor')",
    "{t} // {s}",
    "{t} % {s}",
    "torch.remainder({t}, {t})",
    "torch.fmod({f}, {s})",
    "torch.pow({f}, {k})",
    "torch.pow({f}, {s})",
    "{s} ** {f}",
    "torch.float_power({t}, 2)",
    "torch.atan2({f}, {m})",
    "torch.nextafter({f}, {m})",
    "torch.ldexp({f}, {i})",
    "torch.xlogy({f}, {m})",
    "torch.addcdiv({f}, {m}, {m})",
    "torch.heaviside({f}, {m})",
    "torch.round({f}, decimals=1)",
    "{t} < {t}",
    "{t} >= {s}",
    "torch.isclose({f}, {m})",
    "{t}.prod({d})",
    "{f}.std({d})",
    "torch.std_mean({f})",
    "{f}.median({d})",
    "{f}.nanmedian()",
    "{t}.mode({d})[0]",
    "{f}.kthvalue(1, {d})",
    "{f}.sort({d}, descending=True)",
    "{f}.argmax({d})",
    "{f}.topk(1, {d})",
    "{f}.cumprod({d})",
    "{f}.logcumsumexp({d})",
    "{f}.cummin({d})",
    "torch.nansum({f})",
    "torch.nanmean({f}, {d})",
    "torch.quantile({f}.float(), 0.5)",
    "torch.trapezoid({f}, dim={d})",
    "{f}.to(torch.int64)",
    "{f}.half()",
    "{f}.bfloat16()",
    "{f}.int()",
    "{t}.bool()",
    "torch.angle({c})",
    "torch.sgn({c})",
    "{c} / {c}",
    "torch.polar({f}, {m})",
    "F.cosine_similarity({f}, {m}, dim={d})",
    "torch.cdist({f}.flatten(0, -2), {f0}.flatten(0, -2))",
    "torch.norm({f})",
    "torch.linalg.norm({f}.flatten())",
    "torch.histc({f}, 3, -1, 1)",
]

#: Lines that write in place: to a temporary, or to a view of one.
WRITES: list[str] = [
    "{o}.add_({s})",
    "{o}.add_({t}, alpha=2)",
    "{o}.mul_({m})",
    "{o} *= {s}",
    "{o} += {f}",
    "{o}.sub_({s})",
    "{o}.div_({p})",
    "{o}.neg_()",
    "{o}.relu_()",
    "{o}.clamp_(-{p}, {p})",
    "{o}.tanh_()",
    "{o}.zero_()",
    "{o}.fill_({s})",
    "{o}.copy_({f})",
    "{o}.lerp_({m}, 0.25)",
    "{o}.addcmul_({m}, {m}, value={s})",
    "{o}.masked_fill_({b}, {s})",
    "{o}[{n}] = {s}",
    "{o}[..., 0] += {s}",
    "{o}[..., ::2] = {s}",
    "{o}[{n}].mul_(2)",
    "{o}.t().add_({s})",
    "{o}.diagonal().fill_({s})",
    "{o}.unsqueeze(0)[0].sub_({s})",
    "{o}.index_fill_({d}, torch.tensor([{n}]), {s})",
    "{o}.index_add_({d}, torch.tensor([0]), {o0}.narrow({d}, 0, 1).clone())",
    "{o}.scatter_({d}, torch.zeros_like({o0}, dtype=torch.int64), {s})",
    "{o}.cumsum_({d})",
    "{o}.triu_()",
    "{o}.fill_diagonal_({s})",
    "{o}.transpose_({d}, {e})",
    "{o}.unsqueeze_({d})",
    "{o}.squeeze_()",
    "{o}.t_()",
    "{oi}.add_({k})",
    "{oi}.bitwise_and_({k})",
    "{oi}[{n}] = {k}",
    "{oi}.mul_({m})",
    "torch.mul({f}, {m}, out=torch.empty_like({f0}))",
]

#: What a model returns beside tensors.
EXTRAS = ["None", "3", "2.5", "'text'", "True", "torch.float16", "{a}.shape", "{a}.dtype", "{a}.ndim", "-0.0"]

_HOLE = re.compile(r"\{([a-z]+)(0?)\}")
_DTYPES = {
    "f": (torch.float32, torch.float32, torch.float32, torch.float64),
    "i": (torch.int64,),
    "b": (torch.bool,),
    "c": (torch.complex64,),
}
_LAYOUTS = ["dense"] * 6 + ["strided", "transposed", "expanded", "offset", "rows"]


@dataclass
class Input:
    """A tensor of a call: its values are new at each call."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    conj: bool = False

    def make(self, generator: torch.Generator) -> torch.Tensor:
        shape = self.shape
        if self.layout == "strided" and shape:
            x = self._dense((*shape[:-1], shape[-1] * 2), generator)[..., ::2]
        elif self.layout == "rows" and shape:
            x = self._dense((shape[0] * 2, *shape[1:]), generator)[::2]
        elif self.layout == "transposed" and len(shape) > 1:
            x = self._dense(tuple(reversed(shape)), generator).permute(*reversed(range(len(shape))))
        elif self.layout == "expanded" and shape:
            x = self._dense((1, *shape[1:]), generator).expand(shape)
        elif self.layout == "offset" and shape:
            x = self._dense((shape[0] + 1, *shape[1:]), generator)[1:]
        else:
            x = self._dense(shape, generator)
        return x.conj() if self.conj else x

    def _dense(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        if self.dtype is torch.bool:
            return torch.rand(shape, generator=generator) > 0.5
        if self.dtype is torch.int64:
            return torch.randint(0, 9, shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=self.dtype)


@dataclass
class Model:
    """A generated model: its inputs, its lines and what it returns."""

    seed: int
    inputs: dict[str, Input]
    keywords: list[str]
    lines: list[str] = field(default_factory=list)
    result: str = "None"

    @property
    def source(self) -> str:
        names = [n for n in self.inputs if n not in self.keywords]
        head = f"def forward(self{''.join(', ' + n for n in names)}{', **kw' if self.keywords else ''}):"
        body = [f"{n} = kw[{n!r}]" for n in self.keywords]
        return "\n    ".join([head, *body, *self.lines, f"return {self.result}"])

    def build(self) -> nn.Module:
        scope = dict(_SCOPE)
        exec(self.source, scope)
        return type("Generated", (_Base,), {"forward": scope["forward"]})().eval()

    def draw(self, seed: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Inputs with values of their own for each seed."""
        generator = torch.Generator().manual_seed(seed)
        made = {name: x.make(generator) for name, x in self.inputs.items()}
        return [x for n, x in made.items() if n not in self.keywords], {n: made[n] for n in self.keywords}


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.layer = nn.Linear(3, 2)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.weight = nn.Parameter(torch.randn(3, generator=generator))
        self.register_buffer("table", torch.randn(3, 2, generator=generator))


_SCOPE: dict[str, Any] = {"torch": torch, "F": F, "OrderedDict": OrderedDict, "Pair": Pair}


def make(rng: random.Random, seed: int = 0, stable: bool = False) -> Model:
    """A model of up to a dozen lines. ``stable``: of operators whose rounding does not grow."""
    return _Maker(rng, seed, stable).made()


class _Maker:
    def __init__(self, rng: random.Random, seed: int, stable: bool) -> None:
        self.rng, self.stable = rng, stable
        base = [rng.choice([1, 2, 3, 4]) for _ in range(rng.choice([1, 2, 2, 3]))]
        inputs: dict[str, Input] = {}
        for i in range(rng.choice([1, 2, 2, 3])):
            kind = "f" if i == 0 else rng.choice("ffiibc")
            shape = tuple(base[rng.choice([0, 0, 0, 1]) :]) if i else tuple(base)
            shape = tuple(n if rng.random() < 0.85 else 1 for n in shape)
            if rng.random() < 0.04:
                shape = rng.choice([(), (0,), (0, 3)])
            inputs[f"x{i}"] = Input(
                shape, rng.choice(_DTYPES[kind]), rng.choice(_LAYOUTS), kind == "c" and rng.random() < 0.4
            )
        keywords = [n for n in inputs if n != "x0" and rng.random() < 0.3]
        rng.shuffle(keywords)
        self.model = Model(seed, inputs, keywords)
        args, kwargs = self.model.draw(1)
        positional = [n for n in inputs if n not in keywords]
        self.env: dict[str, Any] = {**dict(zip(positional, args, strict=True)), **kwargs}
        self.own: set[str] = set()
        self.scope = {**_SCOPE, "self": _Base()}
        self.foreign = {x.untyped_storage()._cdata for x in self.env.values()}
        self.foreign |= {p.untyped_storage()._cdata for p in self.scope["self"].state_dict().values()}

    def made(self) -> Model:
        rng = self.rng
        tables = [STABLE, STABLE, WRITES] if self.stable else [STABLE, STABLE, ROUGH, WRITES]
        for _ in range(rng.choice([2, 4, 6, 8, 10])):
            for _ in range(12):
                if self._step(rng.choice(rng.choice(tables))):
                    break
        self.model.result = self._result(2)
        return self.model

    # -- one line

    def _step(self, template: str) -> bool:
        line = self._filled(template)
        if line is None:
            return False
        writes = template in WRITES
        name = f"v{len(self.model.lines)}"
        if not writes or "out=" in template:
            line = f"{name} = {line}"
        scope = {**self.scope, **self.env}
        try:
            with torch.no_grad():
                exec(line, scope)
        except Exception:
            return False
        found = scope.get(name)
        if isinstance(found, tuple | list):  # several results: one of them goes on
            if not found or not all(isinstance(x, torch.Tensor) for x in found):
                return False
            found = found[-1]
            line = f"{line}[-1]"
        if found is not None:
            if not isinstance(found, torch.Tensor) or found.numel() > 4096 or found.ndim > 5:
                return False
            self.env[name] = found
            if found.untyped_storage()._cdata not in self.foreign:
                self.own.add(name)
        self.model.lines.append(line)
        return True

    def _filled(self, template: str) -> str | None:
        first: list[Any] = []
        names: list[str] = []
        dims: dict[str, int] = {}
        rng = self.rng

        def hole(match: re.Match[str]) -> str:
            kind, again = match.groups()
            if again:
                return names[0]
            if kind in ("t", "f", "i", "b", "c", "a", "o", "oi", "m"):
                name = self._tensor(kind, first[0] if first else None)
                names.append(name)
                first.append(self.env[name])
                return name
            ndim = first[0].ndim if first else 1
            if kind in ("d", "e"):
                dims.setdefault(kind, rng.randrange(max(ndim, 1)) - (ndim if ndim and rng.random() < 0.3 else 0))
                return str(dims[kind])
            if kind == "n":
                d = dims.get("d", 0)
                size = first[0].shape[d] if ndim else 1
                return str(rng.randrange(max(size, 1)))
            if kind == "sh":
                return str(self._shape(first[0].numel()))
            if kind == "k":
                return str(rng.choice([1, 2, 3]))
            if kind == "p":
                return rng.choice(["0.5", "1.5", "2", "3.0"])
            assert kind == "s", kind
            return rng.choice(["2", "-1", "0.5", "-0.0", "3", "1.25", "-2.5", "0"])

        try:
            return _HOLE.sub(hole, template)
        except LookupError:
            return None

    def _tensor(self, kind: str, like: Any) -> str:
        def fits(name: str, x: torch.Tensor) -> bool:
            if kind == "m":
                return like is not None and x.shape == like.shape and x.dtype == like.dtype
            if kind in ("o", "oi"):
                return name in self.own and (x.is_floating_point() if kind == "o" else x.dtype is torch.int64)
            return {
                "t": not x.is_complex(),
                "f": x.is_floating_point(),
                "i": x.dtype is torch.int64,
                "b": x.dtype is torch.bool,
                "c": x.is_complex(),
                "a": True,
            }[kind]

        found = [n for n, x in self.env.items() if fits(n, x)]
        if not found:
            raise LookupError(kind)
        return self.rng.choice(found[-4:] if self.rng.random() < 0.6 else found)

    def _shape(self, count: int) -> tuple[int, ...]:
        choices = [(-1,), (1, -1), (-1, 1), (count,)]
        choices += [(n, -1) for n in (2, 3, 4) if count % n == 0]
        return self.rng.choice(choices) if count else (0, 2)

    # -- what it returns

    def _result(self, depth: int) -> str:
        rng = self.rng
        if depth == 2 and rng.random() < 0.15:
            return self._value()
        count = rng.choice([1, 2, 3])
        parts = [self._result(depth - 1) if depth and rng.random() < 0.2 else self._value() for _ in range(count)]
        kind = rng.choice(["tuple", "list", "dict", "ordered", "pair"])
        if kind == "tuple":
            return f"({', '.join(parts)},)"
        if kind == "list":
            return f"[{', '.join(parts)}]"
        if kind == "pair":
            return f"Pair({parts[0]}, {parts[-1]})"
        keys = rng.sample(["z", "a", "m", "k"], len(parts))
        items = ", ".join(f"{k!r}: {p}" for k, p in zip(keys, parts, strict=True))
        return f"{{{items}}}" if kind == "dict" else f"OrderedDict({{{items}}})"

    def _value(self) -> str:
        rng = self.rng
        if rng.random() < 0.1:
            return self._filled(rng.choice(EXTRAS)) or "None"
        names = list(self.env)
        return rng.choice(names[-3:] if rng.random() < 0.6 else names)


# -- the comparison ---------------------------------------------------------------------------------------------------


class Batch(nn.Module):
    """Several models as one: what is compiled once serves them all."""

    def __init__(self, models: Sequence[Model]) -> None:
        super().__init__()
        self.models = nn.ModuleList(m.build() for m in models)

    def forward(self, calls: Any) -> Any:
        return [model(*args, **kwargs) for model, (args, kwargs) in zip(self.models, calls, strict=True)]


def compare(models: Sequence[Model], backend: str, runtime: str, calls: int = 2) -> list[str]:
    """What differs between an engine of these models and eager; empty where nothing does."""
    alone = len(models) == 1
    model = models[0].build() if alone else Batch(models).eval()

    def draw(k: int) -> tuple[list[Any], dict[str, Any]]:
        drawn = [m.draw(100 * k + i) for i, m in enumerate(models)]
        return drawn[0] if alone else ([drawn], {})

    args, kwargs = draw(0)
    engine = anabranch.compile(model, args, kwargs=kwargs, backend=backend, runtime=runtime)
    found: list[str] = []
    for k in range(1, calls + 1):
        args, kwargs = draw(k)
        try:
            with torch.no_grad():
                wanted: Any = model(*args, **kwargs)
        except Exception as e:
            wanted = e
        try:
            got: Any = engine(*args, **kwargs)
        except Exception as e:
            got = e
        if isinstance(wanted, RuntimeError) and "ZeroDivisionError" in str(wanted):
            continue  # whose result nobody used: an engine does not compute it
        if isinstance(wanted, Exception) or isinstance(got, Exception):
            if type(wanted) is not type(got):
                found.append(f"{type(got).__name__}: {got}; eager: {type(wanted).__name__}: {wanted}"[:600])
            continue
        shared = torch.utils._pytree.tree_leaves((args, kwargs))
        shared += model.state_dict(keep_vars=True).values()
        rounding = None if backend == "eager" else Rounding(least=1.0)
        found += differences(got, wanted, rounding=rounding, inputs=shared)
    return found


#: What PyTorch cannot export or Inductor cannot compile, and what is said of it. Later versions than 2.11 take an index
#: that is a tensor, ``quantile`` and ``split``.
REFUSED = {
    "a write into an expanded tensor": "writes into an expanded tensor",
    "a write into overlapping windows": "internal overlap",
    "fill_diagonal_ of a view": "as_strided() call",
    "a write into an expanded tensor, in PyTorch's words": "more than one element of the written-to tensor",
    "an index that is a tensor": "Could not extract specialized integer",
    "quantile": "aten.equal.default",
    "split of no elements": "list assignment index out of range",
    "unsqueeze_ of a constant": "num_mutated_inp_runtime_indices",
    "Inductor: no code for it": "Inductor could not compile the model",
    "Inductor: other strides than it expects": "incorrect fake (aka meta) kernel",
}


def refusal(model: Model, backend: str, runtime: str) -> tuple[str | None, list[str]]:
    """Of one model: why it is refused, if that is one of ``REFUSED``, and what differs if it is not."""
    try:
        return None, compare([model], backend, runtime)
    except (anabranch.UnsupportedModel, anabranch.BuildError) as e:
        known = next((why for why, text in REFUSED.items() if text in str(e)), None)
        return known, [] if known else [f"{type(e).__name__}: {e}"[:800]]
    except Exception as e:
        return None, [f"{type(e).__name__}: {e}"[:800]]


def compare_each(models: Sequence[Model], backend: str, runtime: str) -> tuple[Counter[str], dict[int, list[str]]]:
    """Compile models as one, or each by itself where that fails or differs. How many are refused, and why; and by seed
    what differs."""
    try:
        if not compare(models, backend, runtime):
            return Counter(), {}
    except Exception:
        pass  # the one that is at fault is found below
    refused: Counter[str] = Counter()
    found: dict[int, list[str]] = {}
    for model in models:
        why, what = refusal(model, backend, runtime)
        if why:
            refused[why] += 1
        if what:
            found[model.seed] = what
    if not refused and not found:
        found[models[0].seed] = ["differs only when it is compiled together with the nine that follow"]
    return refused, found


def shrunk(model: Model, fails: Callable[[Model], bool]) -> Model:
    """The model without the lines and the results that its failure does not need."""
    best = model
    for name in re.findall(r"\b[vx]\d+\b", model.result):
        simpler = dataclasses.replace(best, result=name)
        if fails(simpler):
            best = simpler
            break
    i = len(best.lines) - 1
    while i >= 0:
        simpler = dataclasses.replace(best, lines=best.lines[:i] + best.lines[i + 1 :])
        if fails(simpler):
            best = simpler
        i -= 1
    return best
