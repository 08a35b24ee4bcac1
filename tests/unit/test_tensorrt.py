"""Building TensorRT engines: for a GPU that is not here, with the real library. Running them is tested on a GPU."""

from __future__ import annotations

import copy
import logging
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from anabranch import models
from anabranch.backends.tensorrt import Target, compile_program, library
from anabranch.backends.tensorrt import _builder as builder
from anabranch.backends.tensorrt import _compiler as compiler
from anabranch.backends.tensorrt._cache import Cache
from anabranch.backends.tensorrt._layout import Layout
from anabranch.backends.tensorrt._partition import partition
from anabranch.backends.tensorrt._rewrite import fold_norms
from anabranch.errors import BuildError, InputError
from anabranch.export import export_program

_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
_ADA = Target((8, 9), ahead=True)


class Mixed(nn.Module):
    """Convolution and product around operators that ONNX, or TensorRT, does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.special.erfinv(torch.tanh(torch.relu(self.conv(x))) * 0.5)
        return self.linear(z.permute(0, 2, 3, 1)), z.median(1).values.double() * 2


def build(model: nn.Module, *inputs: torch.Tensor, cache: Cache, full: bool = False) -> Any:
    program = export_program(model.eval(), inputs, {})
    return compile_program(library(), program, _ADA, require_full=full, cache=cache)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "engines")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_network_becomes_one_engine(cache: Cache, dtype: torch.dtype) -> None:
    model = models.branches().to(dtype)
    x = torch.rand(1, 3, 64, 64).to(dtype).contiguous(memory_format=torch.channels_last)
    made = build(model.to(memory_format=torch.channels_last), x, cache=cache, full=True)
    assert not made.fallbacks
    assert len(made.engines) == 1
    assert made.flops[0] == made.flops[1] > 0
    (segment,) = made.partition.segments.values()
    assert segment.inputs[0].physical == (1, 64, 64, 3)  # no copy into another layout on the way in


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
    folded = fold_norms(segment.module)
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
            x = torch.special.erfinv(torch.tanh(x) * 0.5)
        y = torch.special.erfinv(x - 1)
        z = torch.special.erfinv(x - 2)
        return torch.special.erfinv(y + z), (i + 1) & 3, x.double() * 2


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
    assert any(
        re.search(rf"__and__\.Scalar {line}: TensorRT's parser does not take it: BitwiseAnd", x) for x in lines
    )
    assert any(re.search(rf"_to_copy\.default {line}, aten\.mul\.Tensor {line}: .* no float64", x) for x in lines)


def test_a_segment_that_is_refused_as_a_whole_names_the_models_lines(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compiler.build

    def refuse(library: Any, path: Path, name: str, *rest: Any) -> bytes:
        if name:  # it is no trial of single operators
            raise builder.Rejected("TensorRT does not build it: too much")
        return real(library, path, name, *rest)

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
            ]
        )
        == "ElementWiseOperation DIV must have same input types. But they are of types Float and BFloat16;"
        " out of memory"
    )
    assert builder.said([]) == "no reason given"


def test_an_equal_model_is_found_in_the_cache_and_another_is_not(cache: Cache) -> None:
    x = torch.rand(2, 8)
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    first = build(model, x, cache=cache)
    assert (first.reused, build(model, x, cache=cache).reused) == (0, 1)
    assert build(model, torch.rand(3, 8), cache=cache).reused == 0
    with torch.no_grad():
        model.bias[0] += 1
    assert build(model, x, cache=cache).reused == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "open to others", "no header"])
def test_an_entry_that_is_not_whole_or_not_ours_is_made_anew(
    cache: Cache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = nn.Linear(8, 8), torch.rand(2, 8)
    build(model, x, cache=cache)
    (entry,) = cache.folder.glob("engine-*")
    content = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(content[:-10])
    elif damage == "flipped":
        entry.write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    elif damage == "foreign":
        build(nn.Linear(8, 8), x, cache=cache)
        other = next(p for p in cache.folder.glob("engine-*") if p != entry)
        entry.write_bytes(other.read_bytes())
    elif damage == "open to others":
        entry.chmod(0o666)
    else:
        entry.write_bytes(b"\x00" * 100)
    with caplog.at_level(logging.WARNING, "anabranch.tensorrt"):
        assert build(model, x, cache=cache).reused == 0
    assert str(entry) in caplog.text
    entry.chmod(0o600)
    assert build(model, x, cache=cache).reused == 1


def test_ctrl_c_stops_a_build(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
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
        build(models.upscaler(), torch.rand(1, 3, 32, 32), cache=cache)
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(cache.folder.glob("engine-*"))


def test_a_gpu_that_cannot_be_built_for_ahead_is_named(cache: Cache) -> None:
    program = export_program(nn.Linear(8, 8).eval(), (torch.rand(2, 8),), {})
    with pytest.raises(InputError, match=r"compute capability 9\.9 given.*8\.9"):
        compile_program(library(), program, Target((9, 9), ahead=True), require_full=False, cache=cache)


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
