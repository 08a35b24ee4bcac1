"""The stream contract's clauses once more, with a backend whose runs need state of their own, as TensorRT's do."""

from __future__ import annotations

import gc
import weakref

import pytest

import anabranch
from contract import stateful
from contract.clauses import *  # noqa: F403  # pytest collects them here
from contract.support import PATHS, Mlp, Rig

# The schedule that finds missing waits; the other one is for the backends of `test_device_contract.py`.
pytestmark = pytest.mark.parametrize("rig", ["lazy"], indirect=True)


@pytest.fixture
def backend() -> str:
    return stateful.NAME


@pytest.fixture(autouse=True)
def with_state(rig: Rig) -> None:
    stateful.install(rig.seam)
    rig.defaults = {"backend": stateful.NAME}


@PATHS
def test_code_goes_where_the_host_may_wait(rig: Rig, runtime: str, graphs: bool) -> None:
    def use() -> anabranch.Engine:
        model = Mlp().eval().requires_grad_(False).to(rig.device())
        engine = anabranch.compile(model, [x], runtime=runtime, cuda_graphs=graphs, **rig.defaults)
        engine(x)
        rig.module.synchronize()
        return engine

    def loaded() -> list[int]:
        return sorted(id(code) for code in stateful.Code.alive if code not in others)

    x = rig.random(4, 256)
    others = weakref.WeakSet(stateful.Code.alive)  # of tests before this one
    engine = use()
    before = loaded()
    assert before
    del engine
    gc.collect()
    rig.seam.collect()
    assert loaded() == before  # nobody waited
    engine = use()
    assert len(loaded()) == len(before)  # to load more is to wait anyway
    rig.module.synchronize()
    engine.close()
    gc.collect()
    rig.seam.free_code()
    assert not loaded()
