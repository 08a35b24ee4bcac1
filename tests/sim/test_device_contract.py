"""The stream contract's clauses on the simulated device: the tests of ``tests/contract``."""

from __future__ import annotations

import pytest

from contract.clauses import *  # noqa: F403  # pytest collects them here


@pytest.fixture
def backend() -> str:
    return "eager"
