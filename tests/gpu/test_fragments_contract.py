"""The stream contract's clauses on CUDA, over a model in fragments: graph, Python, graph."""

from __future__ import annotations

import pytest

from contract.in_fragments import *  # noqa: F403  # pytest collects them here


@pytest.fixture(params=["eager", "inductor"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
