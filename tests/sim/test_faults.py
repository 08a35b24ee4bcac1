"""The fault campaign on the simulated device: whatever a call asks of it fails once, at every place in turn."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from contract import faults, stateful
from contract.faults import EVERY, Planted, Scene, campaign, interrupt_at
from contract.support import Make, Mlp, assert_same

# Nothing runs but what is waited for: work that a fault left behind stays in the way as long as it can.
lazily = pytest.mark.parametrize("rig", ["lazy"], indirect=True)
pytestmark = lazily


def level(rig: Any) -> dict[str, int]:
    """What there is in the machine."""
    gc.collect()
    rig.seam.trim()
    rig.module.empty_cache()
    allocated, reserved = rig.core.memory(0)
    return {"allocated": allocated, "reserved": reserved, **rig.core.alive()}


@pytest.fixture
def unobserved(rig: Any) -> Iterator[None]:
    """The native runtime's locks as they are in production: the C++'s own, where no explorer could watch.

    Observed ones are Python, in which a signal can strike, and a fork can find a thread.
    """
    from anabranch.explore._shared import Observer
    from anabranch.runtime import _native

    _native.core.observe(None)
    yield
    _native.core.observe(Observer())


@pytest.fixture
def plain(rig: Any, unobserved: None) -> Iterator[None]:
    """All that threads share as it is in production. Calls of observed containers are Python: a signal that comes right
    after one has done its work, and before the caller has the answer, is a place that only plain ones have."""
    from anabranch import _sync
    from anabranch.explore._shared import Factories
    from anabranch.runtime._process import process

    _sync.install(_sync.Factories())
    process.renew_locks()
    yield
    _sync.install(Factories())
    process.renew_locks()


@pytest.fixture
def scenes(rig: Any, compiled: Make) -> Iterator[Callable[..., Scene]]:
    """Makes scenes, and looks in the end whether they left anything behind."""
    made: list[Scene] = []
    streams = [rig.stream() for _ in range(3)]

    def make(**options: Any) -> Scene:
        made.append(Scene(rig, compiled, streams, **options))
        return made[-1]

    # What is made once and for all: lanes, and the streams' hidden workspaces.
    for graphs in (True, False):
        rehearsal = make(graphs=graphs, contexts=4)
        rehearsal.check_next()
        rehearsal.engine.warm(contexts=4)
        rehearsal.engine(rig.random(5, faults.WIDTH))
        rehearsal.close()
        made.clear()
    before = level(rig)
    yield make
    rig.open_all()
    for scene in made:
        scene.close()
    assert level(rig) == before


def device(rig: Any, kind: str, times: int = 1) -> Callable[[int], Any]:
    """Plants a fault of the device."""

    @contextmanager
    def plant(nth: int) -> Iterator[Planted]:
        planted = Planted()
        rig.core.fail(kind, nth, times)
        try:
            yield planted
        finally:
            planted.fired = not rig.core.fail(kind, 0)

    return plant


@pytest.fixture
def with_state(rig: Any) -> None:
    """Scenes have a backend whose runs need state."""
    stateful.install(rig.seam)
    rig.defaults = {"backend": stateful.NAME}


@pytest.mark.parametrize("kind", ["alloc", "launch", "copy", "graph", "record", "wait"])
def test_a_warm_graph_call(rig: Any, scenes: Callable[..., Scene], kind: str) -> None:
    scene = scenes(contexts=1)
    places = {"alloc": 1, "launch": 3, "copy": 2, "graph": 1, "record": 1, "wait": 1}
    assert campaign(scene, device(rig, kind), before=lambda: scene.engine.warm()) == places[kind]


@pytest.mark.parametrize("kind", ["alloc", "launch", "record", "wait"])
def test_a_direct_call(rig: Any, scenes: Callable[..., Scene], kind: str) -> None:
    assert campaign(scenes(graphs=False), device(rig, kind)) >= 1


@pytest.mark.parametrize("kind", ["alloc", "launch", "copy", "graph", "record", "capture", "end of capture"])
@EVERY
def test_a_call_that_builds_a_context(rig: Any, scenes: Callable[..., Scene], kind: str, every: int) -> None:
    scene = scenes(contexts=2)
    assert campaign(scene, device(rig, kind), before=scene.drop, every=every) >= 1
    scene.drop()
    assert scene.engine.warm(contexts=2) == 2, "an earlier failure is held against later builds"


@EVERY
@pytest.mark.parametrize("kind", ["alloc", "launch", "capture", "end of capture"])
def test_a_first_call(rig: Any, scenes: Callable[..., Scene], kind: str, every: int) -> None:
    scene = scenes(contexts=4)
    assert campaign(scene, device(rig, kind), before=scene.drop, new=True, every=every) >= 1


def test_a_capture_that_another_operation_invalidates(
    rig: Any, scenes: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = scenes(contexts=2)
    begin = type(rig.seam).capture

    def spoiled(self: Any, lane: Any, memory: Any, fn: Callable[[], Any]) -> Any:
        def with_a_wait() -> Any:
            result = fn()
            with pytest.raises(RuntimeError, match="not permitted"):
                lane.stream.synchronize()
            return result

        return begin(self, lane, memory, with_a_wait)

    scene.drop()
    calls = scene.prepare()
    with monkeypatch.context() as m:
        m.setattr(type(rig.seam), "capture", spoiled)
        calls[0].make()  # runs direct: a context was not to be had
        assert scene.engine.stats().contexts == 0
    assert calls[0].output is not None
    scene.check(calls)
    scene.drop()
    scene.check_next()
    assert scene.engine.stats().contexts >= 1


def test_a_context_whose_end_nothing_tells_is_never_used_again(rig: Any, runtime: str, compiled: Make) -> None:
    # The record fails, and so does the one that the error path makes in its place.
    scene = Scene(rig, compiled, [rig.stream() for _ in range(3)], contexts=2)
    scene.engine.warm(contexts=2)
    calls = scene.prepare()
    graphs = rig.core.alive()["graphs"]
    with device(rig, "record", times=2)(1) as planted, pytest.raises(RuntimeError, match="made to fail"):
        calls[0].make()
    assert planted.fired
    gc.collect()
    rig.seam.collect()
    assert rig.core.alive()["graphs"] == graphs, "its graph was freed, with its launch still queued"
    assert scene.engine.warm(contexts=2) == 1, "its memory is somebody else's, with its work still queued"
    scene.check(calls)


# -- interrupts: of what is Python ------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_warm_call_interrupted_at_each_place(
    rig: Any, runtime: str, scenes: Callable[..., Scene], error: type[BaseException], every: int
) -> None:
    scene = scenes(contexts=1)
    plant = lambda nth: interrupt_at(nth, error)  # noqa: E731
    places = campaign(scene, plant, before=lambda: scene.engine.warm(), every=every)
    # Of the native runtime's call nothing is Python: there is no place where it could be interrupted.
    assert places == 0 if runtime == "native" else places > 20


@EVERY
def test_a_direct_call_interrupted_at_each_place(
    rig: Any, runtime: str, scenes: Callable[..., Scene], every: int
) -> None:
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    before = get("mkldnn", "matmul")  # another test may have set it
    put("mkldnn", "matmul", "none")
    try:
        scene = scenes(graphs=False)
        places = campaign(scene, interrupt_at, every=every)
        assert places == 0 if runtime == "native" else places > 20
        if runtime == "native":
            # A flag that means the same as at compile and reads otherwise: Python is asked, before and after.
            put("mkldnn", "matmul", "ieee")
            assert campaign(scene, interrupt_at, every=every) > 0
    finally:
        put("mkldnn", "matmul", before)


def builds_interrupted_at_each_place(scene: Scene, every: int) -> None:
    assert campaign(scene, interrupt_at, before=scene.drop, every=every) > 40
    faults.nobody_holds_the_build_lock()
    scene.drop()
    assert scene.engine.warm(contexts=2) == 2


@EVERY
def test_a_call_that_builds_a_context_interrupted_at_each_place(
    rig: Any, scenes: Callable[..., Scene], every: int
) -> None:
    builds_interrupted_at_each_place(scenes(contexts=2), every)


@EVERY
def test_the_same_with_plain_containers(rig: Any, plain: None, scenes: Callable[..., Scene], every: int) -> None:
    builds_interrupted_at_each_place(scenes(contexts=2), every)


# Of the native runtime, and with its contexts built ahead: a signal in the middle of a build may come between two
# bytecodes of a `with` statement, ours or PyTorch's, and leave the thread on the stream or in the pool of the build.
@pytest.mark.usefixtures("unobserved")
@pytest.mark.parametrize("runtime", ["native"])
def test_signals_while_calls_are_made(rig: Any, compiled: Make) -> None:
    scene = Scene(rig, compiled, [rig.stream() for _ in range(3)], contexts=2)
    assert scene.engine.warm(contexts=2) == 2
    faults.signals(scene, seconds=3)


# -- threads and processes that end -----------------------------------------------------------------------------------


@pytest.mark.clause(5)
def test_threads_that_end_leave_their_contexts_to_others(rig: Any, scenes: Callable[..., Scene]) -> None:
    scene = scenes(contexts=2)
    faults.threads_that_end(scene)
    assert scene.engine.stats().captures <= 2, "contexts were lost with the threads that had used them"


@pytest.mark.clause(5)
@pytest.mark.usefixtures("unobserved")
def test_a_fork_while_other_threads_are_in_calls(rig: Any, compiled: Make) -> None:
    scene = Scene(rig, compiled, [rig.stream() for _ in range(3)], contexts=2)
    stop = threading.Event()
    x = rig.random(4, faults.WIDTH)

    def call() -> None:
        with rig.module.stream(rig.stream()):
            while not stop.is_set():
                scene.engine(x)
                rig.module.current_stream().synchronize()

    threads = [threading.Thread(target=call) for _ in range(6)]
    for t in threads:
        t.start()
    try:
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                status = 1
                signal.alarm(60)
                torch.set_num_threads(1)  # the parent's OpenMP threads are not there
                try:
                    scene.check_next()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        stop.set()
        for t in threads:
            t.join()
    scene.check_next()


# -- waiting in line --------------------------------------------------------------------------------------------------


def test_of_sixty_four_threads_none_starves(rig: Any, scenes: Callable[..., Scene]) -> None:
    # In line there are at most 63 ahead. More come by while a thread has its context but not yet the GIL, and many on a
    # machine where other programs take the cores. A line that lets a thread starve does so in every round.
    scene = scenes(contexts=1)
    assert any(faults.none_starves(scene) < 640 for _ in range(3))


@pytest.mark.parametrize("runtime", ["python"])
def test_a_line_that_serves_the_last_first_would_be_seen(
    rig: Any, scenes: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import deque

    class Stack(deque[Any]):
        def append(self, waiter: Any) -> None:
            self.appendleft(waiter)

    scene = scenes(contexts=1)
    monkeypatch.setattr(scene.engine._first().calls._pool, "_waiters", Stack())
    assert faults.none_starves(scene) > 640


# -- kernels that have state ------------------------------------------------------------------------------------------


def nothing_is_free_twice(rig: Any) -> None:
    """A lane or a memory pool given back twice would be two owners' at once."""
    for free in (rig.seam.lanes, rig.seam.memories):
        for unused in list(free._by_device.values()):
            assert len({id(x) for x in unused}) == len(list(unused))


# Direct calls of such kernels go through Python in both runtimes, and so does building.
@pytest.mark.usefixtures("with_state")
class TestWithState:
    @pytest.mark.parametrize("kind", ["alloc", "launch", "copy", "record", "wait"])
    def test_a_warm_direct_call(self, rig: Any, scenes: Callable[..., Scene], kind: str) -> None:
        assert campaign(scenes(graphs=False), device(rig, kind)) >= 1

    @pytest.mark.parametrize("runtime", ["python"])
    @pytest.mark.parametrize("kind", ["alloc", "launch", "copy", "record"])
    @EVERY
    def test_a_direct_call_that_builds_an_instance(
        self, rig: Any, scenes: Callable[..., Scene], kind: str, every: int
    ) -> None:
        scene = scenes(graphs=False, contexts=2)
        assert campaign(scene, device(rig, kind), before=scene.drop, every=every) >= 1
        scene.drop()
        assert scene.engine.warm(contexts=2) == 2, "an earlier failure is held against later builds"

    @pytest.mark.parametrize("kind", ["alloc", "launch", "capture", "end of capture"])
    @EVERY
    def test_a_call_that_builds_a_context(self, rig: Any, scenes: Callable[..., Scene], kind: str, every: int) -> None:
        scene = scenes(contexts=2)
        assert campaign(scene, device(rig, kind), before=scene.drop, every=every) >= 1
        scene.drop()
        assert scene.engine.warm(contexts=2) == 2, "an earlier failure is held against later builds"

    @EVERY
    @pytest.mark.parametrize("runtime", ["python"])
    @pytest.mark.parametrize("kind", ["alloc"])
    def test_a_first_call(self, rig: Any, scenes: Callable[..., Scene], kind: str, every: int) -> None:
        scene = scenes(graphs=False, contexts=2)
        assert campaign(scene, device(rig, kind), before=scene.drop, new=True, every=every) >= 1

    @EVERY
    @pytest.mark.parametrize("kind", ["alloc", "launch", "record", "wait"])
    def test_a_call_in_a_capture(self, rig: Any, compiled: Make, kind: str, every: int) -> None:
        gc.collect()
        before = len(stateful.ScratchInstance.alive)
        x = rig.random(4, faults.WIDTH)
        engine = compiled(Mlp(faults.WIDTH), x, cuda_graphs=False)
        expected = rig.load_kernels(engine, x)
        for nth in range(1, 100, every):
            engine.warm(captures=1)
            graph, error = rig.new_graph(), None
            with rig.capture(graph):
                with device(rig, kind)(nth) as planted:
                    try:
                        y = engine(x)
                    except Exception as e:
                        error = e.with_traceback(None)
                if error is not None:
                    # The capture is still good. Where the first call has not got an instance, this one does.
                    y = engine(x)
            assert error is None or faults.is_named(error), error
            graph.replay()
            rig.module.synchronize()
            assert_same(y, expected)
            del graph, y
            gc.collect()
            rig.seam.collect()
            gc.collect()
            # The direct calls' and, where the call failed before it took one, the spare.
            assert len(stateful.ScratchInstance.alive) - before <= 2
            if not planted.fired:
                break
        assert nth > 1

    @EVERY
    @pytest.mark.parametrize("runtime", ["python"])
    @pytest.mark.parametrize("kind", ["alloc", "launch"])
    def test_warming_for_captures(self, rig: Any, scenes: Callable[..., Scene], kind: str, every: int) -> None:
        scene = scenes(graphs=False)
        for nth in range(1, 100, every):
            scene.drop()
            failed = False
            with device(rig, kind)(nth) as planted:
                try:
                    scene.engine.warm(captures=2)
                except (RuntimeError, torch.OutOfMemoryError) as e:
                    failed = faults.is_named(e)
            assert failed == planted.fired
            scene.engine.warm(captures=2)
            assert scene.engine._first().calls.direct.kernels.spare == 2
            scene.check_next()
            if not planted.fired:
                break
        assert nth > 1

    @EVERY
    @pytest.mark.parametrize("runtime", ["python"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    def test_a_warm_direct_call_interrupted_at_each_place(
        self, rig: Any, scenes: Callable[..., Scene], error: type[BaseException], every: int
    ) -> None:
        assert campaign(scenes(graphs=False), lambda nth: interrupt_at(nth, error), every=every) > 20
        nothing_is_free_twice(rig)

    @EVERY
    @pytest.mark.parametrize("runtime", ["python"])
    def test_a_direct_call_that_builds_an_instance_interrupted_at_each_place(
        self, rig: Any, scenes: Callable[..., Scene], every: int
    ) -> None:
        scene = scenes(graphs=False, contexts=2)
        assert campaign(scene, interrupt_at, before=scene.drop, every=every) > 40
        nothing_is_free_twice(rig)
        scene.drop()
        assert scene.engine.warm(contexts=2) == 2

    @EVERY
    @pytest.mark.parametrize("runtime", ["python"])
    def test_a_call_that_builds_a_context_interrupted_at_each_place(
        self, rig: Any, scenes: Callable[..., Scene], every: int
    ) -> None:
        builds_interrupted_at_each_place(scenes(contexts=2), every)
        nothing_is_free_twice(rig)

    def test_an_error_that_is_kept_keeps_no_later_call_waiting(self, rig: Any, scenes: Callable[..., Scene]) -> None:
        scene = scenes(graphs=False, contexts=1)
        calls = scene.prepare()
        with device(rig, "record")(1):
            try:
                calls[0].make()
            except RuntimeError:
                # The exception keeps the frames that it came through, and so the only instance there may be.
                calls[1].make()
        assert calls[0].output is None
        assert calls[1].output is not None
        scene.check(calls)

    def test_an_instance_whose_end_nothing_tells_is_never_used_again(
        self, rig: Any, runtime: str, compiled: Make
    ) -> None:
        scene = Scene(rig, compiled, [rig.stream() for _ in range(3)], graphs=False)
        calls = scene.prepare()
        before = set(stateful.ScratchInstance.alive)
        # That of the direct call, that of the instance, and the one that the error path makes in its place.
        with device(rig, "record", times=2)(1) as planted, pytest.raises(RuntimeError, match="made to fail"):
            calls[0].make()
        assert planted.fired
        gc.collect()
        rig.seam.collect()
        assert before <= set(stateful.ScratchInstance.alive), "it was freed, with its work still queued"
        scene.check(calls)
