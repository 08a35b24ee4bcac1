"""TensorRT's engines for ranges of sizes: built without a GPU, and their ONNX run at several sizes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from anabranch import Dim
from anabranch.backends import TF32
from anabranch.backends.tensorrt import Target, _onnx, compile_program, library
from anabranch.backends.tensorrt import _compiler as compiler
from anabranch.backends.tensorrt._builder import Rejected
from anabranch.backends.tensorrt._cache import Cache
from anabranch.backends.tensorrt._layout import Layout
from anabranch.backends.tensorrt._onnx import Unconvertible, input_names
from anabranch.backends.tensorrt._partition import partition
from anabranch.backends.tensorrt._profile import Profile
from anabranch.export import Program, export_program

_ADA = Target((8, 9), ahead=True, tf32=TF32(products=True, convolutions=True, recurrent=True))

Place = tuple[int, int]


class Encoder(nn.Module):
    """Attention over lengths that vary, in batches that vary, and a view whose size is computed of both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(x)).flatten(1)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.layers(x)
        return self.last(y), y.mean((2, 3))


class InBetween(nn.Module):
    """An operator that ONNX does not have, and after it views and numbers that are computed of the input's sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.special.erfinv(torch.tanh(self.linear(x)) * 0.5)
        y = self.linear(y.view(x.shape[0] * x.shape[1], 8)) / x.shape[0]
        return y.view(x.shape[0], -1) * x.shape[1]


class Flat(nn.Module):
    """After the operator in between no tensor has a size by itself that the view needs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.special.erfinv(torch.tanh(self.linear(x)) * 0.5).view(x.shape[0] * x.shape[1], 8)
        return self.linear(torch.special.erfinv(y * 0.5)).view(x.shape[0], x.shape[1], 8).sum(1)


class Equal(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) @ y + x.sum() * y.shape[0]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + sum(shape)))


#: Model, shapes of its inputs for numbers, the places of these, and numbers to call it with after the first.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], set[Place], list[tuple[int, ...]], int]] = {
    "encoder": (Encoder, lambda b, n: [(b, n, 16)], {(0, 0), (0, 1)}, [(5, 7), (2, 2), (64, 3), (3, 12)], 1),
    "convolutions": (
        Convolutions,
        lambda b, h, w: [(b, 3, h, w)],
        {(0, 0), (0, 2), (0, 3)},
        [(5, 20, 24), (2, 9, 32), (9, 33, 7)],
        1,
    ),
    "a fallback in between": (
        InBetween,
        lambda b, n: [(b, n, 8)],
        {(0, 0), (0, 1)},
        [(5, 7), (2, 16), (64, 2)],
        2,
    ),
    "a size that no tensor of the engine has": (
        Flat,
        lambda b, n: [(b, n, 8)],
        {(0, 0), (0, 1)},
        [(5, 7), (2, 16), (64, 2)],
        3,
    ),
    "two inputs": (Equal, lambda n: [(n, n), (n, 4)], {(0, 0), (0, 1), (1, 0)}, [(5,), (2,), (16,)], 1),
}


@pytest.fixture(autouse=True)
def _equal_weights() -> None:
    torch.manual_seed(58)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "engines")


class Builds:
    """What was built: profiles, and files to run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.profiles: dict[str, Any] = {}

    def __call__(self, library: Any, path: Path, wanted: Any, label: str, *rest: Any) -> bytes:
        made = self._build(library, path, wanted, label, *rest)
        name = label.partition(" (")[0]
        if name:
            assert name not in self.profiles, "built twice"
            self.profiles[name] = rest[-1]
            shutil.copytree(path.parent, self.folder / name)
        return made

    _build = staticmethod(compiler.build)

    def run(self, made: Any, program: Program, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As an engine does, each segment by the definition of ONNX's operators."""

        def caller(name: str, single: bool) -> Callable[..., Any]:
            segment = made.partition.segments[name]
            evaluator = ReferenceEvaluator(onnx.load(str(self.folder / name / "segment.onnx")))

            def call(*given: torch.Tensor) -> Any:
                entered = [layout.to_engine(x).numpy() for x, layout in zip(given, segment.inputs, strict=True)]
                named = zip(input_names(len(given)), entered, strict=True)
                fed = {n: x for n, x in named if n in evaluator.input_names}
                results = [torch.from_numpy(np.asarray(y)) for y in evaluator.run(None, fed)]
                results = [y.permute(x.inverse) for y, x in zip(results, segment.outputs, strict=True)]
                return results[0] if single else results

            return call

        top = made.partition.top
        calls = {n.target: caller(n.target, n.meta["single"]) for n in top.graph.find_nodes(op="call_module")}
        return list(type(top).forward(SimpleNamespace(**calls), *program.weights, *inputs))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Builds:
    made = Builds(tmp_path)
    monkeypatch.setattr(compiler, "build", made)
    return made


def of_range(
    model: nn.Module, inputs: Sequence[torch.Tensor], free: set[Place], declared: dict[Place, Dim] | None = None
) -> Any:
    program = export_program(model.eval().requires_grad_(False), tuple(inputs), {}, free=frozenset(free))
    if program.sizes is not None:
        program.sizes.declared = declared or {}
    return program


@pytest.mark.parametrize("name", CASES)
def test_one_engine_with_one_profile_serves_a_range(name: str, cache: Cache, builds: Builds) -> None:
    make, shapes, free, calls, engines = CASES[name]
    model = make()
    batch = Dim("batch", 0, 64)
    declared = {} if name in ("two inputs", "convolutions") else {(0, 0): batch}
    program = of_range(model, [drawn(*shape) for shape in shapes(*calls[0])], free, declared)
    made = compile_program(library(), program, _ADA, require_full=False, cache=cache)
    program.sizes.settle()
    assert len(made.engines) == len(builds.profiles) == engines
    assert len(made.fallbacks) == engines - 1
    if declared:
        assert made.profile is not None
        assert "one optimization profile: batch 2 to 64, size1 2 to 16" in "\n".join(made.report())
        for segment, profile in zip(made.partition.segments, builds.profiles.values(), strict=False):
            assert len(made.partition.segments[segment].inputs) == len(profile)
    for n, sizes in enumerate(calls):
        inputs = [drawn(*shape, seed=n + 1) for shape in shapes(*sizes)]
        assert not program.sizes.refuses([x.shape for x in inputs])
        with torch.no_grad():
            expected = model(*inputs)
        results = builds.run(made, program, inputs)
        for y, e in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
            torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-5)
    assert len(builds.profiles) == engines, "a size within the range had something built"
    again = of_range(model, [drawn(*shape, seed=9) for shape in shapes(*calls[0])], free, declared)
    assert compile_program(library(), again, _ADA, require_full=False, cache=cache).reused == engines


def test_the_profile_says_what_the_declaration_says(cache: Cache, builds: Builds) -> None:
    model = nn.Linear(8, 4)
    program = of_range(model, [drawn(5, 8)], {(0, 0)}, {(0, 0): Dim("batch", 3, 40)})
    compile_program(library(), program, _ADA, require_full=True, cache=cache)
    assert list(builds.profiles.values()) == [{"input_0": ((3, 8), (5, 8), (40, 8))}]
    sizes = program.sizes
    sizes.settle()
    assert [n for n in range(50) if not sizes.refuses([(n, 8)])] == list(range(3, 41))


def test_a_size_of_which_nothing_is_known_has_bounds_nevertheless(cache: Cache, builds: Builds) -> None:
    program = of_range(nn.Linear(8, 4), [drawn(33, 8)], {(0, 0)})
    compile_program(library(), program, _ADA, require_full=True, cache=cache)
    program.sizes.settle()
    served = [n for n in range(300) if not program.sizes.refuses([(n, 8)])]
    assert served == list(range(2, 129))
    assert [shapes[2] for p in builds.profiles.values() for shapes in p.values()] == [(128, 8)]


class Guarded(nn.Module):
    """Even sizes up to 48 only, the other way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * 2 if x.shape[0] % 2 == 0 and x.shape[0] <= 48 else -x


def test_what_the_program_is_not_right_for_is_not_in_the_profile(cache: Cache, builds: Builds) -> None:
    program = of_range(Guarded(), [drawn(6, 8)], {(0, 0)}, {(0, 0): Dim("batch", 1, 99)})
    compile_program(library(), program, _ADA, require_full=True, cache=cache)
    program.sizes.settle()
    assert list(builds.profiles.values()) == [{"input_0": ((2, 8), (6, 8), (48, 8))}]
    assert [n for n in range(120) if not program.sizes.refuses([(n, 8)])] == list(range(2, 49, 2))


def test_ranges_and_single_shapes_and_other_bounds_are_other_engines(cache: Cache) -> None:
    def key(free: set[Place], most: int = 40) -> dict[str, object]:
        model = nn.Linear(8, 4)
        nn.init.constant_(model.weight, 0.5)
        nn.init.constant_(model.bias, 0.5)
        program = of_range(model, [drawn(5, 8)], free, {(0, 0): Dim("batch", 3, most)} if free else {})
        return compiler._key(library(), program, _ADA, Profile.of(program.sizes))

    assert key({(0, 0)}) == key({(0, 0)})
    assert len({str(k) for k in (key(set()), key({(0, 0)}), key({(0, 0)}, 41))}) == 3


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x * 2 if x.shape[0] > 8 else x - 1,)


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x.reshape(5, 8) * 2,)


@pytest.mark.parametrize(
    ("module", "most", "why"),
    [
        (Branches(), 8, ""),
        (Branches(), 9, "the exporter takes that"),
        (Fixed(), 8, "the exporter fixes size 0 of its input 0 to 5"),
    ],
)
def test_what_the_exporter_assumes_has_to_hold_for_the_whole_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: nn.Module, most: int, why: str
) -> None:
    """As a decomposition of its may, which nobody sees."""
    program = of_range(nn.ReLU(), [drawn(5, 8)], {(0, 0)}, {(0, 0): Dim("batch", 2, most)})
    profile = Profile.of(program.sizes)
    (segment,) = partition(program, {}).segments.values()
    monkeypatch.setattr(_onnx, "rewrite", lambda given: module)

    def export() -> None:
        example = segment.example(torch.device("cpu"))
        _onnx.export(
            segment.module, segment.inputs, segment.outputs, example, tmp_path / "m.onnx", segment.arguments, profile
        )

    if not why:
        export()
        return
    with pytest.raises(Unconvertible, match=why):
        export()


def test_a_size_need_not_be_largest_where_the_sizes_of_inputs_are() -> None:
    program = of_range(nn.Linear(8, 4), [drawn(5, 8)], {(0, 0)}, {(0, 0): Dim("batch", 2, 400_000)})
    profile = Profile.of(program.sizes)
    assert profile is not None
    (symbol,) = profile.best
    least, best, most = (6, 100_000, 7), (15, 499_995, 7), (1_200_000, 499_998, 7)
    assert profile.shapes([3 * symbol, 500_000 - symbol, 7]) == (least, best, most)
    with pytest.raises(Rejected, match="may be anything"):
        profile.shapes([symbol % 7 * symbol])
    program = of_range(nn.Linear(8, 4), [drawn(5, 8)], {(0, 0)}, {(0, 0): Dim("batch", 2, 12)})
    profile = Profile.of(program.sizes)
    assert profile is not None
    (symbol,) = profile.best
    assert profile.shapes([symbol % 7]) == ((0,), (5,), (6,))


def test_an_operator_that_does_not_take_a_range_is_found_and_falls_back(
    cache: Cache, builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builds._build

    def refuse(library: Any, path: Path, wanted: Any, label: str, *rest: Any) -> bytes:
        types = {n.op_type for n in onnx.load(str(path)).graph.node}
        if "Tanh" in types and any(-1 in layout.bound for layout in wanted.values()):
            raise Rejected("no tanh of many sizes")
        return real(library, path, wanted, label, *rest)

    monkeypatch.setattr(Builds, "_build", staticmethod(refuse))

    class Tanh(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.tanh(self.linear(x)).reshape(x.shape[0] * 2, 4).reshape(-1, 8))

    model = Tanh()
    program = of_range(model, [drawn(5, 8)], {(0, 0)})
    made = compile_program(library(), program, _ADA, require_full=False, cache=cache)
    assert [f.op for f in made.fallbacks] == ["aten.tanh.default"]
    for n in (5, 2, 9):
        x = drawn(n, 8, seed=n)
        with torch.no_grad():
            torch.testing.assert_close(builds.run(made, program, [x])[0], model(x), rtol=1e-4, atol=1e-5)


def test_memory_of_a_range_lies_as_the_call_it_was_exported_for() -> None:
    x = drawn(5, 3, 6, 4).contiguous(memory_format=torch.channels_last)
    program = of_range(nn.Conv2d(3, 2, 1).to(memory_format=torch.channels_last), [x], {(0, 0), (0, 2)})
    (segment,) = partition(program, {}).segments.values()
    (layout,) = segment.inputs
    assert layout.physical == (5, 6, 4, 3)
    assert layout.bound == (-1, -1, 4, 3)
    y = drawn(7, 3, 9, 4).contiguous(memory_format=torch.channels_last)
    assert layout.to_engine(y).data_ptr() == y.data_ptr()
    written, result = segment.outputs[0].empty(torch.device("cpu"), (7, 9, 4, 2))
    assert result.shape == (7, 2, 9, 4)
    assert result.data_ptr() == written.data_ptr()
    assert isinstance(segment.outputs[0], Layout)
