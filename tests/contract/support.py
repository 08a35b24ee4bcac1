"""What tests of the contract share: a device's streams held still by a latch, poisoned inputs, small models."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

import anabranch
from anabranch._judge import Rounding, differences
from anabranch.devices import get_device

#: Both keep one contract.
RUNTIMES = ("native", "python")


#: Between two runs of the same float32 operators that may take other kernels.
ROUNDING = Rounding()


def assert_same(actual: Any, expected: Any, about: str = "", *, rounding: Rounding | None = None) -> None:
    """Both are the same in structure, types, dtypes, shapes, strides and every element: bit for bit, or within
    ``rounding``. The host waits for both."""
    found = differences(actual, expected, rounding=rounding)
    assert not found, "\n".join([about, *found]).strip()


class Fn(torch.nn.Module):
    """A function as a model."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


@torch.compiler.disable
def has_memory(x: torch.Tensor) -> bool:
    """True. ``torch.export`` refuses a model that asks, Dynamo cuts its graph here, and no host waits for a device.

    A function that is disabled, as Dynamo of PyTorch 2.11 gives up a whole frame that branches on ``data_ptr()``.
    """
    return x.data_ptr() != 0


class Mlp(torch.nn.Module):
    """Matrix products: they use the stream's hidden workspace (cuBLAS'), the resource that captures must not share."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, width), torch.nn.Linear(width, width)
        )
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * (width**-0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Chain(torch.nn.Module):
    """Twenty small operators: a graph of these is what a captured graph is for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(10):
            x = torch.roll(x, i + 1, -1) * 0.9 + 0.1
        return x


class Keeps(torch.nn.Module):
    """Writes into its first input in place. What it returns: this input, what was there before, what is there now."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, kept: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        old = kept * 2
        kept.mul_(0.5).add_(self.mlp(x))
        return kept, old, kept[1:] + x[1:]


class Rig:
    """Streams, latches and inputs of one test on one kind of device. Every latch is opened at its end."""

    kind: str
    #: Classes whose methods a test may replace: events that the engine makes, and its captured graphs.
    event_class: Any
    graph_class: Any
    #: Whether contexts must be built before a latch closes: building one loads code or takes memory of the driver's,
    #: and that waits for held streams.
    builds_ahead = False
    #: So many small tensors take up all of a segment of PyTorch's allocator.
    small_blocks = 60

    def __init__(self) -> None:
        #: What the tests compile with, unless they say otherwise.
        self.defaults: dict[str, Any] = {}
        self.seam = get_device(self.kind)
        #: ``torch.cuda``, ``torch.sim``: what a program uses.
        self.module: Any = torch.get_device_module(self.kind)
        self._latches: list[Any] = []
        self._seed = 0

    def device(self, index: int = 0) -> torch.device:
        return torch.device(self.kind, index)

    def stream(self) -> Any:
        return self.seam.stream(0)

    def latch(self, *streams: Any) -> Any:
        latch = self.seam.latch()
        self._latches.append(latch)
        for stream in streams:
            latch.hold(stream)
        return latch

    def open_all(self) -> None:
        for latch in self._latches:
            latch.open()
        self.module.synchronize()

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, index: int = 0) -> torch.Tensor:
        """Values of order 1, none of them zero, different at every call; ready when this returns."""
        self._seed += 1
        x = self.draw(shape, self._seed, index)
        x = (x + 0.1 * x.sign()).to(dtype)
        self.module.synchronize(index)
        return x

    def poisoned(self, like: torch.Tensor, stream: Any) -> torch.Tensor:
        """An input that belongs to ``stream`` and holds NaN; ready when this returns."""
        with self.module.stream(stream):
            x = torch.full_like(like, float("nan"))
        self.module.synchronize()
        return x

    def load_kernels(self, engine: Any, x: torch.Tensor) -> torch.Tensor:
        """The engine's serial result. Run before a latch closes: loading a kernel waits for held streams."""
        torch.full_like(x, float("nan")).copy_(x)
        y = engine(x)
        torch.equal(y, y + 1)  # what tests do with results
        differences(y, y + 1)
        differences(y, y + 1, rounding=ROUNDING)
        self.module.synchronize()
        return y

    def comes_true(self, condition: Callable[[], bool]) -> bool:
        """Whether it does, as the device, threads of the driver and the allocator get on with what was dropped."""
        end = time.monotonic() + 30
        while not condition() and time.monotonic() < end:
            gc.collect()
            self.module.synchronize()
            self.seam.collect()
            torch.empty(1, device=self.device())  # PyTorch's allocator looks whether streams are done with its blocks
        return condition()

    @contextmanager
    def new_lanes(self) -> Iterator[None]:
        """Lanes that are new: what threads have allocated on one stays with it, and makes contexts on it larger."""
        seam: Any = self.seam
        aside = list(seam.lanes.drain())
        yield
        for lane in aside:
            seam.release_lane(lane)

    def series(self, engine: Any, *given: torch.Tensor, calls: int = 1) -> list[tuple[torch.Tensor, ...]]:
        """What ``calls`` calls in a row return of a model that writes into its first input, one after another; of
        tensors of their own. As :meth:`load_kernels`, run before a latch closes."""
        kept, *others = (x.clone() for x in given)
        results = []
        for i in range(calls):
            results.append(tuple(y.clone() for y in engine(kept, *(x * (i + 1) for x in others))))
        self.load_kernels(lambda x: x + 1, results[-1][-1])
        assert_same(results, [tuple(y.clone() for y in ys) for ys in results])
        return results

    def build_ahead(self, engine: Any, contexts: int) -> None:
        """Where they cannot be built behind a latch: build the contexts that calls are going to need there. Those that
        are there already were used on another stream: calls on new streams take new ones first."""
        if self.builds_ahead:
            engine.warm(contexts=engine.stats().contexts + contexts)

    # What devices spell differently.

    def draw(self, shape: tuple[int, ...], seed: int, index: int) -> torch.Tensor:
        """Uniform in [-1, 1)."""
        raise NotImplementedError

    def run_what_can(self) -> None:
        """Let the device get as far as latches allow, where it would not do so by itself."""

    @contextmanager
    def nothing_queued(self, stream: Any) -> Iterator[None]:
        """Asserts that the block queues no work on ``stream``, which was idle."""
        yield
        assert stream.query()

    def asks_nothing(self) -> AbstractContextManager[None]:
        """Asserts that in the block no host thread waits for the device, nor asks it whether it is done."""
        raise NotImplementedError

    def sparse(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as a sparse tensor, which no engine takes."""
        return x.to_sparse()

    def new_graph(self) -> Any:
        """A graph of the caller's, with ``replay()``."""
        raise NotImplementedError

    def capture(self, graph: Any, mode: str = "global") -> AbstractContextManager[Any]:
        """Capture what this thread queues into the caller's ``graph``."""
        raise NotImplementedError

    def fast_matmul(self, allowed: bool) -> None:
        """Set a flag that lets float32 products lose precision."""
        raise NotImplementedError


def on_threads(n: int, work: Any) -> None:
    """Run ``work(i)`` in ``n`` threads that start together; the first error is raised here."""
    barrier, errors = threading.Barrier(n), []

    def run(i: int) -> None:
        try:
            barrier.wait()
            work(i)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


def in_time(work: Callable[[], Any], seconds: float = 10) -> bool:
    """Run ``work`` in a thread; whether it ends within ``seconds``, so that a deadlock fails its test."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


Make = Callable[..., Any]


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    """Which runtime runs the calls."""
    return str(request.param)


@pytest.fixture(params=["native", pytest.param("python", marks=pytest.mark.slow)])
def reference_is_slow(request: pytest.FixtureRequest) -> str:
    """As :func:`runtime`, with the reference's calls in the slow tier: for models that are there beside plain ones."""
    return str(request.param)


@pytest.fixture
def compiled(rig: Rig, runtime: str) -> Iterator[Make]:
    """Compile an engine of ``runtime``; closed at the end of the test."""
    engines: list[Any] = []

    def make(model: torch.nn.Module, *inputs: torch.Tensor, **options: Any) -> Any:
        model = model.eval().requires_grad_(False).to(rig.kind, inputs[0].dtype)
        engine = anabranch.compile(model, list(inputs), runtime=runtime, **{**rig.defaults, **options})
        assert engine.runtime == runtime
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


#: The two ways in which a call outside a capture can run.
PATHS = pytest.mark.parametrize("graphs", [True, False], ids=["graph", "direct"])


def assert_changed_flags_queue_nothing(rig: Rig, engine: Any, x: torch.Tensor) -> None:
    """A call under another flag than at compile raises before anything is queued; set back, the engine is as it was."""
    expected = rig.load_kernels(engine, x)
    before = engine.stats()
    s = rig.stream()
    try:
        rig.fast_matmul(True)
        with rig.module.stream(s), rig.nothing_queued(s):
            x.new_empty(4)  # of which a trace tells; it queues nothing
            with pytest.raises(anabranch.FlagsChanged, match="matmul"):
                engine(x)
    finally:
        rig.fast_matmul(False)
    assert engine.stats() == before
    assert_same(engine(x), expected)
