"""What goes wrong in the middle of a call, at each of its steps, and what must be so afterwards: a named error or the
right answer, no half-used context, the next call right, nothing left behind.

``tests/sim`` plants faults in the simulated device, at every place in turn and for both runtimes alike; ``tests/gpu``
has those that CUDA can be made to have.
"""

from __future__ import annotations

import gc
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import anabranch
from anabranch import _activity
from anabranch._judge import differences
from anabranch.runtime._process import process
from contract.support import ROUNDING, Make, Mlp, Rig, assert_same, on_threads

WIDTH = 64
RUNTIME = (str(Path(anabranch.__file__).parent / "runtime") + "/", _activity.__file__)


class Call:
    """One call that is prepared: all that comes ahead of it."""

    def __init__(self, scene: Scene, source: torch.Tensor) -> None:
        self._rig = rig = scene.rig
        self._engine = scene.engine
        self._source = source
        self.stream = next(scene.streams)
        self.expected = scene.reference(source)
        self.input = rig.poisoned(source, self.stream)
        self.output: Any = None

    def start(self, held: bool) -> None:
        """Make its input; ``held``: behind a latch on its stream, and nothing may wait for the device from here on."""
        self._latch = self._rig.latch(*[self.stream] if held else [])
        with self._rig.module.stream(self.stream):
            self.input.copy_(self._source)

    def make(self) -> None:
        with self._rig.module.stream(self.stream):
            self.output = self._engine(self.input)

    def check(self) -> None:
        """What it returned, if it returned anything."""
        self._latch.open()
        self.stream.synchronize()
        if self.output is not None:
            assert_same(self.output, self.expected, rounding=ROUNDING)
            torch.testing.assert_close(self.output, self.expected, rtol=1e-5, atol=1e-6)


class Scene:
    """An engine, and calls of it whose inputs differ from call to call."""

    def __init__(
        self,
        rig: Rig,
        compiled: Make,
        streams: Sequence[Any],
        *,
        graphs: bool = True,
        contexts: int = 1,
        held: bool = True,
    ) -> None:
        self.rig = rig
        self.held = held
        self.contexts = contexts
        self.model = Mlp(WIDTH).eval().requires_grad_(False).to(rig.device())
        # Whatever is new is compiled by itself, in the call.
        options: dict[str, Any] = {"cuda_graphs": graphs, "max_contexts": contexts, "dynamic": False}
        self.engine = compiled(Mlp(WIDTH), rig.random(4, WIDTH), **options)
        self.streams = itertools.cycle(streams)
        for stream in streams:
            with rig.module.stream(stream):
                rig.load_kernels(self.engine, rig.random(4, WIDTH))

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        y = self.model(x)
        self.rig.module.synchronize()
        return y

    def prepare(self, rows: int = 4) -> list[Call]:
        """Three calls on three streams, held if they can be; the first, of ``rows``, is the one that may fail."""
        calls = [Call(self, self.rig.random(n, WIDTH)) for n in (rows, 4, 4)]
        for call in calls:
            call.start(self.held)
        return calls

    def check(self, calls: list[Call]) -> None:
        """The later calls are right, also while the stream of the first still holds what it had queued."""
        for call in calls[1:]:
            call.make()
            assert call.output is not None
        for call in calls:
            call.check()
        assert self.engine.stats().contexts <= self.contexts

    def check_next(self) -> None:
        calls = self.prepare()
        calls[0].make()
        self.check(calls)

    def drop(self) -> None:
        """Let go of all contexts, as far as the engine still knows of them."""
        self.rig.module.synchronize()
        self.engine.trim()
        gc.collect()
        self.rig.seam.collect()
        self.engine.trim()

    def close(self) -> None:
        self.drop()
        stats = self.engine.stats()
        assert (stats.contexts, stats.bytes) == (0, 0), "a context was lost"
        self.engine.close()
        del self.engine, self.model
        gc.collect()
        self.rig.seam.collect()
        gc.collect()
        self.rig.module.synchronize()


def is_named(error: BaseException) -> bool:
    """Whether an error says what went wrong."""
    return isinstance(error, anabranch.AnabranchError | torch.OutOfMemoryError) or "made to fail" in str(error)


Plant = Callable[[int], Any]


#: Which places of a call a campaign makes fail: each, or on a push each seventh.
EVERY = pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])


def campaign(
    scene: Scene, plant: Plant, *, before: Callable[[], Any] = lambda: None, new: bool = False, every: int = 1
) -> int:
    """Let the first place of a call fail, then the next of each ``every``, until there is none that could; the last.

    ``plant(n)`` is a context manager that makes the n-th place fail, and yields what says in the end whether it did.
    ``before`` comes ahead of each call; ``new``: each call has a signature that was not compiled before.
    """
    for nth in itertools.count(1, every):
        before()
        call, *later = scene.prepare(rows=4 + nth if new else 4)
        error: BaseException | None = None
        with plant(nth) as fault:
            try:
                call.make()
            except (Exception, KeyboardInterrupt) as e:
                error = e.with_traceback(None)
        if error is not None:
            assert is_named(error) or type(error) in (KeyboardInterrupt, MemoryError), error
            assert call.output is None
        else:
            assert call.output is not None
        assert not _activity.in_call(), f"interrupted at place {nth}, the call seems to go on"
        assert not _activity.is_building(), f"interrupted at place {nth}, the call seems to go on building"
        scene.check([call, *later])
        if not fault.fired:
            assert error is None, f"nothing was made to fail, and yet: {error!r}"
            return max(nth - every, 0)
        if new:
            # What failed can be had later.
            with scene.rig.module.stream(call.stream):
                call.output = scene.engine(call.input)
            call.check()
    raise AssertionError


class Planted:
    fired = False


@contextmanager
def interrupt_at(nth: int, error: type[BaseException] = KeyboardInterrupt) -> Iterator[Planted]:
    """``error`` is raised in this thread at the n-th place of the runtime's Python where a signal could raise it.

    The interpreter looks for signals where a function begins or a generator goes on, and after calls of C functions.
    """
    planted, places = Planted(), 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal places
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(RUNTIME):
            places += 1
            if places == nth:
                planted.fired = True
                raise error

    sys.setprofile(profile)
    try:
        yield planted
    finally:
        sys.setprofile(None)


def nobody_holds_the_build_lock() -> None:
    taken: list[bool] = []

    def look() -> None:
        taken.append(process.build_lock.acquire(timeout=20))
        if taken[0]:
            process.build_lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert taken == [True], "the build lock was never given back"


# -- the same on every device ---------------------------------------------------------------------------------------


def signals(scene: Scene, seconds: float) -> None:
    """The main thread is interrupted again and again while it calls, and other threads call too."""
    stop, armed, hits = threading.Event(), [False], 0
    main = threading.main_thread().ident
    assert main is not None

    def handler(number: int, frame: Any) -> None:
        if armed[0]:
            armed[0] = False  # once: a second one could strike where the first is being handled
            raise KeyboardInterrupt

    def shoot() -> None:
        while not stop.wait(0.003):
            signal.pthread_kill(main, signal.SIGINT)

    def call_too() -> None:
        with scene.rig.module.stream(scene.rig.stream()):
            while not stop.is_set():
                scene.engine(x)
                scene.rig.module.current_stream().synchronize()

    x = scene.rig.random(4, WIDTH)
    expected = scene.reference(x)
    wrong: list[Any] = []
    before = signal.signal(signal.SIGINT, handler)
    threads = [threading.Thread(target=shoot), threading.Thread(target=call_too), threading.Thread(target=call_too)]
    try:
        for t in threads:
            t.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            y = None
            try:
                armed[0] = True
                y = scene.engine(x)
                armed[0] = False
            except KeyboardInterrupt:
                armed[0] = False
                hits += 1
            near = y is not None and torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
            if y is not None and (not near or differences(y, expected, rounding=ROUNDING)):
                wrong.append(y)
    finally:
        armed[0] = False
        stop.set()
        for t in threads:
            t.join()
        signal.signal(signal.SIGINT, before)
    assert not wrong
    assert hits > 3, "hardly ever interrupted"
    assert not _activity.in_call()
    assert not _activity.is_building()
    nobody_holds_the_build_lock()
    scene.check_next()


def threads_that_end(scene: Scene, threads: int = 30) -> None:
    """Threads come, call, and end with what they remember of the pool; later ones get their contexts all the same."""
    for _ in range(threads):
        call, *later = scene.prepare()
        thread = threading.Thread(target=call.make)
        thread.start()
        thread.join()
        assert call.output is not None
        scene.check([call, *later])
    assert 1 <= scene.engine.stats().contexts <= scene.contexts


def none_starves(scene: Scene, threads: int = 64, calls: int = 40) -> int:
    """Many threads share the contexts; the most calls that others made while one call was under way."""
    x = scene.rig.random(4, WIDTH)
    expected = scene.reference(x)
    finished = [0] * threads
    overtaken = [0] * threads
    outputs: list[Any] = [None] * threads

    def work(i: int) -> None:
        with scene.rig.module.stream(scene.rig.stream()):
            for _ in range(calls):
                before = sum(finished)
                outputs[i] = scene.engine(x)
                overtaken[i] = max(overtaken[i], sum(finished) - before)
                finished[i] += 1

    on_threads(threads, work)
    scene.rig.module.synchronize()
    assert finished == [calls] * threads
    for y in outputs:
        assert_same(y, expected, rounding=ROUNDING)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert scene.engine.stats().contexts == scene.contexts
    return max(overtaken)
