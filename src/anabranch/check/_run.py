"""Runs the cases along four paths and counts what went wrong.

Each output is judged twice, both times by ``anabranch._judge``. The engine's serial result is compared with eager
PyTorch: structure, types, strides and shared memory with eager in the case's dtype, elements with eager in float32.
Then every concurrent result is compared with the engine's own serial one, bit for bit.

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
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from anabranch._exit import described
from anabranch._judge import (
    Pair,
    Rounding,
    describe,
    differences,
    error,
    identical,
    numbers,
    pair,
    sharing,
    tensors,
    unequal,
    wrong,
)
from anabranch.check._boundary import Boundary, boundary
from anabranch.check._case import Case, Subject
from anabranch.check._device import find_device
from anabranch.check._inject import StaleStream
from anabranch.check._watch import Watch, interleaved
from anabranch.errors import CannotJudge, InputError
from anabranch.runtime import Engine, compile

#: Bytes of inputs, results and references that one round may hold.
_ROUND_BYTES = 4 << 30
#: Seconds after which calls that are still being queued are taken to be stuck behind the latch, and it is opened.
_PATIENCE = 60.0
#: Lines that say what is wrong with a row.
_MOST_PROBLEMS = 8
#: The part of integers and booleans that may differ from float32 eager's as those of eager in the case's dtype do. An
#: example is the index of the larger of two numbers that the dtype cannot tell apart.
_MOVED = 0.25


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
    #: Compare serial results with eager at special values of the input, too: NaN, infinities, zeros of both signs.
    boundary: bool = False
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
    #: What is wrong, in words; each once.
    problems: list[str] = field(default_factory=list)
    #: Why right outputs say little: they were the same whatever the input was. Empty where they differed.
    silent: str = ""
    #: The largest error of eager itself in the case's dtype.
    eager_error: float = 0.0
    #: At the first row of a case: the special values that were tried, and what came of them.
    boundary: Boundary | None = None

    @property
    def ok(self) -> bool:
        findings = self.wrong or self.all_zero or self.non_finite or self.races or self.problems
        return not findings and self.max_error <= self.tolerance and not (self.boundary and self.boundary.wrong)

    @property
    def nan_only(self) -> bool:
        """Whether nothing can be said of these outputs, although they have elements."""
        return self.silent.startswith("NaN")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def problem(self, *lines: str) -> None:
        self.problems += [line for line in lines if line not in self.problems][: _MOST_PROBLEMS - len(self.problems)]


def tolerance(dtype: torch.dtype) -> float:
    """Largest accepted error of a serial result against float32 eager: 16 units in the last place, at least 1e-5."""
    return Rounding().of(dtype) or Rounding().floor


def paths_for(device: str) -> tuple[str, ...]:
    """``main``: the main stream; ``fresh``: a new custom stream for each call; ``rotate``: one thread, all streams in
    turn; ``threads``: each thread on streams of its own."""
    return ("main", "fresh", "rotate", "threads") if find_device(device).has_streams else ("main", "threads")


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
    device = find_device(options.device)
    if options.inject and not device.has_streams:
        raise InputError(
            f"--inject {options.inject} needs streams, and device {options.device!r} has none; use --device cuda"
        )
    paths = options.paths or paths_for(options.device)
    rows = []
    with float32_exactly(), torch.no_grad(), interleaved(options.device, options.seed):
        with concurrent.futures.ThreadPoolExecutor(options.threads, "anabranch-check") as workers:
            for case in cases:
                bench = Bench(subject, case, options, workers, lambda: progress(None, 0))
                for path in paths:
                    with Watch(options.device) as watch:
                        row = bench.run(path, lambda n: progress(None, n))
                    row.races, row.report = watch.races, watch.report
                    rows.append(row)
                    progress(row, 0)
                if options.boundary:
                    rows[-len(paths)].boundary = bench.boundary()
                for row in rows[-len(paths) :]:
                    row.silent = bench.silence()
                bench.close()
    return rows


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
        model = subject.make()
        if isinstance(model, torch.nn.Module):
            model = _CASTS[case.dtype](model).to(self.torch_device)
            #: Eager PyTorch in the case's dtype, and in float32.
            self.eager: Callable[..., Any] = model
            float32 = _float32(model, subject)
            self.reference: Callable[..., Any] = lambda x: float32(x.float())
            self.parameters = [*model.parameters(), *model.buffers()]
        else:
            self.eager = self.reference = model.module()
            self.parameters = []
        self.generator = torch.Generator(device=self.torch_device).manual_seed(2991)
        self._check_repeatable()
        self.beat()
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
        #: Shares memory with nothing.
        self._nothing = torch.empty(1, device=self.torch_device)
        #: The first result that was looked at, and whether another one differed from it.
        self._first: Any = None
        self._varied = False
        #: Integers and booleans that were compared with float32 eager, and that differ there but not from eager.
        self._integers = self._moved = 0
        #: Whether calls can be made while their streams are held: not where the host waits for them in each call.
        self.holds = self.device.has_streams and not self._waits()

    def _check_repeatable(self) -> None:
        """One input must have one result that can be compared, or nothing can be said of a concurrent result."""
        x = self._input(self._source())
        try:
            once, again = self.eager(x), self.eager(x)
            self._synchronize()
        except Exception as e:
            raise InputError(
                f"the model raises where it gets {self.case.dtype_name}{list(self.case.shape)}: {described(e)}."
                " Expected a model of one tensor that runs in eager PyTorch; give a --shape and a --dtype that it takes"
            ) from e
        if found := differences(again, once, rounding=Rounding()):
            raise CannotJudge(
                f"eager PyTorch gives two results for one input, so that no output can be compared: {found[0]}. Does"
                " the model draw random numbers, or keep state from call to call? Check it without."
            )

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

    def _serial(self, row: Row, n: int) -> list[_Serial]:
        """The engine's own results when nothing else runs; these are compared with eager."""
        made: list[_Serial] = []
        for i in range(n):
            source = self._source()
            x = self._input(source)
            if not self.device.has_streams:
                source = self._nothing  # calls there are made with the same input again
            one = _Serial(source, x, self.engine(x))
            self._synchronize()
            if i % self.options.reference_every == 0:
                self._compare_with_eager(row, one)
                self._synchronize()
            if self.device.has_streams and not sharing(pair(one.result, one.result)[1], [x], [self._nothing]):
                one = _Serial(source, self._nothing, one.result)  # the input is not needed any more
            made.append(one)
            self.beat()
        return made

    def _compare_with_eager(self, row: Row, one: _Serial) -> None:
        eager = self.eager(one.x)
        inputs = [one.x, *self.parameters]
        found, pairs = pair(one.result, eager, rounding=Rounding())
        row.problem(*(found or sharing(pairs, inputs, inputs)))
        told = {line.partition(" differs")[0] for line in row.problems}  # of each output once
        if self.case.dtype is torch.float32:
            wide: dict[str, torch.Tensor] = {}  # eager is the reference
        else:
            float32 = pair(one.result, self.reference(one.x), dtypes=False, strides=False)[1]
            wide = {p.name: p.expected for p in float32}
        for name, actual, expected in pairs:
            same = identical(actual, expected)
            if same and name not in wide:
                continue
            # What has no counterpart in float32 has a shape that depends on data.
            reference = wide.get(name, expected)
            if actual.is_floating_point() or actual.is_complex():
                off = error(actual, reference)
                if off > row.tolerance and name not in told:
                    row.problem(describe(Pair(name, actual, reference), wrong(actual, reference, row.tolerance)))
                row.max_error = max(row.max_error, off)
                row.eager_error = max(row.eager_error, off if same else error(expected, reference))
                continue
            differs = unequal(actual, reference)
            bad = int((differs & unequal(actual, expected)).sum())
            if bad:
                row.problem(f"{name} ({_name(actual.dtype)}) differs from eager in {bad} of {actual.numel()} elements")
            # A number that was rounded to an integer differs by little.
            moved = differs & _far(actual, reference, row.tolerance)
            self._integers += actual.numel()
            self._moved += max(0, int(moved.sum()) - bad)
            if self._moved > max(1.0, _MOVED * self._integers):
                row.problem(
                    f"{name} ({_name(actual.dtype)}) is as eager {self.case.dtype_name}'s, but far from float32"
                    f" eager's in {self._moved} of {self._integers} elements: more than rounding moves"
                )
        if not self._varied:
            if self._first is None:
                self._first = one.result
            elif _vary(self._first, one.result):
                self._varied, self._first = True, ()

    def silence(self) -> str:
        """Why the outputs of this case say little; empty where they say something."""
        if self._varied:
            return ""
        seen = [x for x in tensors(self._first) if x.numel()]
        if not seen:
            return "the model returns no tensor" if not tensors(self._first) else "its outputs have no elements"
        floats = [x for x in seen if x.is_floating_point() or x.is_complex()]
        if len(floats) == len(seen) and all(bool(x.isnan().all()) for x in floats):
            return "NaN is every element of every output, in eager, too"
        return "its outputs were the same for every input, so that nobody would see calls that are mixed up"

    def boundary(self) -> Boundary:
        """Compare serial results with eager where the input has special values."""

        def synchronize() -> None:
            self._synchronize()
            self.beat()

        return boundary(self.engine, self.eager, self.reference, self._input(self._source()), synchronize)

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
                found.extend(_form(outputs[i], x, serial[i]))
                del x  # freed right after the call, as users do
                verdicts[i] = _verdict(outputs[i], serial[i].result, self.torch_device)
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
            later[i] = _verdict(outputs[i], serial[i].result, self.torch_device)
        verdicts = verdicts.maximum(later)
        self._synchronize()
        row.in_flight = max(row.in_flight, in_flight)
        bad, all_zero, non_finite = verdicts.sum(0).tolist()
        row.calls += n
        row.wrong += bad
        row.all_zero += all_zero
        row.non_finite += non_finite
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
            found = _form(outputs[i], inputs[i], serial[i])
            with lock:
                row.problem(*found)

        barriers = [threading.Barrier(min(threads, n - b * threads)) for b in range(-(-n // threads))]
        self._spread(path, n, one)
        # Once all are done: nobody may write to an output that was handed out.
        for i in range(n):
            self.beat()
            bad, all_zero, non_finite = _verdict(outputs[i], serial[i].result, self.torch_device).tolist()
            row.calls += 1
            row.wrong += bad
            row.all_zero += all_zero
            row.non_finite += non_finite

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


#: Not ``model.to(dtype)``, which takes complex parameters for floating ones, and drops their imaginary parts.
_CASTS: dict[torch.dtype, Callable[[torch.nn.Module], torch.nn.Module]] = {
    torch.float32: torch.nn.Module.float,
    torch.float16: torch.nn.Module.half,
    torch.bfloat16: torch.nn.Module.bfloat16,
    torch.float64: torch.nn.Module.double,
}


def _float32(model: torch.nn.Module, subject: Subject) -> torch.nn.Module:
    """The same model in float32."""
    try:
        return copy.deepcopy(model).float()
    except Exception:  # it holds what cannot be copied, a lock for example
        other: torch.nn.Module = subject.make().to(next(model.parameters(), torch.empty(0)).device)
        other.load_state_dict(model.state_dict())
        return other.float()


@dataclass(frozen=True)
class _Serial:
    """A call that was made when nothing else ran. ``x`` is its input, if it is needed later on."""

    source: torch.Tensor
    x: torch.Tensor
    result: Any


def _poison(x: torch.Tensor) -> torch.Tensor:
    """NaN, or the largest value of an integer type."""
    if x.dtype is torch.bool:
        return x.fill_(True)
    return x.fill_(float("nan") if x.is_floating_point() or x.is_complex() else torch.iinfo(x.dtype).max)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _form(result: Any, x: torch.Tensor, serial: _Serial) -> list[str]:
    """How a concurrent result differs from the serial one in all but its elements. The host does not wait."""
    found, pairs = pair(result, serial.result)
    return found or sharing(pairs, [x], [serial.x])


def _far(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> torch.Tensor:
    """Where integers are further from one another than rounding before they became integers puts them."""
    if actual.dtype is torch.bool or not actual.numel():
        return torch.ones_like(actual, dtype=torch.bool)
    a, e = actual.double(), expected.double()
    return (a - e).abs() > 1 + bound * e.abs().amax()


def _vary(first: Any, other: Any) -> bool:
    """Whether two results differ at all, but for the signs of zeros."""
    found, pairs = pair(first, other, strides=False)
    return bool(found) or any(
        not identical(p.actual, p.expected)
        and bool((unequal(p.actual, p.expected) & ((numbers(p.actual) != 0) | (numbers(p.expected) != 0))).any())
        for p in pairs
    )


def _verdict(result: Any, reference: Any, device: torch.device) -> torch.Tensor:
    """(wrong, all zero, non-finite) as 0 or 1, computed on the current stream without the host, of whose memory nothing
    may be copied: that would wait for the stream.

    Wrong is whatever has other bits, NaN's included: the same kernels ran on the same input."""
    found, pairs = pair(result, reference)
    none = torch.zeros((), dtype=torch.bool, device=device)
    flags = [torch.stack([~none if found else none, none, none])]
    for p in pairs:
        if p.actual.device == device:
            flags.append(_flags(p))
        else:  # an output on the CPU is there already
            flags.append(torch.stack([~none if flag else none for flag in _flags(p).tolist()]))
    return torch.stack(flags).any(0).to(torch.int32)


def _flags(p: Pair) -> torch.Tensor:
    if p.actual.device.type == "cpu" and identical(p.actual, p.expected):
        return torch.zeros(3, dtype=torch.bool)
    other = unequal(p.actual, p.expected, nan_bits=True).any()
    y, r = numbers(p.actual), numbers(p.expected)
    if not y.is_floating_point():
        none = torch.zeros_like(p.expected)
        zero = ~unequal(p.actual, none).any() & unequal(p.expected, none).any()
        return torch.stack([other, zero, torch.zeros_like(other)])
    return torch.stack([other, (y == 0).all() & (r != 0).any(), (~y.isfinite() & r.isfinite()).any()])
