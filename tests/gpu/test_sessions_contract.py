"""What sessions promise, on CUDA: the tests of ``tests/contract/sessions.py``."""

from __future__ import annotations

import pytest

from contract.sessions import *  # noqa: F403  # pytest collects them here


@pytest.fixture(params=["eager", "inductor"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
