"""Fixtures of the tests on the simulated device. It is imported in fixtures, not before: a process that only collects
these tests, on a GPU host, keeps CUDA as its accelerator."""

from __future__ import annotations

import gc
import importlib
import json
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("contract")
from contract.support import Rig, compiled, runtime  # noqa: E402, F401  # fixtures


class Sim(Rig):
    """The simulated device. ``policy`` says how it runs what is queued whenever a host thread waits."""

    kind = "sim"

    def __init__(self, policy: str, seed: int) -> None:
        import anabranch.sim
        from anabranch.sim import _device

        super().__init__()
        self.core = anabranch.sim.core
        self.core.policy(policy, seed)
        self.graph_class = _device._SimGraph
        # PyTorch's own class cannot be changed, as torch.cuda.Event can.
        self.event_class = type("Event", (torch.Event,), {})

    def event(self) -> Any:
        return self.event_class("sim")

    def draw(self, shape: tuple[int, ...], seed: int, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.empty(shape).uniform_(-1, 1, generator=generator).to(self.device(index))

    def run_what_can(self) -> None:
        while able := [actor for actor, enabled, *_ in self.core.heads() if enabled]:
            for actor in able:
                self.core.step(actor)

    @contextmanager
    def nothing_queued(self, stream: Any) -> Iterator[None]:
        # The stream itself is not idle where something was freed on it: that queues poison.
        self.core.trace(True)
        yield
        events = [json.loads(line) for line in self.core.take_trace().splitlines()]
        self.core.trace(False)
        assert any(e["do"] == "alloc" for e in events), "traced nothing"
        assert not [e for e in events if e["do"] in ("op", "replay") and e["stream"] == f"s{stream.stream_id}"]

    @contextmanager
    def asks_nothing(self) -> Iterator[None]:
        before = self.core.asked()
        yield
        assert self.core.asked() == before, "a host thread waited for the device, or asked it"
        self.event().query()
        self.module.current_stream().query()
        assert self.core.asked() > before, "counted nothing"

    def sparse(self, x: torch.Tensor) -> torch.Tensor:
        return x.cpu().to_sparse()  # not modelled

    def new_graph(self) -> Any:
        import anabranch.sim

        return anabranch.sim.Graph()

    def capture(self, graph: Any, mode: str = "global") -> AbstractContextManager[Any]:
        import anabranch.sim

        return anabranch.sim.graph(graph, mode=mode)

    def fast_matmul(self, allowed: bool) -> None:
        torch.set_float32_matmul_precision("high" if allowed else "highest")


_EXPLORER = ("test_explore_", "test_mutants", "test_runtime", "test_native_mutants")


# First, so that the tiers are counted with these marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        # Kernels with state: building and direct calls are Python in both runtimes, and the contract's clauses have a
        # push of their own for each runtime, with kernels that have none.
        seldom = {"TestWithState": "native", "test_stateful_contract": "python"}
        for part, seldom_by in seldom.items():
            if part in item.nodeid and parameters.get("runtime") == seldom_by:
                item.add_marker(pytest.mark.slow)
    # The explorer forks for each schedule, which costs by the memory that the process holds: its tests come first.
    items.sort(key=lambda item: not item.path.name.startswith(_EXPLORER))


# lazy runs only what a host thread waits for, and so is the one that finds waits that are missing.
@pytest.fixture(params=["lazy", pytest.param("random", marks=pytest.mark.slow)])
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    rig = Sim(request.param, zlib.crc32(request.node.nodeid.encode()))
    monkeypatch.setattr(type(rig.seam), "event", lambda seam: rig.event())
    yield rig
    rig.open_all()
    gc.collect()
    rig.core.policy("fifo", 0)


@pytest.fixture(scope="module")
def programs(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module of ``programs/`` that a test file names in its ``PROGRAMS``, with its engines built."""
    # Engines of earlier tests may still be at work. Where they go between two schedules, these are not the same.
    for thread in threading.enumerate():
        if thread.name == "anabranch builds":
            thread.join(60)
    # So would what they have left to be freed: each look whether it is done has two answers.
    import anabranch.sim  # noqa: F401  # registers the device
    from anabranch.devices import get_device

    gc.collect()
    torch.get_device_module("sim").synchronize()
    get_device("sim").collect()
    folder = str(Path(__file__).parent / "programs")
    if folder not in sys.path:  # modules in there import each other
        sys.path.insert(0, folder)
    # They may set how many threads operators use. MKL's products round by that, and other threads of this process do
    # not learn of it before they ask.
    cores = torch.get_num_threads()
    yield importlib.import_module(request.module.PROGRAMS)
    torch.set_num_threads(cores)


@pytest.fixture(scope="module")
def core() -> Any:
    """The C++ face as a Python module. The runtime under it is the one that engines in Python have built already."""
    import anabranch.sim
    from anabranch import _extension, cpp
    from anabranch.runtime import _library

    name, library = "anabranch_engine", _library.build()
    header = cpp.include_paths()[0]
    path = _extension._toolchain.build(
        name,
        [Path(__file__).with_name("engine_module.cpp"), *cpp.cmake_path().glob("*.cpp")],
        flags=[*_extension.flags(name), "-O0", f"-I{header}"],  # which compiles in half the time
        libraries=[str(library), f"-Wl,-rpath,{library.parent}", *cpp.link_flags(), "-ltorch_python"],
        headers=[*header.glob("*/*.h"), *_library.FOLDER.glob("*.h")],
    )
    core = _extension.load(name, path)
    core.set_private_device(anabranch.sim.core.native_api())
    return core
