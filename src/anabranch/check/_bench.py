"""The bench: one case, set up, whose calls are made in rounds along a path.

Each round prepares inputs and their serial results, holds every stream with a latch, queues the round's calls and their
verification behind it, opens the latch and reads the counts. So calls really are in flight together, and an input is
really written after the call on it was issued: a call that does not wait for its stream reads poison.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from anabranch._judge import pair, sharing
from anabranch.check._boundary import Boundary, boundary
from anabranch.check._case import Case, Subject
from anabranch.check._device import find_device
from anabranch.check._eager import Eager
from anabranch.check._inject import StaleStream
from anabranch.check._row import Row, tolerance
from anabranch.check._verdict import Serial, form, verdict
from anabranch.runtime import Engine, compile

#: Bytes of inputs, results and references that one round may hold.
_ROUND_BYTES = 4 << 30
#: Seconds after which calls that are still being queued are taken to be stuck behind the latch, and it is opened.
_PATIENCE = 60.0


@dataclass(frozen=True)
class Options:
    """How to check; see ``anabranch check --help``."""

    device: str = "cpu"
    streams: int = 8
    threads: int = 8
    calls: int = 100
    backend: str | None = None
    runtime: str = "auto"
    inject: str | None = None
    max_contexts: int = 16
    cuda_graphs: bool | None = None
    #: Check kernels that are compiled for all sizes of the input.
    dynamic: bool = False
    paths: tuple[str, ...] = ()
    #: Compare each serial result (1), or each n-th of a round, with float32 eager.
    reference_every: int = 1
    timed: bool = True
    #: Compare serial results with eager at special values of the input, too: NaN, infinities, zeros of both signs.
    boundary: bool = False
    #: On the simulated device: which of the possible interleavings.
    seed: int = 0


class Bench:
    """One case, set up: the engine, float32 eager, the streams.

    ``options.streams`` and ``options.threads`` are what is there; :meth:`run` may use fewer of them.
    """

    def __init__(
        self,
        subject: Subject,
        case: Case,
        options: Options,
        workers: concurrent.futures.ThreadPoolExecutor,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.case, self.options, self.workers = case, options, workers
        #: Called whenever something is done, so that whoever waits knows that it goes on.
        self.beat = beat
        self.device = find_device(options.device)
        self.index = self.device.index(torch.device(options.device))
        self.torch_device = torch.device(options.device, self.index) if self.device.has_streams else torch.device("cpu")
        case.refuse_too_large(self.torch_device)
        self.eager = Eager(subject, case, self.torch_device)
        self.generator = torch.Generator(device=self.torch_device).manual_seed(2991)
        self.eager.check_repeatable(self._input(self._source()), self._synchronize)
        self.beat()
        self.engine: Engine = compile(
            self.eager.model,
            [case.empty(self.torch_device)],
            backend=options.backend,
            runtime=options.runtime,
            max_contexts=options.max_contexts,
            cuda_graphs=options.cuda_graphs,
            dynamic=options.dynamic,
        )
        self.call: Callable[..., Any] = StaleStream(self.engine) if options.inject else self.engine
        count = options.streams if self.device.has_streams else 0
        self._all_streams = [self.device.stream(self.index) for _ in range(count)]
        self.streams, self.threads = self._all_streams, options.threads
        self.engine.warm(contexts=min(options.max_contexts, options.streams))
        #: Shares memory with nothing.
        self._nothing = torch.empty(1, device=self.torch_device)
        #: Whether calls can be made while their streams are held: not where the host waits for them in each call.
        self.holds = self.device.has_streams and not self._waits()

    def _waits(self) -> bool:
        """Whether the host waits for the device in each call: then a call on a held stream would never return."""
        if self.engine.plan.reason.startswith("data-dependent"):
            return True
        if self.device.kind != "sim":
            return False
        import anabranch.sim

        x = self._input(self._source())
        self._synchronize()
        self.engine(x)
        before = anabranch.sim.core.asked()
        self.engine(x)
        asked: bool = anabranch.sim.core.asked() != before
        self._synchronize()
        return asked

    def _synchronize(self) -> None:
        if self.device.has_streams:
            self.device.current_stream(self.index).synchronize()

    def close(self) -> None:
        self.engine.close()

    # -- rounds -------------------------------------------------------------------------------------------------

    def run(
        self, path: str, progress: Callable[[int], None], streams: int | None = None, threads: int | None = None
    ) -> Row:
        """Check along ``path`` with the first ``streams`` streams and ``threads`` threads (default: all)."""
        self.streams = self._all_streams[:streams]
        self.threads = self.options.threads if threads is None else threads
        row = Row(path, self.case.dtype_name, self.case.shape_name, tolerance=tolerance(self.case.dtype))
        plan = self.engine.plan
        row.mode = f"{plan.backend}, {'captured' if plan.captured else 'direct'}"
        if self.device.has_streams and not self.holds:
            row.mode += "; the host waits in each call, so that streams are not held"
        run_round = self._round if self.device.has_streams else self._round_cpu
        size = self._round_size(path)
        if self.device.has_streams and self.device.kind != "sim":
            # Whatever would wait for a held stream (loading kernels, a thread's library handles) happens here, once.
            run_round(Row(path, "", ""), path, size, hold=False)
        while row.calls < self.options.calls:
            n = min(size, self.options.calls - row.calls)
            run_round(row, path, n, hold=self.holds)
            progress(n)
        row.us_a_call = self._time(path) if self.options.timed and self.device.kind != "sim" else 0.0
        return row

    def _round_size(self, path: str) -> int:
        """Calls a round: a few a stream, as queues are finite and a host that fills one waits for the latch."""
        plan = self.engine.plan
        outputs = max(1, sum(b.kind == "output" for b in plan.buffers))
        launches = 12 + 24 * outputs + 2 * (3 if plan.captured else sum(s.kind != "view" for s in plan.steps) + 40)
        per_stream = max(1, min(4, 700 // launches))
        streams = {"main": 1, "fresh": 16, "rotate": len(self.streams), "threads": len(self.streams)}[path]
        wanted = per_stream * max(streams, 1) if self.device.has_streams else 4 * self.threads
        by_memory = _ROUND_BYTES // max(1, 8 * self.case.nbytes)
        return max(min(wanted, by_memory), streams if self.device.has_streams else self.threads, 1)

    def _source(self) -> torch.Tensor:
        """A new input: values of order 1 and of both signs, none of them zero; integers and booleans are 0 or 1."""
        dtype = self.case.dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            x = torch.empty(self.case.shape, dtype=torch.float32, device=self.torch_device)
            return (x.uniform_(-1, 1, generator=self.generator) > 0).to(dtype)
        x = torch.empty((*self.case.shape, 1 + dtype.is_complex), dtype=torch.float32, device=self.torch_device)
        x.uniform_(-1, 1, generator=self.generator)
        x = x + 0.1 * x.sign()
        return (torch.view_as_complex(x) if dtype.is_complex else x[..., 0]).to(dtype)

    def _input(self, source: torch.Tensor) -> torch.Tensor:
        return self.case.empty(self.torch_device).copy_(source)

    def _serial(self, row: Row, n: int) -> list[Serial]:
        """The engine's own results when nothing else runs; these are compared with eager."""
        made: list[Serial] = []
        for i in range(n):
            source = self._source()
            x = self._input(source)
            if not self.device.has_streams:
                source = self._nothing  # calls there are made with the same input again
            one = Serial(source, x, self.engine(x))
            self._synchronize()
            if i % self.options.reference_every == 0:
                self.eager.compare(row, x, one.result)
                self._synchronize()
            if self.device.has_streams and not sharing(pair(one.result, one.result)[1], [x], [self._nothing]):
                one = Serial(source, self._nothing, one.result)  # the input is not needed any more
            made.append(one)
            self.beat()
        return made

    def boundary(self) -> Boundary:
        """Compare serial results with eager where the input has special values."""

        def synchronize() -> None:
            self._synchronize()
            self.beat()

        return boundary(self.engine, self.eager.call, self.eager.reference, self._input(self._source()), synchronize)

    def _round(self, row: Row, path: str, n: int, hold: bool) -> None:
        """Queue ``n`` calls behind a latch along ``path``, let go, count."""
        device, index = self.device, self.index
        serial = self._serial(row, n)
        streams = self._assign(path, n)
        inputs: list[Any] = []
        for stream in streams:
            with device.on_stream(stream):
                inputs.append(_poison(self.case.empty(self.torch_device)))
        outputs: list[Any] = [None] * n  # kept, as a caller keeps what it goes on using
        verdicts = torch.zeros(n, 3, dtype=torch.int32, device=self.torch_device)
        later = torch.zeros(n, 3, dtype=torch.int32, device=self.torch_device)
        finished = [device.event() for _ in range(n)]
        found: list[str] = []
        for stream in (device.current_stream(index), *streams):
            stream.synchronize()

        latch = device.latch()
        if hold:
            for stream in {s.stream_id: s for s in streams}.values():
                latch.hold(stream)

        def one(i: int) -> None:
            with device.on_stream(streams[i]):
                x = inputs[i]
                inputs[i] = None
                x.copy_(serial[i].source)
                outputs[i] = self.call(x)
                found.extend(form(outputs[i], x, serial[i]))
                del x  # freed right after the call, as users do
                verdicts[i] = verdict(outputs[i], serial[i].result, self.torch_device)
                finished[i].record(streams[i])

        try:
            self._spread(path, n, one)
            if hold and path != "main":
                self._let_strays_run()
            in_flight = sum(not e.query() for e in finished) if hold else 0
        finally:
            latch.open()
        for event in finished:
            event.synchronize()
        self.beat()
        for i in range(n):  # again, now that all others are done: nobody may write to an output that was handed out
            later[i] = verdict(outputs[i], serial[i].result, self.torch_device)
        verdicts = verdicts.maximum(later)
        self._synchronize()
        row.in_flight = max(row.in_flight, in_flight)
        row.count(n, *verdicts.sum(0).tolist())
        row.problem(*found)

    def _let_strays_run(self) -> None:
        """Wait for the main stream, which nothing holds: a call that went there by mistake reads poison now.

        Else it would depend on luck which of the two runs first once the latch is open. At most a second: the main
        stream may share a hardware queue with a held one.
        """
        stream = self.device.current_stream(self.index)
        if self.device.kind == "sim":
            stream.synchronize()  # streams share nothing there, and there is no time
            return
        event = self.device.event()
        event.record(stream)
        end = time.monotonic() + 1.0
        while not event.query() and time.monotonic() < end:
            pass

    def _round_cpu(self, row: Row, path: str, n: int, hold: bool) -> None:
        """The same without streams: threads are held at a barrier, so that their calls start together."""
        serial = self._serial(row, n)
        inputs = [s.x for s in serial]
        outputs: list[Any] = [None] * n
        threads = 1 if path == "main" else self.threads
        lock = threading.Lock()
        inside = [0]

        def one(i: int) -> None:
            # The last batch may be smaller than the number of threads; a barrier of its own size holds it.
            batch = i // threads
            with lock:
                inside[0] += 1
                row.in_flight = max(row.in_flight, inside[0])
            try:
                barriers[batch].wait()
                outputs[i] = self.call(inputs[i])
            except BaseException:
                for barrier in barriers:
                    barrier.abort()  # or the other threads would wait for this one for ever
                raise
            finally:
                with lock:
                    inside[0] -= 1
            found = form(outputs[i], inputs[i], serial[i])
            with lock:
                row.problem(*found)

        barriers = [threading.Barrier(min(threads, n - b * threads)) for b in range(-(-n // threads))]
        self._spread(path, n, one)
        # Once all are done: nobody may write to an output that was handed out.
        for i in range(n):
            self.beat()
            row.count(1, *verdict(outputs[i], serial[i].result, self.torch_device).tolist())

    def _assign(self, path: str, n: int) -> list[Any]:
        """The stream of each call."""
        if path == "main":
            return [self.device.current_stream(self.index)] * n
        if path == "fresh":
            return [torch.get_device_module(self.torch_device).Stream(device=self.index) for _ in range(n)]
        return [self.streams[i % len(self.streams)] for i in range(n)]

    def _spread(self, path: str, n: int, one: Callable[[int], None]) -> None:
        """Run ``one(i)`` for each call: in this thread, or call ``i`` in worker ``i % threads``."""
        if path != "threads":
            for i in range(n):
                one(i)
            return

        workers = min(self.threads, n)

        def work(worker: int) -> None:
            # Modes are thread-local, like the current stream.
            with torch.no_grad(), self.device.on_device(self.index):
                if ready is not None:
                    ready.wait()
                for i in range(worker, n, workers):
                    one(i)

        ready: threading.Barrier | None = None
        if self.device.kind == "sim":
            on_threads(workers, work)
            return
        ready = threading.Barrier(workers)  # so that each runs in a thread of its own
        futures = [self.workers.submit(work, w) for w in range(workers)]
        _, pending = concurrent.futures.wait(futures, timeout=_PATIENCE)
        if pending and self.device.has_streams:
            raise RuntimeError(
                f"calls did not return within {_PATIENCE:.0f} s while their streams were held; a call must not wait for"
                " the device"
            )
        errors = [e for future in futures if (e := future.exception()) is not None]
        # Threads that waited for the one that failed say nothing about why.
        for raised in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise raised

    # -- timing -------------------------------------------------------------------------------------------------

    def _time(self, path: str) -> float:
        """Microseconds a call along ``path`` when nothing is held or verified: wall time over calls."""
        n = max(self.threads, min(self.options.calls, 200))
        streams = self._assign(path, n) if self.device.has_streams else [None] * n
        x = self._input(self._source())

        def one(i: int) -> None:
            stream = streams[i]
            with self.device.on_stream(stream) if stream is not None else nullcontext():
                self.call(x)

        def synchronize() -> None:
            for stream in {id(s): s for s in streams if s is not None}.values():
                stream.synchronize()

        if self.device.has_streams:
            self.device.current_stream(self.index).synchronize()
        self._spread(path, min(n, 2 * self.threads), one)
        synchronize()
        start = time.perf_counter()
        self._spread(path, n, one)
        synchronize()
        return (time.perf_counter() - start) / n * 1e6


def on_threads(n: int, work: Callable[[int], None]) -> None:
    """Run ``work(i)`` in ``n`` new threads; the first error is raised here."""
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _poison(x: torch.Tensor) -> torch.Tensor:
    """NaN, or the largest value of an integer type."""
    if x.dtype is torch.bool:
        return x.fill_(True)
    return x.fill_(float("nan") if x.is_floating_point() or x.is_complex() else torch.iinfo(x.dtype).max)
