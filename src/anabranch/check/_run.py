"""Runs the cases along four paths and counts what went wrong.

Each round prepares inputs and their serial results, holds every stream with a latch, queues the round's calls and their
verification behind it, opens the latch and reads the counts. So calls really are in flight together, and an input is
really written after the call on it was issued: a call that does not wait for its stream reads poison.
"""

from __future__ import annotations

import concurrent.futures
import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from anabranch.check._case import Case, Subject
from anabranch.check._inject import StaleStream
from anabranch.check._watch import Watch, interleaved
from anabranch.devices import get_device
from anabranch.errors import InputError
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
    paths: tuple[str, ...] = ()
    #: Compare each serial result (1), or each n-th of a round, with float32 eager.
    reference_every: int = 1
    timed: bool = True
    #: On the simulated device: which of the possible interleavings.
    seed: int = 0


@dataclass
class Row:
    """The result of one path for one case. ``max_error`` is relative to the largest magnitude of float32 eager's."""

    path: str
    dtype: str
    shape: str
    calls: int = 0
    in_flight: int = 0
    wrong: int = 0
    all_zero: int = 0
    non_finite: int = 0
    max_error: float = 0.0
    tolerance: float = 0.0
    us_a_call: float = 0.0
    mode: str = ""
    #: Findings of the race checker at different places, and the first of them in words; on the simulated device.
    races: int = 0
    report: str = ""

    @property
    def ok(self) -> bool:
        findings = self.wrong or self.all_zero or self.non_finite or self.races
        return not findings and self.max_error <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def tolerance(dtype: torch.dtype) -> float:
    """Largest accepted error of a serial result against float32 eager: 16 units in the last place, at least 1e-5."""
    return max(16 * torch.finfo(dtype).eps, 1e-5)


def paths_for(device: str) -> tuple[str, ...]:
    """``main``: the main stream; ``fresh``: a new custom stream for each call; ``rotate``: one thread, all streams in
    turn; ``threads``: each thread on streams of its own."""
    return ("main", "fresh", "rotate", "threads") if get_device(device).has_streams else ("main", "threads")


@contextmanager
def float32_exactly() -> Iterator[None]:
    """TF32 and the like off, so that float32 eager is a reference."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def run_check(
    subject: Subject,
    cases: Sequence[Case],
    options: Options,
    progress: Callable[[Row | None, int], None] = lambda row, calls: None,
) -> list[Row]:
    """Check every case along every path. ``progress(row, calls)`` hears of finished calls, and of finished rows."""
    device = get_device(options.device)
    if options.inject and not device.has_streams:
        raise InputError(
            f"--inject {options.inject} needs streams, and device {options.device!r} has none; use --device cuda"
        )
    paths = options.paths or paths_for(options.device)
    rows = []
    with float32_exactly(), torch.no_grad(), interleaved(options.device, options.seed):
        with concurrent.futures.ThreadPoolExecutor(options.threads, "anabranch-check") as workers:
            for case in cases:
                bench = Bench(subject, case, options, workers)
                for path in paths:
                    with Watch(options.device) as watch:
                        row = bench.run(path, lambda n: progress(None, n))
                    row.races, row.report = watch.races, watch.report
                    rows.append(row)
                    progress(row, 0)
                bench.close()
    return rows


class Bench:
    """One case, set up: the engine, float32 eager, the streams.

    ``options.streams`` and ``options.threads`` are what is there; :meth:`run` may use fewer of them.
    """

    def __init__(
        self, subject: Subject, case: Case, options: Options, workers: concurrent.futures.ThreadPoolExecutor
    ) -> None:
        self.case, self.options, self.workers = case, options, workers
        self.device = get_device(options.device)
        self.index = self.device.index(torch.device(options.device))
        self.torch_device = torch.device(options.device, self.index) if self.device.has_streams else torch.device("cpu")
        model = subject.make()
        if isinstance(model, torch.nn.Module):
            model = model.to(self.torch_device, case.dtype)
            self.reference: Callable[..., Any] = copy.deepcopy(model).float()
        else:
            module = model.module()
            self.reference = lambda x: module(x.to(case.dtype))
        self.generator = torch.Generator(device=self.torch_device).manual_seed(2991)
        self.engine: Engine = compile(
            model,
            [case.empty(self.torch_device)],
            backend=options.backend,
            runtime=options.runtime,
            max_contexts=options.max_contexts,
            cuda_graphs=options.cuda_graphs,
        )
        self.call: Callable[..., Any] = StaleStream(self.engine) if options.inject else self.engine
        count = options.streams if self.device.has_streams else 0
        self._all_streams = [self.device.stream(self.index) for _ in range(count)]
        self.streams, self.threads = self._all_streams, options.threads
        self.engine.warm(contexts=min(options.max_contexts, options.streams))

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
        run_round = self._round if self.device.has_streams else self._round_cpu
        size = self._round_size(path)
        if self.device.has_streams and self.device.kind != "sim":
            # Whatever would wait for a held stream (loading kernels, a thread's library handles) happens here, once.
            run_round(Row(path, "", ""), path, size, hold=False)
        while row.calls < self.options.calls:
            n = min(size, self.options.calls - row.calls)
            run_round(row, path, n, hold=True)
            progress(n)
        row.us_a_call = self._time(path) if self.options.timed and self.device.kind != "sim" else 0.0
        return row

    def _round_size(self, path: str) -> int:
        """Calls a round: a few a stream, as queues are finite and a host that fills one waits for the latch."""
        plan = self.engine.plan
        launches = 24 + 2 * (3 if plan.captured else sum(s.kind != "view" for s in plan.steps) + 40)
        per_stream = max(1, min(4, 700 // launches))
        streams = {"main": 1, "fresh": 16, "rotate": len(self.streams), "threads": len(self.streams)}[path]
        wanted = per_stream * max(streams, 1) if self.device.has_streams else 4 * self.threads
        by_memory = _ROUND_BYTES // max(1, 8 * self.case.nbytes)
        return max(min(wanted, by_memory), streams if self.device.has_streams else self.threads, 1)

    def _source(self) -> torch.Tensor:
        """A new input: values of order 1 and of both signs, none of them zero."""
        x = torch.empty(self.case.shape, dtype=torch.float32, device=self.torch_device)
        x.uniform_(-1, 1, generator=self.generator)
        return (x + 0.1 * x.sign()).to(self.case.dtype)

    def _input(self, source: torch.Tensor) -> torch.Tensor:
        return self.case.empty(self.torch_device).copy_(source)

    def _serial(self, row: Row, n: int) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """Inputs, and the engine's own results when nothing else runs; these are compared with float32 eager."""
        sources: list[torch.Tensor] = []
        references: list[list[torch.Tensor]] = []
        for _ in range(n):
            source = self._source()
            result = _tensors(self.engine(self._input(source)))
            if self.device.has_streams:
                self.device.current_stream(self.index).synchronize()
            if len(sources) % self.options.reference_every == 0:
                expected = _tensors(self.reference(source.float()))
                for y, e in zip(result, expected, strict=True):
                    row.max_error = max(row.max_error, _error(y, e))
            sources.append(source)
            references.append(result)
        return sources, references

    def _round(self, row: Row, path: str, n: int, hold: bool) -> None:
        """Queue ``n`` calls behind a latch along ``path``, let go, count."""
        device, index = self.device, self.index
        sources, references = self._serial(row, n)
        streams = self._assign(path, n)
        inputs: list[Any] = []
        for stream in streams:
            with device.on_stream(stream):
                inputs.append(_poison(self.case.empty(self.torch_device)))
        outputs: list[Any] = [None] * n  # kept, as a caller keeps what it goes on using
        verdicts = torch.zeros(n, 3, dtype=torch.int32, device=self.torch_device)
        finished = [device.event() for _ in range(n)]
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
                x.copy_(sources[i])
                outputs[i] = _tensors(self.call(x))
                del x  # freed right after the call, as users do
                verdicts[i] = _verdict(outputs[i], references[i])
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
        row.in_flight = max(row.in_flight, in_flight)
        wrong, all_zero, non_finite = verdicts.sum(0).tolist()
        row.calls += n
        row.wrong += wrong
        row.all_zero += all_zero
        row.non_finite += non_finite

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
        sources, references = self._serial(row, n)
        inputs = [self._input(s) for s in sources]
        threads = 1 if path == "main" else self.threads
        lock = threading.Lock()
        inside = [0]

        def one(i: int) -> None:
            # The last batch may be smaller than the number of threads; a barrier of its own size holds it.
            batch = i // threads
            with lock:
                inside[0] += 1
                row.in_flight = max(row.in_flight, inside[0])
            barriers[batch].wait()
            try:
                results = _tensors(self.call(inputs[i]))
            finally:
                with lock:
                    inside[0] -= 1
            wrong, all_zero, non_finite = _verdict(results, references[i]).tolist()
            with lock:
                row.calls += 1
                row.wrong += wrong
                row.all_zero += all_zero
                row.non_finite += non_finite

        barriers = [threading.Barrier(min(threads, n - b * threads)) for b in range(-(-n // threads))]
        self._spread(path, n, one)

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
            raise RuntimeError(f"calls did not return within {_PATIENCE:.0f} s while their streams were held")
        for future in futures:
            future.result()

    # -- timing -------------------------------------------------------------------------------------------------

    def _time(self, path: str) -> float:
        """Microseconds a call along ``path`` when nothing is held or verified: wall time over calls."""
        n = max(self.threads, min(self.options.calls, 200))
        streams = self._assign(path, n) if self.device.has_streams else [None] * n
        x = self._input(self._source())

        def one(i: int) -> None:
            with self.device.on_stream(streams[i]):
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


def _tensors(value: Any) -> list[torch.Tensor]:
    from torch.utils import _pytree as pytree

    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def _poison(x: torch.Tensor) -> torch.Tensor:
    """NaN, or the largest value of an integer type."""
    return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(_BITS[x.element_size()]) if x.dtype is not torch.bool else x


def _verdict(results: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> torch.Tensor:
    """(wrong, all zero, non-finite) as 0 or 1, computed on the current stream without the host."""
    flags = []
    for y, r in zip(results, references, strict=True):
        if y.shape != r.shape or y.dtype != r.dtype:
            return torch.ones(3, dtype=torch.int32, device=y.device)
        wrong = (_bits(y) != _bits(r)).any()
        zero = (y == 0).all() & (r != 0).any()
        non_finite = (~torch.isfinite(y) & torch.isfinite(r)).any()
        flags.append(torch.stack([wrong, zero, non_finite]))
    return torch.stack(flags).any(0).to(torch.int32)


def _error(y: torch.Tensor, expected: torch.Tensor) -> float:
    if not y.numel() or not y.is_floating_point():
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float(((y.float() - expected).abs().max() / scale).item())
