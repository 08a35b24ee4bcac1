"""Statistics, ratios, and what a run is shown as."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anabranch.bench import overview, strike, summary, table
from anabranch.bench._plot import plot
from anabranch.bench._report import notes, number, with_ratios
from anabranch.bench._statistics import percentile, ratio, spread


def test_percentile_is_a_value_that_was_seen() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.5) == 1.0
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([5.0, 6.0], 1.0) == 6.0
    assert percentile([5.0, 6.0], 0.0) == 5.0


def test_spread_is_the_median_with_the_extremes() -> None:
    assert spread([3.0, 1.0, 10.0]) == {"median": 3.0, "low": 1.0, "high": 10.0, "rounds": 3}


def test_ratio_above_one_is_better() -> None:
    assert ratio(200.0, 100.0, more_is_better=True) == 2.0
    assert ratio(50.0, 100.0, more_is_better=False) == 2.0
    assert ratio(50.0, None, more_is_better=False) is None
    assert ratio(50.0, 0.0, more_is_better=True) is None


@pytest.mark.parametrize(("value", "text"), [(12345.6, "12,346"), (314.2, "314"), (31.42, "31.4"), (3.142, "3.14")])
def test_numbers_have_three_digits_or_all_before_the_point(value: float, text: str) -> None:
    assert number(value) == text


def made(system: str, latency: float, throughput: float, wrong: int = 0, inexact: int = 0) -> dict[str, Any]:
    return {
        "work": "relu",
        "system": system,
        "status": "ok",
        "build_s": 1.5,
        "first_call_ms": 20.0,
        "memory_mb": 1234.5,
        "serial_error": 0.001,
        "serially_wrong": False,
        "latency": {k: spread([latency]) for k in ("p50_us", "p99_us", "host_us")},
        "throughput": {
            "4": {
                "per_s": spread([throughput]),
                "calls": 100,
                "checked": 480,
                "wrong": wrong,
                "inexact": inexact,
                "all_zero": 0,
            }
        },
    }


@pytest.fixture
def content() -> dict[str, Any]:
    crashed = {
        "work": "relu",
        "system": "e",
        "status": "crashed",
        "reason": "build: SIGSEGV",
        "crash": {"stage": "build", "how": "SIGSEGV", "stderr": ["Fatal Python error: Segmentation fault"]},
        "throughput": {},
    }
    families = {"a": "peer", "b": "peer", "c": "ours", "d": "bound", "e": "peer"}
    return with_ratios(
        {
            "environment": {"device": "Device X", "torch": "2.0", "date": "2026-01-02T03:04:05+00:00"},
            "settings": {"streams": [4], "dtype": "float16", "rounds": 1},
            "works": {"relu": {"summary": "one ReLU", "shape": [1, 3, 5]}},
            "systems": {k: {"label": f"System {k.upper()}", "family": v} for k, v in families.items()},
            "cells": [
                made("a", 100.0, 1000.0),
                made("b", 50.0, 4000.0, wrong=167),
                made("c", 40.0, 3000.0),
                made("d", 20.0, 9000.0),
                crashed,
            ],
        }
    )


def test_the_best_peer_is_one_that_was_right(content: dict[str, Any]) -> None:
    # B is right on one stream, so its latency stands; its throughput does not.
    assert content["works"]["relu"]["best_peer"] == {"p50_us": "b", "host_us": "b", "4": "a"}
    ours = content["cells"][2]
    assert ours["vs_best_peer"] == {"p50_us": 1.25, "host_us": 1.25, "4": 3.0}
    assert "vs_best_peer" not in content["cells"][4]


def test_the_latency_of_a_peer_that_is_wrong_on_one_stream_does_not_count(content: dict[str, Any]) -> None:
    b = content["cells"][1]
    b["throughput"]["1"] = {**b["throughput"]["4"], "wrong": 49}
    assert with_ratios(content)["works"]["relu"]["best_peer"] == {"p50_us": "a", "host_us": "a", "4": "a"}
    assert strike(b, "p50_us", "peer") == "~~50.0~~ 49 of 480 wrong"


def test_without_a_right_peer_there_is_no_ratio(content: dict[str, Any]) -> None:
    del content["cells"][:2]
    del content["cells"][0]["vs_best_peer"]
    assert "vs_best_peer" not in with_ratios(content)["cells"][0]
    assert content["works"]["relu"]["best_peer"] == {}


def test_struck_out_figures_show_the_count(content: dict[str, Any]) -> None:
    assert strike(content["cells"][1], "4", "peer") == "~~4,000~~ 167 of 480 wrong"
    assert strike(content["cells"][0], "4", "peer") == "1,000"
    assert strike(content["cells"][4], "4", "peer") == "crashed"
    content["cells"][0]["serially_wrong"] = True
    assert strike(content["cells"][0], "p50_us", "peer") == "~~100~~ off by 0%"


def test_the_table_has_a_line_for_each_system(content: dict[str, Any]) -> None:
    console = Console(width=190, record=True, file=io.StringIO())
    console.print(table(content, "relu"))
    text = console.export_text()
    assert "relu: one ReLU (1x3x5, float16)" in text
    for name in "ABCDE":
        assert f"System {name}" in text
    assert "4,000 167 of 480 wrong" in text
    assert "crashed" in text
    assert "1.5" in text


def test_notes_tell_how_it_crashed(content: dict[str, Any]) -> None:
    assert notes(content) == [
        "relu, System E: crashed: build: SIGSEGV",
        "    Fatal Python error: Segmentation fault",
    ]


def test_the_readme_table_quotes_right_figures_and_lists_wrong_ones(content: dict[str, Any]) -> None:
    text = summary(content)
    assert "| relu | 50.0 (System B) | 40.0 | **1.25** | 1,000 (System A); 4 | 3,000; 4 | **3.00** | 9,000; 4 |" in text
    assert "| relu | System B | 4 | ~~4,000~~ 167 of 480 wrong |" in text
    assert "1 crash." in text
    assert "Device X, PyTorch 2.0, 2026-01-02" in text


def test_the_readme_table_takes_the_number_of_streams_that_suits_each(content: dict[str, Any]) -> None:
    content["settings"]["streams"] = [1, 4]
    peer = next(c for c in content["cells"] if c["system"] == "a")
    peer["throughput"]["1"] = {**peer["throughput"]["4"], "per_s": spread([6000.0])}
    assert "| 6,000 (System A); 1 | 3,000; 4 | **0.50** |" in summary(content)


def test_the_readme_table_has_a_line_a_work_with_losses_and_wrong_outputs_of_ours(content: dict[str, Any]) -> None:
    (line,) = [row for row in overview(content).splitlines() if row.startswith("| relu |")]
    right = "| relu | 50.0 (System B) | 40.0 | **1.25** | 1,000 (System A) | 3,000 | **3.00** | 0 of "
    assert line.startswith(right)
    ours = [c for c in content["cells"] if content["systems"][c["system"]]["family"] == "ours"]
    ours[0]["latency"] = {k: spread([100.0]) for k in ours[0]["latency"]}
    ours[0]["throughput"]["4"] |= {"per_s": spread([500.0])}
    assert "| 50.0 (System B) | 100 | **0.50** | 1,000 (System A) | 500 | **0.50** |" in overview(content)
    ours[0]["throughput"]["4"] |= {"wrong": 2, "inexact": 5}
    text = overview(content)
    assert "| none |  | 7 of " in text  # a figure with a wrong output behind it is no figure
    ours[0]["serially_wrong"] = True
    assert f"| 7 of 480, and 1 of {len(ours)} serial outputs |" in overview(content)


def test_many_wrong_figures_are_a_line_a_system(content: dict[str, Any]) -> None:
    bad = next(c for c in content["cells"] if c["system"] == "b")
    for n in range(20):
        bad["throughput"][str(n)] = dict(bad["throughput"]["4"])
    text = summary(content)
    assert "| System B | 20 | 1 | 3,340 of 9,600 |" in text
    assert "~~" not in text


def test_the_plot_is_a_small_png(content: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "folder" / "plot.png"
    plot(content, target)
    data = target.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 200_000
