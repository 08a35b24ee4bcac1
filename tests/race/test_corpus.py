"""The 39 traces distilled from public bug reports: each gets its verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import race_oracle

from anabranch.race import check_trace

CORPUS = Path(__file__).parent / "corpus"
INDEX = json.loads((CORPUS / "index.json").read_text(encoding="utf-8"))


def test_index_and_folder_agree() -> None:
    assert sorted(INDEX) == sorted(p.stem for p in CORPUS.glob("*.jsonl"))
    assert len(INDEX) == 39


@pytest.mark.parametrize("name", sorted(INDEX))
def test_verdict(name: str) -> None:
    path = CORPUS / f"{name}.jsonl"
    result = check_trace(path)
    assert result.verdict == INDEX[name]["verdict"]
    assert bool(result.reports) == (result.verdict != "clean")
    assert race_oracle.judge(path.read_text(encoding="utf-8").splitlines()) == result.verdict
