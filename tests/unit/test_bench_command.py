"""``anabranch bench``: its options, and the works and systems behind them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from anabranch.bench import SYSTEMS, WORKS, Subject, default_systems, default_works, find_system, find_work
from anabranch.bench import _command as module
from anabranch.cli._bench import command
from anabranch.errors import InputError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command would run; nothing is run."""
    calls: list[Any] = []

    def fake(works: Any, systems: Any, options: Any) -> dict[str, Any]:
        calls.append((works, systems, options))
        return {"works": {}, "cells": [], "systems": {}, "environment": {}, "settings": {"streams": [1]}}

    monkeypatch.setattr(module, "_run", fake)
    return calls


def invoke(*args: str) -> Any:
    return CliRunner().invoke(command, args)


@pytest.mark.parametrize(
    "args",
    [
        ("relu", "chain", "--streams", "1", "4", "16", "--systems", "eager", "compile"),
        ("relu", "chain", "--systems", "eager,compile", "--streams", "16,4,1"),
        ("--streams", "1", "4", "16", "relu", "chain", "--systems", "eager", "compile"),
    ],
)
def test_several_values_may_follow_an_option(asked: list[Any], args: tuple[str, ...]) -> None:
    result = invoke(*args, "--device", "cpu")
    assert result.exit_code == 0, result.output
    works, systems, options = asked[0]
    assert (works, systems, options.streams) == (["relu", "chain"], ["eager", "compile"], (1, 4, 16))
    assert options.dtype == "float32"


def test_without_names_all_that_make_sense_here_are_run(asked: list[Any]) -> None:
    assert invoke("--device", "cpu").exit_code == 0
    works, systems, _ = asked[0]
    assert works == default_works()
    assert systems == default_systems("cpu")
    assert {"eager", "compile", "aoti", "onnxruntime", "anabranch-inductor-native", "anabranch-eager-python"} <= set(
        systems
    )
    assert not {"bound", "compile-overhead"} & set(systems)


@pytest.mark.parametrize("streams", ["0", "a", ","])
def test_bad_streams_are_refused(streams: str) -> None:
    result = invoke("relu", "--streams", streams)
    assert result.exit_code == 2
    assert "expected numbers" in result.output


def test_an_unknown_work_ends_with_status_2() -> None:
    result = invoke("nonsense", "--device", "cpu")
    assert result.exit_code == 2
    assert "expected one of relu" in result.output


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("relu", "--device", "cuda")
    assert result.exit_code == 2
    assert "--device cpu" in result.output


def test_list_names_everything() -> None:
    output = invoke("--list").output
    for name in (*WORKS, *SYSTEMS):
        assert name in output


def test_a_run_is_written_and_shown_again(tmp_path: Path) -> None:
    target, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    args = ("relu", "--device", "cpu", "--systems", "eager", "anabranch-eager-native", "--streams", "1", "2")
    result = invoke(*args, "--rounds", "1", "--seconds", "0.01", "--json", str(target))
    assert result.exit_code == 0, result.output
    content = json.loads(target.read_text())
    assert not content["partial"]
    assert [c["status"] for c in content["cells"]] == ["ok", "ok"]
    assert all(r["wrong"] == 0 for c in content["cells"] for r in c["throughput"].values())
    shown = invoke("--from", str(target), "--plot", str(picture))
    assert shown.exit_code == 0, shown.output
    assert "PyTorch eager" in shown.output
    assert picture.exists()


def test_the_baseline_and_the_bound_are_built_first_and_what_takes_many_cores_last() -> None:
    names = [s.name for s in sorted(SYSTEMS.values(), key=lambda s: s.order)]
    assert set(names[:2]) == {"eager", "bound"}
    assert names[-1] == "compile-autotune"
    assert names.index("trt-cpp-each") < names.index("compile") < names.index("anabranch-eager-native")


OURS = [w for w in WORKS.values() if w.needs is None]


@pytest.mark.parametrize("work", OURS, ids=lambda w: w.name)
def test_works_have_seeded_weights_and_finite_outputs(work: Any) -> None:
    before = torch.random.get_rng_state()
    model, again = work.make(), work.make()
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not model.training
    # Small pictures will do; other shapes are part of the network.
    shape = tuple(min(n, 64) for n in work.shape) if len(work.shape) == 4 else work.shape
    with torch.no_grad():
        y = model(torch.randn(shape))
    assert torch.isfinite(y).all()
    assert y.std() > 1e-3


def test_stand_ins_are_for_where_torchvision_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from anabranch.bench import _work

    monkeypatch.setattr(_work, "installed", lambda name: True)
    assert "googlenet" in default_works()
    assert "branches" not in default_works()
    monkeypatch.setattr(_work, "installed", lambda name: False)
    assert "googlenet" not in default_works()
    assert {"branches", "residual"} <= set(default_works())
    with pytest.raises(InputError, match="torchvision"):
        find_work("googlenet")


def test_torch_tensorrt_is_tried_in_every_set_up() -> None:
    names = {n for n in SYSTEMS if n.startswith("trt-")}
    wanted = {f"trt-{r}{g}-{w}" for r in ("cpp", "python") for g in ("", "-graphs") for w in ("shared", "each")}
    assert names == wanted | {"trt-cpp-subgraphs-each"}
    assert all(SYSTEMS[n].missing("cpu") == "not for cpu" for n in names)


def test_our_engine_is_there_in_each_backend_and_runtime() -> None:
    from anabranch.backends import BACKENDS
    from anabranch.runtime._compile import RUNTIMES

    ours = {s.name for s in SYSTEMS.values() if s.family == "ours"}
    backends = {*BACKENDS, "tensorrt"}
    extra = {"anabranch-tensorrt-native-graphs", "anabranch-tensorrt-native-direct"}
    assert ours == {f"anabranch-{b}-{r}" for b in backends for r in RUNTIMES} | extra


def test_our_tensorrt_is_for_gpus_and_its_variants_for_where_they_are_named() -> None:
    names = {n for n in SYSTEMS if n.startswith("anabranch-tensorrt-")}
    assert not names & set(default_systems("cpu"))
    assert names & set(default_systems("cuda")) == {"anabranch-tensorrt-native", "anabranch-tensorrt-python"}
    assert all(SYSTEMS[n].missing("cpu") == "not for cpu" for n in names)
    assert not any(SYSTEMS[n].contiguous for n in names)


def test_one_of_several_modules_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    from anabranch.bench import _system

    system = find_system("anabranch-tensorrt-native")
    for there in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setattr(_system, "installed", there.__eq__)
        assert system.missing("cuda") is None
    monkeypatch.setattr(_system, "installed", lambda name: False)
    assert system.missing("cuda") == "tensorrt or tensorrt_rtx is not installed"


def test_the_note_of_our_tensorrt_says_how_much_of_the_model_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import anabranch

    asked: list[dict[str, Any]] = []

    class Engine:
        plan = SimpleNamespace(captured=True, reason="asked for")

        def explain(self) -> str:
            return "signature 0\n  tensorrt_rtx 1.4.0.76: 57 of 57 operators, 100.0% of FLOPs, in 1 engine\n  more"

    def compiled(model: Any, inputs: Any, **options: Any) -> Engine:
        asked.append(options)
        return Engine()

    monkeypatch.setattr(anabranch, "compile", compiled)
    subject = Subject(find_work("relu"), torch.nn.ReLU(), torch.zeros(1), 8)
    share = "tensorrt_rtx 1.4.0.76: 57 of 57 operators, 100.0% of FLOPs, in 1 engine"
    for suffix, graphs in (("native", None), ("python", None), ("native-graphs", True), ("native-direct", False)):
        ready = SYSTEMS[f"anabranch-tensorrt-{suffix}"].build(subject)
        assert ready.note == f"captured: asked for; {share}"
        assert asked[-1]["backend"] == "tensorrt"
        assert asked[-1]["cuda_graphs"] is graphs
    assert SYSTEMS["anabranch-inductor-native"].build(subject).note == "captured: asked for"


def test_extra_works_are_run_where_they_are_named(asked: list[Any]) -> None:
    assert not {"resnet18", "upscaler-270p"} & set(default_works())
    assert invoke("upscaler-270p", "--device", "cpu", "--checked", "500").exit_code == 0
    works, _, options = asked[0]
    assert works == ["upscaler-270p"]
    assert options.checked == 500
    assert invoke("relu", "--device", "cpu").exit_code == 0
    assert asked[1][2].checked is None
    assert invoke("relu", "--device", "cpu", "--checked", "1").exit_code == 2


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from anabranch.bench import _system

    monkeypatch.setattr(_system, "installed", lambda name: False)
    assert find_system("onnxruntime").missing("cpu") == "onnxruntime is not installed"
    assert find_system("eager").missing("cpu") is None
