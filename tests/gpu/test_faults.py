"""Faults that CUDA can be made to have in a call: no memory, a spoiled capture, interrupts, ends of threads.

The simulated device has the rest: one fault at every place in turn (``tests/sim/test_faults.py``)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import anabranch
from contract import faults
from contract.faults import Scene, campaign, interrupt_at
from contract.support import Make, Mlp, assert_same
from gpu.support import Gpu


@pytest.fixture
def scenes(gpu: Gpu, compiled: Make) -> Iterator[Callable[..., Scene]]:
    """Makes scenes; none may have lost a context in the end."""
    made: list[Scene] = []
    streams = [gpu.stream() for _ in range(3)]

    def make(**options: Any) -> Scene:
        # Streams are not held: in these tests contexts are built in the middle of calls, which loads kernels, and that
        # waits for all streams of the device.
        made.append(Scene(gpu, compiled, streams, held=False, **options))
        return made[-1]

    yield make
    gpu.open_all()
    for scene in made:
        scene.close()


@contextmanager
def no_memory() -> Iterator[None]:
    """PyTorch's allocator gets nothing from the driver, and has nothing left."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, torch.cuda.memory_reserved() / total))
    # What is cached in segments that are partly in use, those of large tensors and those of small ones.
    junk = []
    size = 1 << 28
    while size >= 512:
        try:
            junk.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        del junk


def test_a_call_in_a_capture_that_is_spoilt_already(gpu: Gpu, compiled: Make) -> None:
    from cuda.bindings import runtime as rt

    x = gpu.random(64, 256)
    engine = compiled(Mlp(), x)
    expected = gpu.load_kernels(engine, x)
    stream = gpu.stream()
    with torch.cuda.stream(stream):
        thread_local = rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        assert rt.cudaStreamBeginCapture(stream.cuda_stream, thread_local)[0] == 0
        try:
            assert rt.cudaStreamSynchronize(stream.cuda_stream)[0] != 0
            with pytest.raises(anabranch.NotCapturable, match="invalidated before this call"):
                engine(x)
        finally:
            assert rt.cudaStreamEndCapture(stream.cuda_stream)[0] != 0
            rt.cudaGetLastError()
        assert_same(engine(x), expected)


@pytest.mark.parametrize("graphs", [True, False], ids=["graph", "direct"])
def test_no_memory_for_a_warm_call(gpu: Gpu, compiled: Make, graphs: bool) -> None:
    x = gpu.random(1024, 1024)
    engine = compiled(torch.nn.ReLU(), x, cuda_graphs=graphs, max_contexts=2)
    expected = gpu.load_kernels(engine, x)
    contexts = engine.stats().contexts
    for _ in range(3):
        with no_memory(), pytest.raises(torch.OutOfMemoryError):
            engine(x)
        assert_same(engine(x), expected)
    assert engine.stats().contexts == contexts


def test_no_memory_for_a_context_runs_direct_or_says_so(gpu: Gpu, compiled: Make) -> None:
    x = gpu.random(1024, 1024)
    engine = compiled(torch.nn.ReLU(), x, cuda_graphs=True, max_contexts=2)
    expected = gpu.load_kernels(engine, x)
    for _ in range(3):
        engine.trim()
        out = torch.empty_like(x)  # keeps room for one result
        with no_memory():
            del out
            try:
                y = engine(x)
            except torch.OutOfMemoryError:
                y = None
        if y is not None:
            assert_same(y, expected)
        assert_same(engine(x), expected)
        gc.collect()
        engine.trim()
        assert engine.warm(contexts=2) == 2


def test_no_memory_for_a_first_call(gpu: Gpu, compiled: Make) -> None:
    x = gpu.random(1024, 1024)
    engine = compiled(torch.nn.ReLU(), x, cuda_graphs=True)
    wide = gpu.random(2048, 1024)
    with no_memory(), pytest.raises(torch.OutOfMemoryError):
        engine(wide)
    assert_same(engine(x), x.relu())
    assert_same(engine(wide), wide.relu())


def test_a_capture_that_another_operation_invalidates(
    gpu: Gpu, scenes: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = scenes(contexts=2)
    capture, spoilt = type(gpu.seam).capture_source, []

    def spoiled(self: Any, lane: Any, memory: Any, fn: Callable[[], Any]) -> Any:
        def with_a_wait() -> Any:
            result = fn()
            spoilt.append(1)
            lane.stream.synchronize()  # not allowed in a capture, and ends it
            return result

        return capture(self, lane, memory, with_a_wait)

    scene.drop()
    calls = scene.prepare()
    with monkeypatch.context() as m:
        m.setattr(type(gpu.seam), "capture_source", spoiled)
        calls[0].make()  # runs direct: a context was not to be had
    assert spoilt
    assert calls[0].output is not None
    assert scene.engine.stats().contexts == 0
    scene.check(calls)
    scene.drop()
    scene.check_next()
    assert scene.engine.stats().contexts >= 1


def test_a_warm_call_interrupted_at_each_place(gpu: Gpu, runtime: str, scenes: Callable[..., Scene]) -> None:
    scene = scenes(contexts=1)
    places = campaign(scene, interrupt_at, before=lambda: scene.engine.warm())
    # Of the native runtime's call nothing is Python: there is no place where it could be interrupted.
    assert places == 0 if runtime == "native" else places > 20


def test_a_call_that_builds_a_context_interrupted_at_each_place(gpu: Gpu, scenes: Callable[..., Scene]) -> None:
    scene = scenes(contexts=2)
    assert campaign(scene, interrupt_at, before=scene.drop) > 30
    faults.nobody_holds_the_build_lock()
    scene.drop()
    assert scene.engine.warm(contexts=2) == 2


@pytest.mark.parametrize("runtime", ["native"])
def test_signals_while_calls_are_made(gpu: Gpu, scenes: Callable[..., Scene]) -> None:
    scene = scenes(contexts=2)
    assert scene.engine.warm(contexts=2) == 2
    faults.signals(scene, seconds=5)


def test_threads_that_end_leave_their_contexts_to_others(gpu: Gpu, scenes: Callable[..., Scene]) -> None:
    scene = scenes(contexts=2)
    faults.threads_that_end(scene)
    assert scene.engine.stats().captures <= 2, "contexts were lost with the threads that had used them"


def test_of_sixty_four_threads_none_starves(gpu: Gpu, scenes: Callable[..., Scene]) -> None:
    # One round may see the scheduler keep a thread away that has a context already.
    scene = scenes(contexts=1)
    assert any(faults.none_starves(scene) < 640 for _ in range(3))
