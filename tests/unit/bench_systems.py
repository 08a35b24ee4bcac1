"""Systems with known faults, for the benchmark's own tests."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from anabranch.bench import Subject, _worker

Call = Callable[[torch.Tensor], torch.Tensor]


def right(subject: Subject) -> Call:
    return subject.model


def small() -> torch.nn.Module:
    """A work beside the built-in ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torch.nn.Linear(4, 4)


def _first_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def zeros_on_one_thread(subject: Subject) -> Call:
    """Right on the first thread; on each other one nobody writes the output."""

    def call(x: torch.Tensor) -> torch.Tensor:
        y = subject.model(x)
        return y if _first_thread() else torch.zeros_like(y)

    return call


def stale(subject: Subject) -> Call:
    """Writes its one output buffer at the first calls only, as a run whose output copy was lost would."""
    buffers: list[torch.Tensor] = []
    count = [0]

    def call(x: torch.Tensor) -> torch.Tensor:
        y = subject.model(x)
        if not buffers:
            buffers.append(y.clone())
        count[0] += 1
        if count[0] < 40:
            buffers[0].copy_(y)
        return buffers[0]

    return call


def another_threads(subject: Subject) -> Call:
    """Returns the output of the call before, whoever made it."""
    last: list[torch.Tensor] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        y = subject.model(x)
        last.append(y.clone())
        return y if _first_thread() or len(last) < 2 else last[-2].clone()

    return call


def nearly(subject: Subject) -> Call:
    """Other bits on other threads, within rounding."""
    return lambda x: subject.model(x) if _first_thread() else subject.model(x) * (1 + 1e-6)


def off(subject: Subject) -> Call:
    """Wrong in every call, the same way."""
    return lambda x: subject.model(x) * 1.5


def aborts(subject: Subject) -> Call:
    def call(x: torch.Tensor) -> torch.Tensor:
        print("terminate called without an active exception", file=sys.stderr)
        os.abort()

    return call


def faults(subject: Subject) -> Call:
    return lambda x: torch.tensor(ctypes.string_at(0)[0])


def aborts_on_threads(subject: Subject) -> Call:
    def call(x: torch.Tensor) -> torch.Tensor:
        if not _first_thread():
            os.abort()
        return subject.model(x)

    return call


def aborts_on_relu_threads(subject: Subject) -> Call:
    """Fine, but for one work."""
    return aborts_on_threads(subject) if subject.work.name == "relu" else right(subject)


def hangs_on_threads(subject: Subject) -> Call:
    def call(x: torch.Tensor) -> torch.Tensor:
        if not _first_thread():
            time.sleep(1000)
        return subject.model(x)

    return call


def never_built(subject: Subject) -> Call:
    time.sleep(1000)
    return right(subject)


def refuses(subject: Subject) -> Call:
    raise RuntimeError("this model has\nan operator that nobody knows")


def refuses_threads(subject: Subject) -> Call:
    def call(x: torch.Tensor) -> torch.Tensor:
        if not _first_thread():
            raise ValueError("one thread only")
        return subject.model(x)

    return call


def late(subject: Subject) -> Call:
    """Takes too long, but only at the first try: its time is over at once."""
    if _once():
        signal.setitimer(signal.ITIMER_REAL, 0.01, 5.0)
        time.sleep(1000)
    return right(subject)


def swallows(subject: Subject) -> Call:
    """Never built, and as a library that calls back it swallows what is raised in it, once."""
    try:
        time.sleep(1000)
    except BaseException:
        time.sleep(1000)
    return right(subject)


def _once() -> bool:
    """Whether this is the first try of this system in this run."""
    marker = Path(f"{os.environ['TORCHINDUCTOR_CACHE_DIR']}-tried")
    first = not marker.exists()
    marker.touch()
    return first


def out_of_memory_at_first(subject: Subject) -> Call:
    if _once():
        raise RuntimeError("CUDA error: out of memory")
    return right(subject)


def out_of_memory(subject: Subject) -> Call:
    raise RuntimeError("CUDA error: out of memory")


def killed_at_first(subject: Subject) -> Call:
    """Ended as the kernel does it where a host has no memory left."""
    if _once():
        os.kill(os.getpid(), signal.SIGKILL)
    return right(subject)


def out_of_memory_at_the_first_latency(subject: Subject) -> Call:
    """Finds no memory at one call: the first after it was built and its outputs were looked at."""
    calls = [0]

    def call(x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 10:  # the first, eight inputs, and then this one
            raise RuntimeError("CUDA error: out of memory")
        return subject.model(x)

    return call


def _note(log: str, line: str) -> int:
    """Write a line beside the workers' logs; how many there are now."""
    order = Path(log).with_name("order")
    with order.open("a") as file:
        file.write(f"{line}\n")
    return len(order.read_text().splitlines())


def serve_and_log(connection: Connection, log: str, job: dict[str, Any]) -> None:
    """A worker that logs when it creates its context and when it builds."""
    start, meter = _worker._start, _worker._meter

    def logged_start(job: dict[str, Any]) -> float:
        _note(log, f"begin {job['system']}")
        held = start(job)
        _note(log, f"end {job['system']}")
        return held

    def logged_meter(job: dict[str, Any], command: dict[str, Any]) -> Any:
        _note(log, f"build {job['system']}")
        return meter(job, command)

    _worker._start, _worker._meter = logged_start, logged_meter
    _worker.serve(connection, log, job)


def serve_and_hang_once(connection: Connection, log: str, job: dict[str, Any]) -> None:
    """A worker whose first build never answers, where no signal of the process itself can end it."""
    meter = _worker._meter

    def hanging(job: dict[str, Any], command: dict[str, Any]) -> Any:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        if _note(log, "build") == 1:
            time.sleep(1000)
        return meter(job, command)

    _worker._meter = hanging
    _worker.serve(connection, log, job)


def serve_contexts_badly(connection: Connection, log: str, job: dict[str, Any]) -> None:
    """A run's first worker finds no memory for its context, its second does not answer, its third is killed."""
    count = _note(log, "start")

    def start(job: dict[str, Any]) -> float:
        if count == 1:
            raise RuntimeError("CUDA error: out of memory")
        if count == 2:
            time.sleep(1000)
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    _worker._start = start
    _worker.serve(connection, log, job)


def serve_no_context_to_eager(connection: Connection, log: str, job: dict[str, Any]) -> None:
    def start(job: dict[str, Any]) -> float:
        raise RuntimeError("CUDA error: out of memory")

    if job["system"] == "eager":
        _worker._start = start
    _worker.serve(connection, log, job)


def serve_and_kill_eager_once(connection: Connection, log: str, job: dict[str, Any]) -> None:
    """A worker; that of eager ends while its latency is measured, once."""
    memory = _worker._memory

    def counted(job: dict[str, Any]) -> float:
        # Asked after the build, before and after the first calls of all threads, then before the latency.
        if _note(log, "asked") == 4:
            os.abort()
        return memory(job)

    if job["system"] == "eager":
        _worker._memory = counted
    _worker.serve(connection, log, job)


def serve_a_lost_device(connection: Connection, log: str, job: dict[str, Any]) -> None:
    """A worker whose device is gone once something was raised."""
    _worker._lost = lambda job: True
    _worker.serve(connection, log, job)
