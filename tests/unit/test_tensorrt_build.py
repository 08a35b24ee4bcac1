"""Building ahead of time: the command, the function, and that a machine with the GPU finds what was built."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import anabranch
from anabranch import models
from anabranch.backends import TF32
from anabranch.backends.tensorrt import Target, compile_program, library
from anabranch.backends.tensorrt import _compiler as compiler
from anabranch.backends.tensorrt._cache import Cache
from anabranch.backends.tensorrt._layout import Layout
from anabranch.backends.tensorrt._partition import by_reason
from anabranch.cli._build import command
from anabranch.errors import BuildError, InputError
from anabranch.export import Program, export_program
from anabranch.runtime._flags import Flags


class Mixed(nn.Module):
    """Convolutions around an operator that ONNX does not have; batch normalization; memory that pad reorders."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(functional.pad(x, (1, 1, 1, 1), mode="replicate")))
        return self.last(torch.special.erfinv(torch.tanh(x) * 0.5))


class Recurrent(nn.Module):
    """Makes tensors on its input's device."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[0], 8, dtype=x.dtype, device=x.device)
        for step in x.unbind(1):
            h = torch.tanh(self.linear(h) + step + torch.arange(8, device=x.device))
        return h


def make_mixed() -> nn.Module:
    torch.manual_seed(58)
    return Mixed()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: what an earlier one has built need not be built again."""
    return tmp_path_factory.mktemp("shared") / "engines"


@pytest.fixture(autouse=True)
def _equal_weights() -> None:
    torch.manual_seed(58)


@pytest.fixture
def no_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on everything has to be in the cache."""

    def refuse(*args: Any, **kwargs: Any) -> bytes:
        raise AssertionError("an engine is built that was built before")

    monkeypatch.setattr(compiler, "_serialize", refuse)


def on_a_gpu(model: nn.Module, x: torch.Tensor) -> Program:
    """The program as a machine with a GPU exports it, where PyTorch's CUDA operators give shapes and strides."""
    twin = copy.deepcopy(model)
    with FakeTensorMode():

        def there(t: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

        for module in twin.modules():
            for name, p in list(module._parameters.items()):
                module._parameters[name] = None if p is None else nn.Parameter(there(p), requires_grad=False)
            for name, b in list(module._buffers.items()):
                module._buffers[name] = None if b is None else there(b)
        inputs = (there(x),)
    program = export_program(twin, inputs, {})
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    program.weights = [state[name].detach() for name in program.weight_names]
    return program


def strides(program: Program) -> dict[str, Any]:
    nodes = program.module.graph.nodes
    return {n.name: n.meta["val"].stride() for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)}


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype, bool]] = {
    "relu": (models.relu, (1, 3, 5), torch.float16, False),
    "branches, channels last": (models.branches, (1, 3, 64, 64), torch.float16, True),
    "mixed, channels last": (make_mixed, (1, 3, 16, 16), torch.float32, True),
    "recurrent": (Recurrent, (2, 3, 8), torch.float32, False),
}


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products of float32 are for TensorRT-RTX only where they may be in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if "branches" in case else ()) for case in CASES]
)
def test_a_machine_with_the_gpu_finds_what_was_built_without_one(
    cache: Path, case: str, request: pytest.FixtureRequest
) -> None:
    make, shape, dtype, channels_last = CASES[case]
    memory = torch.channels_last if channels_last else torch.contiguous_format
    model = make().eval().requires_grad_(False).to(dtype=dtype, memory_format=memory)
    x = torch.rand(shape).to(dtype).contiguous(memory_format=memory)
    built = anabranch.build(model, [x], compute_capability="8.9", cache=cache)
    assert built.engines
    program = on_a_gpu(model, x)
    if channels_last:
        # What makes this worth testing: there, PyTorch lays other values out otherwise.
        assert strides(program) != strides(export_program(model, (x,), {}))
    request.getfixturevalue("no_builds")
    target = Target((8, 9), ahead=False, tf32=Flags("cuda").tf32)
    found = compile_program(library(), program, target, require_full=False, cache=Cache(cache))
    assert found.reused == len(found.engines) == len(built.engines)
    assert f", {found.reused} from the cache" in found.report()[0]
    assert by_reason(found.fallbacks) == list(built.fallbacks)
    for name, segment in found.partition.segments.items():
        values = found.partition.top.graph.find_nodes(op="call_module", target=name)[0].meta["val"]
        own = [tuple(v.stride()) for v in (values if isinstance(values, list) else [values])]
        assert [y.stride for y in segment.outputs] == own  # what follows is given what PyTorch would give it


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_results_of_an_engine_for_another_order_get_the_strides_of_the_model(order: tuple[int, ...]) -> None:
    wanted = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    layout = Layout.of(wanted).reordered(order)
    written, result = layout.empty(torch.device("cpu"))
    written.copy_(layout.to_engine(wanted))
    assert written.shape == layout.physical
    made = layout.to_model(result)
    assert torch.equal(made, wanted)
    assert made.stride() == wanted.stride()
    assert (made.data_ptr() == written.data_ptr()) is (order == (0, 2, 3, 1))


def test_a_key_has_all_that_an_engine_depends_on_and_no_more(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(x: torch.Tensor, capability: tuple[int, int] = (8, 9), tf32: TF32 | None = None) -> dict[str, object]:
        model = nn.Conv2d(3, 4, 3).eval().requires_grad_(False)
        for p in model.parameters():
            p.fill_(0.5)
        program = export_program(model, (x,), {})
        return compiler._key(library(), program, Target(capability, ahead=True, tf32=tf32 or TF32()))

    x = torch.rand(1, 3, 8, 8)
    base = key(x)
    others = [
        key(torch.rand(2, 3, 8, 8)),
        key(x.contiguous(memory_format=torch.channels_last)),
        key(x, capability=(8, 6)),
        key(x, tf32=TF32(convolutions=True)),
    ]
    assert key(torch.rand(1, 3, 8, 8)) == base
    assert all(other != base for other in others)
    version = compiler.importlib.metadata.version
    monkeypatch.setattr(compiler.importlib.metadata, "version", lambda name: version(name).split("+")[0] + "+cu130")
    assert key(x) == base  # the same PyTorch, built for a GPU
    monkeypatch.setattr(compiler.importlib.metadata, "version", lambda name: "9.9")
    assert key(x) != base


def test_tf32_is_read_from_the_flags_as_compile_reads_them(cache: Path, no_builds: None, monkeypatch: Any) -> None:
    seen: list[Target] = []

    def stop(library: Any, program: Any, target: Target, **options: Any) -> None:
        seen.append(target)
        raise BuildError("seen")

    monkeypatch.setattr("anabranch.backends.tensorrt.compile_program", stop)
    for arguments in ([], ["--tf32"]):
        result = CliRunner().invoke(command, ["relu", "--compute-capability", "8.9", "--cache", str(cache), *arguments])
        assert result.exit_code == 1, result.output
    everything = TF32(products=True, convolutions=True, recurrent=True)
    # By default PyTorch allows it in convolutions and recurrent layers.
    assert [t.tf32 for t in seen] == [dataclasses.replace(everything, products=False), everything]
    assert Flags("cuda").tf32 == seen[0].tf32


def test_the_cache_of_one_machine_serves_another(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anabranch.build(models.relu(), [anabranch.Input((1, 3, 5))], compute_capability=(8, 9), cache=cache)
    shutil.copytree(cache, tmp_path / "elsewhere")
    monkeypatch.setenv("ANABRANCH_TENSORRT_CACHE", str(tmp_path / "elsewhere"))
    again = anabranch.build(models.relu(), [torch.rand(1, 3, 5)], compute_capability="8.9")
    assert again.reused == len(again.engines) == 1
    assert again.cache == tmp_path / "elsewhere"


# -- the function ---------------------------------------------------------------------------------------------------


def test_what_was_built_is_told(cache: Path) -> None:
    built = anabranch.build(
        make_mixed().eval(), [anabranch.Input((1, 3, 16, 16))], compute_capability=(8, 9), cache=cache
    )
    assert len(built.engines) == 2
    assert built.flops[0] == built.flops[1] > 0
    assert built.operators[1] - built.operators[0] == len(built.fallbacks) == 1
    assert "aten.special_erfinv.default (test_tensorrt_build.py:" in built.fallbacks[0]
    assert "no ONNX for it" in built.fallbacks[0]
    for engine in built.engines:
        assert engine.path.parent == cache
        assert 0 < engine.nbytes < engine.path.stat().st_size  # a line about it, and the engine
    text = str(built)
    for word in (
        "Mixed(float32[1, 3, 16, 16])",
        "capability 8.9",
        "100.0% of FLOPs",
        "2 engines",
        "erfinv",
        str(cache),
    ):
        assert word in text
    content = json.loads(json.dumps(built.as_dict()))
    assert content["nbytes"] == built.nbytes == sum(e["nbytes"] for e in content["engines"])


def test_no_weights_are_kept_when_all_is_built(cache: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    addresses = {p.data_ptr() for p in model.parameters()}
    anabranch.build(model, [torch.randn(2, 64)], compute_capability="8.9", cache=cache)
    del model
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    assert not [t for t in tensors if not t.is_sparse and t.layout is torch.strided and t.data_ptr() in addresses]


@pytest.mark.usefixtures("tf32")
def test_precision_and_keyword_inputs_are_those_of_compile(cache: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, *, scale: float) -> dict[str, torch.Tensor]:
            return {"y": self.linear(x) * scale}

    x = torch.rand(2, 8)
    full = anabranch.build(Named().eval(), [x], kwargs={"scale": 2.0}, compute_capability="8.9", cache=cache)
    half = anabranch.build(
        Named().eval(), {"x": x, "scale": 2.0}, precision=torch.float16, compute_capability="8.9", cache=cache
    )
    assert len(full.engines) == len(half.engines) == 1
    assert half.operators[1] > full.operators[1]  # casts at the border


def test_a_model_whose_graph_depends_on_data_has_no_engines(cache: Path) -> None:
    class Chosen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0]

    x = torch.rand(4)
    built = anabranch.build(Chosen().eval(), [x], compute_capability="8.9", cache=cache)
    assert built.engines == ()
    assert "data-dependent" in built.fallbacks[0]
    with pytest.raises(BuildError, match="require_full=True given, and backend 'tensorrt' does not run this model"):
        anabranch.build(Chosen().eval(), [x], compute_capability="8.9", cache=cache, require_full=True)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no GPU": ({"compute_capability": None}, r"sees no GPU here.*--compute-capability 8\.9"),
    "no such capability": ({"compute_capability": "9.9"}, r"compute capability 9\.9 given;.*8\.9"),
    "no capability": ({"compute_capability": "Ada"}, r"compute capability 'Ada' given; expected one such as 8\.9"),
    "half a capability": ({"compute_capability": (8,)}, r"compute capability \(8,\) given"),
    "another backend": ({"backend": "inductor"}, r"'inductor' given, which compiles where its engines run"),
    "unknown backend": ({"backend": "magic"}, r"'magic' given, which is unknown; expected 'tensorrt'"),
    "a precision": ({"precision": torch.float64}, r"precision=torch\.float64 given"),
    "no folder": ({"cache": "/proc/engines"}, r"engines cannot be kept in /proc/engines: .*ANABRANCH_TENSORRT_CACHE"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_tried_is_named(cache: Path, bad: str, no_builds: None) -> None:
    options, message = BAD[bad]
    with pytest.raises(InputError, match=message):
        anabranch.build(models.relu(), [torch.rand(2)], **{"compute_capability": "8.9", "cache": cache, **options})


def test_what_is_no_model_and_what_is_no_input_is_named(cache: Path) -> None:
    with pytest.raises(InputError, match=r"model is a function; expected an nn\.Module"):
        anabranch.build(lambda x: x, [torch.rand(2)], compute_capability="8.9", cache=cache)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"expected a list: inputs=\[x\]"):
        anabranch.build(models.relu(), torch.rand(2), compute_capability="8.9", cache=cache)  # type: ignore[arg-type]


@pytest.mark.parametrize("x", [anabranch.Input((2,), device="cpu"), anabranch.Input((2,), device="cuda")])
def test_compile_without_a_gpu_names_the_command(x: anabranch.Input) -> None:
    with pytest.raises(InputError, match=r"on the CPU; expected them on a CUDA device|sees no GPU here") as info:
        anabranch.compile(models.relu(), [x], backend="tensorrt")
    arguments = str(info.value).partition("anabranch build MODEL ")[2].partition(", or ")[0].split()
    assert len(arguments) == 8
    # What is named there is a command as it should be.
    with command.make_context("build", ["relu", *arguments]) as context:
        assert context.params["capabilities"] == ("8.9",)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(command, [*arguments, "--cache", str(cache), "--compute-capability", "8.9"])

    return run


def test_the_command_builds_and_reports(run: Callable[..., Any], cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "built.json"
    result = run("relu", "--shape", "1,3,5", "--shape", "2,3", "--dtype", "float16", "--json", str(target))
    assert result.exit_code == 0, result.output
    for word in ("relu(float16[1, 3, 5])", "relu(float16[2, 3])", "1 of 1 operators, in 1 engine", str(cache)):
        assert word in result.output
    content = json.loads(target.read_text())
    assert [b["compute_capability"] for b in content["builds"]] == [[8, 9]] * 2
    assert all(Path(e["path"]).is_file() for b in content["builds"] for e in b["engines"])


def test_the_command_takes_a_users_model_and_require_full(run: Callable[..., Any]) -> None:
    shape = ("--shape", "1,3,16,16")
    result = run("test_tensorrt_build:make_mixed", *shape, "--channels-last")
    assert result.exit_code == 0, result.output
    assert "not in TensorRT: aten.special_erfinv.default (test_tensorrt_build.py:" in result.output
    result = run("test_tensorrt_build:make_mixed", *shape, "--require-full")
    assert result.exit_code == 1
    assert "require_full=True" in result.output
    assert "aten.special_erfinv.default" in result.output


def test_the_command_takes_an_exported_program_with_its_inputs(run: Callable[..., Any], tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) + y

    path = tmp_path / "two.pt2"
    torch.export.save(torch.export.export(Two().eval(), (torch.rand(2, 3), torch.rand(2, 3))), path)
    result = run(str(path))
    assert result.exit_code == 0, result.output
    assert "two(float32[2, 3], float32[2, 3])" in result.output
    result = run(str(path), "--dtype", "float16")
    assert result.exit_code == 2
    assert "--dtype given" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "model 'nonsense' given; expected one of relu, upscaler, branches"),
        (["test_tensorrt_build:make_mixed"], "give --shape"),
        (["relu", "--shape", "1,x"], "is not a shape"),
        (["relu", "--shape", "1,3", "--channels-last"], "needs 4 sizes"),
    ],
)
def test_the_command_says_what_it_cannot_try(run: Callable[..., Any], arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_without_tensorrt_the_command_names_the_package(run: Callable[..., Any], monkeypatch: Any) -> None:
    from anabranch.ahead import _command

    def missing() -> None:
        raise BuildError("backend='tensorrt' needs TensorRT. Do: pip install 'anabranch[tensorrt]'")

    monkeypatch.setattr(_command, "library", missing)
    result = run("relu", "--shape", "1")
    assert result.exit_code == 2
    assert "pip install 'anabranch[tensorrt]'" in result.output


def test_ctrl_c_ends_the_command(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler, "_serialize", interrupt)
    result = run("relu", "--shape", "1")
    assert result.exit_code == 130
    assert "interrupted" in result.output
