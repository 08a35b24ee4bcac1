"""What sessions promise, on the simulated device: the tests of ``tests/contract/sessions.py``."""

from __future__ import annotations

import pytest

from contract.sessions import *  # noqa: F403  # pytest collects them here


@pytest.fixture
def backend() -> str:
    return "eager"
