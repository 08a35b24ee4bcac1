"""The stream contract's clauses on CUDA, over engines whose kernels are for many sizes."""

from __future__ import annotations

import pytest

from contract.in_ranges import *  # noqa: F403  # pytest collects them here


@pytest.fixture(params=["eager", "inductor"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
