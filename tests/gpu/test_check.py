"""The check tool on a real GPU: it must find the injected bug, and nothing without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from anabranch.check import Case, Options, find_subject, run_check
from anabranch.cli._check import command


@pytest.mark.parametrize("graphs", [True, False], ids=["graph", "direct"])
@pytest.mark.parametrize("model", ["relu", "branches"])
def test_right_engines_pass_with_at_least_eight_calls_in_flight(model: str, graphs: bool) -> None:
    shape = (1, 3, 5) if model == "relu" else (1, 3, 64, 64)
    options = Options("cuda", streams=8, threads=8, calls=64, backend="eager", cuda_graphs=graphs)
    rows = run_check(find_subject(model), [Case(torch.float16, shape)], options)
    assert [r.path for r in rows] == ["main", "fresh", "rotate", "threads"]
    for row in rows:
        assert row.ok, row
        assert row.calls == 64
    assert min(r.in_flight for r in rows if r.path in ("rotate", "threads", "fresh")) >= 8


@pytest.mark.parametrize("graphs", [True, False], ids=["graph", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_injected_stale_stream_is_wrong_everywhere_but_on_the_main_stream(dtype: torch.dtype, graphs: bool) -> None:
    options = Options("cuda", calls=32, backend="eager", inject="stale-stream", cuda_graphs=graphs)
    rows = {r.path: r for r in run_check(find_subject("relu"), [Case(dtype, (1, 3, 5))], options)}
    assert rows["main"].ok
    # Not each of them: a fresh stream may share the main stream's hardware queue, and a stale call then comes late.
    for path in ("fresh", "rotate", "threads"):
        assert rows[path].wrong > rows[path].calls // 2, path


def test_the_command_reports_and_exits_with_1(tmp_path: Path) -> None:
    target = tmp_path / "r.json"
    args = ["relu", "--shape", "1,3,5", "--calls", "16", "--backend", "eager", "--json", str(target)]
    assert CliRunner().invoke(command, args).exit_code == 0
    good = json.loads(target.read_text())
    assert good["wrong"] == 0
    assert good["calls"] == 16 * 4 * 2
    assert "H" in good["environment"]["device"] or good["environment"]["device"]
    result = CliRunner().invoke(command, [*args, "--inject", "stale-stream"])
    assert result.exit_code == 1
    assert json.loads(target.read_text())["wrong"] > 0
    assert "WRONG" in result.output
