"""Measures one built system on one work. Runs in the system's own process; nothing else runs meanwhile.

Two rules keep figures honest. What is timed is only the system's calls: as many are timed as fill the wanted time, and
the last output of each stream is compared. Then the same calls are made again with *every* output compared on the
device, on the stream it was made on, and overwritten with NaN afterwards, so that an output that nobody wrote shows.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import queue
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from anabranch.bench._statistics import percentile
from anabranch.bench._system import Call, NotReady, Ready, Subject, System
from anabranch.bench._work import Work
from anabranch.check import float32_exactly

#: Inputs in turn; two calls in flight on neighbouring threads never have the same one.
INPUTS = 8
#: As few as that takes, where one has more elements than this: each has a reference beside it.
_FEW_INPUTS, _LARGE = 3, 10_000_000
#: A serial output this far from float32 eager (relative to its largest magnitude) is wrong, unless eager PyTorch in
#: the same dtype is itself off by a quarter of that or more: some networks amplify rounding.
ALLOWED = {torch.float16: 0.05, torch.bfloat16: 0.2, torch.float32: 0.01}
#: A concurrent output this far from the system's own serial one is wrong. Nearer, but not the same bits, is "inexact":
#: peers may choose another algorithm in another thread, and do not promise bits.
CLOSE = {torch.float16: 0.016, torch.bfloat16: 0.128, torch.float32: 1e-4}
_MOST_SAMPLES = 2000
_MOST_CALLS = 20_000
#: Calls of each stream that are checked by default: as many as were timed, but no more than this.
_CHECKED_CALLS = 48


class Meter:
    """One system on one work. Made in the process's main thread, which is also thread 0 of every measurement."""

    def __init__(
        self, work: Work, system: System, device: str, dtype: torch.dtype, streams: int, deadline: float
    ) -> None:
        self.system, self.work = system, work
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self.cuda = device == "cuda"
        self.dtype = dtype
        if self.cuda:
            torch.backends.cudnn.benchmark = True
        layout = torch.contiguous_format
        if work.channels_last and self.cuda and not system.contiguous:
            layout = torch.channels_last
        self.layout = layout
        model = work.make()
        self._float32 = copy.deepcopy(model)
        model = model.to(self.device, dtype)
        if layout is torch.channels_last:
            model = model.to(memory_format=layout)  # type: ignore[call-overload]
        self.generator = torch.Generator(device="cpu").manual_seed(2991)
        few = math.prod(work.shape_on(self.device.type)) > _LARGE
        self.inputs = [self._input(i) for i in range(_FEW_INPUTS if few else INPUTS)]
        self.subject = Subject(work, model, self.inputs[0].clone(memory_format=layout), streams, deadline)
        self.ready: Ready | None = None
        self.streams: list[Any] = []
        self.threads: list[_Thread] = []
        self.references: list[torch.Tensor] = []
        self.scales: list[float] = []
        self.close = CLOSE[dtype]
        self.allowed = ALLOWED[dtype]
        #: Threads that have made their first calls, and how long the slowest of them took to.
        self.warmed = 0
        self.warm_seconds = 0.0

    def _input(self, i: int) -> torch.Tensor:
        x = torch.randn(self.work.shape_on(self.device.type), generator=self.generator)
        # Different magnitudes as well: networks with random weights map different noise to nearly the same output.
        x = x * (0.5 + 0.25 * i)
        x = x.to(self.device, self.dtype)
        return x.contiguous(memory_format=self.layout)

    # -- building -------------------------------------------------------------------------------------------------

    def build(self) -> dict[str, Any]:
        """Build, call once, and compare serial outputs with float32 eager."""
        start = time.perf_counter()
        with torch.no_grad():
            self.ready = self.system.build(self.subject)
            built = time.perf_counter()
            first = self.ready.call(self.inputs[0])
            self._synchronize()
            called = time.perf_counter()
            self.streams = [torch.cuda.Stream() if self.cuda else None for _ in range(1)]
            call = self.ready.slots(1)[0]
            with self._on(0):
                for x in self.inputs:
                    self.references.append(call(x).clone())
                    self._sync(0)
            error = self._error()
        del first
        return {
            "build_s": called - start,
            "first_call_ms": (called - built) * 1e3,
            "note": self.ready.note,
            "error": error,
            "allowed_error": self.allowed,
            "close": self.close,
        }

    def _error(self) -> float:
        """Largest error of the serial outputs against float32 eager, relative to the largest magnitude there."""
        worst = rounding = 0.0
        reference = self._float32.to(self.device)
        # One run an input does not repay a search for the fastest algorithm.
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False)
        with flags, float32_exactly(), torch.no_grad():
            for x, y in zip(self.inputs, self.references, strict=True):
                expected = reference(x.float())
                difference = (y.float() - expected).abs().max().item()
                scale = max(expected.abs().max().item(), 1e-12)
                worst = max(worst, difference / scale) if difference == difference else float("inf")
                if self.dtype is torch.float32:
                    continue
                plain = (self.subject.model(x).float() - expected).abs().max().item() / scale
                rounding = max(rounding, plain) if plain == plain else rounding
        self.allowed = max(self.allowed, 4 * rounding)
        self.scales = [max(y.abs().max().item(), 1e-12) for y in self.references]
        # Two outputs that are nearer to each other than what passes as close could be exchanged unnoticed.
        for i, y in enumerate(self.references):
            other = self.references[(i + 1) % len(self.inputs)]
            if y.shape == other.shape:
                apart = (y.float() - other.float()).abs().max().item() / max(
                    self.scales[i], self.scales[(i + 1) % len(self.inputs)]
                )
                self.close = min(self.close, apart / 4)
        del reference
        self._float32 = None  # type: ignore[assignment]
        if self.cuda:
            torch.cuda.empty_cache()
        return worst

    def warm(self, counts: Sequence[int], seconds: float) -> dict[str, Any]:
        """Each thread's first calls, for as many of ``counts`` as the system serves, while others are still built.

        They can take seconds a thread: cuDNN searches again in each. What does not fit into ``seconds`` is left.
        """
        end = time.monotonic() + seconds
        for n in sorted(counts, reverse=True):
            with contextlib.suppress(NotReady):
                self._warm(n, end)
                break
        return {"warmed": self.warmed}

    def _warm(self, streams: int, end: float = float("inf")) -> list[Call]:
        assert self.ready is not None
        with torch.no_grad():
            calls = self.ready.slots(streams)
        while len(self.streams) < streams:
            self.streams.append(torch.cuda.Stream() if self.cuda else None)
        while len(self.threads) < streams - 1:
            self.threads.append(_Thread(len(self.threads) + 1))
        while self.warmed < streams and time.monotonic() < end:
            # One after the other: whatever is set up at a thread's or an engine's first call must not meet a capture.
            i = self.warmed
            start = time.monotonic()
            self._each([i], lambda i: self._loop(i, calls[i], 2))
            self.warmed, self.warm_seconds = i + 1, max(self.warm_seconds, time.monotonic() - start)
        return calls

    # -- latency --------------------------------------------------------------------------------------------------

    def latency(self, seconds: float) -> dict[str, Any]:
        """One call at a time on one stream: microseconds until the output is there, and until the call returned.

        And what a copy of the input takes, many in a row: what a call that reads and writes as much could take at best.
        """
        assert self.ready is not None
        total: list[float] = []
        host: list[float] = []
        clock = time.perf_counter
        with torch.no_grad(), self._on(0):
            call = self.ready.slots(1)[0]
            for x in self.inputs[:2]:
                call(x)
            self._sync(0)
            end = clock() + seconds
            while (clock() < end or len(total) < 3) and len(total) < _MOST_SAMPLES:
                x = self.inputs[len(total) % len(self.inputs)]
                before = clock()
                y = call(x)
                returned = clock()
                self._sync(0)
                total.append((clock() - before) * 1e6)
                host.append((returned - before) * 1e6)
                kept = y  # until the next call has returned: what freeing a result takes is not that call's time
            del y, kept
            copies = max(3, min(_MOST_SAMPLES, int(0.2 * seconds / max(percentile(total, 0.5) * 1e-6, 1e-6))))
            for n in (3, copies):
                before = clock()
                for i in range(n):
                    x = self.inputs[i % len(self.inputs)].clone()
                self._sync(0)
                copy_us = (clock() - before) / n * 1e6
            del x
        return {
            "copy_us": copy_us,
            "p50_us": percentile(total, 0.5),
            "p99_us": percentile(total, 0.99),
            "host_us": percentile(host, 0.5),
            "calls": len(total),
        }

    # -- throughput -----------------------------------------------------------------------------------------------

    def throughput(
        self, streams: int, seconds: float, patience: float = float("inf"), checked: int | None = None
    ) -> dict[str, Any]:
        """Calls a second over ``streams`` streams with a thread each, and what every output was worth.

        ``checked``: how many calls of each stream are judged, whatever was timed. They end early where they take half
        of ``patience``: slow is not hung.
        """
        assert self.ready is not None
        if self.warmed > 1 and (streams - self.warmed) * self.warm_seconds > patience / 2:
            raise NotReady(f"{self.warmed} threads made their first calls in time")
        calls = self._warm(streams)
        everyone = list(range(streams))
        if self.ready.one_thread:
            launches = self.ready.launches(streams)

            def timed(n: int) -> float:
                return self._launch(launches, n)
        else:

            def timed(n: int) -> float:
                return self._each(everyone, lambda i: self._loop(i, calls[i], n))

        timed(1)
        wanted, trial = 1, timed(1)
        for share in (0.05, 0.2, 1.0):
            # One call is mostly start and end; longer trials, as far as there is time, tell how many fill it.
            now = min(_MOST_CALLS, max(2, int(share * seconds * wanted / max(trial, 1e-6))))
            if now > 2 and share < 1.0:
                trial = timed(now)
            wanted = now if share == 1.0 or now > 2 else wanted
        took = timed(wanted)
        # Before the judging, whose temporaries are not the system's.
        peak = memory_mb(self.cuda)
        tallies = [torch.zeros(3, dtype=torch.int64, device=self.device) for _ in everyone]
        judged: list[int] = []
        many = min(wanted, _CHECKED_CALLS) if checked is None else checked - 1
        if self.ready.one_thread:
            many += checked is not None
            self._launch_checked(calls, tallies, many)
            judged.append(many * streams)
        else:
            end = time.monotonic() + patience / 2

            def judge(i: int, n: int) -> None:
                judged.append(self._loop(i, calls[i], n, tallies[i], end))

            self._each(everyone, functools.partial(judge, n=1))
            self._each(everyone, functools.partial(judge, n=many))
        wrong, inexact, zero = torch.stack(tallies).sum(0).tolist()
        return {
            "per_s": wanted * streams / took,
            "calls": wanted * streams,
            "checked": sum(judged),
            "wrong": wrong,
            "inexact": inexact,
            "all_zero": zero,
            "peak_mb": peak,
        }

    def _loop(self, i: int, call: Call, n: int, tally: torch.Tensor | None = None, until: float = float("inf")) -> int:
        """``n`` calls on stream ``i``, by its thread; with ``tally`` every output is judged and poisoned, and nothing
        begun after ``until``. Returns how many calls there were."""
        done = 0
        with torch.no_grad(), self._on(i):
            for j in range(n):
                k = (i + j) % len(self.inputs)
                y = call(self.inputs[k])
                done += 1
                if tally is not None:
                    self._judge(y, k, tally)
                    if time.monotonic() > until:
                        break
            self._sync(i)
        return done

    def _launch(self, launches: Sequence[Callable[[], Any]], n: int) -> float:
        before = torch.cuda.current_stream()
        start = time.perf_counter()
        for _ in range(n):
            for i, launch in enumerate(launches):
                # Not the context manager, whose two switches cost more than a small graph's launch.
                torch.cuda.set_stream(self.streams[i])
                launch()
        torch.cuda.set_stream(before)
        for i in range(len(launches)):
            self._sync(i)
        return time.perf_counter() - start

    def _launch_checked(self, calls: Sequence[Call], tallies: Sequence[torch.Tensor], n: int) -> None:
        with torch.no_grad():
            for j in range(n):
                for i, call in enumerate(calls):
                    k = (i + j) % len(self.inputs)
                    with self._on(i):
                        self._judge(call(self.inputs[k]), k, tallies[i])
            for i in range(len(calls)):
                self._sync(i)

    def _judge(self, y: torch.Tensor, k: int, tally: torch.Tensor) -> None:
        """Count on the current stream, without the host: wrong, right but for rounding, all zero. Then poison."""
        expected = self.references[k]
        if y.shape != expected.shape or y.dtype != expected.dtype:
            tally[0] += 1
            return
        difference = (y.float() - expected.float()).abs().amax()
        wrong = ~(difference <= self.close * self.scales[k])  # so that NaN is wrong
        inexact = (difference > 0) & ~wrong
        zero = wrong & ~(y != 0).any()
        tally += torch.stack([wrong, inexact, zero])
        with torch.inference_mode():
            y.fill_(float("nan"))

    def _each(self, who: Sequence[int], work: Callable[[int], Any]) -> float:
        """``work(i)`` for each ``i``, in its thread, all starting together; seconds until the last one's end."""
        start = threading.Barrier(len(who))
        times: list[tuple[float, float]] = []
        errors: list[BaseException] = []

        def run(i: int) -> None:
            try:
                start.wait()
                before = time.perf_counter()
                work(i)
                times.append((before, time.perf_counter()))
            except BaseException as e:
                errors.append(e)

        for i in who:
            if i:
                self.threads[i - 1].start(functools.partial(run, i))
        if 0 in who:
            run(0)
        for i in who:
            if i:
                self.threads[i - 1].join()
        if errors:
            raise errors[0]
        return max(t[1] for t in times) - min(t[0] for t in times)

    # -- the device -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _on(self, i: int) -> Iterator[None]:
        if not self.cuda:
            yield
            return
        with torch.cuda.stream(self.streams[i]):
            yield

    def _sync(self, i: int) -> None:
        if self.cuda:
            self.streams[i].synchronize()

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class _Thread:
    """A thread that lives as long as the process: libraries keep what they set up for it."""

    def __init__(self, i: int) -> None:
        self.todo: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.cores = torch.get_num_threads()
        threading.Thread(target=self._run, name=f"bench-{i}", daemon=True).start()

    def _run(self) -> None:
        # A new thread would take as many cores as there are.
        torch.set_num_threads(self.cores)
        while True:
            self.todo.get()()
            self.done.put(None)

    def start(self, work: Callable[[], None]) -> None:
        self.todo.put(work)

    def join(self) -> None:
        self.done.get()


def memory_mb(cuda: bool) -> float:
    """Megabytes that this process holds: on the device as its driver counts, else PyTorch's peak, else peak RAM."""
    if cuda:
        with contextlib.suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            # By its name: the driver's numbers know nothing of CUDA_VISIBLE_DEVICES.
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid() and process.usedGpuMemory:
                    return float(process.usedGpuMemory) / 1e6
        return float(torch.cuda.max_memory_reserved()) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
