"""The tier rules of tests/conftest.py, run on small suites of their own in a subprocess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TWO_TESTS = "def test_one(): pass\ndef test_two(): pass\n"
ONE_OF_TWO = "import pytest\ndef test_one(): pass\n@pytest.mark.slow\ndef test_two(): pass\n"


def tier(tests: int, push: int, **budgets: int) -> dict[str, int]:
    return {"tests": tests, "push": push, **budgets}


def commit(suite: pytest.Pytester, **tiers: dict[str, int]) -> None:
    (suite.path / "tests/tiers.json").write_text(json.dumps(tiers))


def committed(suite: pytest.Pytester) -> Any:
    return json.loads((suite.path / "tests/tiers.json").read_text())


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Two tests in ``unit``, two in ``gpu``, and a tiers.json that says so. PyTorch is stubbed: there is no GPU."""
    monkeypatch.delenv("ANABRANCH_REQUIRE_GPU", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # twenty small runs: other plugins only cost time
    tests = pytester.mkdir("tests")
    (tests / "conftest.py").write_text(CONFTEST.read_text())
    for name in ("unit", "gpu"):
        (tests / name).mkdir()
        (tests / name / f"test_{name}.py").write_text(TWO_TESTS)
    commit(pytester, gpu=tier(2, 0), unit=tier(2, 2))
    pytester.makeini("[pytest]\ntestpaths = tests\nmarkers =\n  gpu\n  slow\naddopts = --strict-markers -ra")
    stub = pytester.mkdir("stub")
    (stub / "torch.py").write_text(
        "class version: cuda = '13.0'\nclass cuda:\n    is_available = staticmethod(bool)\nget_num_threads = int\n"
        "manual_seed = int\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(stub))
    return pytester


def run(suite: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return suite.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


def lose_a_test(suite: pytest.Pytester, name: str) -> None:
    (suite.path / "tests" / name / f"test_{name}.py").write_text("def test_one(): pass\n")


def test_a_complete_suite_passes(suite: pytest.Pytester) -> None:
    result = run(suite)
    result.assert_outcomes(passed=2, skipped=2)
    assert result.ret == 0


@pytest.mark.parametrize("arguments", [[], ["tests"], ["tests/"], ["tests/unit"], ["-m", "not gpu"], ["."]])
def test_a_tier_with_fewer_tests_fails(suite: pytest.Pytester, arguments: list[str]) -> None:
    lose_a_test(suite, "unit")
    result = run(suite, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*tests/unit has 1 tests, tests/tiers.json says 2*scripts/tiers*"])


def test_a_tier_whose_folder_is_gone_fails(suite: pytest.Pytester) -> None:
    (suite.path / "tests/unit/test_unit.py").unlink()
    result = run(suite)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*tests/unit has 0 tests*"])


def test_a_whole_tier_that_collects_nothing_fails(suite: pytest.Pytester) -> None:
    (suite.path / "tests/unit/test_unit.py").unlink()
    result = run(suite, "tests/unit")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_more_tests_than_committed_pass(suite: pytest.Pytester) -> None:
    (suite.path / "tests/unit/test_more.py").write_text(TWO_TESTS)
    run(suite).assert_outcomes(passed=4, skipped=2)


@pytest.mark.parametrize(
    "arguments", [["tests/unit/test_unit.py"], ["-k", "one"], ["tests/unit/test_unit.py::test_one"], ["tests/gpu"]]
)
def test_a_part_of_a_tier_is_not_counted(suite: pytest.Pytester, arguments: list[str]) -> None:
    lose_a_test(suite, "unit")
    assert run(suite, *arguments).ret == 0


def test_gpu_tests_left_out_by_their_mark_are_not_missing(suite: pytest.Pytester) -> None:
    result = run(suite, "-m", "not gpu")
    result.assert_outcomes(passed=2, deselected=2)
    assert result.ret == 0


def test_gpu_tests_that_vanish_are_missing_also_where_they_are_left_out(suite: pytest.Pytester) -> None:
    lose_a_test(suite, "gpu")
    assert run(suite, "-m", "not gpu").ret == pytest.ExitCode.USAGE_ERROR


def test_a_file_that_does_not_import_is_reported_as_such(suite: pytest.Pytester) -> None:
    (suite.path / "tests/unit/test_unit.py").write_text("import no_such_module\n")
    result = run(suite)
    result.stdout.fnmatch_lines(["*No module named 'no_such_module'*"])
    assert result.ret != 0


def test_gpu_tests_skip_with_the_reason(suite: pytest.Pytester) -> None:
    result = run(suite, "-m", "gpu")
    result.assert_outcomes(skipped=2, deselected=2)
    result.stdout.fnmatch_lines(["SKIPPED*PyTorch finds no CUDA device*"])


def test_gpu_tests_fail_where_a_gpu_is_required(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANABRANCH_REQUIRE_GPU", "1")
    result = run(suite, "-m", "gpu")
    result.assert_outcomes(errors=2, deselected=2)
    result.stdout.fnmatch_lines(["*ANABRANCH_REQUIRE_GPU=1, but PyTorch finds no CUDA device*"])


def test_a_marked_test_outside_the_gpu_tier_skips_too(suite: pytest.Pytester) -> None:
    (suite.path / "tests/unit/test_marked.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pass\n")
    run(suite, "tests/unit").assert_outcomes(passed=2, skipped=1)


def test_write_tiers(suite: pytest.Pytester) -> None:
    commit(suite, gone=tier(3, 3), unit=tier(9, 9, budget=7))
    (suite.path / "tests/unit/test_more.py").write_text(TWO_TESTS)
    assert run(suite, "--write-tiers", "--collect-only", "-q").ret == 0
    assert committed(suite) == {"gpu": tier(2, 0), "unit": tier(4, 4, budget=7)}
    lose_a_test(suite, "gpu")
    assert run(suite, "--write-tiers", "--collect-only", "-q", "tests/unit").ret == 0
    assert committed(suite) == {"gpu": tier(2, 0), "unit": tier(4, 4, budget=7)}


@pytest.mark.parametrize("arguments", [[], ["-m", "not slow"]])
def test_a_test_that_no_push_runs_any_more_fails(suite: pytest.Pytester, arguments: list[str]) -> None:
    (suite.path / "tests/unit/test_unit.py").write_text(ONE_OF_TWO)
    result = run(suite, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*tests/unit has 1 tests for a push, tests/tiers.json says 2*scripts/tiers*"])


BURNS = """import time
def test_burns():
    end = time.process_time() + 1.1
    while time.process_time() < end: pass
def test_two(): pass
"""


def test_what_tiers_took_is_told_and_over_budget_is_loud_and_no_failure(suite: pytest.Pytester) -> None:
    commit(suite, gpu=tier(2, 0, budget=0), unit=tier(2, 2, budget=1, budget_all=50))
    (suite.path / "tests/unit/test_unit.py").write_text(BURNS)
    result = run(suite, "-m", "not gpu and not slow")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "unit * s in 2 tests, budget 1 s",
            "*OVER BUDGET: tests/unit took * allows 1*",
            "* s  tests/unit/*::test_burns",
        ]
    )
    result = run(suite, "-m", "not gpu")  # everything, which may take longer
    result.stdout.fnmatch_lines(["unit * s in 2 tests, budget 50 s"])
    result.stdout.no_fnmatch_line("*OVER BUDGET*")


def test_what_a_test_draws_follows_from_its_name(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = "import random\ndef test_one(): open('drawn', 'a').write(f'{random.random()}\\n')\ntest_two = test_one\n"
    (suite.path / "tests" / "unit" / "test_unit.py").write_text(draws)
    drawn = []
    for seed in ("0", "0", "1"):
        monkeypatch.setenv("ANABRANCH_TEST_SEED", seed)
        run(suite, "tests/unit").assert_outcomes(passed=2)
        drawn.append((suite.path / "drawn").read_text().split())
        (suite.path / "drawn").unlink()
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 4
