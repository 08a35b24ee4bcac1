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
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from anabranch._judge import Pair, numbers, pair, relative_error, sharing, tensors, unequal, wrong
from anabranch.bench._host import memory_mb
from anabranch.bench._statistics import percentile
from anabranch.bench._system import Call, NotReady, Ready, Subject, System
from anabranch.bench._threads import Threads
from anabranch.bench._work import Work
from anabranch.check import float32_exactly
from anabranch.errors import CannotJudge

#: Inputs in turn; two calls in flight on neighbouring threads never have the same one.
INPUTS = 8
#: As few as that takes, where one has more elements than this: each has a reference beside it.
_FEW_INPUTS, _LARGE = 3, 10_000_000
#: A serial output this far from float32 eager (relative to its largest magnitude) is wrong, unless eager PyTorch in
#: the same dtype is itself off by a quarter of that or more: some networks amplify rounding. Integers and booleans are
#: as one of the two, or wrong; NaN and infinities are where float32 eager has them.
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
        #: Memory that later calls read.
        self.held = {x.untyped_storage().data_ptr() for x in (*self.inputs, *model.parameters(), *model.buffers())}
        self.ready: Ready | None = None
        self.streams: list[Any] = []
        self.threads = Threads()
        #: What the system's own serial call returned for each input.
        self.references: list[Any] = []
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
                    self.references.append(_cloned(call(x)))
                    self._sync(0)
            error = self._error()
            if self.system.family == "ours" and self._unlike_eager(first):
                error = math.inf
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
        """Largest error of the serial outputs against float32 eager, relative to the largest magnitude there; infinite
        where no bound could accept one.

        Raises :class:`~anabranch.errors.CannotJudge` where right could not be told from wrong."""
        worst = rounding = 0.0
        reference = self._float32.to(self.device)
        # One run an input does not repay a search for the fastest algorithm.
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False)
        with flags, float32_exactly(), torch.no_grad():
            for x, y in zip(self.inputs, self.references, strict=True):
                wide, eager = reference(x.float()), self.subject.model(x)
                if self._form(y, eager):
                    worst = math.inf
                    continue
                wides = tensors(wide)
                for i, (actual, plain) in enumerate(zip(tensors(y), tensors(eager), strict=True)):
                    # Where a shape depends on data there may be no counterpart.
                    expected = wides[i] if len(wides) > i and wides[i].shape == plain.shape else plain
                    if numbers(actual).is_floating_point():
                        worst = max(worst, float(relative_error(actual, expected)))
                        off = float(relative_error(plain, expected))
                        rounding = max(rounding, off) if self.dtype is not torch.float32 and off < 1 else rounding
                    elif bool((unequal(actual, plain) & unequal(actual, expected.to(actual.dtype))).any()):
                        worst = math.inf
        self.allowed = max(self.allowed, 4 * rounding)
        self._can_judge()
        del reference
        self._float32 = None  # type: ignore[assignment]
        if self.cuda:
            torch.cuda.empty_cache()
        return worst

    def _form(self, y: Any, expected: Any) -> list[str]:
        """What differs but for elements and strides: of other systems in the tensors only, of ours in everything.

        Other systems are called through wrappers that may flatten a nest."""
        if self.system.family != "ours":
            y, expected = tensors(y), tensors(expected)
        return pair(y, expected, strides=False)[0]

    def _unlike_eager(self, y: Any) -> list[str]:
        """How the result for the first input differs from eager's in types, layout and shared memory."""
        x = self.inputs[0]
        found, pairs = pair(y, self.subject.model(x))
        held = [x, *self.subject.model.parameters(), *self.subject.model.buffers()]
        found = found or sharing(pairs, held, held)
        for line in found:
            print(f"unlike eager: {line}", flush=True)
        return found

    def _can_judge(self) -> None:
        """Two outputs that are nearer to each other than what passes as close could be exchanged unnoticed."""
        varied = False
        for i, y in enumerate(self.references):
            other = self.references[(i + 1) % len(self.inputs)]
            found, pairs = pair(tensors(y), tensors(other), strides=False)
            varied |= bool(found)
            for p in pairs:
                if not bool(unequal(p.actual, p.expected).any()):
                    continue
                if numbers(p.actual).is_floating_point():
                    apart = min(
                        float(relative_error(p.actual, p.expected)), float(relative_error(p.expected, p.actual))
                    )
                    varied |= apart > 0
                    self.close = min(self.close, apart / 4) if apart > 0 else self.close
                else:
                    varied = True
        if not varied:
            nan = all(bool(numbers(x).isnan().all()) for y in self.references for x in tensors(y))
            what = "NaN everywhere" if nan else "the same for every input"
            raise CannotJudge(
                f"its outputs are {what}, so that a wrong one could not be told; give another work or shape"
            )

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
        self.threads.grow(streams)
        while self.warmed < streams and time.monotonic() < end:
            # One after the other: whatever is set up at a thread's or an engine's first call must not meet a capture.
            i = self.warmed
            start = time.monotonic()
            self.threads.each([i], lambda i: self._loop(i, calls[i], 2))
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
                return self.threads.each(everyone, lambda i: self._loop(i, calls[i], n))

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

            self.threads.each(everyone, functools.partial(judge, n=1))
            self.threads.each(everyone, functools.partial(judge, n=many))
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

    def _judge(self, y: Any, k: int, tally: torch.Tensor) -> None:
        """Count on the current stream, without the host: wrong, right but for rounding, all zero. Then poison."""
        expected = self.references[k]
        if self._form(y, expected):
            tally[0] += 1
            return
        outputs = [Pair("", a, e) for a, e in zip(tensors(y), tensors(expected), strict=True) if a.numel()]
        if outputs:
            bad = torch.stack([wrong(p.actual, p.expected, self.close).any() for p in outputs]).any()
            other = torch.stack([unequal(p.actual, p.expected).any() for p in outputs]).any()
            zeros = torch.stack([_lost(p) for p in outputs]).any()
            tally += torch.stack([bad, other & ~bad, bad & zeros])
        with torch.inference_mode():
            for p in outputs:
                # Not what later calls read: an input or a parameter that was handed back.
                if p.actual.untyped_storage().data_ptr() not in self.held:
                    _poison(p.actual)

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


def _cloned(value: Any) -> Any:
    """The same nest with tensors of its own: a later call may write to what was returned."""
    return pytree.tree_map_only(torch.Tensor, lambda x: x.clone(), value)


def _lost(p: Pair) -> torch.Tensor:
    """Whether nothing but zeros came where something else was expected."""
    y, e = numbers(p.actual), numbers(p.expected)
    return ~(y != 0).any() & (e != 0).any()


def _poison(x: torch.Tensor) -> None:
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        return  # one element for many cannot be written
    if x.dtype is torch.bool:
        x.logical_not_()
    else:
        x.fill_(math.nan if x.is_floating_point() or x.is_complex() else torch.iinfo(x.dtype).max)
