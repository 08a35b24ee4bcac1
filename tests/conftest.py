"""Test tiers: a tier is the first folder under ``tests/``, named for what it needs (``unit``, ``race``, ``gpu``, ...).

- A whole tier that collects fewer tests than ``tests/tiers.json`` says fails the run. Tests vanish in silence: an
  import guarded too well, a file that no longer matches ``test_*.py``, a parametrization over an empty list. A run of
  single files, ``-k``, ``--lf`` or ``--deselect`` is not checked. ``scripts/tiers`` writes the file.
- Tests under ``tests/gpu`` carry the ``gpu`` mark without saying so. Without a CUDA device they are skipped, with the
  reason; with ``ANABRANCH_REQUIRE_GPU=1`` they fail instead, so that a GPU host cannot pass by skipping.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

REQUIRE_GPU = "ANABRANCH_REQUIRE_GPU"
_COUNTS = pytest.StashKey[dict[str, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-tiers", action="store_true", help="write the number of tests in each tier to tests/tiers.json"
    )
    parser.addoption("--evidence", metavar="FILE", help="write what was run, where, and how it ended, as JSON")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """``--evidence FILE``: what was run where, and how it ended, for benchmarks/results."""
    target = config.getoption("--evidence")
    if not target or hasattr(config, "workerinput"):
        return
    import torch

    from anabranch.check import environment

    counts = {kind: len(terminalreporter.getreports(kind)) for kind in ("passed", "failed", "error", "skipped")}
    names = sorted(r.nodeid for r in terminalreporter.getreports("passed"))
    skipped = {r.nodeid: str(r.longrepr[-1]) for r in terminalreporter.getreports("skipped")}
    command = "python -m " + " ".join(["pytest", *config.invocation_params.args])
    where = {**environment("cuda"), "gpus": torch.cuda.device_count(), "command": command}
    content = {**counts, "environment": where, "skips": skipped, "tests": names}
    Path(target).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _tests(config: pytest.Config) -> Path:
    return config.rootpath / "tests"


def _tier(path: Path, tests: Path) -> str | None:
    """The first folder under ``tests`` on the way to ``path``; None for a file outside or directly in ``tests``."""
    parts = path.relative_to(tests).parts if path.is_relative_to(tests) else ()
    return parts[0] if len(parts) > 1 else None


# First, before `-k` and `-m` deselect: a tier is counted as it is in the files, and only then is the choice made.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    counts: dict[str, int] = {}
    for item in items:
        tier = _tier(item.path, _tests(config))
        if tier is not None:
            counts[tier] = counts.get(tier, 0) + 1
        if tier == "gpu":
            item.add_marker(pytest.mark.gpu)
    config.stash[_COUNTS] = counts


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    tests = _tests(config)
    counts = config.stash.get(_COUNTS, {})
    # With pytest-xdist each worker collects too; the session that the user sees is the one that judges.
    if session.testsfailed or hasattr(config, "workerinput"):
        return
    file = tests / "tiers.json"
    whole = _whole_tiers(config, tests)
    committed: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    if config.getoption("--write-tiers"):
        # A tier that this run did not ask for keeps its number; one whose folder is gone is dropped.
        kept = {tier: n for tier, n in committed.items() if whole is not None and tier not in whole}
        asked = {tier: n for tier, n in counts.items() if whole is None or tier in whole}
        file.write_text(json.dumps(dict(sorted({**kept, **asked}.items())), indent=2) + "\n")
        return
    options = ("keyword", "deselect", "ignore", "ignore_glob", "lf")
    if any(getattr(config.option, option, None) for option in options):
        return
    for tier, expected in committed.items():
        found = counts.get(tier, 0)
        if (whole is None or tier in whole) and found < expected:
            raise pytest.UsageError(
                f"tests/{tier} has {found} tests, tests/tiers.json says {expected}: tests are missing. "
                "If they were removed on purpose, run scripts/tiers and commit the file."
            )


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
