"""Our own programs: the broken form gets its verdict, its repaired twin is silent, and the oracle agrees."""

from __future__ import annotations

import json

import pytest
import race_oracle
from race_programs import PROGRAMS, Program, parse

from anabranch.race import check_lines

TWINS = [p for p in PROGRAMS if p.repaired]


def _judge(text: str) -> str:
    events = parse(text)
    verdict = check_lines(events).verdict
    assert race_oracle.judge([json.dumps(e) for e in events]) == verdict
    return verdict


def test_names_are_unique() -> None:
    assert len({p.name for p in PROGRAMS}) == len(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_verdict(program: Program) -> None:
    assert _judge(program.text) == program.verdict


@pytest.mark.parametrize("program", TWINS, ids=lambda p: p.name)
def test_repaired_twin_is_clean(program: Program) -> None:
    assert program.verdict != "clean"
    assert _judge(program.repaired) == "clean"
