"""What TensorRT is not asked for since it would compute in TF32, and how pooling keeps NaN. Without TensorRT."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from anabranch.backends import TF32
from anabranch.backends.tensorrt._partition import counted, flops, partition
from anabranch.backends.tensorrt._rewrite import rewrite
from anabranch.backends.tensorrt._tf32 import in_tf32
from anabranch.export import Program, export_program, is_quantization

pytestmark = pytest.mark.usefixtures("seeded")


class Function(nn.Module):
    """Of its constants and inputs."""

    def __init__(self, function: Any, **weights: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            self.register_buffer(name, weight)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def program_of(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return export_program(model.eval().requires_grad_(False), inputs, {})


def named(program: Program, names: Any) -> list[str]:
    """The operators of these nodes, without their overloads."""
    found = [n for n in program.module.graph.nodes if n.name in names]
    return [n.target.overloadpacket.__name__ for n in found]


_SQUARE = torch.rand(4, 4)

#: By name: the kind that it is under, and a model of an input of shape (4, 4).
_KINDS: dict[str, tuple[str, nn.Module]] = {
    "linear": ("products", nn.Linear(4, 4)),
    "matmul": ("products", Function(lambda _, x: x @ x)),
    "einsum": ("products", Function(lambda _, x: torch.einsum("ij,kj->ik", x, x))),
    "addmm": ("products", Function(lambda _, x: torch.addmm(x, x, x))),
    "bmm": ("products", Function(lambda _, x: torch.bmm(x[None], x[None]))),
    "mv": ("products", Function(lambda _, x: torch.mv(x, x[0]))),
    "dot": ("products", Function(lambda _, x: torch.dot(x[0], x[1]))),
    "cdist": ("products", Function(lambda _, x: torch.cdist(x, x))),
    "bilinear": ("products", nn.Bilinear(4, 4, 3)),
    "attention": ("products", Function(lambda _, x: F.scaled_dot_product_attention(x[None], x[None], x[None]))),
    "conv1d": ("convolutions", nn.Conv1d(4, 3, 1)),
    "conv2d": ("convolutions", Function(lambda m, x: F.conv2d(x[None, None], m.weight), weight=torch.rand(2, 1, 3, 3))),
    "same": ("convolutions", nn.Conv1d(4, 3, 3, padding="same")),
    "transposed": ("convolutions", nn.ConvTranspose1d(4, 3, 2)),
    "lstm": ("recurrent", nn.LSTM(4, 3)),
    "gru": ("recurrent", nn.GRU(4, 3)),
}


class _Both(nn.Module):
    """Two inputs of the one that is given, for layers that take two."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x, x.flip(0))


@pytest.mark.parametrize("name", _KINDS)
def test_products_and_convolutions_of_float32_run_elsewhere_unless_tf32_is_allowed(name: str) -> None:
    kind, model = _KINDS[name]
    program = program_of(_Both(model) if isinstance(model, nn.Bilinear) else model, _SQUARE)
    graph = program.module.graph
    found = in_tf32(graph, TF32())
    assert len(found) == 1, named(program, found)
    ((_, reason),) = found.items()
    assert {"recurrent": "recurrent layers"}.get(kind, kind) in reason
    assert "not allowed here" in reason
    others = {"products": True, "convolutions": True, "recurrent": True, kind: False}
    assert in_tf32(graph, TF32(**others)) == found
    assert in_tf32(graph, TF32(**{kind: True})) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_in_half_precision_stay(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4)).to(dtype)
    assert in_tf32(program_of(model, _SQUARE.to(dtype)).module.graph, TF32()) == {}
    # Of two halves, and what is added to them is in float32.
    mixed = Function(lambda _, x: (x @ x).float() @ x.float())
    program = program_of(mixed, _SQUARE.to(dtype))
    (left,) = in_tf32(program.module.graph, TF32())
    assert left == program.module.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)[1].name


@pytest.mark.parametrize(
    "function",
    [torch.relu, torch.softmax, torch.cumsum, torch.sum, lambda x, _: x * x, lambda x, _: F.layer_norm(x, (4,))],
    ids=["relu", "softmax", "cumsum", "sum", "square", "layer_norm"],
)
def test_what_is_no_product_stays(function: Any) -> None:
    model = Function(lambda _, x: function(x) if function is torch.relu else function(x, -1))
    assert in_tf32(program_of(model, _SQUARE).module.graph, TF32()) == {}


def _qd() -> Any:
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    return torch.ops.quantized_decomposed


def _int8(x: torch.Tensor) -> torch.Tensor:
    about = (0.01, 0, -128, 127, torch.int8)
    result: torch.Tensor = _qd().dequantize_per_tensor(_qd().quantize_per_tensor(x, *about), *about)
    return result


def _fp8(x: torch.Tensor) -> torch.Tensor:
    return (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32) * 0.01


@pytest.mark.parametrize(
    "quantize", [_int8, _fp8, lambda x: torch.fake_quantize_per_tensor_affine(x, 0.01, 0, -128, 127)]
)
def test_what_reads_quantized_tensors_only_stays(quantize: Any) -> None:
    bias = torch.rand(4)
    both = Function(lambda m, x: F.linear(quantize(x), quantize(m.weight).t(), m.bias), weight=_SQUARE, bias=bias)
    one = Function(lambda m, x: F.linear(quantize(x), m.weight, m.bias), weight=_SQUARE, bias=bias)
    program = program_of(both, _SQUARE)
    assert in_tf32(program.module.graph, TF32()) == {}
    assert named(program_of(one, _SQUARE), in_tf32(program_of(one, _SQUARE).module.graph, TF32())) == ["linear"]
    # Where PyTorch runs the quantizations, TensorRT would read float32.
    quantizations = {n.name for n in program.module.graph.nodes if is_quantization(n)}
    assert named(program, in_tf32(program.module.graph, TF32(), quantizations)) == ["linear"]


def test_a_run_without_a_product_is_not_worth_an_engine_between_them() -> None:
    half = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU()).half()
    model = Function(lambda m, x: torch.softmax(torch.relu(m.layer(m.half_of(x))) * 2, -1))
    model.layer, model.half_of = nn.Linear(4, 4), Function(lambda m, x: m.inner(x.half()).float())
    model.half_of.inner = half
    program = program_of(model, _SQUARE)
    excluded = in_tf32(program.module.graph, TF32())
    assert named(program, excluded) == ["linear"]
    worth = {n.name for n in counted(program) if flops(n)}
    (segment,) = partition(program, excluded, worth).segments.values()
    inside = named(program, segment.nodes)
    assert "conv1d" in inside
    assert "softmax" not in inside
    assert len(partition(program, excluded).segments) == 2


class _Ignoring(fx.Interpreter):
    """Max pooling as TensorRT does it: NaN is less than any number."""

    pools = 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "max_pool" in str(target):
            self.pools += 1
            args = (args[0].nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf), *args[1:])
        return super().call_function(target, args, kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d((2, 3), (1, 2), ceil_mode=True),
        nn.MaxPool2d(2, return_indices=True),
        nn.MaxPool1d(2),
        nn.MaxPool3d(2),
        nn.AdaptiveMaxPool2d(2),
    ],
    ids=str,
)
def test_max_pooling_keeps_nan(pool: nn.Module, dtype: torch.dtype) -> None:
    dimensions = int(type(pool).__name__[-2])
    x = torch.randn(2, 3, *[8] * dimensions).to(dtype)
    x = x.masked_fill(torch.rand(x.shape) < 0.2, torch.inf).masked_fill(torch.rand(x.shape) < 0.5, -torch.inf)
    x.view(-1)[::37] = torch.nan
    expected = pool(x)
    (segment,) = partition(program_of(pool, x), {}).segments.values()
    ignoring = _Ignoring(segment.module)
    lost = ignoring.run(x)[0]
    kept = _Ignoring(rewrite(segment.module))
    values = kept.run(x)[0]
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert bool(expected.isnan().any())
    assert not lost.isnan().any()
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    assert (ignoring.pools, kept.pools) == (1, 2)


def test_max_pooling_of_int8_has_no_nan_to_keep() -> None:
    model = Function(lambda _, x: _int8(F.max_pool2d(_int8(x), 2)))
    (segment,) = partition(program_of(model, torch.rand(1, 3, 8, 8)), {}).segments.values()
    rewritten = rewrite(segment.module).graph
    assert len(rewritten.find_nodes(op="call_function", target=torch.ops.aten.max_pool2d.default)) == 1
    assert not rewritten.find_nodes(op="call_function", target=torch.ops.aten.isnan.default)
