"""A native runtime with defects: the explorer finds each, by the race checker alone and by wrong values alone.

One build has all of them (``planted.h``), in a process of its own, and each exploration turns one on. With none turned
on the same build passes the exhaustive search.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

#: What turns it on, the program of ``programs/`` that shows it, with its arguments, and what the race checker says.
MUTANTS = {
    "the last use is not recorded": (
        "no record",
        ("engines", "streams2_threads1_calls3_contexts1", "native"),
        r"stream `B` has waited for no work of stream `A`",
    ),
    "no wait for the last use": (
        "no wait",
        ("engines", "streams2_threads1_calls3_contexts1", "native"),
        r"stream `B` has waited for no work of stream `A`",
    ),
    "given back before its last use is recorded": (
        "late record",
        ("engines", "streams2_threads2_calls2_contexts1", "native"),
        r"stream `[AB]` has waited for (no work of stream|stream) `[AB]`",
    ),
    "taken by a hint without a look at whose it is": (
        "unchecked hint",
        ("engines", "streams2_threads2_calls2_contexts1", "native"),
        r"stream `[AB]` has waited for (no work of stream|stream) `[AB]`",
    ),
    "a graph keeps the state of the session that called first": (
        "first session",
        ("sessions", "sessions2_threads1_by_turns", "native", 2),
        r"stream `B` has waited for no work of stream `A`",
    ),
    "a call of a session does not wait for the one before it": (
        "no wait of a session",
        ("sessions", "session1_streams2_by_turns", "native", 2),
        r"stream `B` has waited for (no work of stream|stream) `A`",
    ),
    "state is copied back after the last use is recorded": (
        "late copy back",
        ("sessions", "sessions2_threads1_by_turns", "native", 1),
        r"stream `B` has waited for stream `A` only up to its item",
    ),
}

_FIND = """
import json, os, sys
sys.path.insert(0, "tests/sim/programs")
import engines, sessions
from anabranch.sim import explore

def explored(planted, program, oracle):
    os.environ["ANABRANCH_PLANTED"] = planted
    module, name, *args = program
    found = getattr(sys.modules[module], name)
    verdict = explore(found, args=tuple(args), oracles=[oracle] if oracle else ("race", "values"))
    return str(verdict), sorted(verdict.oracles), verdict.report()

found = {}
for planted, program in json.loads(sys.argv[1]):
    found[planted] = {oracle: explored(planted, program, oracle) for oracle in ("race", "values")}
programs = {str(program): program for _, program in json.loads(sys.argv[1])}
clean = {name: explored("", program, None) for name, program in programs.items()}
print(json.dumps({"found": found, "clean": clean, "streams": [f"s{s.stream_id}" for s in engines.STREAMS]}))
"""


@pytest.fixture(scope="module")
def explored() -> Any:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "ANABRANCH_NATIVE_FLAGS": "-DANABRANCH_PLANTED -O0",
    }
    asked = json.dumps([(planted, program) for planted, program, _ in MUTANTS.values()])
    command = [sys.executable, "-c", _FIND, asked]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MUTANTS)
def test_is_found_by_races_and_by_values(explored: Any, name: str) -> None:
    planted, _, diagnostic = MUTANTS[name]
    names = dict(zip(explored["streams"], "ABC", strict=True))
    for oracle, (verdict, oracles, report) in explored["found"][planted].items():
        assert verdict.startswith("failed("), f"by {oracle}: {verdict}"
        assert oracles == [oracle]
        if oracle == "race":
            report = re.sub(r"`(s\d+)`", lambda m: f"`{names.get(m[1], m[1])}`", report)
            assert re.search(diagnostic, report), report
        else:
            assert "expected" in report


def test_with_nothing_planted_the_same_build_passes(explored: Any) -> None:
    assert explored["clean"]
    for program, (verdict, _, report) in explored["clean"].items():
        assert verdict.startswith("exhaustive("), f"{program}: {report}"


def test_the_names_are_those_in_the_sources() -> None:
    # A name that no source knows would plant nothing, and one that no test knows would never be turned on.
    text = "".join(p.read_text() for p in (ROOT / "src/anabranch/runtime/_core").glob("*.cpp"))
    assert set(re.findall(r'planted\("([^"]+)"\)', text)) == {planted for planted, _, _ in MUTANTS.values()}
