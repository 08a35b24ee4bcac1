"""Building TensorRT engines: for a GPU that is not here, with the real library. Running them is tested on a GPU."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import anabranch
from anabranch import models
from anabranch.backends import TF32
from anabranch.backends.tensorrt import Target, compile_program, library
from anabranch.backends.tensorrt import _builder as builder
from anabranch.backends.tensorrt import _compiler as compiler
from anabranch.backends.tensorrt import _rewrite as rewriting
from anabranch.backends.tensorrt._cache import Cache
from anabranch.backends.tensorrt._layout import Layout
from anabranch.backends.tensorrt._onnx import export, input_names
from anabranch.backends.tensorrt._partition import partition, why_not
from anabranch.backends.tensorrt._rewrite import rewrite
from anabranch.errors import BuildError, InputError
from anabranch.export import export_program
from contract.quantized import INT8, quantized_ops

_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
_ADA = Target((8, 9), ahead=True, tf32=TF32(products=True, convolutions=True, recurrent=True))


class Mixed(nn.Module):
    """Convolution and product around operators that ONNX, or TensorRT, does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.special.erfinv(torch.tanh(torch.relu(self.conv(x))) * 0.5)
        return self.linear(z.permute(0, 2, 3, 1)), z.median(1).values.double() * 2


def _slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def build(model: nn.Module, *inputs: torch.Tensor, cache: Cache, full: bool = False) -> Any:
    program = export_program(model.eval(), inputs, {})
    return compile_program(library(), program, _ADA, require_full=full, cache=cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One for all tests but those of the cache itself: what an earlier test has built need not be built again."""
    return Cache(tmp_path_factory.mktemp("shared") / "engines")


@pytest.fixture
def own_cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "engines")


@pytest.fixture(autouse=True)
def _equal_weights() -> None:
    torch.manual_seed(58)


@pytest.mark.parametrize("dtype", [torch.float16, _slow(torch.bfloat16), _slow(torch.float32)])
def test_a_network_becomes_one_engine(cache: Cache, dtype: torch.dtype) -> None:
    model = models.branches().to(dtype)
    x = torch.rand(1, 3, 64, 64).to(dtype).contiguous(memory_format=torch.channels_last)
    made = build(model.to(memory_format=torch.channels_last), x, cache=cache, full=True)
    assert not made.fallbacks
    assert len(made.engines) == 1
    assert made.flops[0] == made.flops[1] > 0
    (segment,) = made.partition.segments.values()
    assert segment.inputs[0].physical == (1, 64, 64, 3)  # no copy into another layout on the way in


@pytest.mark.parametrize(
    ("dtype", "tf32", "wide"),
    [(torch.float32, False, True), (torch.float32, True, False), (torch.float16, False, False)],
)
def test_what_would_be_computed_in_tf32_runs_elsewhere_and_is_told(
    cache: Cache, dtype: torch.dtype, tf32: bool, wide: bool
) -> None:
    target = dataclasses.replace(_ADA, tf32=TF32(products=tf32))
    for model, has in ((nn.Sequential(nn.Linear(8, 8), nn.ReLU()), True), (nn.GELU(), False)):
        program = export_program(model.to(dtype).eval(), (torch.rand(4, 8, dtype=dtype),), {})
        made = compile_program(library(), program, target, require_full=False, cache=cache)
        out = wide and has and not library().keeps_float32
        assert len(made.engines) == (0 if out else 1)
        text = "\n".join(made.report())
        assert ("aten.linear.default" in text and "products of float32 in TF32" in text) is out
        again = compile_program(library(), program, target, require_full=False, cache=cache)
        assert again.report()[1:] == made.report()[1:]
        assert again.reused == len(made.engines)
        if out:
            assert "aten.relu.default" in text
            with pytest.raises(BuildError, match=r"require_full=True.*set_float32_matmul_precision\('high'\)"):
                compile_program(library(), program, target, require_full=True, cache=cache)


def test_convolutions_and_products_are_allowed_each_by_itself(cache: Cache) -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    program = export_program(model.eval(), (torch.rand(2, 8, 8),), {})
    target = dataclasses.replace(_ADA, tf32=TF32(convolutions=True))
    made = compile_program(library(), program, target, require_full=False, cache=cache)
    whole = library().keeps_float32
    assert [f.op for f in made.fallbacks] == ([] if whole else ["aten.linear.default", "aten.relu.default"])
    assert [len(s.nodes) for s in made.partition.segments.values()] == [4 if whole else 2]


class Residual(nn.Module):
    """A normalization that no convolution can take up, one that it can, one of a result that is used twice, a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1, bias=bias) for bias in (False, True))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.norms[0](x))
        b = torch.relu(self.norms[1](self.first(a)))
        c = self.second(b)
        return torch.relu(self.norms[2](c) + c + x)


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("float32_statistics", [False, True])
def test_batch_norms_in_half_precision_become_part_of_the_engine(
    cache: Cache, dtype: torch.dtype, float32_statistics: bool
) -> None:
    model = Residual().to(dtype)
    if float32_statistics:
        model.norms.float()
    made = build(model, torch.rand(1, 8, 16, 16).to(dtype), cache=cache, full=True)
    assert not made.fallbacks
    assert len(made.engines) == 1


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folded_batch_norms_are_as_exact_as_pytorch(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(*(Residual() for _ in range(3))).to(dtype).eval(), torch.rand(1, 8, 16, 16).to(dtype)
    program = export_program(model, (x,), {})
    (segment,) = partition(program, {}).segments.values()
    folded = rewrite(segment.module)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        (mine,), theirs = folded(x), model(x)
    norms = [len(m.graph.find_nodes(op="call_function", target=_NORM)) for m in (segment.module, folded)]
    assert norms == [9, 6]
    assert (mine - exact).norm() < 1.25 * (theirs - exact).norm()


def test_bfloat16_becomes_one_engine(cache: Cache) -> None:
    made = build(models.upscaler().bfloat16(), torch.rand(1, 3, 32, 32).bfloat16(), cache=cache, full=True)
    assert len(made.engines) == 1


def test_what_is_refused_runs_in_between_and_is_named(cache: Cache) -> None:
    made = build(Mixed(), torch.rand(2, 3, 16, 16), cache=cache)
    reasons = {f.op: f.reason for f in made.fallbacks}
    assert set(reasons) == {
        "aten.special_erfinv.default",
        "aten.median.dim",
        "aten._to_copy.default",
        "aten.mul.Tensor",
    }
    assert "no ONNX for it" in reasons["aten.median.dim"]
    assert "float64" in reasons["aten.mul.Tensor"]  # the parser would take it, and compute in float32
    assert all("test_tensorrt.py" in f.source for f in made.fallbacks)
    assert made.flops[0] == made.flops[1] > 0
    again = build(Mixed(), torch.rand(2, 3, 16, 16), cache=cache)
    assert len(again.engines) == len(made.engines) == 2


def test_require_full_names_them(cache: Cache) -> None:
    with pytest.raises(BuildError, match=r"require_full=True.*aten\.median\.dim \(test_tensorrt\.py:\d+\)"):
        build(Mixed(), torch.rand(2, 3, 16, 16), cache=cache, full=True)


class Refused(nn.Module):
    """One operator without ONNX many times, one that the parser refuses, one type that TensorRT does not have."""

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for _ in range(5):
            x = torch.special.erfinv(x)
        x = torch.special.erfinv(x)
        x = torch.special.erfinv(x)
        return torch.special.erfinv(x), (i + 1) & 3, x.double() * 2


def test_refusals_are_grouped_by_reason_with_the_models_lines(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "anabranch.tensorrt"):
        made = build(Refused(), torch.rand(4), torch.arange(4), cache=cache)
    assert not caplog.records  # 64-bit integers need no warning
    _, *lines = made.report()
    line = r"\(test_tensorrt\.py:\d+\)"
    op = rf"aten\.special_erfinv\.default {line}"
    assert len(lines) == 3, lines
    (erfinv,) = (x for x in lines if "erfinv" in x)
    why = r"no ONNX for it: PyTorch has none for prims\.erf_inv\.default"
    assert re.fullmatch(rf"  not in TensorRT: {op} x5, {op}, {op} and 1 more: {why}", erfinv)
    assert any(re.search(rf"__and__\.Scalar {line}: TensorRT's parser does not take it: BitwiseAnd", x) for x in lines)
    assert any(re.search(rf"_to_copy\.default {line}, aten\.mul\.Tensor {line}: .* no float64", x) for x in lines)


def test_a_segment_that_is_refused_as_a_whole_names_the_models_lines(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compiler.build

    def refuse(library: Any, path: Path, wanted: Any, name: str, *rest: Any) -> bytes:
        if name:  # it is no trial of single operators
            raise builder.Rejected("TensorRT does not build it: too much")
        return real(library, path, wanted, name, *rest)

    monkeypatch.setattr(compiler, "build", refuse)
    where = r"test_tensorrt\.py:\d+"
    with pytest.raises(
        BuildError, match=rf"all from {where} to {where} together: TensorRT does not build it: too much"
    ):
        build(Two(), torch.rand(2, 8), cache=cache, full=True)


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x)
        return y * 2


def test_what_the_library_says_is_told_once_and_without_its_own_lines() -> None:
    assert (
        builder.said(
            [
                "Invalid Node - node_Div_5\nITensor::getDimensions: Error Code 4: API Usage Error (node_Div_5:"
                " ElementWiseOperation DIV must have same input types. But they are of types Float and BFloat16."
                " In validateTypes at /_src/optimizer/common/nodes/elementWiseNode.cpp:40)\n[checkMacros.cpp::"
                "catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/common/dispatch/"
                "checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime version))",
                "[elsewhere.cpp::f::1] out of memory",
                "[elsewhere.cpp::f::1] out of memory",
            ],
            ahead=True,
        )
        == "ElementWiseOperation DIV must have same input types. But they are of types Float and BFloat16;"
        " out of memory"
    )
    assert builder.said([]) == "no reason given"
    asks = "[checkMacros.cpp::catchCudaError::229] Error Code 1: Cuda Runtime (In catchCudaError at /_src/a.cpp:229)"
    assert builder.said([asks], ahead=True) == "this version needs a GPU to build it"
    assert "Cuda Runtime" in builder.said([asks])  # there is a GPU, then, and something is the matter with it


class Function(nn.Module):
    def __init__(self, function: Any, **constants: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, constant in constants.items():
            self.register_buffer(name, constant)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def exported(model: nn.Module, *inputs: torch.Tensor, folder: Path) -> tuple[Any, Any]:
    """The one segment of ``model``, and its ONNX."""
    program = export_program(model.eval(), inputs, {})
    reasons = {why_not(n) for n in program.module.graph.nodes if n.op == "call_function"}
    assert reasons <= {"", "it makes no tensor"}
    (segment,) = partition(program, {}).segments.values()
    path = export(
        segment.module, segment.inputs, segment.outputs, segment.example(torch.device("cpu")), folder / "m.onnx"
    )
    return segment, onnx.load(str(path))


def computed(model: nn.Module, *inputs: torch.Tensor, folder: Path) -> list[torch.Tensor]:
    """What the ONNX of ``model`` gives, by the definition of ONNX's operators."""
    segment, file = exported(model, *inputs, folder=folder)
    fed = dict(zip(input_names(len(inputs)), (x.numpy() for x in inputs), strict=True))
    results = ReferenceEvaluator(file).run(None, fed)
    return [
        torch.from_numpy(np.asarray(y)).permute(layout.inverse)
        for y, layout in zip(results, segment.outputs, strict=True)
    ]


_NAN = float("nan")
_MASK = torch.tensor([[True, False, True], [False] * 3, [True] * 3])
_ATTEND = nn.functional.scaled_dot_product_attention

_SPECIAL = torch.tensor([_NAN, float("inf"), -float("inf"), 0.5, -4.0, 7.0])
#: Of float16: the ends, a subnormal, and what has few digits beside 1.
_ENDS = torch.tensor([_NAN, float("inf"), 65504, -65504, 1.5e-5, -1.5e-5, 1e-3, -16, -float("inf")]).half()
_POOLED = torch.tensor([[*[-float("inf")] * 4, 1.0, _NAN, *[-float("inf")] * 3, -3e38, float("inf")]])

_AS_PYTORCH = {
    "maximum of NaN": (lambda _, x: torch.maximum(x, x.flip(0)), torch.tensor([1.0, _NAN, 3.0, 4.0])),
    "minimum of NaN": (lambda _, x: torch.minimum(x, x.flip(0)), torch.tensor([1.0, _NAN, 3.0, 4.0])),
    "max pooling of NaN": (lambda _, x: nn.functional.max_pool1d(x, 2), torch.tensor([[1.0, _NAN, 3.0, 4.0]])),
    "sign of NaN": (lambda _, x: torch.sign(x), torch.tensor([-2.0, _NAN, 0.0, 4.0])),
    "amax of all": (lambda _, x: x.amax() - x.amin(), torch.rand(2, 3)),
    "sum in float16": (lambda _, x: x.sum() + 1, torch.full((8,), 100.0).half()),
    # Not drawn: of some values the roundings of a product in float16 add up to more than is allowed.
    "sums in float16": (lambda _, x: (x.sum(1), x.cumsum(1), x.prod(1)), torch.linspace(0.5, 1, 16).view(2, 8).half()),
    "abs in float16": (lambda _, x: x.abs(), torch.tensor([-1.0, 2.0]).half()),
    "norm of large float16": (lambda _, x: x.norm(dim=1), torch.full((2, 8), 1000.0).half()),
    "logsumexp of large": (lambda _, x: x.logsumexp(1), torch.full((2, 8), 200.0)),
    "attention to nothing": (lambda m, x: _ATTEND(x, x, x, attn_mask=m.mask), torch.rand(1, 2, 3, 8)),
    "attention of heads that share": (
        lambda _, x: _ATTEND(x, x[:, ::2], x[:, 1::2] * 2, is_causal=True, enable_gqa=True),
        torch.rand(2, 4, 3, 8),
    ),
    "attention to -inf": (
        lambda m, x: _ATTEND(x, x, x, attn_mask=torch.zeros(3, 3).masked_fill(~m.mask, -torch.inf)),
        torch.rand(1, 2, 3, 8),
    ),
    "attention by a computed mask": (
        lambda m, x: _ATTEND(x, x, x, attn_mask=(x[0, 0, :, :3] < 2) & m.mask),
        torch.rand(1, 2, 3, 8),
    ),
    "integers divide as they do": (
        lambda _, i: (torch.div(i, 2, rounding_mode="trunc"), i % 3, torch.fmod(i, 3), i / 2),
        torch.tensor([-6, 0, 6, 9]),
    ),
    "64-bit integers": (lambda _, i: i * 3 + 1, torch.tensor([2**40, -(2**35)])),
    "float to integer": (lambda _, x: x.to(torch.int32), torch.tensor([-2.7, -0.5, 1.5, 2.7])),
    "a scalar in, and out": (lambda _, x: x * 2, torch.tensor(3.0)),
    "NaN stays": (lambda _, x: (nn.functional.hardsigmoid(x), nn.functional.hardswish(x)), _SPECIAL),
    "the roots of minus infinity": (lambda _, x: (x**-0.5, x**0.5), _SPECIAL),
    "hardswish of the largest": (lambda _, x: nn.functional.hardswish(x), torch.tensor([3.4e38, -3.4e38, 5e37])),
    "logarithms of nothing": (
        lambda _, x: (x.log_softmax(0), x.log_softmax(1), nn.functional.logsigmoid(x)),
        _ENDS.view(3, 3),
    ),
    "digits of small numbers": (lambda _, x: (x.log1p(), x.expm1()), _ENDS),
    "elu and its kind": (
        lambda _, x: (nn.functional.elu(x, 0.7), nn.functional.celu(x, 1.5), nn.functional.selu(x)),
        _ENDS,
    ),
    "gelu of the largest": (
        lambda _, x: (nn.functional.gelu(x), nn.functional.gelu(x, approximate="tanh")),
        _ENDS[~_ENDS.isinf()],  # of which the CPU's kernels make NaN on some machines
    ),
    "the largest of minus infinities": (lambda _, x: nn.functional.max_pool1d(x, 3, 2, 1), _POOLED),
}


@pytest.mark.parametrize("name", _AS_PYTORCH)
def test_onnx_computes_as_pytorch_does(tmp_path: Path, name: str) -> None:
    function, x = _AS_PYTORCH[name]
    model = Function(function, mask=_MASK)
    expected = model(x)
    for mine, theirs in zip(
        computed(model, x, folder=tmp_path),
        expected if isinstance(expected, tuple) else (expected,),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_onnx_has_gelu_of_infinity_as_gpus_have(tmp_path: Path) -> None:
    function, _ = _AS_PYTORCH["gelu of the largest"]
    x = torch.tensor([torch.inf, 1.0]).half()
    for y in computed(Function(function, mask=_MASK), x, folder=tmp_path):
        assert y[0] == torch.inf
        torch.testing.assert_close(y[1], torch.tensor(0.8412).half(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda _, x: nn.functional.avg_pool2d(x, 2, divisor_override=3), "ignores divisor_override"),
        (lambda _, x: torch.atan2(x, x), "turns NaN into 0"),
        (lambda _, x: (x / 0.1).to(torch.float8_e4m3fn).float(), "without clamp"),
        (lambda _, x: x.to(torch.int8).float(), "int8 in torch.ops.quantized_decomposed only"),
        (lambda _, x: nn.functional.avg_pool2d(x, 2), "divides before it adds"),
        *(
            (f, "leaves NaN out")
            for f in (lambda _, x: x.topk(2)[0], lambda _, x: x.argmax(-1), lambda _, x: x.sort()[0])
        ),
        *((f, "far apart") for f in (lambda _, x: x % 3, lambda _, x: torch.fmod(x, x.flip(0)))),
        (lambda _, x: x.logit(1e-6), "infinity of NaN"),
        (lambda _, x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear"), "infinities whose weight is 0"),
        (lambda _, x: nn.functional.interpolate(x, scale_factor=2, mode="bicubic"), "infinities whose weight is 0"),
    ],
)
def test_what_would_be_another_result_is_not_given_to_tensorrt(function: Any, reason: str) -> None:
    program = export_program(Function(function), (torch.rand(1, 3, 8, 8),), {})
    reasons = [why_not(n) for n in program.module.graph.nodes if n.op == "call_function"]
    assert any(reason in r for r in reasons), reasons


def test_results_of_another_type_than_pytorchs_are_refused(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "_WIDE", ())  # the exporter by itself makes float32 of it
    made = build(Function(lambda _, x: (x * 2).sum(1)), torch.rand(2, 8).half(), cache=cache)
    (refused,) = made.fallbacks
    assert refused.op == "aten.sum.dim_IntList"
    assert refused.reason == "TensorRT makes torch.float32[2] of output_0; expected torch.float16[2]"


def test_checks_of_types_are_no_results_of_an_engine(cache: Cache) -> None:
    model = Function(lambda _, x: torch.relu((x * 2).to(torch.float32) + 1))
    made = build(model, torch.rand(2, 8).half(), cache=cache, full=True)
    (segment,) = made.partition.segments.values()
    assert len(segment.outputs) == 1


# -- models of every day --------------------------------------------------------------------------------------------


class ResNet(nn.Module):
    """Basic blocks as in ResNet-18, of few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.blocks = nn.ModuleList([_basic(8, 8, 1), _basic(8, 16, 2)])
        self.shortcuts = nn.ModuleList([nn.Identity(), nn.Conv2d(8, 16, 1, stride=2, bias=False)])
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = torch.relu(block(x) + shortcut(x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def _basic(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Mobile(nn.Module):
    """An inverted residual of MobileNetV3: depthwise, squeeze and excitation, hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32), nn.Hardswish())
        self.depth = nn.Sequential(
            nn.Conv2d(32, 32, 5, padding=2, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depth(self.expand(x))
        return x + self.project(y * self.squeeze(y))


class Encoder(nn.Module):
    """A token encoder: embeddings, two layers, the mean of what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        padding = tokens == 0
        y = self.layers(self.embed(tokens), src_key_padding_mask=padding)
        return (y * ~padding[..., None]).sum(1) / (~padding).sum(1, keepdim=True)


_PICTURE = torch.rand(1, 3, 32, 32)
_EVERY_DAY = {
    **{
        name: (model.make, torch.rand(1, 3, 5) if name == "relu" else _PICTURE)
        for name, model in models.BUILTIN.items()
    },
    "resnet": (ResNet, _PICTURE),
    "mobile": (Mobile, torch.rand(1, 8, 16, 16)),
    "encoder": (Encoder, torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])),
}
_DTYPES = {"relu": [torch.float16, torch.bfloat16, torch.float32], "branches": [], "upscaler": [torch.float16]}
_ALSO = [torch.float16, torch.bfloat16]


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if dtype is torch.float16 else pytest.mark.slow)
        for name in _EVERY_DAY
        for dtype in _DTYPES.get(name, _ALSO)
    ],
)
def test_models_of_every_day_are_one_engine(cache: Cache, name: str, dtype: torch.dtype) -> None:
    make, x = _EVERY_DAY[name]
    made = build(make().to(dtype), x.to(dtype) if x.is_floating_point() else x, cache=cache, full=True)
    assert len(made.engines) == 1
    assert made.operators[0] == made.operators[1] > 0
    if name != "relu":
        assert made.flops[0] >= 0.95 * made.flops[1] > 0
        assert "100.0% of FLOPs" in made.report()[0]


# -- quantized models -----------------------------------------------------------------------------------------------

_FP8 = torch.float8_e4m3fn


def _weights(m: Any) -> torch.Tensor:
    return quantized_ops().dequantize_per_channel(m.weight, m.scales, m.zeros, 0, -127, 127, torch.int8)


def _pairs(m: Any, x: torch.Tensor) -> torch.Tensor:
    """As PT2E quantization writes it: pairs around what is to be int8, weights quantized ahead."""
    q = quantized_ops()
    x = q.dequantize_per_tensor(q.quantize_per_tensor(x, 0.01, 0, *INT8), 0.01, 0, *INT8)
    y = torch.relu(nn.functional.conv2d(x, _weights(m)))
    return q.dequantize_per_tensor(q.quantize_per_tensor(y, 0.02, 0, *INT8), 0.02, 0, *INT8)


def _narrow(m: Any, x: torch.Tensor) -> torch.Tensor:
    q = quantized_ops()
    x = q.dequantize_per_tensor(q.quantize_per_tensor(x, 0.1, 0, -8, 7, torch.int8), 0.1, 0, -8, 7, torch.int8)
    return nn.functional.conv2d(x, _weights(m))


def _fake(m: Any, x: torch.Tensor) -> torch.Tensor:
    """As a model after quantization-aware training has it."""
    x = torch.fake_quantize_per_tensor_affine(x, 0.01, 0, 0, 127)
    weight = torch.fake_quantize_per_channel_affine(m.float_weight, m.scales, m.int_zeros, 0, -127, 127)
    return nn.functional.conv2d(x, weight)


def _computed(m: Any, x: torch.Tensor) -> torch.Tensor:
    """With zero points that the model makes itself, of some of the channels' scales."""
    x = torch.fake_quantize_per_tensor_affine(x, 0.01, 0, -128, 127)
    weight = torch.fake_quantize_per_channel_affine(m.float_weight, m.scales[:8], m.zeros.int(), 0, -127, 127)
    return nn.functional.conv2d(x, weight)


def _float8(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = (x / 0.05).clamp(-448, 448).to(_FP8).to(x.dtype) * 0.05
    return nn.functional.linear(y, m.weight8.to(x.dtype) * 0.01)


def _quantized(function: Any) -> nn.Module:
    q = quantized_ops()
    weight, zeros = torch.randn(8, 3, 3, 3), torch.zeros(8, dtype=torch.int64)
    scales = weight.abs().amax((1, 2, 3)) / 127
    return Function(
        function,
        float_weight=weight,
        weight=q.quantize_per_channel(weight, scales, zeros, 0, -127, 127, torch.int8),
        scales=scales,
        zeros=zeros,
        int_zeros=zeros.int(),
        weight8=torch.randn(4, 8).div(0.01).clamp(-448, 448).to(_FP8),
    )


@pytest.fixture
def quantizes_ahead() -> None:
    if library().version.startswith("1.4."):
        pytest.skip("TensorRT-RTX 1.4 needs a GPU to build quantized networks")


@pytest.mark.usefixtures("seeded", "quantizes_ahead")
@pytest.mark.parametrize(
    ("function", "operators"),
    [
        (_pairs, ["QuantizeLinear", *["DequantizeLinear"] * 2, "Conv", "Relu", "QuantizeLinear", "DequantizeLinear"]),
        (_narrow, ["Clip", "QuantizeLinear", *["DequantizeLinear"] * 2, "Conv"]),
        (_fake, ["Clip", "QuantizeLinear", *["DequantizeLinear"] * 2, "Conv"]),
        (_computed, ["QuantizeLinear", *["DequantizeLinear"] * 2, "Conv"]),
        (_float8, ["QuantizeLinear", *["DequantizeLinear"] * 2, "Gemm"]),
    ],
)
def test_a_quantized_model_is_one_engine_with_its_quantizations(
    cache: Cache, tmp_path: Path, function: Any, operators: list[str]
) -> None:
    model, x = _quantized(function), torch.rand(4, 8) if function is _float8 else torch.rand(1, 3, 8, 8) * 2 - 1
    made = build(model, x, cache=cache, full=True)
    assert len(made.engines) == 1
    _, file = exported(model, x, folder=tmp_path)
    assert [n.op_type for n in file.graph.node] == operators
    (result,) = ReferenceEvaluator(file).run(None, {"input_0": x.numpy()})
    # Where a value lies between two steps of the quantization, which of them is chosen may differ.
    wrong = (torch.from_numpy(result) - model(x)).abs() > 1e-4
    assert wrong.float().mean() < 0.02


def _int8_linear(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, half = quantized_ops(), {"out_dtype": torch.float16}
    x = q.dequantize_per_tensor(q.quantize_per_tensor(x, 0.01, 0, *INT8), 0.01, 0, *INT8, **half)
    weight = q.dequantize_per_tensor(m.weight, 0.01, 0, *INT8, **half)
    return nn.functional.linear(x, weight)


@pytest.mark.usefixtures("quantizes_ahead")
@pytest.mark.parametrize("function", [_int8_linear, _float8])
def test_quantized_weights_of_a_half_precision_model_stay_so_in_the_engine(cache: Cache, function: Any) -> None:
    weight = torch.randint(-100, 100, (1024, 1024))
    model = Function(function, weight=weight.to(torch.int8), weight8=weight.to(_FP8))
    made = build(model, torch.rand(16, 1024).half(), cache=cache, full=True)
    (engine,) = made.engines.values()
    assert weight.numel() < len(engine) < 1.5 * weight.numel()  # a byte each


def test_quantizations_are_left_out_first_where_they_and_the_rest_do_not_go_together(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compiler.build

    def refuse(library: Any, path: Path, wanted: Any, name: str, *rest: Any) -> bytes:
        kinds = {n.op_type for n in onnx.load(str(path), load_external_data=False).graph.node}
        if {"Conv", "QuantizeLinear"} <= kinds and name:
            raise builder.Rejected("TensorRT does not build it: no such kernel")
        return b"" if "QuantizeLinear" in kinds else real(library, path, wanted, name, *rest)

    monkeypatch.setattr(compiler, "build", refuse)
    made = build(_quantized(_pairs), torch.rand(1, 3, 8, 8), cache=cache)
    assert {f.op.split(".")[0] for f in made.fallbacks} == {"quantized_decomposed"}
    assert made.flops[0] == made.flops[1] > 0


def test_a_zero_point_that_is_not_zero_is_named(cache: Cache) -> None:
    q = quantized_ops()
    function = lambda _, x: q.dequantize_per_tensor(q.quantize_per_tensor(x, 0.1, 3, *INT8), 0.1, 3, *INT8)  # noqa: E731
    made = build(Function(function), torch.rand(2, 8), cache=cache)
    assert all("Non-zero zero point is not supported" in f.reason for f in made.fallbacks)
    assert len(made.fallbacks) == 2


def test_an_equal_model_is_found_in_the_cache_and_another_is_not(own_cache: Cache) -> None:
    x = torch.rand(2, 8)
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    first = build(model, x, cache=own_cache)
    assert (first.reused, build(model, x, cache=own_cache).reused) == (0, 1)
    assert build(model, torch.rand(3, 8), cache=own_cache).reused == 0
    with torch.no_grad():
        model.bias[0] += 1
    assert build(model, x, cache=own_cache).reused == 0


@pytest.mark.parametrize("damage", ["flipped", "foreign", *map(_slow, ("cut", "open to others", "no header"))])
def test_an_entry_that_is_not_whole_or_not_ours_is_made_anew(
    own_cache: Cache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = nn.Linear(8, 8), torch.rand(2, 8)
    build(model, x, cache=own_cache)
    (entry,) = own_cache.folder.glob("engine-*")
    content = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(content[:-10])
    elif damage == "flipped":
        entry.write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    elif damage == "foreign":
        build(nn.Linear(8, 8), x, cache=own_cache)
        other = next(p for p in own_cache.folder.glob("engine-*") if p != entry)
        entry.write_bytes(other.read_bytes())
    elif damage == "open to others":
        entry.chmod(0o666)
    else:
        entry.write_bytes(b"\x00" * 100)
    with caplog.at_level(logging.WARNING, "anabranch.tensorrt"):
        assert build(model, x, cache=own_cache).reused == 0
    assert str(entry) in caplog.text
    entry.chmod(0o600)
    assert build(model, x, cache=own_cache).reused == 1


@pytest.mark.parametrize("named", [True, False])
def test_an_entry_is_used_only_from_a_folder_that_nobody_else_can_write_to(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ANABRANCH_TENSORRT_CACHE", raising=False)
    cache = Cache(tmp_path / "engines") if named else Cache()
    cache.store("engine", {"model": 1}, b"content")
    path = cache.path("engine", {"model": 1})
    assert cache.load("engine", {"model": 1}) == b"content"
    assert caplog.text == ""
    # A folder that was named is looked at alone; in the user's cache, those above it too.
    for folder in [cache.folder] if named else [cache.folder, cache.folder.parent, tmp_path / "cache"]:
        before = folder.stat().st_mode
        folder.chmod(0o770)
        assert cache.load("engine", {"model": 1}) is None
        assert f"chmod go-w {folder}" in caplog.text
        folder.chmod(before)
    assert cache.load("engine", {"model": 1}) == b"content"
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))
    assert cache.load("engine", {"model": 1}) is None
    assert "is a symbolic link" in caplog.text
    cache.store("engine", {"model": 1}, b"content")
    assert cache.load("engine", {"model": 1}) == b"content"
    assert not path.is_symlink()


def test_ctrl_c_stops_a_build(own_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    made = builder._monitor

    def monitor(api: Any, progress: Any, interrupted: Any) -> Any:
        real = made(api, progress, interrupted)
        start = type(real).phase_start

        def phase_start(self: Any, name: str, parent: str | None, steps: int) -> None:
            start(self, name, parent, steps)
            os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(type(real), "phase_start", phase_start)
        return real

    monkeypatch.setattr(builder, "_monitor", monitor)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build(models.upscaler(), torch.rand(1, 3, 32, 32), cache=own_cache)
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(own_cache.folder.glob("engine-*"))


def test_a_gpu_that_cannot_be_built_for_ahead_is_named(own_cache: Cache) -> None:
    program = export_program(nn.Linear(8, 8).eval(), (torch.rand(2, 8),), {})
    with pytest.raises(InputError, match=r"compute capability 9\.9 given.*8\.9"):
        compile_program(library(), program, Target((9, 9), ahead=True), require_full=False, cache=own_cache)


def test_without_a_gpu_the_error_says_so() -> None:
    with pytest.raises(InputError, match=r"on the CPU; expected them on a CUDA device"):
        anabranch.compile(nn.Linear(8, 8).eval(), [torch.rand(2, 8)], backend="tensorrt")


def test_not_installed_gives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from anabranch.backends.tensorrt import _library

    monkeypatch.setattr(_library, "PACKAGES", ("tensorrt_that_is_not_there",))
    monkeypatch.delenv("ANABRANCH_TENSORRT", raising=False)
    with pytest.raises(BuildError, match=r"pip install 'anabranch\[tensorrt\]'"):
        _library.library.__wrapped__()


def test_the_key_does_not_depend_on_where_the_weights_are() -> None:
    x = torch.rand(2, 8)
    program = export_program(nn.Linear(8, 8).eval(), (x,), {})
    assert compiler._model_hash(program) == compiler._model_hash(export_program(_copy(program), (x,), {}))


def _copy(program: Any) -> nn.Module:
    model = nn.Linear(8, 8).eval()
    model.load_state_dict(dict(zip(program.weight_names, program.weights, strict=True)))
    return model


@pytest.mark.parametrize("permutation", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 2, 1)])
def test_memory_in_any_order_reaches_an_engine_without_a_copy(permutation: tuple[int, ...]) -> None:
    base = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    x = base.permute(*(permutation.index(d) for d in range(4)))
    layout = Layout.of(x)
    assert layout.to_engine(x).data_ptr() == x.data_ptr()
    written, result = layout.empty(torch.device("cpu"))
    written.copy_(layout.to_engine(x))
    assert torch.equal(result, x)
    assert result.stride() == x.stride()
