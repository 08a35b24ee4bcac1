"""The stream contract's clauses on the simulated device, over engines whose kernels are for many sizes."""

from __future__ import annotations

import pytest

from contract.in_ranges import *  # noqa: F403  # pytest collects them here
from contract.support import reference_is_slow as runtime  # noqa: F401  # a fixture

# The schedule that finds missing waits; the other one is for the models of `test_device_contract.py`.
pytestmark = pytest.mark.parametrize("rig", ["lazy"], indirect=True)


@pytest.fixture
def backend() -> str:
    return "eager"
