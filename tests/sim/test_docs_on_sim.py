"""What the README and the docs show runs on the simulated device, and prints what they say that it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import documents
from documents import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    {b.page for b in documents.blocks() if b.language == "python" and documents.needs_streams(b)},
)
SHOWN = [b for b in documents.blocks() if b.output is not None]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything in one process: see ``run_documents.py``."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "TMPDIR": str(tmp_path_factory.mktemp("documents")),
        "COLUMNS": "120",
    }
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_documents.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page: str, done: dict[str, Any]) -> None:
    assert done[page]["status"] == 0, done[page]["stderr"]


@pytest.mark.parametrize("block", SHOWN, ids=str)
def test_a_shown_output_is_what_the_command_prints(block: documents.Block, done: dict[str, Any]) -> None:
    assert done[str(block)]["stdout"] == block.output, done[str(block)]["stderr"]
    assert done[str(block)]["status"] == 1  # they show findings


def test_the_readme_shows_the_bug_and_the_cure(done: dict[str, Any]) -> None:
    assert any(block.page == "README.md" for block in SHOWN)
    example = (ROOT / "examples/stale_stream.py").read_text(encoding="utf-8")
    (shown,) = [b for b in documents.blocks() if b.language == "python" and b.text.startswith("engine_stream")]
    assert example.endswith(shown.text)
    assert len([line for line in shown.text.splitlines() if line]) == 6
    cure = done["anabranch explore examples/any_stream.py"]
    assert cure["status"] == 0, cure["stderr"]
    verdict = cure["stdout"].strip()
    assert verdict.startswith("exhaustive(")
    assert f"`{verdict}`" in README
