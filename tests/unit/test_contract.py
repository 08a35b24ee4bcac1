"""Every clause of docs/contract.md is tested on every device: read from the test files, nothing is kept by hand."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parents[1]
TITLES = re.findall(r"^(\d+)\. \*\*", (TESTS.parent / "docs/contract.md").read_text(encoding="utf-8"), flags=re.M)
CLAUSES = {int(number) for number in TITLES}
#: By device: where its tests are. The CPU has no streams, and so nothing of what clauses 1 to 3 and 6 speak of.
FOLDERS = {"cuda": "gpu", "sim": "sim", "cpu": "unit"}
OF_STREAMS = {1, 2, 3, 6}


def by_clause(file: Path, clauses: Path) -> dict[int, list[str]]:
    """The tests of a file by clause: by name, by mark, and those that it takes from ``clauses``."""
    found: dict[int, list[str]] = defaultdict(list)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "contract.clauses" and node.names[0].name == "*":
            for clause, names in by_clause(clauses, clauses).items():
                found[clause] += names
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        numbers = {int(number) for number in re.findall(r"^test_clause(\d+)_", node.name)}
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.clause":
                numbers.add(ast.literal_eval(mark.args[0]))
        for number in numbers:
            found[number].append(node.name)
    return found


def missing(tests: Path, clauses: set[int]) -> list[str]:
    """Each clause that has no test on some device."""
    lines = []
    for device, folder in FOLDERS.items():
        found: set[int] = set()
        for file in (tests / folder).glob("test_*.py"):
            found |= set(by_clause(file, tests / "contract/clauses.py"))
        wanted = clauses - OF_STREAMS if device == "cpu" else clauses
        lines += [f"clause {number} has no test on {device} (tests/{folder})" for number in sorted(wanted - found)]
        lines += [f"tests/{folder} tests clause {number}: there is none" for number in sorted(found - clauses)]
    return lines


def test_each_clause_has_a_test_on_each_device() -> None:
    assert sorted(CLAUSES) == list(range(1, 9))
    assert not missing(TESTS, CLAUSES)


def test_a_clause_without_a_test_is_named(tmp_path: Path) -> None:
    for folder in (*FOLDERS.values(), "contract"):
        (tmp_path / folder).mkdir()
    (tmp_path / "contract/clauses.py").write_text("def test_clause1_order(rig): pass\n")
    (tmp_path / "sim/test_contract.py").write_text("from contract.clauses import *\n")
    (tmp_path / "unit/test_forks.py").write_text("@pytest.mark.clause(5)\ndef test_a_fork(): pass\n")
    assert missing(tmp_path, {1, 5}) == [
        "clause 1 has no test on cuda (tests/gpu)",
        "clause 5 has no test on cuda (tests/gpu)",
        "clause 5 has no test on sim (tests/sim)",
    ]
    assert "tests/unit tests clause 5: there is none" in missing(tmp_path, {1})
