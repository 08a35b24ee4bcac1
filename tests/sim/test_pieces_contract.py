"""The stream contract's clauses on the simulated device, over a model of three pieces."""

from __future__ import annotations

import pytest

from contract.in_pieces import *  # noqa: F403  # pytest collects them here

# The schedule that finds missing waits; the other one is for the models of `test_device_contract.py`.
pytestmark = pytest.mark.parametrize("rig", ["lazy"], indirect=True)


@pytest.fixture
def backend() -> str:
    return "eager"


@pytest.fixture(params=["native", pytest.param("python", marks=pytest.mark.slow)])
def runtime(request: pytest.FixtureRequest) -> str:
    """As in `contract.support`; the reference's calls in the slow tier, which the plain contract has on every push."""
    return str(request.param)
