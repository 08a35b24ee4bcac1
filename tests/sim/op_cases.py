"""The operators that ``sim`` is held to, each a function of its inputs that is also run on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

FLOATS = (torch.float32, torch.bfloat16)
EXACT = (torch.float32, torch.float64)
NUMBERS = (torch.float32, torch.int64)
SINGLE = (torch.float32,)


@dataclass(frozen=True)
class Spec:
    """How an input is made: normal numbers in the case's dtype, or integers below `high`, or booleans."""

    shape: tuple[int, ...]
    kind: str = "number"
    high: int = 0
    change: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda t: t)

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        if self.kind == "bool":
            made = torch.rand(self.shape, generator=generator) > 0.5
        elif self.kind == "index":
            made = torch.randint(self.high, self.shape, generator=generator)
        elif dtype.is_floating_point:
            made = torch.randn(self.shape, generator=generator).to(dtype)
        else:
            made = torch.randint(-9, 10, self.shape, generator=generator).to(dtype)
        return made


def n(*shape: int, change: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> Spec:
    return Spec(shape, change=change)


def index(*shape: int, high: int) -> Spec:
    return Spec(shape, "index", high)


def mask(*shape: int) -> Spec:
    return Spec(shape, "bool")


def swapped(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(-1, -2)


def strided(t: torch.Tensor) -> torch.Tensor:
    return t[..., ::2]


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[..., Any]
    inputs: tuple[Spec, ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    waits: bool = False  # the host waits for the data, as on CUDA
    empty: bool = False  # nothing to run


CASES: list[Case] = []


def case(
    name: str,
    run: Callable[..., Any],
    *inputs: Spec,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    waits: bool = False,
    empty: bool = False,
) -> None:
    assert name not in {c.name for c in CASES}, name
    CASES.append(Case(name, run, inputs, dtypes, waits, empty))


# -- one element at a time ---------------------------------------------------------------------------------------------
for _name in [
    "abs",
    "ceil",
    "cos",
    "erf",
    "exp",
    "floor",
    "neg",
    "relu",
    "round",
    "sigmoid",
    "sign",
    "silu",
    "sin",
    "tanh",
    "trunc",
    "isnan",
    "logical_not",
    "square",
    "expm1",
]:
    case(_name, getattr(torch, _name, None) or getattr(F, _name), n(3, 5))
for _name in ["sqrt", "log", "log2", "rsqrt", "reciprocal", "log1p"]:
    case(_name, lambda x, f=_name: getattr(torch, f)(x.abs() + 1), n(3, 5))
for _name in ["gelu", "elu", "hardswish", "leaky_relu", "softplus", "mish", "hardsigmoid", "logsigmoid"]:
    case(_name, getattr(F, _name), n(3, 5))
for _name in ["add", "sub", "mul", "div", "maximum", "minimum", "eq", "lt", "ge", "atan2", "fmod", "hypot"]:
    case(_name, getattr(torch, _name), n(3, 5), n(3, 5))
case("add alpha", lambda x, y: torch.add(x, y, alpha=3), n(3, 5), n(3, 5), dtypes=NUMBERS)
case("add broadcast", torch.add, n(3, 1, 5), n(4, 1), dtypes=NUMBERS)
case("add scalar", lambda x: x + 2 - 0.5 * x, n(3, 5))
case("add number of the host", lambda x: x + torch.tensor(2.5), n(3, 5))
case("add of two dtypes", lambda x, i: x + i, n(3, 5), index(3, 5, high=4))
case("mul transposed", torch.mul, n(5, 3, change=swapped), n(3, 5), dtypes=NUMBERS)
case("mul strided", torch.mul, n(3, 10, change=strided), n(3, 10, change=strided), dtypes=NUMBERS)
case("mul of nothing", torch.mul, n(0, 5), n(1, 5), empty=True)
case("pow", lambda x: x**2 + 2.0**x, n(3, 5))
case("clamp", lambda x: x.clamp(-0.5, 0.5), n(3, 5))
case("clamp by tensors", lambda x, y: torch.clamp(x, min=y), n(3, 5), n(5))
case("where", torch.where, mask(3, 5), n(3, 5), n(1, 5), dtypes=NUMBERS)
case("where with a number", lambda m, x: torch.where(m, x, 0.0), mask(3, 5), n(3, 5))
case("lerp", lambda x, y: torch.lerp(x, y, 0.3), n(3, 5), n(3, 5))
case("addcmul", lambda x, y, z: torch.addcmul(x, y, z, value=2), n(3, 5), n(3, 5), n(5), dtypes=NUMBERS)
case("nan_to_num", lambda x: (x / 0).nan_to_num(1.0), n(3, 5))
case("bitwise", lambda x, y: (x & y) | ~x, index(6, high=64), index(6, high=64), dtypes=SINGLE)
case("shift", lambda x: (x << 2) >> 1, index(6, high=64), dtypes=SINGLE)
case("to float64", lambda x: x.to(torch.float64), n(3, 5))
case("to bool", lambda x: x.bool(), n(3, 5), dtypes=NUMBERS)
case("complex", lambda x, y: torch.complex(x, y).conj() * 2j, n(4), n(4), dtypes=EXACT)
case("view_as_real", lambda x: torch.view_as_real(torch.view_as_complex(x) * 1j), n(4, 2), dtypes=EXACT)
case("copies of conjugates", lambda x, y: torch.complex(x, y).conj().clone(), n(4), n(4), dtypes=EXACT)

# -- views and shapes --------------------------------------------------------------------------------------------------
case("reshape", lambda x: x.reshape(4, 6) * 1, n(2, 3, 4), dtypes=NUMBERS)
case("reshape of a transpose", lambda x: x.reshape(6, 4), n(2, 4, 3, change=swapped), dtypes=NUMBERS)
case("permute", lambda x: x.permute(2, 0, 1).contiguous(), n(2, 3, 4), dtypes=NUMBERS)
case("slices", lambda x: x[1:, ::2, -1] + x[0, 0, 0], n(3, 4, 5), dtypes=NUMBERS)
case("unfold", lambda x: x.unfold(1, 3, 2) * 2, n(2, 9), dtypes=NUMBERS)
case("as_strided", lambda x: x.as_strided((3, 3), (2, 1), 1) + 1, n(12), dtypes=NUMBERS)
case("diagonal", lambda x: x.diagonal(1) * 2, n(4, 4), dtypes=NUMBERS)
case("expand", lambda x: x.expand(3, 2, 4).contiguous(), n(2, 4), dtypes=NUMBERS)
case("chunk", lambda x: [c * 2 for c in x.chunk(2, 1)], n(2, 6), dtypes=NUMBERS)
case("split", lambda x: torch.stack([c.sum() for c in x.split(2, 1)]), n(2, 6), dtypes=NUMBERS)
case("unbind", lambda x: torch.stack(x.unbind(1)), n(2, 3), dtypes=NUMBERS)
case("view as another dtype", lambda x: x.view(torch.int32) * 2, n(2, 4), dtypes=SINGLE)
case("unsafe_split", lambda x: [c * 2 for c in torch.unsafe_split(x, 2)], n(4, 3), dtypes=NUMBERS)
case("movedim, squeeze", lambda x: x.movedim(0, -1).unsqueeze(0).squeeze(1) + 1, n(3, 1, 4), dtypes=NUMBERS)
case("flatten", lambda x: x.flatten(1) + 1, n(2, 3, 4), dtypes=NUMBERS)
case("contiguous channels last", lambda x: x.contiguous(memory_format=torch.channels_last) + 1, n(2, 3, 4, 5))
case("cat", lambda x, y: torch.cat([x, y, x], 1), n(2, 3), n(2, 4), dtypes=NUMBERS)
case("cat with nothing", lambda x, y: torch.cat([x, y]), n(0, 3), n(2, 3), dtypes=NUMBERS)
case("stack", lambda x, y: torch.stack([x, y], -1), n(2, 3), n(3, 2, change=swapped), dtypes=NUMBERS)
case("flip", lambda x: x.flip(0, 1), n(3, 4), dtypes=NUMBERS)
case("roll", lambda x: x.roll((1, 2), (0, 1)), n(3, 4), dtypes=NUMBERS)
case("repeat", lambda x: x.repeat(2, 3), n(2, 2), dtypes=NUMBERS)
case("tile, repeat_interleave", lambda x: x.tile(2).repeat_interleave(2, 0), n(2, 2), dtypes=NUMBERS)
case("tril", lambda x: x.tril() + x.triu(1), n(4, 4), dtypes=NUMBERS)
case("pad", lambda x: F.pad(x, (1, 2, 0, 1), value=3.0), n(2, 3, 4))
case("pad reflecting", lambda x: F.pad(x, (1, 2), mode="reflect"), n(2, 3, 4))
case("pad replicating", lambda x: F.pad(x, (1, 2, 1, 0), mode="replicate"), n(1, 2, 3, 4))
case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), n(1, 8, 2, 3))
case("im2col", lambda x: F.unfold(x, 2), n(1, 2, 4, 4))
case("meshgrid", lambda x, y: list(torch.meshgrid(x * 1, y * 1, indexing="ij")), n(3), n(2), dtypes=NUMBERS)

# -- new tensors -------------------------------------------------------------------------------------------------------
case("like", lambda x: [torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 7)], n(2, 3), dtypes=NUMBERS)
case("new", lambda x: [x.new_zeros(3), x.new_full((2,), 3.0)], n(2, 3))
case("arange", lambda x: torch.arange(1, 9, 2, device=x.device, dtype=x.dtype), n(1), dtypes=NUMBERS)
case("linspace", lambda x: torch.linspace(0, 1, 5, device=x.device), n(1), dtypes=SINGLE)
case("eye", lambda x: torch.eye(3, 4, device=x.device), n(1), dtypes=SINGLE)
case("tril_indices", lambda x: torch.tril_indices(3, 4, device=x.device), n(1), dtypes=SINGLE)
case("hann_window", lambda x: torch.hann_window(8, device=x.device), n(1), dtypes=SINGLE)
case("one_hot", lambda i: F.one_hot(i, 5), index(4, high=5), dtypes=SINGLE, waits=True)

# -- reductions --------------------------------------------------------------------------------------------------------
for _name in ["sum", "mean", "prod", "amax", "amin", "std", "var", "logsumexp"]:
    case(f"{_name} of a dimension", lambda x, f=_name: getattr(torch, f)(x, dim=1), n(3, 5, 2))
for _name in ["sum", "mean", "max", "min", "std", "argmax", "median", "norm"]:
    case(f"{_name} of all", getattr(torch, _name), n(3, 5))
case("sum keeping dimensions", lambda x: x.sum((0, 2), keepdim=True), n(3, 5, 2), dtypes=NUMBERS)
case("sum of nothing", lambda x: x.sum(0), n(0, 3), dtypes=NUMBERS)
case("max of a dimension", lambda x: list(x.max(1)), n(3, 5), dtypes=NUMBERS)
case("aminmax", lambda x: [*torch.aminmax(x), *torch.aminmax(x, dim=0)], n(3, 5), dtypes=NUMBERS)
case("any, all", lambda m: [m.any(), m.all(1), m.any((0, 1))], mask(3, 5), dtypes=SINGLE)
case("cumsum", lambda x: x.cumsum(1), n(3, 5), dtypes=NUMBERS)
case("cumprod", lambda x: x.cumprod(0), n(3, 5))
case("cummax", lambda x: list(x.cummax(1)), n(3, 5), dtypes=NUMBERS)
case("logcumsumexp", lambda x: x.logcumsumexp(1), n(3, 5))
case("var_mean", lambda x: list(torch.var_mean(x, 1)), n(3, 5))
case("softmax", lambda x: x.softmax(-1), n(3, 5))
case("log_softmax", lambda x: x.log_softmax(0), n(3, 5))
case("count_nonzero", lambda m: m.count_nonzero(1), mask(3, 5), dtypes=SINGLE)
case("vector_norm", lambda x: torch.linalg.vector_norm(x, 1, dim=1), n(3, 5))
case("cdist", lambda x, y: torch.cdist(x, y), n(3, 5), n(4, 5), dtypes=EXACT)
case("histc", lambda x: torch.histc(x, 4, -2, 2), n(20), dtypes=EXACT)

# -- products of matrices ----------------------------------------------------------------------------------------------
case("mm", torch.mm, n(3, 4), n(4, 5))
case("mm transposed", torch.mm, n(4, 3, change=swapped), n(5, 4, change=swapped))
case("bmm", torch.bmm, n(2, 3, 4), n(2, 4, 5))
case("addmm", lambda b, x, y: torch.addmm(b, x, y, beta=0.5, alpha=2), n(5), n(3, 4), n(4, 5))
case("baddbmm", torch.baddbmm, n(2, 3, 5), n(2, 3, 4), n(2, 4, 5))
case("mv", torch.mv, n(3, 4), n(4))
case("dot", torch.dot, n(4), n(4))
case("matmul broadcast", torch.matmul, n(2, 1, 3, 4), n(5, 4, 2))
case("linear", F.linear, n(2, 3, 4), n(5, 4), n(5))
case("bilinear", F.bilinear, n(3, 4), n(3, 5), n(2, 4, 5), n(2))
case("einsum", lambda x, y: torch.einsum("abc,abd->cd", x, y), n(2, 3, 4), n(2, 3, 5))
case("outer, kron", lambda x, y: [torch.outer(x, y), torch.kron(x, y)], n(3), n(2), dtypes=NUMBERS)
case("mm of nothing", torch.mm, n(0, 4), n(4, 5), empty=True)
case("mm over nothing", torch.mm, n(3, 0), n(0, 5))

# -- linear algebra ----------------------------------------------------------------------------------------------------
case(
    "inv", lambda x: torch.linalg.inv_ex(x + 5 * torch.eye(4, device=x.device, dtype=x.dtype))[0], n(4, 4), dtypes=EXACT
)
case(
    "cholesky", lambda x: torch.linalg.cholesky_ex(x @ x.mT + torch.eye(4, device=x.device))[0], n(4, 4), dtypes=SINGLE
)
case(
    "cholesky with checks", lambda x: torch.linalg.cholesky(x @ x.mT + 4), n(2, 2), dtypes=(torch.float64,), waits=True
)
case("solve", lambda x, y: torch.linalg.solve_ex(x, y)[0], n(4, 4), n(4, 2), dtypes=EXACT)
case(
    "triangular_solve",
    lambda x, y: torch.linalg.solve_triangular(x.triu() + 3, y, upper=True),
    n(3, 3),
    n(3, 2),
    dtypes=EXACT,
)
case("qr", lambda x: torch.linalg.qr(x)[1].abs(), n(4, 3), dtypes=EXACT)
case("svd", lambda x: torch.linalg.svdvals(x), n(4, 3), dtypes=EXACT)
case("eigh", lambda x: torch.linalg.eigvalsh(x + x.mT), n(3, 3), dtypes=EXACT)
case("det", torch.linalg.det, n(3, 3), dtypes=EXACT)
case("fft", lambda x: torch.fft.rfft(x).abs(), n(3, 8), dtypes=EXACT)
case("fft there and back", lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real, n(4, 4), dtypes=EXACT)

# -- networks ----------------------------------------------------------------------------------------------------------
case("conv1d", lambda x, w: F.conv1d(x, w, padding=1), n(2, 3, 9), n(4, 3, 3))
case("conv2d", lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), n(2, 3, 8, 8), n(4, 3, 3, 3), n(4))
case("conv2d grouped", lambda x, w: F.conv2d(x, w, groups=2, dilation=2), n(1, 4, 9, 9), n(4, 2, 3, 3))
case(
    "conv2d channels last",
    F.conv2d,
    n(2, 3, 8, 8, change=lambda t: t.to(memory_format=torch.channels_last)),
    n(4, 3, 3, 3),
)
case("conv3d", F.conv3d, n(1, 2, 5, 5, 5), n(3, 2, 2, 2, 2))
case("conv_transpose2d", lambda x, w: F.conv_transpose2d(x, w, stride=2), n(1, 3, 4, 4), n(3, 2, 3, 3))
case("max_pool2d", lambda x: F.max_pool2d(x, 2), n(2, 3, 8, 8))
case("max_pool2d with indices", lambda x: list(F.max_pool2d(x, 3, 1, return_indices=True)), n(1, 2, 6, 6))
case("avg_pool2d", lambda x: F.avg_pool2d(x, 2, padding=1), n(2, 3, 8, 8))
case("adaptive pools", lambda x: [F.adaptive_avg_pool2d(x, 3), F.adaptive_max_pool2d(x, 2)], n(2, 3, 8, 8))
case("batch_norm", lambda x, w, b: F.batch_norm(x, b, w.abs(), w, b), n(2, 3, 4, 4), n(3), n(3))
case("batch_norm in training", lambda x, m, v: F.batch_norm(x, m, v, training=True), n(4, 3), n(3), n(3), dtypes=EXACT)
case("layer_norm", lambda x, w, b: F.layer_norm(x, (5,), w, b), n(3, 5), n(5), n(5))
case("native_layer_norm", lambda x: list(torch.native_layer_norm(x, (5,), None, None, 1e-5)), n(3, 5), dtypes=EXACT)
case("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), n(2, 4, 3, 3), n(4), n(4))
case("instance_norm", F.instance_norm, n(2, 4, 3, 3), dtypes=EXACT)
case("rms_norm", lambda x, w: F.rms_norm(x, (5,), w), n(3, 5), n(5))
case("attention", F.scaled_dot_product_attention, n(2, 2, 5, 4), n(2, 2, 6, 4), n(2, 2, 6, 4), dtypes=EXACT)
case("causal attention", lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), n(2, 2, 5, 4), dtypes=EXACT)
case("embedding", F.embedding, index(2, 3, high=7), n(7, 4))
case("embedding_bag", lambda i, w: F.embedding_bag(i, w, mode="sum"), index(2, 3, high=7), n(7, 4), dtypes=SINGLE)
case("interpolate nearest", lambda x: F.interpolate(x, scale_factor=2), n(1, 2, 3, 3))
case("interpolate bilinear", lambda x: F.interpolate(x, (5, 7), mode="bilinear"), n(1, 2, 3, 3))
case(
    "interpolate bicubic",
    lambda x: F.interpolate(x, (5, 7), mode="bicubic", antialias=True),
    n(1, 2, 8, 8),
    dtypes=EXACT,
)
case(
    "grid_sample",
    lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False),
    n(1, 2, 4, 4),
    n(1, 3, 3, 2),
    dtypes=EXACT,
)
case("glu", lambda x: F.glu(x), n(3, 6))
case("prelu", F.prelu, n(3, 4), n(4))
case("cross_entropy", F.cross_entropy, n(4, 6), index(4, high=6))
case("mse_loss", F.mse_loss, n(3, 4), n(3, 4))
case("binary_cross_entropy", lambda x, m: F.binary_cross_entropy_with_logits(x, m.to(x.dtype)), n(6), mask(6))
case(
    "kl_div",
    lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean"),
    n(3, 4),
    n(3, 4),
    dtypes=EXACT,
)
case(
    "lstm_cell",
    lambda *a: list(torch.lstm_cell(a[0], a[1:3], *a[3:])),
    n(2, 3),
    n(2, 4),
    n(2, 4),
    n(16, 3),
    n(16, 4),
    n(16),
    n(16),
    dtypes=EXACT,
)
case("gru_cell", torch.gru_cell, n(2, 3), n(2, 4), n(12, 3), n(12, 4), n(12), n(12), dtypes=EXACT)
case("dropout in evaluation", lambda x: F.dropout(x, 0.5, training=False) * 1, n(3, 5))
case("cosine_similarity", F.cosine_similarity, n(3, 5), n(3, 5), dtypes=EXACT)
case("affine_grid", lambda x: F.affine_grid(x, (1, 1, 4, 4), align_corners=False), n(1, 2, 3), dtypes=EXACT)

# -- indices -----------------------------------------------------------------------------------------------------------
case("gather", lambda x, i: x.gather(1, i), n(3, 5), index(3, 2, high=5), dtypes=NUMBERS)
case("take_along_dim", lambda x: x.take_along_dim(x.argsort(1), 1), n(3, 5))
case("index_select", lambda x, i: x.index_select(0, i), n(5, 3), index(4, high=5), dtypes=NUMBERS)
case("index", lambda x, i, j: x[i, :, j], n(5, 3, 4), index(6, high=5), index(6, high=4), dtypes=NUMBERS)
case("index of the host", lambda x: x[torch.tensor([2, 0])], n(5, 3), dtypes=NUMBERS, waits=True)
case("index by a mask", lambda x, m: x[m], n(3, 5), mask(3, 5), dtypes=NUMBERS, waits=True)
case("index_put", lambda x, i, v: x.index_put((i,), v), n(5, 3), index(2, high=5), n(2, 3), dtypes=NUMBERS)
case(
    "index_put adding",
    lambda x, i, v: x.index_put((i,), v, accumulate=True),
    n(5),
    index(7, high=5),
    n(7),
    dtypes=NUMBERS,
)
case(
    "index_put by a mask", lambda x, m: x.index_put((m,), x.new_tensor(3)), n(3, 5), mask(3), dtypes=NUMBERS, waits=True
)
case("index_add", lambda x, i, v: x.index_add(0, i, v), n(5, 3), index(4, high=5), n(4, 3), dtypes=NUMBERS)
case("index_fill", lambda x, i: x.index_fill(0, i, 7), n(5, 3), index(2, high=5), dtypes=NUMBERS)
case("scatter", lambda x, i, v: x.scatter(1, i.argsort(1), v), n(3, 5), index(3, 5, high=9), n(3, 5), dtypes=NUMBERS)
case("scatter_add", lambda x, i, v: x.scatter_add(1, i, v), n(3, 5), index(3, 4, high=5), n(3, 4), dtypes=NUMBERS)
case("scatter_reduce", lambda x, i, v: x.scatter_reduce(1, i, v, "amax"), n(3, 5), index(3, 4, high=5), n(3, 4))
case("masked_fill", lambda x, m: x.masked_fill(m, -math.inf), n(3, 5), mask(3, 5))
case("masked_select", lambda x, m: x.masked_select(m), n(3, 5), mask(3, 5), dtypes=NUMBERS, waits=True)
case("masked_scatter", lambda x, m, v: x.masked_scatter(m, v), n(3, 5), mask(3, 5), n(15), dtypes=NUMBERS)
case("nonzero", lambda m: m.nonzero(), mask(3, 5), dtypes=SINGLE, waits=True)
case("unique", lambda i: list(torch.unique(i, return_inverse=True)), index(20, high=6), dtypes=SINGLE, waits=True)
case("unique_consecutive", lambda i: torch.unique_consecutive(i), index(20, high=3), dtypes=SINGLE, waits=True)
case("bincount", lambda i: torch.bincount(i, minlength=4), index(20, high=6), dtypes=SINGLE, waits=True)
case(
    "repeat_interleave by a tensor",
    lambda x, i: x.repeat_interleave(i),
    n(4),
    index(4, high=3),
    dtypes=NUMBERS,
    waits=True,
)
case("sort", lambda x: list(x.sort(dim=1, descending=True, stable=True)), n(3, 9), dtypes=NUMBERS)
case("topk", lambda x: x.topk(3)[0], n(3, 9), dtypes=NUMBERS)
case("kthvalue", lambda x: x.kthvalue(2, 1)[0], n(3, 9), dtypes=NUMBERS)
case("argmin", lambda x: x.argmin(1), n(3, 9))
case("searchsorted", lambda x, y: torch.searchsorted(x.sort()[0], y), n(9), n(4), dtypes=NUMBERS)
case("bucketize", lambda x: torch.bucketize(x, torch.arange(-2.0, 2.0, device=x.device)), n(9), dtypes=SINGLE)
case("isin", lambda x, y: torch.isin(x, y), index(9, high=9), index(3, high=9), dtypes=SINGLE)
case("take", lambda x, i: x.take(i), n(3, 4), index(5, high=12), dtypes=NUMBERS)
case("put", lambda x, v: x.put(torch.arange(2, device=x.device), v), n(3, 4), n(2), dtypes=NUMBERS)
case("equal", lambda x, y: [torch.equal(x, y), torch.equal(x, x)], n(3), n(3), dtypes=NUMBERS, waits=True)
case("allclose", lambda x: torch.allclose(x, x + 1), n(3), waits=True)
case("item", lambda x: [x[1, 2].item(), bool(x[0, 0] > 0)], n(3, 5), dtypes=NUMBERS, waits=True)
case("tolist", lambda x: x.t().tolist(), n(3, 5), dtypes=NUMBERS, waits=True)


# -- in place ----------------------------------------------------------------------------------------------------------
def _through_views(x: torch.Tensor) -> torch.Tensor:
    x[1] += 3
    x[:, 2].mul_(2)
    x.t()[0].fill_(9)
    x[3, 3] = 5
    x[0, :2] = x[2, :2]
    x.diagonal().add_(1)
    return x


def _swap(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    x.copy_(y.t())
    y.zero_()
    return [x, y]


case("in place", lambda x, y: x.add_(y).mul_(2).relu_().clamp_(max=1), n(3, 5), n(5), dtypes=NUMBERS)
case("in place through views", _through_views, n(4, 4), dtypes=NUMBERS)
case("copy_ transposed", _swap, n(3, 4), n(4, 3), dtypes=NUMBERS)
case("in place with itself", lambda x: x.mul_(x), n(3, 5), dtypes=NUMBERS)
case("scatter_", lambda x, i: x.scatter_(1, i, 1.0), n(3, 5), index(3, 1, high=5))
case(
    "index_put_ through a view",
    lambda x, i, v: x[:, 1].index_put_((i,), v),
    n(5, 3),
    index(1, high=5),
    n(1),
    dtypes=NUMBERS,
)
case("masked_fill_", lambda x, m: x.masked_fill_(m, 0.5), n(3, 5), mask(3, 5))
case("setting by a mask", lambda x, m: x.__setitem__(m, 7) or x, n(3, 5), mask(3, 5), dtypes=NUMBERS)
case("addmm_", lambda x, y, z: x.addmm_(y, z), n(3, 5), n(3, 4), n(4, 5))
case("unsqueeze_, t_", lambda x: x.unsqueeze_(0).squeeze_(0).t_() + 1, n(3, 5), dtypes=NUMBERS)
case("cumsum_, sort of a part", lambda x: x[1].cumsum_(0), n(3, 5), dtypes=NUMBERS)
case("resize_", lambda x: x.resize_(2, 3), n(4, 5), dtypes=NUMBERS, empty=True)
case("resize_ larger", lambda x: x.clone().resize_(5, 2)[:2], n(2, 2), dtypes=NUMBERS)
case("set_", lambda x, y: x.set_(y) + 1, n(3), n(2, 5, change=swapped), dtypes=NUMBERS)


# -- out= --------------------------------------------------------------------------------------------------------------
def _out(f: Callable[..., Any], shape: tuple[int, ...] = (0,)) -> Callable[..., torch.Tensor]:
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        out = torch.empty(shape, device=inputs[0].device, dtype=inputs[0].dtype)
        f(*inputs, out=out)
        return out

    return run


case("out add", _out(torch.add), n(3, 5), n(5), dtypes=NUMBERS)
case("out of the right size", _out(torch.mul, (3, 5)), n(3, 5), n(5), dtypes=NUMBERS)
case("out mm", _out(torch.mm), n(3, 4), n(4, 5))
case("out cat", _out(lambda x, y, out: torch.cat([x, y], out=out)), n(3), n(4), dtypes=NUMBERS)
case("out softmax", _out(lambda x, out: torch.softmax(x, 1, out=out)), n(3, 4))
case("out index_select", _out(lambda x, i, out: torch.index_select(x, 0, i, out=out)), n(5, 3), index(2, high=5))
case("out masked_select", _out(torch.masked_select), n(3, 5), mask(3, 5), dtypes=NUMBERS, waits=True)
case("out nonzero", _out(torch.nonzero), index(9, high=3), dtypes=SINGLE, waits=True)

# -- lists -------------------------------------------------------------------------------------------------------------
case("foreach add", lambda x, y: torch._foreach_add([x, y], 2.0), n(3), n(4, 5))
case("foreach mul lists", lambda x, y: torch._foreach_mul([x, y], [y, x]), n(3), n(3), dtypes=NUMBERS)
case("foreach in place", lambda x, y: (torch._foreach_mul_([x, y], 3), [x, y])[1], n(3), n(4, 5), dtypes=NUMBERS)
case("foreach copy", lambda x, y: (torch._foreach_copy_([x], [y]), x)[1], n(3), n(3), dtypes=NUMBERS)
case("foreach norm", lambda x, y: torch._foreach_norm([x, y]), n(3), n(4, 5), dtypes=EXACT)
case(
    "foreach sqrt, lerp",
    lambda x, y: torch._foreach_lerp(torch._foreach_sqrt([x * x]), [y], 0.5),
    n(3),
    n(3),
    dtypes=EXACT,
)


def _sgd(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor) -> list[torch.Tensor]:
    torch._fused_sgd_(
        [p], [g], [m], weight_decay=0.1, momentum=0.9, lr=0.1, dampening=0.0, nesterov=False, maximize=False,
        is_first_step=False,
    )  # fmt: skip
    return [p, m]


case("fused sgd", _sgd, n(3), n(3), n(3), dtypes=EXACT)
