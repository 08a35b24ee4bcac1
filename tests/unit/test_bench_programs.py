"""``benchmarks/bench.py`` and ``benchmarks/readme.py``: lanes become one run, and pages quote what lies in results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def part(work: str, seconds: float) -> dict[str, Any]:
    where = {"seconds": seconds, "load_before": [0.0] * 3, "load_after": [1.0] * 3, "command": "anabranch bench"}
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


def test_lanes_hold_each_work_of_a_gpu_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from anabranch.bench import _work, default_works

    monkeypatch.setattr(_work, "installed", lambda name: True)
    dealt = [w for lane in load("bench").LANES for w in lane]
    assert sorted(dealt) == sorted(default_works())


@pytest.mark.parametrize("page", ["README.md", "docs/bench.md"])
def test_each_section_has_its_markers(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in load("readme").SECTIONS[page]:
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
