"""``anabranch race``: what it prints, writes and returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from anabranch.cli import main

CORPUS = Path(__file__).parent / "corpus"


def _run(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["race", *arguments], input=stdin)


@pytest.mark.parametrize(("name", "word", "status"), [("C01", "race", 1), ("C02", "stale", 1), ("P01", "clean", 0)])
def test_last_line_and_status(name: str, word: str, status: int) -> None:
    done = _run(str(CORPUS / f"{name}.jsonl"))
    assert done.output.splitlines()[-1].split()[0] == word
    assert done.exit_code == status


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = _run(str(CORPUS / "C01.jsonl"), "--json", str(path))
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["verdict"] == "race"
    assert data["counts"]["reports"] == len(data["reports"]) == 2
    assert all(report["text"] in done.output for report in data["reports"])


def test_standard_input() -> None:
    done = _run("-", stdin=(CORPUS / "C02.jsonl").read_bytes())
    assert done.output.splitlines()[-1].startswith("stale ")


def test_malformed_trace(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"do": "unsafe_call"}\n{"do": "wiat"}\n', encoding="utf-8")
    done = _run(str(path))
    assert done.exit_code == 2
    assert "line 2: expected" in done.output


def test_unreadable_trace(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        done = _run(str(path))
        assert done.exit_code == 2
        assert "cannot be read" in done.output


def test_unwritable_json(tmp_path: Path) -> None:
    done = _run(str(CORPUS / "P01.jsonl"), "--json", str(tmp_path / "no" / "out.json"))
    assert done.exit_code == 2
    assert "cannot be written" in done.output


def test_limit() -> None:
    done = _run(str(CORPUS / "C01.jsonl"), "--limit", "1")
    assert done.output.count("missing") == 1
    assert "1 findings not kept" in done.output.splitlines()[-1]
