"""The stream contract's clauses on the simulated device, over a model of three pieces."""

from __future__ import annotations

import pytest

from contract.in_pieces import *  # noqa: F403  # pytest collects them here
from contract.support import reference_is_slow as runtime  # noqa: F401  # a fixture

# The schedule that finds missing waits; the other one is for the models of `test_device_contract.py`.
pytestmark = pytest.mark.parametrize("rig", ["lazy"], indirect=True)


@pytest.fixture
def backend() -> str:
    return "eager"
