"""The stream contract's clauses on real streams, held still by a latch: the tests of ``tests/contract``, on CUDA."""

from __future__ import annotations

import pytest

from contract.clauses import *  # noqa: F403  # pytest collects them here


@pytest.fixture(params=["eager", "inductor"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
