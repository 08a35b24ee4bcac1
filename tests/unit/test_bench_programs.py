"""``benchmarks/bench.py`` and ``benchmarks/tables.py``: lanes become one run, and pages quote what lies in results."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from anabranch.bench import _host

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))  # for what it imports of the same folder
        spec.loader.exec_module(module)
    return module


def part(work: str, seconds: float) -> dict[str, Any]:
    where = {
        "seconds": seconds,
        "date": "2026-11-24",
        "load_before": [0.0] * 3,
        "load_after": [1.0] * 3,
        "command": "anabranch bench",
    }
    return {
        "environment": where,
        "settings": {"streams": [1]},
        "partial": False,
        "works": {work: {"summary": "", "shape": [1]}},
        "systems": {"eager": {"label": "PyTorch eager", "family": "peer"}},
        "cells": [{"work": work, "system": "eager", "status": "ok", "throughput": {}}],
    }


def test_lanes_become_one_run() -> None:
    whole = load("bench").merge([part("a", 1.0), part("b", 2.0)], "python benchmarks/bench.py h200")
    assert list(whole["works"]) == ["a", "b"]
    assert [c["work"] for c in whole["cells"]] == ["a", "b"]
    assert [lane["works"] for lane in whole["environment"]["lanes"]] == [["a"], ["b"]]
    assert [lane["seconds"] for lane in whole["environment"]["lanes"]] == [1.0, 2.0]
    assert whole["environment"]["command"] == "python benchmarks/bench.py h200"


def test_several_calls_become_one_run_that_says_so() -> None:
    bench = load("bench")
    calls = [bench.merge([part(f"{n}1", 1.0), part(f"{n}2", 2.0)], f"call {n}") for n in ("a", "b")]
    whole = bench.merge([*calls, part("a2", 3.0)], "python benchmarks/bench.py merge a.json b.json again.json")
    assert list(whole["works"]) == ["a1", "a2", "b1", "b2"]
    assert [c["work"] for c in whole["cells"]] == ["a1", "a2", "b1", "b2"]
    lanes = whole["environment"]["lanes"]
    assert [lane["works"] for lane in lanes] == [["a1"], ["a2"], ["b1"], ["b2"], ["a2"]]
    assert whole["environment"]["command"].startswith("python benchmarks/bench.py merge")


def test_runs_of_different_systems_do_not_become_one() -> None:
    other = part("b", 1.0)
    other["systems"] = {"compile": {"label": "torch.compile", "family": "peer"}}
    with pytest.raises(click.ClickException, match="different systems"):
        load("bench").merge([part("a", 1.0), other], "command")


def test_lanes_hold_each_work_of_a_gpu_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from anabranch.bench import _work, default_works

    monkeypatch.setattr(_work, "installed", lambda name: True)
    bench = load("bench")
    for lanes in (1, 2):
        dealt = bench.deal(default_works(), bench.LANES, lanes)
        assert len(dealt) == lanes
        assert sorted(w for lane in dealt for w in lane) == sorted(default_works())


def test_some_works_are_dealt_as_all_are() -> None:
    bench = load("bench")
    assert bench.deal(["googlenet", "relu", "encoder"], bench.LANES, 2) == [["relu", "googlenet"], ["encoder"]]
    assert bench.deal(["chain", "relu"], bench.LANES, 2) == [["relu", "chain"]]
    assert bench.deal(["my_package:model@1,3", "relu"], bench.LANES, 2) == [["relu", "my_package:model@1,3"]]


def test_a_lane_that_wrote_nothing_is_said_and_an_earlier_file_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lane(number: int, of: int, works: list[str], target: Path, *_: Any) -> None:
        if works != ["b"]:
            target.write_text(json.dumps(part(works[0], 1.0)))

    lanes = load("lanes")
    monkeypatch.setattr(lanes, "_lane", lane)
    (tmp_path / "lane1.json").write_text("{}")
    parts, missing = lanes.run_lanes([["a"], ["b"]], tmp_path, "cpu", 1.0, [])
    assert [list(p["works"]) for p in parts] == [["a"]]
    assert missing == [tmp_path / "lane1.json"]
    with pytest.raises(click.ClickException, match="no lane"):
        lanes.run_lanes([["b"]], tmp_path, "cpu", 1.0, [])


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("hung", 1)])
def test_a_run_of_lanes_without_its_baseline_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str, code: int
) -> None:
    bench = load("bench")
    found = part("relu", 1.0)
    figures = {key: {"median": 1.0, "low": 1.0, "high": 1.0, "rounds": 1} for key in ("p50_us", "host_us")}
    found["cells"][0] |= (
        {"status": "ok", "latency": figures}
        if status == "ok"
        else {
            "status": status,
            "reason": "build: no answer",
        }
    )
    monkeypatch.setattr(bench, "run_lanes", lambda *_: ([found], []))
    monkeypatch.setattr(bench, "plot", lambda *_: None)
    result = CliRunner().invoke(bench.main, ["h200", "--works", "relu", "--out", str(tmp_path)])
    assert result.exit_code == code, result.output
    assert ("no figures of the baseline: relu: eager is hung: build: no answer" in result.output) == bool(code)
    assert json.loads((tmp_path / "bench_h200.json").read_text())["cells"][0]["status"] == status


def test_what_is_free_is_told() -> None:
    total, available = _host.host_memory()
    assert 0 < available < total
    assert re.match(r"host \d+ of \d+ GB free", _host.free_memory())


@pytest.mark.parametrize("page", ["README.md", "docs/bench.md", "docs/models.md"])
def test_each_section_has_its_markers(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in load("tables").SECTIONS[page]:
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1


def test_a_committed_run_says_where_and_how_it_was_made() -> None:
    files = sorted((ROOT / "benchmarks/results").glob("bench_*.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        assert {"date", "device", "torch", "command", "load_before", "load_after"} <= set(content["environment"])
        assert len(content["cells"]) == len(content["works"]) * len(content["systems"])
        assert all(c["status"] != "waiting" for c in content["cells"])
        picture = file.with_suffix(".png")
        assert not picture.exists() or picture.stat().st_size < 200_000


def test_many_calls_counts_what_is_wrong() -> None:
    program = load("many_calls")
    work = program.WORKS["mlp"]
    module = work.make().eval().requires_grad_(False).half()
    device = torch.device("cpu")
    assert program.serve(module, module, work, device, 12, 1) == (12, 0)
    assert program.serve(lambda x: torch.zeros_like(module(x)), module, work, device, 12, 1) == (12, 12)
    calls = iter(range(12))
    assert program.serve(
        lambda x: module(x) if next(calls) % 4 else module(x).fill_(float("nan")), module, work, device, 12, 1
    ) == (12, 3)


def test_precision_is_measured_beside_autocast_and_under_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    precision = load("precision")
    made = precision.measurements()
    full = [name for name in made if not name.startswith("tiny")]
    assert len(full) == 5 + 2 * 5
    # Compilers would take minutes.
    make = precision.anabranch.compile
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(precision.anabranch, "compile", lambda *args, **more: make(*args, backend="eager", **more))
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        with torch.random.fork_rng(devices=[]):
            figures = made["tiny speed: tiny encoder"]()
            counted = made["tiny threads: tiny encoder, mixed"]()
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert all(figures["finite"].values())
    assert 0 < figures["error_ratio"]["float16"] < 1.5
    assert figures["error"]["mixed"] < figures["error"]["mixed-bf16"] < 0.1
    assert figures["share_half"]["mixed"] >= 0.8
    ratio = figures["us"]["float16"] / figures["us"]["mixed"]
    assert figures["speed_ratio"]["float16"] == pytest.approx(ratio, rel=0.01)
    assert (counted["calls"], counted["wrong"]) == (32, 0)
    json.dumps([figures, counted])
