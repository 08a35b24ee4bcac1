"""Small programs of streams and events on the simulated device, so small that every schedule can be tried."""

from __future__ import annotations

import threading

import torch

import anabranch.sim

SIM = torch.device("sim", 0)
A, B, C = (torch.Stream(SIM) for _ in range(3))
X = torch.zeros(4, device=SIM)
Y = torch.zeros(4, device=SIM)
Z = torch.zeros(4, device=SIM)
PINNED = torch.zeros(4, pin_memory=True)
torch.accelerator.synchronize()


def _sync(*streams: torch.Stream) -> None:
    for stream in streams:
        stream.synchronize()


def missing_wait() -> torch.Tensor:
    """Two streams write one tensor."""
    with A:
        X.fill_(1)
    with B:
        X.fill_(2)
    _sync(A, B)
    return X


def waited_for() -> torch.Tensor:
    with A:
        X.fill_(1)
    B.wait_stream(A)
    with B:
        X.fill_(2)
    _sync(B)
    return X


def side_by_side() -> tuple[torch.Tensor, torch.Tensor]:
    with A:
        X.fill_(1)
    with B:
        Y.fill_(2)
    _sync(A, B)
    return X, Y


def read_and_write() -> tuple[torch.Tensor, torch.Tensor]:
    """One stream reads what another writes, twice."""
    with A:
        X.fill_(1)
        X.fill_(2)
    with B:
        Y.copy_(X)
    _sync(A, B)
    return X, Y


def two_readers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with A:
        X.fill_(1)
    with B:
        Y.copy_(X)
    with C:
        Z.copy_(X)
    _sync(A, B, C)
    return X, Y, Z


def chain() -> torch.Tensor:
    """Three streams, one after the other by events."""
    with A:
        X.fill_(1)
    B.wait_event(A.record_event())
    with B:
        Y.copy_(X)
    C.wait_event(B.record_event())
    with C:
        Z.copy_(Y)
    _sync(C)
    return Z


def event_recorded_again() -> torch.Tensor:
    """The wait binds to the record before it, not to the later one."""
    done = torch.Event(SIM)
    with A:
        X.fill_(1)
    done.record(A)
    B.wait_event(done)
    with A:
        Y.fill_(1)
    done.record(A)
    with B:
        Z.copy_(X)
    _sync(A, B)
    return Z


def asked() -> tuple[bool, torch.Tensor]:
    """What a query answers depends on the schedule."""
    with A:
        X.fill_(1)
    done = A.record_event()
    answer = done.query()
    _sync(A)
    return answer, X


def polled() -> torch.Tensor:
    with A:
        X.fill_(1)
    done = A.record_event()
    while not done.query():
        pass
    return X


def freed_too_early() -> torch.Tensor:
    """The block goes back while another stream still reads it; the next tensor gets it."""
    with A:
        t = torch.ones(4, device=SIM)
    B.wait_stream(A)
    with B:
        Y.copy_(t)
    del t
    with A:
        _ = torch.full((4,), 5.0, device=SIM)
    _sync(A, B)
    return Y


def freed_with_record_stream() -> torch.Tensor:
    with A:
        t = torch.ones(4, device=SIM)
    B.wait_stream(A)
    with B:
        Y.copy_(t)
    t.record_stream(B)
    del t
    with A:
        _ = torch.full((4,), 5.0, device=SIM)
    _sync(A, B)
    return Y


def pinned_copy() -> torch.Tensor:
    """The host changes pinned memory while a copy from it is queued."""
    PINNED.fill_(1)
    with A:
        X.copy_(PINNED, non_blocking=True)
    PINNED.fill_(2)
    _sync(A)
    return X


def two_threads() -> tuple[torch.Tensor, torch.Tensor]:
    def work(stream: torch.Stream, t: torch.Tensor) -> None:
        with stream:
            t.fill_(1)

    threads = [threading.Thread(target=work, args=pair) for pair in ((A, X), (B, Y))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _sync(A, B)
    return X, Y


def one_stream_of_two_threads() -> torch.Tensor:
    """A stream runs things in the order in which they were queued; which that is, is up to the threads."""

    def work(value: int) -> None:
        with A:
            X.fill_(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _sync(A)
    return X


def handed_to_a_thread() -> torch.Tensor:
    """A join orders threads, never streams."""

    def work() -> None:
        with B:
            Y.copy_(X)

    with A:
        X.fill_(1)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    _sync(A, B)
    return Y


assert anabranch.sim.core is not None
