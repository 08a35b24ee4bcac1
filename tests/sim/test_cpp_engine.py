"""``anabranch::Engine`` on the simulated device: its streams, its events, and when its weights are freed.

The rest of the C++ face needs no streams: ``tests/unit/test_cpp_server.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch import cpp
from contract.support import Mlp, Rig, assert_same, on_threads

pytestmark = pytest.mark.usefixtures("rig")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    cpp.save_program(Mlp(64).eval(), [torch.empty(8, 64)], tmp_path / "mlp")
    return tmp_path / "mlp"


@pytest.fixture
def expected() -> torch.nn.Module:
    return Mlp(64).eval().requires_grad_(False).to("sim")


def test_calls_from_threads_on_streams_of_their_own(rig: Rig, core: Any, program: Path, expected: Any) -> None:
    engine = core.Engine(str(program), rig.device())
    inputs = [[rig.random(8, 64) for _ in range(5)] for _ in range(3)]
    results: list[Any] = [None] * 3

    def work(i: int) -> None:
        with rig.module.stream(rig.stream()):
            results[i] = [engine.run([x])[0].cpu() for x in inputs[i]]

    on_threads(3, work)
    for i in range(3):
        for x, y in zip(inputs[i], results[i], strict=True):
            assert_same(y, expected(x).cpu())
    assert engine.calls() == 15


def test_a_call_is_ordered_on_the_current_stream(rig: Rig, core: Any, program: Path, expected: Any) -> None:
    engine = core.Engine(str(program), rig.device())
    value, stream = rig.random(8, 64), rig.stream()
    x = rig.poisoned(value, stream)
    latch = rig.latch(stream)
    with rig.module.stream(stream):
        x.copy_(value)
        (y,) = engine.run([x])
        x.fill_(float("nan"))
        copy = y.clone()
        y.fill_(float("nan"))
    rig.run_what_can()
    latch.open()
    with rig.module.stream(stream):
        assert_same(copy.cpu(), expected(value).cpu())


@pytest.mark.parametrize("freed_by", ["the engine", "the caller"])
def test_weights_are_freed_after_their_last_use_on_each_stream(
    rig: Rig, core: Any, program: Path, expected: Any, freed_by: str
) -> None:
    values = [rig.random(8, 64), rig.random(8, 64)]
    streams = [rig.stream(), rig.stream()]
    engine = core.Engine(str(program), rig.device())
    kept = engine.weights() if freed_by == "the caller" else None
    latches = [rig.latch(stream) for stream in streams]
    results = []
    for x, stream in zip(values, streams, strict=True):
        with rig.module.stream(stream):
            results += engine.run([x])
    engine.destroy()
    del kept
    # On another stream, where the freed weights would come from first: nothing may overwrite them yet.
    sizes = [p.shape for p in expected.parameters()]
    junk = [torch.full(size, float("nan"), device=rig.device()) for size in sizes for _ in range(20)]
    rig.module.default_stream().synchronize()
    for latch in reversed(latches):
        latch.open()
    for x, y, stream in zip(values, results, streams, strict=True):
        stream.synchronize()
        assert_same(y.cpu(), expected(x).cpu())
    del junk


def test_freed_weights_are_memory_for_others(rig: Rig, core: Any, program: Path) -> None:
    engine = core.Engine(str(program), rig.device())
    with rig.module.stream(rig.stream()):
        engine.run([rig.random(8, 64)])
    addresses = {w.data_ptr() for w in engine.weights()}
    engine.destroy()
    rig.module.synchronize()
    new = [torch.empty(64, 64, device=rig.device()) for _ in range(40)]
    new += [torch.empty(64, device=rig.device()) for _ in range(40)]
    assert addresses <= {x.data_ptr() for x in new}


def test_inside_a_capture_a_call_is_refused_and_the_capture_stays_good(
    rig: Rig, core: Any, program: Path, expected: Any
) -> None:
    engine = core.Engine(str(program), rig.device())
    x, graph = rig.random(8, 64), rig.new_graph()
    y = torch.full_like(x, float("nan"))
    with rig.capture(graph):
        with pytest.raises(core.NotCapturable, match="outside the capture"):
            engine.run([x])
        y.copy_(x)
    graph.replay()
    rig.module.synchronize()
    assert_same(y.cpu(), x.cpu())
    assert_same(engine.run([x])[0].cpu(), expected(x).cpu())


def test_inputs_of_another_device_are_refused(rig: Rig, core: Any, program: Path) -> None:
    engine = core.Engine(str(program), rig.device(1))
    with pytest.raises(core.InputError, match=r"input 0 is on cpu; this engine runs on .*:1\. Pass x\.to"):
        engine.run([torch.randn(8, 64)])
    with pytest.raises(core.InputError, match=r"input 0 is on .*:0; this engine runs on .*:1"):
        engine.run([rig.random(8, 64)])
    (y,) = engine.run([rig.random(8, 64, index=1)])
    assert y.device.index == 1


def test_the_engine_without_a_file_that_the_docs_make(core: Any) -> None:
    weight, x = torch.randn(32, 64), torch.randn(8, 64)
    (y,) = core.documented(weight, x)
    assert_same(y, torch.nn.functional.gelu(torch.nn.functional.linear(x, weight), approximate="tanh"))
