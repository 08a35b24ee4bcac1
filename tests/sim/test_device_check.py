"""``anabranch check --device sim``: the bug and the cure, without a GPU, and the same in every run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"


def check(*args: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the simulated device is a process's only accelerator."""
    # Where compiled code is kept: all of it would be compiled again.
    kept = {name: os.environ[name] for name in ("XDG_CACHE_HOME",) if name in os.environ}
    return subprocess.run(
        [sys.executable, "-m", "anabranch", "check", *args, "--device", "sim"],
        env={"PYTHONPATH": str(SRC), "PATH": "/usr/bin:/bin", "HOME": str(Path.home()), **kept},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


SMALL = ("relu", "--shape", "1,3,5", "--dtype", "float16", "--calls", "24", "--streams", "3", "--threads", "3")


@pytest.mark.parametrize("path", ["--graphs", "--direct", "--graphs --dynamic"])
def test_a_right_engine_is_silent(tmp_path: Path, path: str) -> None:
    target = tmp_path / "r.json"
    done = check(*SMALL, *path.split(), "--json", str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all outputs right" in done.stdout
    assert "race:" not in done.stdout
    rows = json.loads(target.read_text())["rows"]
    assert [r["path"] for r in rows] == ["main", "fresh", "rotate", "threads"]
    assert all(r["ok"] and r["calls"] == 24 and r["races"] == 0 for r in rows)
    assert min(r["in_flight"] for r in rows if r["path"] != "main") >= 3


@pytest.mark.parametrize("path", ["--graphs", pytest.param("--direct", marks=pytest.mark.slow)])
def test_the_injected_stale_stream_is_found_the_same_in_every_run(tmp_path: Path, path: str) -> None:
    tables: list[Any] = []
    outputs = []
    for i in range(2):
        target = tmp_path / f"{i}.json"
        done = check(*SMALL, path, "--inject", "stale-stream", "--json", str(target))
        assert done.returncode == 1, done.stdout + done.stderr
        tables.append(json.loads(target.read_text())["rows"])
        outputs.append(done.stdout)
    assert tables[0] == tables[1]
    assert outputs[0] == outputs[1]
    rows = {r["path"]: r for r in tables[0]}
    assert rows["main"]["ok"]
    for name in ("fresh", "rotate", "threads"):
        row = rows[name]
        assert row["wrong"] == row["calls"] == 24, name
        assert row["all_zero"] + row["non_finite"] == 24, f"{name}: neither zeros nor poison"
        assert row["races"] > 0
        # What is missing, and what would add it.
        assert re.search(r"missing|fix|wait", row["report"]), row["report"]
        assert row["report"].splitlines()[0] in outputs[0]


def test_the_default_shapes_are_the_small_ones(tmp_path: Path) -> None:
    target = tmp_path / "r.json"
    done = check(
        "relu", "--calls", "4", "--streams", "2", "--threads", "2", "--dtype", "float32", "--json", str(target)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shapes = {r["shape"] for r in json.loads(target.read_text())["rows"]}
    assert "1x3x5" in shapes
    assert "0x3x5" in shapes
    assert any(s.endswith("misaligned") for s in shapes)
    assert not any("2160" in s for s in shapes)


MODULE = """
import torch
class Find(torch.nn.Module):
    def forward(self, x):
        return x[x > 0], (x > 0.5).nonzero()
calls = []
class Endless(torch.nn.Module):
    def forward(self, x):
        calls.append(x.shape)
        if len(calls) == 40:  # a few rounds of the check's own calls of the model
            print("running", flush=True)
        return x * 2
"""
TINY = (
    "--device",
    "sim",
    "--shape",
    "2,8",
    "--dtype",
    "float32",
    "--streams",
    "2",
    "--threads",
    "2",
    "--runtime",
    "python",
)


def command(folder: Path, *args: str) -> subprocess.Popen[str]:
    (folder / "subject_of_sim.py").write_text(MODULE)
    return subprocess.Popen(
        [sys.executable, "-m", "anabranch", "check", *args, *TINY],
        env={**os.environ, "PYTHONPATH": f"{SRC}{os.pathsep}{folder}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells have what they run in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_a_model_whose_host_waits_in_each_call_is_checked_without_holding_streams(tmp_path: Path) -> None:
    done = command(tmp_path, "subject_of_sim:Find", "--calls", "4", "--no-boundary")
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, out + err
    assert "the host waits in each call" in " ".join(out.split())
    assert "all outputs right" in out


@pytest.mark.slow  # on every push `tests/unit/test_check.py` interrupts a check on the CPU
def test_ctrl_c_ends_it_while_streams_are_held(tmp_path: Path) -> None:
    done = command(tmp_path, "subject_of_sim:Endless", "--calls", "100000")
    assert done.stdout is not None
    assert done.stdout.readline() == "running\n"
    for _ in range(2):  # the check's own, and the one that a hurried user adds
        done.send_signal(signal.SIGINT)
    try:
        out, err = done.communicate(timeout=60)
    finally:
        done.kill()
    assert done.returncode == 130, out + err
    assert "interrupted" in err
    assert "Traceback" not in err
