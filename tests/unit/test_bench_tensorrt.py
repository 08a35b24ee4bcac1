"""``benchmarks/bench_tensorrt.py``: each bar is judged by what is in the run, and never passes without it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from anabranch.bench import SYSTEMS, WORKS, default_systems
from anabranch.bench._statistics import spread

FILE = Path(__file__).parents[2] / "benchmarks/bench_tensorrt.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_bench_tensorrt", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FILE.parent))
        spec.loader.exec_module(module)
    return module


def figures(per_s: float, wrong: int = 0, inexact: int = 0, checked: int = 4000) -> dict[str, Any]:
    return {
        "per_s": spread([per_s]),
        "calls": 100,
        "checked": checked,
        "wrong": wrong,
        "inexact": inexact,
        "all_zero": 0,
    }


def made(system: str, error: float, p50: float, one: float, eight: float, wrong: int = 0, note: str = "") -> Any:
    return {
        "work": "resnet18",
        "system": system,
        "status": "ok",
        "note": note,
        "serial_error": error,
        "serially_wrong": False,
        "latency": {"p50_us": spread([p50])},
        "throughput": {"1": figures(one, checked=500), "8": figures(eight, wrong)},
    }


@pytest.fixture
def cells(program: ModuleType) -> dict[str, Any]:
    """A run in which every bar is met: peers with graphs are wrong on 8 streams, and faster than the right ones."""
    share = "tensorrt_rtx 1.4.0.76: 57 of 57 operators, 99.5% of FLOPs, in 1 engine"
    found = [
        made(program.MAIN, 0.0012, 300.0, 3000.0, 9000.0, note=f"captured: faster; {share}"),
        made("anabranch-tensorrt-python", 0.0014, 310.0, 2900.0, 4000.0, note=f"captured: faster; {share}"),
        made(program.GRAPHS, 0.0012, 300.0, 3000.0, 9000.0, note=f"captured: asked for; {share}"),
        made(program.DIRECT, 0.0012, 700.0, 1500.0, 2000.0, note=f"direct: asked for; {share}"),
        made("trt-cpp-shared", 0.0010, 600.0, 1200.0, 1000.0),
        made("trt-python-shared", 0.0010, 800.0, 1100.0, 1400.0, wrong=2000),
        made("trt-cpp-graphs-shared", 0.0011, 350.0, 2900.0, 2600.0, wrong=167),
        made("trt-python-graphs-shared", 0.0010, 400.0, 2500.0, 2400.0, wrong=291),
    ]
    return {c["system"]: c for c in found}


def judged(program: ModuleType, cells: dict[str, Any], work: str = "resnet18") -> dict[str, Any]:
    content = {"works": {work: {}}, "cells": [{**c, "work": work} for c in cells.values()]}
    found: dict[str, Any] = program.verdict(content)[work]
    assert set(found) == set(program.BARS)
    assert program.text({work: found}).count("\n") == len(found) - 1
    return found


def test_what_meets_every_bar_passes(program: ModuleType, cells: dict[str, Any]) -> None:
    found = judged(program, cells)
    assert {row["result"] for row in found.values()} == {"pass"}
    assert not any("why" in row for row in found.values())
    assert found["flops_share"]["ours"] == 99.5
    assert (found["error"]["ours"], found["error"]["theirs"], found["error"]["ratio"]) == (0.0014, 0.001, 1.4)
    assert found["wrong"]["ours"][program.MAIN] == "0 of 4000"
    assert found["wrong"]["theirs"]["trt-cpp-graphs-shared"] == "167 of 4000"
    assert (found["latency"]["ours"], found["latency"]["theirs"]) == (300.0, 350.0)


def test_a_peer_that_is_wrong_on_8_streams_does_not_count_there(program: ModuleType, cells: dict[str, Any]) -> None:
    row = judged(program, cells)["throughput"]
    assert (row["theirs"], row["theirs_on_streams"], row["ratio"]) == (1000.0, 8, 9.0)
    # What it does right, on one stream, is said too.
    assert (row["theirs_on_any_streams"], row["ratio_to_any_streams"]) == (2900.0, 3.103)
    cells["trt-cpp-graphs-shared"]["throughput"]["8"]["wrong"] = 0
    row = judged(program, cells)["throughput"]
    assert (row["theirs"], row["result"]) == (2600.0, "fail")


def test_peers_that_are_all_wrong_on_8_streams_are_compared_on_one(program: ModuleType, cells: dict[str, Any]) -> None:
    cells["trt-cpp-shared"]["throughput"]["8"]["wrong"] = 1
    row = judged(program, cells)["throughput"]
    assert (row["theirs"], row["theirs_on_streams"], row["result"]) == (2900.0, 1, "fail")


def test_a_missed_throughput_says_whether_the_gpu_is_the_limit(program: ModuleType, cells: dict[str, Any]) -> None:
    cells["trt-cpp-shared"] = made("trt-cpp-shared", 0.0010, 600.0, 1200.0, 2800.0)
    assert "why" not in judged(program, cells)["throughput"]
    cells[program.BOUND] = made(program.BOUND, 0.0012, 300.0, 3000.0, 9600.0)
    row = judged(program, cells)["throughput"]
    assert (row["result"], row["bound"], row["ratio_to_bound"]) == ("fail", 9600.0, 0.9375)
    assert row["why"] == "the GPU does 9,600 at most, 3.43 x theirs"
    cells[program.BOUND] = made(program.BOUND, 0.0012, 300.0, 3000.0, 12000.0)
    assert "why" not in judged(program, cells)["throughput"]


@pytest.mark.parametrize("kind", ["wrong", "inexact"])
def test_one_output_of_ours_that_is_not_the_same_bits_fails(
    program: ModuleType, cells: dict[str, Any], kind: str
) -> None:
    cells[program.GRAPHS]["throughput"]["8"][kind] = 1
    del cells["trt-cpp-shared"]
    row = judged(program, cells)["wrong"]
    assert row["result"] == "fail"
    assert row["ours"][program.GRAPHS] == "1 of 4000"
    assert row["theirs"]["trt-cpp-shared"] == "not in this run"


def test_too_few_checked_calls_are_no_measurement(program: ModuleType, cells: dict[str, Any]) -> None:
    cells[program.DIRECT]["throughput"]["8"]["checked"] = 3999
    assert judged(program, cells)["wrong"]["result"] == "not measured"


def test_with_graphs_means_that_there_were_graphs(program: ModuleType, cells: dict[str, Any]) -> None:
    cells[program.GRAPHS]["note"] = cells[program.DIRECT]["note"]
    row = judged(program, cells)["wrong"]
    assert (row["result"], row["why"]) == ("not measured", f"{program.GRAPHS}: not captured")


def test_without_cells_nothing_passes(program: ModuleType, cells: dict[str, Any]) -> None:
    assert {row["result"] for row in judged(program, {}).values()} == {"not measured"}
    for name in cells:
        there = {k: c for k, c in cells.items() if k != name}
        found = judged(program, there)
        assert found["wrong"]["result"] == found["error"]["result"] == "not measured"
        assert name in found["wrong"]["why"]
    for status, reason in (
        ("skipped", "out of time before its build"),
        ("slow", "not built within 240 s"),
        ("unavailable", "torch_tensorrt is not installed"),
        ("failed", "build: OutOfMemoryError: CUDA out of memory"),
        ("crashed", "build: SIGKILL"),
    ):
        empty = {
            n: {"system": n, "work": "", "status": status, "reason": reason, "throughput": {}}
            for n in (*program.OURS, *program.PEERS)
        }
        assert {row["result"] for row in judged(program, empty).values()} == {"not measured"}


def test_a_peer_that_time_ran_out_for_leaves_its_bars_open(program: ModuleType, cells: dict[str, Any]) -> None:
    del cells["trt-python-graphs-shared"]["throughput"]["8"]
    found = judged(program, cells)
    assert found["throughput"]["result"] == found["wrong"]["result"] == "not measured"
    assert found["latency"]["result"] == found["error"]["result"] == "pass"
    cells["trt-python-graphs-shared"]["without"] = {"8": "NotReady: 3 threads made their first calls in time"}
    assert judged(program, cells)["throughput"]["result"] == "not measured"


def test_a_peer_that_ended_by_itself_has_been_measured(program: ModuleType, cells: dict[str, Any]) -> None:
    for name, reason in (("trt-python-shared", "8 streams: SIGSEGV"), ("trt-python-graphs-shared", "8 streams: abort")):
        del cells[name]["throughput"]["8"]
        cells[name] |= {"status": "crashed", "reason": reason}
    found = judged(program, cells)
    assert {row["result"] for row in found.values()} == {"pass"}
    assert found["wrong"]["theirs"]["trt-python-shared"] == "8 streams: SIGSEGV"
    # But a comparison needs somebody who is right.
    for name in program.PEERS:
        cells[name] = {"system": name, "status": "crashed", "reason": "build: SIGSEGV", "throughput": {}}
    found = judged(program, cells)
    assert {found[bar]["result"] for bar in ("error", "latency", "throughput")} == {"not measured"}
    assert found["wrong"]["result"] == "pass"


def test_ours_fails_by_ending_by_itself(program: ModuleType, cells: dict[str, Any]) -> None:
    cells[program.MAIN] |= {"status": "crashed", "reason": "8 streams: SIGSEGV"}
    found = judged(program, cells)
    assert found["wrong"]["result"] == found["throughput"]["result"] == "fail"
    assert found["latency"]["result"] == "pass"
    cells[program.MAIN] = {
        "system": program.MAIN,
        "status": "failed",
        "reason": "build: BuildError: no",
        "throughput": {},
    }
    found = judged(program, cells)
    assert {row["result"] for row in found.values()} == {"fail"}
    assert found["latency"]["why"] == f"{program.MAIN}: build: BuildError: no"


def test_figures_beyond_a_bar_fail(program: ModuleType, cells: dict[str, Any]) -> None:
    note = cells[program.DIRECT]["note"]
    cells[program.DIRECT]["note"] = note.replace("99.5%", "94.9%")
    cells["anabranch-tensorrt-python"]["serial_error"] = 0.00151
    cells[program.MAIN]["latency"]["p50_us"] = spread([350.1])
    cells[program.MAIN]["throughput"]["8"] = figures(3999.0)
    found = judged(program, cells)
    assert {bar for bar, row in found.items() if row["result"] == "fail"} == set(found) - {"wrong"}
    # Only convolutional networks have a bar on their FLOPs.
    assert judged(program, cells, "encoder")["flops_share"]["result"] == "no bar"
    shareless = {name: cell | {"note": "captured: asked for"} for name, cell in cells.items()}  # as a ReLU's
    assert judged(program, shareless, "relu")["flops_share"]["result"] == "no bar"
    cells[program.DIRECT]["note"] = "direct: asked for"
    assert judged(program, cells)["flops_share"]["result"] == "not measured"


def test_an_exact_network_has_to_be_exact(program: ModuleType, cells: dict[str, Any]) -> None:
    for cell in cells.values():
        cell["serial_error"] = 0.0
    assert judged(program, cells)["error"]["result"] == "pass"
    cells[program.MAIN]["serial_error"] = 1e-6
    assert judged(program, cells)["error"]["result"] == "fail"
    cells[program.MAIN] |= {"serial_error": "inf", "serially_wrong": True}
    found = judged(program, cells)
    assert {found[bar]["result"] for bar in ("error", "wrong", "latency", "throughput")} == {"fail"}


def test_names_are_those_of_the_benchmark(program: ModuleType) -> None:
    assert {*program.OURS, *program.PEERS} <= set(SYSTEMS)
    assert set(program.OURS) - {program.GRAPHS, program.DIRECT} <= set(default_systems("cuda"))
    works = [w for lane in program.LANES for w in lane]
    assert len(works) == len(set(works)) == 8
    assert {*works, *program.CNNS} <= set(WORKS)
    assert all(WORKS[w].max_streams >= program.STREAMS for w in works)
    assert {w for w in works if WORKS[w].channels_last} <= set(program.CNNS)


def test_files_of_earlier_calls_are_judged_together(program: ModuleType, cells: dict[str, Any], tmp_path: Path) -> None:
    files = []
    for work in ("resnet18", "relu"):
        content = {
            "environment": {"date": "2026-11-26", "device": "Device X"},
            "settings": {"streams": [1, 8]},
            "partial": False,
            "works": {work: {"summary": "", "shape": [1]}},
            "systems": {n: {"label": n, "family": SYSTEMS[n].family} for n in cells},
            "cells": [{**c, "work": work} for c in cells.values()],
        }
        files.append(tmp_path / f"{work}.json")
        files[-1].write_text(json.dumps(content))
    out = tmp_path / "out"
    args = [v for file in files for v in ("--merge", str(file))]
    result = CliRunner().invoke(program.main, [*args, "--out", str(out)])
    assert result.exit_code == 0, result.output
    content = json.loads((out / "tensorrt_h200.json").read_text())
    assert content["verdict"]["results"] == {"pass": 9, "fail": 0, "not measured": 0, "no bar": 1}
    assert list(content["verdict"]["works"]) == ["resnet18", "relu"]
    assert [lane["works"] for lane in content["environment"]["lanes"]] == [["resnet18"], ["relu"]]
