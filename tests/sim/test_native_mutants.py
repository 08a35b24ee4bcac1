"""Broken builds of the native runtime: the explorer finds each, by the race checker alone and by wrong values alone.

A fault is planted by a compiler flag, so each has a build and a process of its own. Their repaired twin is the runtime
itself, on the same programs: ``test_runtime.py``.
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

#: The flag, the program of ``programs/engines.py`` that shows it, and what the race checker says.
MUTANTS = {
    "the last use is not recorded": (
        "NO_RECORD",
        "streams2_threads1_calls3_contexts1",
        r"stream `B` has waited for no work of stream `A`",
    ),
    "no wait for the last use": (
        "NO_WAIT",
        "streams2_threads1_calls3_contexts1",
        r"stream `B` has waited for no work of stream `A`",
    ),
    "given back before its last use is recorded": (
        "LATE_RECORD",
        "streams2_threads2_calls2_contexts1",
        r"stream `[AB]` has waited for (no work of stream|stream) `[AB]`",
    ),
    "taken by a hint without a look at whose it is": (
        "UNCHECKED_HINT",
        "streams2_threads2_calls2_contexts1",
        r"stream `[AB]` has waited for (no work of stream|stream) `[AB]`",
    ),
}

_FIND = """
import json, sys
sys.path.insert(0, "tests/sim/programs")
import engines
from anabranch.sim import explore

found = {}
for oracle in ("race", "values"):
    verdict = explore(getattr(engines, sys.argv[1]), args=("native",), oracles=[oracle])
    found[oracle] = (str(verdict), sorted(verdict.oracles), verdict.report())
print(json.dumps({"found": found, "streams": [f"s{s.stream_id}" for s in engines.STREAMS]}))
"""


def explored(flag: str, program: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    if flag:
        environment["ANABRANCH_NATIVE_FLAGS"] = f"-DANABRANCH_MUTANT_{flag}"
    done = subprocess.run(
        [sys.executable, "-c", _FIND, program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MUTANTS)
def test_is_found_by_races_and_by_values(name: str) -> None:
    flag, program, diagnostic = MUTANTS[name]
    result = explored(flag, program)
    names = dict(zip(result["streams"], "ABC", strict=True))
    for oracle, (verdict, oracles, report) in result["found"].items():
        assert verdict.startswith("failed("), f"by {oracle}: {verdict}"
        assert oracles == [oracle]
        if oracle == "race":
            report = re.sub(r"`(s\d+)`", lambda m: f"`{names.get(m[1], m[1])}`", report)
            assert re.search(diagnostic, report), report
        else:
            assert "expected" in report


def test_the_flags_of_the_mutants_are_in_the_sources() -> None:
    # A flag that no source knows would make a build without a fault.
    text = "".join(p.read_text() for p in (ROOT / "src/anabranch/runtime/_core").glob("*.cpp"))
    assert set(re.findall(r"ANABRANCH_MUTANT_(\w+)", text)) == {flag for flag, _, _ in MUTANTS.values()}
