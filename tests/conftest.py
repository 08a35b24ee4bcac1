"""Test tiers: a tier is the first folder under ``tests/``, named for what it needs (``unit``, ``race``, ``gpu``, ...).

- ``make test`` runs on every push and leaves out what is marked ``slow``; ``make test-all`` runs everything. A test
  that is too long for a push has a shorter twin that is not marked: fewer schedules, fewer seconds, one runtime of two.
- ``tests/tiers.json`` says of each tier how many tests it has (``tests``), how many of them a push runs (``push``), and
  how many seconds of CPU time these may take (``budget``; ``budget_all``: all of them). ``scripts/tiers`` writes the
  counts; the budgets are set by hand.
- A whole tier that collects fewer tests than that fails the run. Tests vanish in silence: an import guarded too well, a
  file that no longer matches ``test_*.py``, a parametrization over an empty list, a mark too many. A run of single
  files, ``-k``, ``--lf`` or ``--deselect`` is not checked.
- Each run ends with what each tier took and its 20 slowest tests. Over budget is printed loudly; it is no failure,
  because machines differ.
- Tests under ``tests/gpu`` carry the ``gpu`` mark without saying so. Without a CUDA device they are skipped, with the
  reason; with ``ANABRANCH_REQUIRE_GPU=1`` they fail instead, so that a GPU host cannot pass by skipping.
- What a test draws follows from its name, so that one that fails fails again. ``ANABRANCH_TEST_SEED=1`` (2, 3, ...)
  has all of them draw something else.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REQUIRE_GPU = "ANABRANCH_REQUIRE_GPU"
TEST_SEED = "ANABRANCH_TEST_SEED"
SLOWEST = 20
_COUNTS = pytest.StashKey[dict[str, dict[str, int]]]()
_CLOCK = pytest.StashKey[float]()
#: CPU seconds by test.
_spent: defaultdict[str, float] = defaultdict(float)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-tiers", action="store_true", help="write the number of tests in each tier to tests/tiers.json"
    )
    parser.addoption("--evidence", metavar="FILE", help="write what was run, where, and how it ended, as JSON")


# -- collections of garbage -------------------------------------------------------------------------------------------

#: Seconds that the last collection of everything took, and when one began.
_collecting = {"took": 1.0, "began": 0.0}


def _watch(phase: str, info: dict[str, int]) -> None:
    if info["generation"] == 2:
        now = time.perf_counter()
        _collecting["took" if phase == "stop" else "began"] = now - _collecting["began"] if phase == "stop" else now


gc.callbacks.append(_watch)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Put aside what lives now, once a collection takes long: what PyTorch's modules and caches made stays anyway.

    The tests make thousands of collections, of 1 ms then instead of 200.
    """
    if _collecting["took"] > 0.02:
        gc.collect()
        gc.freeze()
        gc.collect()


# -- what tests draw ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def draws_of_its_name(request: pytest.FixtureRequest) -> None:
    """Weights and inputs do not depend on the tests before."""
    import numpy
    import torch

    seed = zlib.crc32(f"{request.node.nodeid} {os.environ.get(TEST_SEED, '0')}".encode())
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


# -- what tests leave --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def as_many_cores_as_before() -> Iterator[None]:
    """Products of the files that come later in this process would be rounded in another way."""
    import torch

    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before, f"this file has left torch.set_num_threads({torch.get_num_threads()})"


# -- what tests take ---------------------------------------------------------------------------------------------------


def _cpu_seconds() -> float:
    """Of this process and of all children that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Each report carries the CPU time since the last one: of setup, call and teardown, in this process."""
    outcome: Any = yield
    now = _cpu_seconds()
    outcome.get_result().cpu = now - item.config.stash[_CLOCK]
    item.config.stash[_CLOCK] = now


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    item.config.stash[_CLOCK] = _cpu_seconds()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # With pytest-xdist this runs in each worker and in the process that gathers; the numbers come along in the report.
    _spent[report.nodeid] += getattr(report, "cpu", 0.0)


def _tier_of(nodeid: str) -> str | None:
    """The tier of a test by its id: ``tests/TIER/file.py::name``; None for a file directly in ``tests``."""
    folders = nodeid.split("::")[0].split("/")
    return folders[1] if len(folders) > 2 else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    _write_evidence(terminalreporter, config)
    if not _spent:
        return
    tiers: dict[str, list[float]] = defaultdict(list)
    for nodeid, seconds in _spent.items():
        tiers[_tier_of(nodeid) or "."].append(seconds)
    whole = _whole_tiers(config, _tests(config))
    committed = _committed(config)
    key = "budget" if "not slow" in (config.option.markexpr or "") else "budget_all"
    terminalreporter.section("CPU seconds of this process and its children")
    for tier, seconds in sorted(tiers.items()):
        budget = committed.get(tier, {}).get(key)
        line = f"{tier:8} {sum(seconds):7.1f} s in {len(seconds)} tests"
        terminalreporter.line(line + (f", budget {budget} s" if budget is not None else ""))
        if budget is not None and sum(seconds) > budget and (whole is None or tier in whole):
            over = f"OVER BUDGET: tests/{tier} took {sum(seconds):.0f} s of CPU time, tests/tiers.json allows {budget}"
            terminalreporter.line(
                f"*** {over}. Make tests cheaper, or mark one `slow` beside a shorter twin. ***", red=True
            )
    files: dict[str, float] = defaultdict(float)
    for nodeid, spent in _spent.items():
        files[nodeid.split("::")[0]] += spent
    for title, entries in (("files", files), ("tests", _spent)):
        terminalreporter.line(f"The {SLOWEST} slowest {title}:")
        for name, spent in sorted(entries.items(), key=lambda entry: -entry[1])[:SLOWEST]:
            terminalreporter.line(f"{spent:7.1f} s  {name}")


def _write_evidence(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """``--evidence FILE``: what was run where, and how it ended, for benchmarks/results."""
    target = config.getoption("--evidence")
    if not target:
        return
    import torch

    from anabranch.check import environment

    reports = {kind: terminalreporter.getreports(kind) for kind in ("passed", "failed", "error", "skipped")}
    command = "python -m " + " ".join(["pytest", *config.invocation_params.args])
    gpu = torch.cuda.is_available()
    where = {**environment("cuda" if gpu else "cpu"), "gpus": torch.cuda.device_count(), "command": command}
    content = {
        **{kind: len(found) for kind, found in reports.items()},
        "cpu_seconds": round(sum(_spent.values()), 1),
        "environment": where,
        "failures": sorted(r.nodeid for kind in ("failed", "error") for r in reports[kind]),
        "skips": {r.nodeid: str(r.longrepr[-1]) for r in reports["skipped"]},
        "tests": sorted(r.nodeid for r in reports["passed"]),
    }
    Path(target).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# -- how many there are ------------------------------------------------------------------------------------------------


def _tests(config: pytest.Config) -> Path:
    return config.rootpath / "tests"


def _tier(path: Path, tests: Path) -> str | None:
    """The first folder under ``tests`` on the way to ``path``; None for a file outside or directly in ``tests``."""
    parts = path.relative_to(tests).parts if path.is_relative_to(tests) else ()
    return parts[0] if len(parts) > 1 else None


# First, before `-k` and `-m` deselect: a tier is counted as it is in the files, and only then is the choice made.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    counts: dict[str, dict[str, int]] = {}
    for item in items:
        tier = _tier(item.path, _tests(config))
        if tier == "gpu":
            item.add_marker(pytest.mark.gpu)
        if tier is not None:
            count = counts.setdefault(tier, {"tests": 0, "push": 0})
            count["tests"] += 1
            count["push"] += not (item.get_closest_marker("slow") or item.get_closest_marker("gpu"))
    config.stash[_COUNTS] = counts


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    tests = _tests(config)
    counts = config.stash.get(_COUNTS, {})
    # With pytest-xdist each worker collects too; the session that the user sees is the one that judges.
    if session.testsfailed or hasattr(config, "workerinput"):
        return
    whole = _whole_tiers(config, tests)
    committed = _committed(config)
    if config.getoption("--write-tiers"):
        # A tier that this run did not ask for keeps its numbers; one whose folder is gone is dropped.
        kept = {tier: n for tier, n in committed.items() if whole is not None and tier not in whole}
        asked = {t: {**committed.get(t, {}), **n} for t, n in counts.items() if whole is None or t in whole}
        text = json.dumps(dict(sorted({**kept, **asked}.items())), indent=2)
        (tests / "tiers.json").write_text(text + "\n")
        return
    options = ("keyword", "deselect", "ignore", "ignore_glob", "lf")
    if any(getattr(config.option, option, None) for option in options):
        return
    nothing = {"tests": 0, "push": 0}
    for tier, expected in committed.items():
        found = counts.get(tier, nothing)
        if whole is not None and tier not in whole:
            continue
        for what in nothing:
            if found[what] < expected[what]:
                where = f"tests/{tier} has {found[what]} {'tests' if what == 'tests' else 'tests for a push'}"
                raise pytest.UsageError(
                    f"{where}, tests/tiers.json says {expected[what]}: tests are missing. "
                    "If that is on purpose, run scripts/tiers and commit the file."
                )


def _committed(config: pytest.Config) -> dict[str, dict[str, int]]:
    file = _tests(config) / "tiers.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _whole_tiers(config: pytest.Config, tests: Path) -> set[str] | None:
    """The tiers whose whole folder was asked for; None when all of ``tests/`` was."""
    tiers = set()
    for argument in config.args:
        path = (config.invocation_params.dir / argument.split("::")[0]).resolve()
        if tests.is_relative_to(path):
            return None
        if path.parent == tests and "::" not in argument and path.suffix != ".py":
            tiers.add(path.name)
    return tiers


def _no_gpu() -> str | None:
    """Why there is no GPU to test on, or None when there is one."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return "PyTorch is not installed"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return None


@pytest.fixture(scope="session")
def gpu_probe() -> str | None:
    """The reason to skip tests that need a GPU, probed once a run; None when there is one."""
    return _no_gpu()


@pytest.fixture(autouse=True)
def _needs_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None:
        return
    reason: str | None = request.getfixturevalue("gpu_probe")
    if reason is None:
        return
    if os.environ.get(REQUIRE_GPU) == "1":
        pytest.fail(f"{REQUIRE_GPU}=1, but {reason}", pytrace=False)
    pytest.skip(reason)
