"""Programs for the explorer: sessions of one engine, on streams of two threads; and sessions that are broken.

Each program takes the runtime that it is to run on. Each schedule starts from the sessions as they are here.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from engines import INPUTS, RUNTIMES, SIM, SOURCES, STREAMS

import anabranch
import anabranch.sim


class Keeps(torch.nn.Module):
    """What a call returns depends on all calls before it, and on their order."""

    kept: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor([8.0, 4.0, 2.0, 1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.mul_(0.5).add_(x)
        return self.kept * 2 + 1


def make(runtime: str, contexts: int) -> Any:
    """An engine with so many contexts, built; with none it runs direct."""
    model, x = Keeps().to(SIM), torch.empty(4, device=SIM)
    how = {"max_contexts": contexts} if contexts else {"cuda_graphs": False}
    engine = anabranch.compile(model, [x], backend="eager", runtime=runtime, **how)
    engine.warm(contexts=contexts)
    assert bool(engine.stats().captures) == bool(contexts)
    return engine


#: By runtime and number of contexts.
ENGINES = {(runtime, contexts): make(runtime, contexts) for runtime in RUNTIMES for contexts in (0, 1, 2)}
SESSIONS = {key: [engine.session() for _ in range(2)] for key, engine in ENGINES.items()}
torch.accelerator.synchronize()


def expected(indices: Sequence[int]) -> list[torch.Tensor]:
    """What a session returns for these inputs, one after another."""
    model = Keeps()
    return [model(SOURCES[i]) for i in indices]


def serve(session: Any, stream: torch.Stream, indices: Sequence[int], outputs: dict[int, torch.Tensor]) -> None:
    """Calls from one thread on one stream: the input is made there and dropped right after the call."""
    with torch.no_grad(), stream:
        for i in indices:
            x = INPUTS[i] * 1
            outputs[i] = session(x)
            del x


def check(outputs: dict[int, torch.Tensor], *series: Sequence[int]) -> None:
    for stream in STREAMS:
        stream.synchronize()
    for indices in series:
        for i, y in zip(indices, expected(indices), strict=True):
            got = outputs[i].cpu()
            assert torch.equal(got, y), f"call {i} returned {got.tolist()}, expected {y.tolist()}"


def _together(*works: Callable[[], None]) -> None:
    """Each in a thread."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def sessions2_threads2_calls2(runtime: str, contexts: int) -> None:
    """Each thread has a session, on a stream of its own."""
    first, second = SESSIONS[runtime, contexts]
    outputs: dict[int, Any] = dict.fromkeys(range(4))
    _together(
        lambda: serve(first, STREAMS[0], [0, 1], outputs),
        lambda: serve(second, STREAMS[1], [2, 3], outputs),
    )
    check(outputs, [0, 1], [2, 3])


def sessions2_made_by_threads2(runtime: str, contexts: int) -> None:
    """Each thread makes its session."""
    engine = ENGINES[runtime, contexts]
    outputs: dict[int, Any] = dict.fromkeys(range(2))
    made: dict[int, Any] = dict.fromkeys(range(2))

    def work(t: int) -> None:
        with STREAMS[t]:
            made[t] = engine.session()
        serve(made[t], STREAMS[t], [t], outputs)

    _together(lambda: work(0), lambda: work(1))
    check(outputs, [0], [1])


def sessions2_threads1_by_turns(runtime: str, contexts: int) -> None:
    """One thread serves two sessions, each on its stream."""
    outputs: dict[int, Any] = {}
    for i in range(4):
        serve(SESSIONS[runtime, contexts][i % 2], STREAMS[i % 2], [i], outputs)
    check(outputs, [0, 2], [1, 3])


def session1_streams2_by_turns(runtime: str, contexts: int) -> None:
    """One session is called and begun anew on two streams."""
    session = SESSIONS[runtime, contexts][0]
    outputs: dict[int, Any] = {}
    for i in range(2):
        serve(session, STREAMS[i % 2], [i], outputs)
    with STREAMS[0]:
        session.reset()
    for i in range(2, 4):
        serve(session, STREAMS[(i + 1) % 2], [i], outputs)
    check(outputs, [0, 1], [2, 3])


def session1_state_saved_and_loaded(runtime: str, contexts: int) -> None:
    """A copy of the state, a clone, and a state that is loaded, each on another stream than the call before."""
    session = SESSIONS[runtime, contexts][0]
    outputs: dict[int, Any] = {}
    serve(session, STREAMS[0], [0], outputs)
    with STREAMS[1]:
        saved = session.state
        twin = session.clone()
    serve(session, STREAMS[0], [1], outputs)
    serve(twin, STREAMS[2], [2], outputs)
    with STREAMS[1]:
        session.load(saved)
    serve(session, STREAMS[0], [3], outputs)
    check(outputs, [0, 1])
    check(outputs, [0, 2])
    check(outputs, [0, 3])


def session1_threads2(runtime: str, contexts: int) -> tuple[bool, ...]:
    """Two threads call one session: at once, and one is turned away; or in either order."""
    session = SESSIONS[runtime, contexts][0]
    outputs: dict[int, Any] = dict.fromkeys(range(2))
    busy = [False, False]

    def work(t: int) -> None:
        try:
            serve(session, STREAMS[t], [t], outputs)
        except anabranch.SessionBusy:
            busy[t] = True

    _together(lambda: work(0), lambda: work(1))
    served = [t for t in range(2) if not busy[t]]
    assert served, "each was turned away by the other"
    for stream in STREAMS:
        stream.synchronize()
    got = {t: outputs[t].cpu() for t in served}
    orders = [served, served[::-1]]
    right = [all(torch.equal(got[t], y) for t, y in zip(order, expected(order), strict=True)) for order in orders]
    assert any(right), f"calls {served} returned {got}, expected what they do one after another"
    return tuple(busy)


def session_dropped_in_flight(runtime: str, contexts: int) -> None:
    """It is made on one stream and called on another, and goes at once: its memory comes from the first."""
    outputs: dict[int, Any] = {}
    with STREAMS[0]:
        session = ENGINES[runtime, contexts].session()
    serve(session, STREAMS[1], [0, 1], outputs)
    del session
    gc.collect()
    with STREAMS[0]:
        junk = [torch.full((4,), -1.0, device=SIM) for _ in range(3)]
    check(outputs, [0, 1])
    del junk


# -- mutants -----------------------------------------------------------------------------------------------------------
# Each changes one thing of a session, and runs a program that passes otherwise. `mutants.py` has them, too.


def shared_state(runtime: str) -> None:
    """Two sessions have the same tensors."""
    first, second = SESSIONS[runtime, 2]
    second._memory.tensors = first._memory.tensors
    sessions2_threads1_by_turns(runtime, 2)


class _Unordered(torch.Stream):
    """A stream that waits for nothing."""

    def wait_event(self, event: Any) -> None:
        pass


def _without_waits(session: Any, method: str) -> None:
    """What ``method`` of the session does is queued at once. Its call waits for its context, as before."""
    device, own = session._device, getattr(session, method)

    class Seam:
        """The device, as far as a session asks it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(device, name)

        def current_stream(self, index: int) -> Any:
            stream = device.current_stream(index)
            return _Unordered(
                stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
            )

    def unordered(*args: Any) -> Any:
        session._device = Seam()
        try:
            return own(*args)
        finally:
            session._device = device

    setattr(session, method, unordered)


def calls_that_do_not_wait(runtime: str) -> None:
    """A call does not wait for the session's call before it."""
    _without_waits(SESSIONS[runtime, 2][0], "run")
    session1_streams2_by_turns(runtime, 2)


def reset_that_does_not_wait(runtime: str) -> None:
    """Beginning anew does not wait for the calls before it."""
    _without_waits(SESSIONS[runtime, 2][0], "_ordered")
    session1_streams2_by_turns(runtime, 2)


class _NoLock:
    """Whoever comes gets it."""

    def acquire(self, blocking: bool = True) -> bool:
        return True

    def release(self) -> None:
        pass


def busy_is_ignored(runtime: str) -> None:
    """Two threads are at work with one session at once."""
    SESSIONS[runtime, 2][0]._busy = _NoLock()
    session1_threads2(runtime, 2)


def freed_at_once(runtime: str) -> None:
    """A session's memory is another's as soon as nobody refers to it."""
    type(ENGINES[runtime, 2].seam).retire = lambda self, events, tensors: None
    session_dropped_in_flight(runtime, 2)


# Of the Python runtime; for the native one see `test_native_mutants.py`.


def first_sessions_addresses() -> None:
    """A graph reads and writes the tensors of the session that called it first."""
    calls = ENGINES["python", 2]._first().calls
    launch, first = calls._launch, list[torch.Tensor]()

    def of_the_first(context: Any, inputs: Sequence[torch.Tensor], stream: Any) -> Any:
        first.extend(inputs[len(first) :])
        written = calls._unit.written
        return launch(context, [first[i] if i in written else x for i, x in enumerate(inputs)], stream)

    calls._launch = of_the_first
    sessions2_threads1_by_turns("python", 2)


def late_copy_back() -> None:
    """What a call has written leaves the context after the record that the next one waits for."""
    calls = ENGINES["python", 1]._first().calls

    def launch(context: Any, inputs: Sequence[torch.Tensor], stream: Any) -> Any:
        results, copies = context.outputs.allocate()
        stream.wait_event(context.done)
        for static, x in zip(context.inputs, inputs, strict=True):
            static.copy_(x)
        context.graph.launch(stream)
        for new, static in copies:
            new.copy_(static)
        context.done.record(stream)
        context.used_on = stream.stream_id
        for i in calls._unit.written:
            inputs[i].copy_(context.inputs[i])
        return results

    calls._launch = launch
    sessions2_threads1_by_turns("python", 1)


__all__ = ["ENGINES", "INPUTS", "RUNTIMES", "SESSIONS", "SOURCES", "STREAMS"]
