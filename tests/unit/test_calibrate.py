"""``anabranch calibrate``: who is guilty, what it proposes, and that the proposal keeps what it promises."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import anabranch
from anabranch import InputError, Mixed
from anabranch.calibrate import Calibration, Finding, calibrate, draw, load_samples
from anabranch.cli import main
from contract.overflowing import GUILTY, NETWORKS

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These are thousands of tiny operators."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def samples(*inputs: torch.Tensor) -> list[Any]:
    return [((x,), {}) for x in inputs]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def by_place(found: Calibration) -> dict[str, Finding]:
    return {f.place: f for f in found.operators}


def share_in(engine: anabranch.Engine) -> float:
    share: float = engine.summary()["signatures"][0]["precision"]["share_half"]
    return share


@pytest.mark.parametrize("name", NETWORKS)
def test_the_guilty_operator_is_first_and_the_proposal_keeps_the_budget(name: str, tmp_path: Path) -> None:
    model, make = NETWORKS[name]()
    budget = 1e-2 if name == "norm_of_sums" else 4e-3
    found = calibrate(model, samples(make(), make()), budget=budget)
    worst = found.operators[0]
    assert worst.place.rpartition(":")[2].partition("#")[0] == GUILTY[name]
    assert worst.starts
    assert worst.overflow > 0
    assert not worst.half
    assert math.isinf(worst.effect)
    assert not math.isfinite(list(found.plain.values())[-1])
    assert 0 < found.error <= budget
    path = tmp_path / "precision.json"
    path.write_text(json.dumps(found.data()), encoding="utf-8")
    x = make()
    engine = anabranch.compile(model, [x], backend="eager", runtime="python", precision=path)
    with torch.no_grad():
        assert error(engine(x), model(x)) <= 1.5 * budget
    assert share_in(engine) == pytest.approx(found.share_half)
    assert found.share_half >= 0.8


class _Three(nn.Module):
    """A layer without which the error would be small, one that is most of the work, and one that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.sharp, self.wide, self.last = nn.Linear(16, 16), nn.Linear(16, 512), nn.Linear(512, 16)
        with torch.no_grad():
            self.sharp.bias.add_(300.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.sharp(x) - 300.0
        return self.last(torch.relu(self.wide(y)))


def test_what_costs_most_for_its_work_is_kept_first() -> None:
    model = _Three()
    x = [torch.randn(8, 16) for _ in range(2)]
    loose, tight, none = (calibrate(model, samples(*x), budget=b) for b in (1.0, 2e-3, 1e-12))
    assert loose.mixed.keep == ()
    assert loose.share_half == 1.0
    assert tight.mixed.keep == ("sharp:aten.linear#0",)
    assert 0.9 < tight.share_half < 1.0
    assert tight.error <= 2e-3 < loose.error
    assert none.share_half == 0.0
    assert none.error == 0.0
    assert len(none.mixed.keep) == 3
    first = loose.operators[0]
    assert first.place in ("sharp:aten.linear#0", ":aten.sub#0")
    assert sum(f.share for f in loose.operators) == pytest.approx(1.0)
    assert by_place(loose)["sharp:aten.linear#0"].share > 10 * by_place(loose)["last:aten.linear#0"].share


def test_scores_that_a_softmax_bears_are_proposed_for_half() -> None:
    class Attends(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x.transpose(-1, -2)).softmax(-1) @ x

    found = calibrate(Attends(), samples(torch.randn(2, 6, 8)), budget=5e-3)
    assert found.mixed.half == (":aten.matmul#0", ":aten.matmul#1")
    assert found.share_half == 1.0
    assert found.error <= 5e-3


class _Tiny(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 1e-9, (x * 1e-6).log()


def test_flushed_and_subnormal_values_are_counted() -> None:
    x = torch.rand(5, 7) + 1
    found = by_place(calibrate(_Tiny(), samples(x)))
    zero, small = found[":aten.mul#0"], found[":aten.mul#1"]
    assert (zero.flushed, zero.elements) == (35, 35)
    assert zero.effect == 1.0
    assert (small.flushed, small.subnormal) == (0, 35)
    assert not zero.leaves_the_range
    assert not by_place(calibrate(_Tiny(), samples(x), dtype=torch.bfloat16))[":aten.mul#0"].flushed


def test_infinities_that_float32_has_too_are_no_overflow() -> None:
    class Logs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x.log(), (x * 300.0).exp().clamp(max=1e9).reciprocal()])

    x = torch.tensor([0.02, 0.0, 0.05, 2.0])  # times 300: within half, within half, beyond half, beyond float32
    found = by_place(calibrate(Logs(), samples(x)))
    log, exp = found[":aten.log#0"], found[":aten.exp#0"]
    assert (log.infinite, log.overflow, log.nan) == (1, 0, 0)
    assert (exp.infinite, exp.overflow, exp.nan) == (1, 1, 0)


def test_errors_along_the_depth_are_drawn() -> None:
    model, make = NETWORKS["large_logits"]()
    found = calibrate(model, samples(make()), budget=4e-3)
    order = [f.place for f in sorted(found.operators, key=lambda f: f.depth)]
    assert list(found.plain) == order
    assert set(found.proposed) <= set(order)
    assert found.plain[order[0]] < 1e-2
    assert math.isinf(found.plain[order[-1]])
    picture = ElementTree.fromstring(draw(found, "a <network>"))
    kinds = [child.tag.rpartition("}")[2] for child in picture]
    broken = sum(not math.isfinite(v) for v in (*found.plain.values(), *found.proposed.values()))
    assert kinds.count("path") == broken > 0
    assert kinds.count("circle") == len(found.plain) + len(found.proposed) - broken
    assert any("query:aten.linear#0" in "".join(child.itertext()) for child in picture)


def test_keyword_inputs_and_writes_are_measured_without_being_written() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("seen", torch.ones(4))

        def forward(self, x: torch.Tensor, scale: float, *, more: torch.Tensor) -> dict[str, torch.Tensor]:
            self.seen.add_(x.sum(0))
            more.mul_(2)
            return {"y": self.layer(x) * scale + self.seen}

    model, x, more = Writes().eval(), torch.randn(3, 4), torch.randn(3)
    kept = more.clone()
    found = calibrate(model, [((x, 0.5), {"more": more})])
    assert torch.equal(more, kept)
    assert torch.equal(model.seen, torch.ones(4))
    assert 0 < by_place(found)["layer:aten.linear#0"].effect < 1e-3


# -- samples --------------------------------------------------------------------------------------------------------


def drawn() -> list[torch.Tensor]:
    """What ``--data test_calibrate:drawn`` gives."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(1, 3, 16, 16, generator=generator) for _ in range(3)]


def several() -> list[torch.Tensor]:
    return [torch.ones(1, 2), torch.ones(2, 2)]


def nothing() -> list[torch.Tensor]:
    return []


def alone() -> torch.Tensor:
    return torch.ones(2, 2)


def words() -> list[str]:
    return ["a", "b"]


def test_samples_come_from_files_and_functions(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    path = tmp_path / "samples.pt"
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    torch.save([(a, 2), {"x": a, "y": b}], path)
    with pytest.raises(InputError, match="several shapes or types"):
        load_samples(str(path), 8, cpu)
    torch.save([(a, b), (b, a), (a, a)], path)
    first, second = load_samples(str(path), 2, cpu)
    assert torch.equal(first[0][1], b)
    assert torch.equal(second[0][0], b)
    torch.save([{"x": a}], path)
    assert torch.equal(load_samples(str(path), 8, cpu)[0][1]["x"], a)
    assert len(load_samples("test_calibrate:drawn", 2, cpu)) == 2


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("test_calibrate:several", "several shapes"),
        ("test_calibrate:nothing", "no samples"),
        ("test_calibrate:alone", "gives a Tensor"),
        ("test_calibrate:words", "a sample that is a str without tensors"),
        ("test_calibrate:absent", "Expected module:callable"),
        ("absent.pt", "cannot be read"),
    ],
)
def test_other_data_is_refused(data: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        load_samples(data, 8, torch.device("cpu"))


def test_models_that_cannot_be_measured_are_refused() -> None:
    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argmax(-1)

    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - x) / 0

    with pytest.raises(InputError, match="returns no floating-point tensors"):
        calibrate(Counts(), samples(torch.randn(2, 3)))
    with pytest.raises(InputError, match="no finite element in float32"):
        calibrate(Breaks(), samples(torch.randn(2, 3)))


# -- the command ----------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    """What ``anabranch calibrate test_calibrate:network`` measures."""
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5)
    return nn.Sequential(*layers)


def test_the_command_writes_a_file_that_compile_takes(tmp_path: Path) -> None:
    out, svg = tmp_path / "deep/precision.json", tmp_path / "deep/error.svg"
    words = ["calibrate", "test_calibrate:network", "--data", "test_calibrate:drawn", "--budget", "0.003"]
    result = CliRunner().invoke(
        main, [*words, "--device", "cpu", "--out", str(out), "--svg", str(svg)], standalone_mode=False
    )
    assert result.exception is None, result.output
    assert "test_calibrate:network in float16 beside float32, worst first" in result.output
    assert "100.0% of floating-point operations in float16" in result.output
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["samples"] == 3
    measured = {"0:aten.conv2d#0", "2:aten.adaptive_avg_pool2d#0", "4:aten.linear#0"}
    assert {f["place"] for f in content["operators"]} == measured
    ElementTree.fromstring(svg.read_text(encoding="utf-8"))
    assert Mixed.load(out).dtype is torch.float16
    model, x = network().eval(), drawn()[0]
    engine = anabranch.compile(model, [x], backend="eager", runtime="python", precision=str(out))
    with torch.no_grad():
        assert 0 < error(engine(x), model(x)) <= 0.003


class _Sums(nn.Module):
    """Of numbers that float32 has no digits for, beside a product; with types that are named, and made of bits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        large = torch.full_like(x, 3e7, dtype=torch.float32)
        signs = (x.view(torch.int32) >> 31).to(torch.float32)
        return ((x + large) - large) * 1e-2 + signs, self.layer(x).to(torch.float32)


def test_float64_is_a_reference_beside_which_float32_has_an_error() -> None:
    model, x = _Sums().eval().requires_grad_(False), torch.rand(4, 8) + 0.3
    narrow = calibrate(model, samples(x), budget=1e-2)
    wide = calibrate(model, samples(x), budget=1e-2, reference=torch.float64)
    assert (narrow.reference, wide.reference) == ("float32", "float64")
    assert narrow.data()["reference"] == "float32"
    assert by_place(narrow).keys() == by_place(wide).keys()
    # The digits that float32 loses are no error beside itself.
    assert narrow.error < 1e-2
    exact = x.double() * 1e-2
    assert wide.error == pytest.approx(error(model(x)[0], exact), rel=1e-6)
    assert wide.error > 0.1
    # What half precision does to an operator is the same beside both, but for float32's rounding.
    product = "layer:aten.linear#0"
    assert by_place(wide)[product].error == pytest.approx(by_place(narrow)[product].error, rel=0.05)
    assert 0 < by_place(wide)[product].error < 1e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_the_guilty_operator_is_first_beside_float64_too(name: str) -> None:
    model, make = NETWORKS[name]()
    found = calibrate(model, samples(make()), budget=1e-2, reference=torch.float64)
    worst = found.operators[0]
    assert worst.place.rpartition(":")[2].partition("#")[0] == GUILTY[name]
    assert worst.starts
    assert 0 < found.error <= 1e-2


def test_other_references_are_refused() -> None:
    with pytest.raises(InputError, match=r"reference=torch\.float16 given; expected torch\.float32 or torch\.float64"):
        calibrate(nn.Linear(2, 2), samples(torch.rand(1, 2)), reference=torch.float16)


def test_the_command_says_in_a_line_what_it_cannot_do() -> None:
    words = ["calibrate", "test_calibrate:network", "--data", "test_calibrate:nothing", "--device", "cpu"]
    result = CliRunner().invoke(main, words, standalone_mode=False)
    assert isinstance(result.exception, SystemExit)
    assert result.exception.code == 2
