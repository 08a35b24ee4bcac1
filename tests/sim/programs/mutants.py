"""Broken runtimes, each with its repaired twin. The explorer must find every one of the first and none of the second.

Each is the product's engine with one thing changed; nothing of this is in the product. ``MUTANTS`` gives the program of
the mutant, that of its twin, and what the race checker must say of the mutant.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pieces
import sessions
import torch
from engines import ENGINES as ALL
from engines import INPUTS, SIM, STREAMS, check, many_threads, one_thread, serve
from stateful import DIRECT, GRAPHS, make, streams2_threads1_direct_call_then_capture

from anabranch.check._inject import StaleStream
from anabranch.sim import core

Program = Callable[[], None]

#: The Python runtime's: each mutant replaces a method of it. Those of the native runtime are in `native_mutants.py`.
ENGINES = ALL["python"]

#: Of the mutants that run calls on a stream of the runtime's own.
LANE = torch.Stream(SIM)
_STALE = StaleStream(ENGINES[1])


def _pick(engine: Any) -> Any:
    """The specialization that runs the calls."""
    return engine._first().calls


# -- 1: the stream of compile time -------------------------------------------------------------------------------------


def stale_stream() -> None:
    one_thread(_STALE, 2)


def stale_stream_repaired() -> None:
    one_thread(ENGINES[1], 2)


# -- 2, 3, 9: a runtime with a stream of its own -----------------------------------------------------------------------


class OnLane:
    """Runs the kernels on a private stream, forked from the caller's and joined to it."""

    def __init__(self, engine: Any, *, wait_in: bool = True, wait_out: bool = True, record: bool = True) -> None:
        self._kernels = _pick(engine).direct.run
        self._wait_in, self._wait_out, self._record = wait_in, wait_out, record

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        caller = torch.accelerator.current_stream()
        fork, join = torch.Event(SIM), torch.Event(SIM)
        fork.record(caller)
        if self._wait_in:
            LANE.wait_event(fork)
        with LANE:
            (y,) = self._kernels([x])
            join.record(LANE)
        if self._record:
            x.record_stream(LANE)
            y.record_stream(caller)
        if self._wait_out:
            caller.wait_event(join)
        # As a caller would: the result is used and dropped while its work is still queued.
        return y + 0


def lane_repaired() -> None:
    one_thread(OnLane(ENGINES[1]), 2)


def no_input_wait() -> None:
    one_thread(OnLane(ENGINES[1], wait_in=False), 2)


def no_output_wait() -> None:
    one_thread(OnLane(ENGINES[1], wait_out=False), 2)


def record_stream_forgotten() -> None:
    one_thread(OnLane(ENGINES[1], record=False), 2)


# -- 4, 5, 6, 8, 10: the graph path with its steps in another order ----------------------------------------------------


def _launch_without_wait(context: Any, inputs: Sequence[torch.Tensor], stream: Any) -> list[torch.Tensor]:
    results, copies = context.outputs.allocate()
    _queue(context, inputs, copies, stream)
    context.done.record(stream)
    context.used_on = stream.stream_id
    return results  # type: ignore[no-any-return]


def _launch_with_late_wait(context: Any, inputs: Sequence[torch.Tensor], stream: Any) -> list[torch.Tensor]:
    results, copies = context.outputs.allocate()
    for static, x in zip(context.inputs, inputs, strict=True):
        static.copy_(x)
    stream.wait_event(context.done)
    context.graph.launch(stream)
    for new, static in copies:
        new.copy_(static)
    context.done.record(stream)
    context.used_on = stream.stream_id
    return results  # type: ignore[no-any-return]


def _queue(context: Any, inputs: Sequence[torch.Tensor], copies: Any, stream: Any) -> None:
    for static, x in zip(context.inputs, inputs, strict=True):
        static.copy_(x)
    context.graph.launch(stream)
    for new, static in copies:
        new.copy_(static)


def shared_context() -> None:
    _pick(ENGINES[1])._launch = _launch_without_wait
    one_thread(ENGINES[1], 2)


def inputs_refilled() -> None:
    _pick(ENGINES[1])._launch = _launch_with_late_wait
    one_thread(ENGINES[1], 2)


def graph_path_repaired() -> None:
    one_thread(ENGINES[1], 2)


def released_before_outputs() -> None:
    spec = _pick(ENGINES[1])

    def run(context: Any, inputs: Sequence[torch.Tensor], stream: Any) -> list[torch.Tensor]:
        results, copies = context.outputs.allocate()
        stream.wait_event(context.done)
        for static, x in zip(context.inputs, inputs, strict=True):
            static.copy_(x)
        context.graph.launch(stream)
        context.done.record(stream)
        context.used_on = stream.stream_id
        spec._pool.release(context)
        for new, static in copies:
            new.copy_(static)
        return results  # type: ignore[no-any-return]

    spec._run_graph = run
    many_threads(ENGINES[1], 2, 1)


def two_threads_repaired() -> None:
    many_threads(ENGINES[1], 2, 1)


def _launch_with_events(events: Sequence[torch.Event]) -> Callable[..., list[torch.Tensor]]:
    """Takes the event of each use from a ring; a context that was never used waits for nothing."""
    ring = itertools.cycle(events)

    def launch(context: Any, inputs: Sequence[torch.Tensor], stream: Any) -> list[torch.Tensor]:
        results, copies = context.outputs.allocate()
        if context.used_on is not None:
            stream.wait_event(context.done)
        _queue(context, inputs, copies, stream)
        context.done = next(ring)
        context.done.record(stream)
        context.used_on = stream.stream_id
        return results  # type: ignore[no-any-return]

    return launch


def event_reused() -> None:
    # Another context's record moves it before the next user of this context has waited.
    _pick(ENGINES[2])._launch = _launch_with_events([torch.Event(SIM)])
    one_thread(ENGINES[2], 3, streams=3)


def event_reused_repaired() -> None:
    _pick(ENGINES[2])._launch = _launch_with_events([torch.Event(SIM) for _ in range(3)])
    one_thread(ENGINES[2], 3, streams=3)


def _fail_then_call() -> None:
    outputs: dict[int, torch.Tensor] = {}
    # The third launch is the copy of the output: the graph is queued by then.
    with torch.no_grad(), STREAMS[0]:
        x = INPUTS[0] * 1
        core.fail("launch", 3)
        failed = False
        try:
            ENGINES[1](x)
        except RuntimeError:
            failed = True
        assert failed, "the call was made to fail, and did not"
        del x
    serve(ENGINES[1], STREAMS[1], [1], outputs)
    check(outputs, STREAMS[:2])


def error_not_drained() -> None:
    spec = _pick(ENGINES[1])
    launch = spec._launch

    def run(context: Any, inputs: Sequence[torch.Tensor], stream: Any) -> list[torch.Tensor]:
        try:
            return launch(context, inputs, stream)  # type: ignore[no-any-return]
        finally:
            spec._pool.release(context)

    spec._run_graph = run
    _fail_then_call()


def error_drained() -> None:
    _fail_then_call()


# -- 7: a context that does not wait for its last call -----------------------------------------------------------------


def _call_then_trim() -> None:
    outputs: dict[int, torch.Tensor] = {}
    serve(ENGINES[1], STREAMS[0], [0], outputs)
    _pick(ENGINES[1]).contexts.trim()
    # Builds a context anew, in whatever memory the old one has left.
    serve(ENGINES[1], STREAMS[1], [1], outputs)
    check(outputs, STREAMS[:2])


def context_freed_early() -> None:
    device = ENGINES[1].seam
    defer = type(device).defer_free

    def at_once(self: Any, index: int, events: Any, kept: Any, free: Callable[[], None]) -> None:
        free()

    type(device).defer_free = at_once
    try:
        _call_then_trim()
    finally:
        type(device).defer_free = defer


def context_freed_in_time() -> None:
    _call_then_trim()


# -- 11: two preemptions -----------------------------------------------------------------------------------------------


class CheckThenAct:
    """A context that is taken by looking at a flag and then setting it, as two accesses.

    Thread 1 finds it free and is preempted; thread 2 takes it and is preempted in the middle of its call; thread 1
    goes on with the context that thread 2 has half filled. With one preemption less, ``done`` orders the two.
    """

    def __init__(self, engine: Any, *, atomic: bool) -> None:
        from anabranch import _sync

        self._spec = _pick(engine)
        (self._context,) = list(self._spec._pool._idle)
        self._state = _sync.dict_("context taken")
        self._lock = _sync.lock("context taken")
        self._free = _sync.event("context free")
        self._atomic = atomic

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._atomic:
            with self._lock:
                return self._run(x)
        if self._state.get("taken"):
            # Taken: a call that needs no context.
            (y,) = self._spec.direct.run([x])
            return y  # type: ignore[no-any-return]
        self._state["taken"] = True
        y = self._run(x)
        self._state["taken"] = False
        return y

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        stream = torch.accelerator.current_stream()
        (y,) = self._spec._launch(self._context, [x], stream)
        return y  # type: ignore[no-any-return]


def two_preemptions() -> None:
    many_threads(CheckThenAct(ENGINES[1], atomic=False), 2, 1)


def two_preemptions_repaired() -> None:
    many_threads(CheckThenAct(ENGINES[1], atomic=True), 2, 1)


# -- 12 to 15: kernels that have state -------------------------------------------------------------------------------


def _with_one_instance() -> Any:
    """An engine whose contexts all have the same instance."""
    from contract.stateful import ScratchKernels

    instance, made = ScratchKernels.instance, []

    def the_same(self: Any, *given: Any) -> Any:
        made.append(made[0] if made else instance(self, *given))
        return made[0]

    ScratchKernels.instance = the_same  # type: ignore[method-assign]
    try:
        return make("python", 2, graphs=True)
    finally:
        ScratchKernels.instance = instance  # type: ignore[method-assign]


_ONE_INSTANCE = _with_one_instance()


def _direct_calls(call: Callable[[Any, Any, Any, Sequence[torch.Tensor]], Any]) -> Any:
    """The engine with one instance for direct calls, which are ``call(instances, member, stream, inputs)``."""
    spec = _pick(DIRECT["python"][1])
    instances = spec.direct.kernels

    def kernels(inputs: Sequence[torch.Tensor]) -> Any:
        stream = torch.accelerator.current_stream()
        return call(instances, instances._acquire(stream.stream_id), stream, inputs)

    spec.direct.kernels = kernels
    return DIRECT["python"][1]


def instance_shared_by_contexts() -> None:
    one_thread(_ONE_INSTANCE, 2)


def instances_of_contexts() -> None:
    one_thread(GRAPHS["python"], 2)


def instance_without_wait() -> None:
    def call(instances: Any, member: Any, stream: Any, inputs: Sequence[torch.Tensor]) -> Any:
        results = member.run(inputs)
        member.done.record(stream)
        member.used_on = stream.stream_id
        instances._pool.release(member)
        return results

    one_thread(_direct_calls(call), 2)


def instance_waited_for() -> None:
    one_thread(DIRECT["python"][1], 2)


def instance_released_before_run() -> None:
    def call(instances: Any, member: Any, stream: Any, inputs: Sequence[torch.Tensor]) -> Any:
        stream.wait_event(member.done)
        member.used_on = stream.stream_id
        instances._pool.release(member)
        results = member.run(inputs)
        member.done.record(stream)
        return results

    many_threads(_direct_calls(call), 2, 1)


def instance_released_after_run() -> None:
    many_threads(DIRECT["python"][1], 2, 1)


def captured_in_use() -> None:
    instances = _pick(DIRECT["python"][1]).direct.kernels
    instances.take = lambda: instances._pool.acquire(0, lambda: False)
    streams2_threads1_direct_call_then_capture("python")


def captured_spare() -> None:
    streams2_threads1_direct_call_then_capture("python")


# -- 16, 17: calls of several pieces ---------------------------------------------------------------------------------


def _piece_on_lane(*, waits: bool) -> None:
    """The direct piece runs on a stream of the runtime's own, between two on the caller's."""
    calls = _pick(pieces.ENGINES[pieces.Draws, "python", 2])
    run, takes, drops = calls._steps[1]

    def aside(values: Sequence[torch.Tensor]) -> Any:
        caller = torch.accelerator.current_stream()
        fork, join = torch.Event(SIM), torch.Event(SIM)
        fork.record(caller)
        if waits:
            LANE.wait_event(fork)
        with LANE:
            results = run(values)
            join.record(LANE)
        for x in values:
            x.record_stream(LANE)
        for y in results:
            y.record_stream(caller)
        if waits:
            caller.wait_event(join)
        return results

    calls._steps[1] = (aside, takes, drops)
    pieces.draws_threads1_calls2("python", 2)


def piece_out_of_order() -> None:
    _piece_on_lane(waits=False)


def piece_in_order() -> None:
    _piece_on_lane(waits=True)


def value_left_in_the_context() -> None:
    part = _pick(pieces.ENGINES[pieces.Draws, "python", 2]).parts[0].calls
    launch = part._launch

    def without_copies(context: Any, inputs: Sequence[torch.Tensor], stream: Any) -> Sequence[torch.Tensor]:
        launch(context, inputs, stream)
        return context.outputs.results  # type: ignore[no-any-return]

    part._launch = without_copies
    pieces.draws_threads1_calls2("python", 2)


def values_copied_out() -> None:
    pieces.draws_threads1_calls2("python", 2)


# -- 18 to 24: sessions ------------------------------------------------------------------------------------------------
# Of the Python runtime; `test_runtime_sessions.py` has those that the native one has, too.


def state_shared() -> None:
    sessions.shared_state("python")


def sessions_by_turns() -> None:
    sessions.sessions2_threads1_by_turns("python", 2)


def sessions_by_turns_with_one_context() -> None:
    sessions.sessions2_threads1_by_turns("python", 1)


def session_call_without_wait() -> None:
    sessions.calls_that_do_not_wait("python")


def session_reset_without_wait() -> None:
    sessions.reset_that_does_not_wait("python")


def session_by_turns() -> None:
    sessions.session1_streams2_by_turns("python", 2)


def session_busy_ignored() -> None:
    sessions.busy_is_ignored("python")


def session_busy() -> None:
    sessions.session1_threads2("python", 2)


def session_freed_at_once() -> None:
    sessions.freed_at_once("python")


def session_freed_in_time() -> None:
    sessions.session_dropped_in_flight("python", 2)


MUTANTS: dict[str, tuple[Program, Program]] = {
    "stale stream": (stale_stream, stale_stream_repaired),
    "no input wait": (no_input_wait, lane_repaired),
    "no output wait": (no_output_wait, lane_repaired),
    "one context shared by two streams": (shared_context, graph_path_repaired),
    "released before the outputs are copied out": (released_before_outputs, two_threads_repaired),
    "inputs refilled while the graph runs": (inputs_refilled, graph_path_repaired),
    "context freed early": (context_freed_early, context_freed_in_time),
    "event re-used too soon": (event_reused, event_reused_repaired),
    "record_stream forgotten": (record_stream_forgotten, lane_repaired),
    "error path that does not drain": (error_not_drained, error_drained),
    "two preemptions": (two_preemptions, two_preemptions_repaired),
    "one instance shared by two contexts": (instance_shared_by_contexts, instances_of_contexts),
    "instance that does not wait for its last run": (instance_without_wait, instance_waited_for),
    "instance released before its run is queued": (instance_released_before_run, instance_released_after_run),
    "instance of a direct call captured": (captured_in_use, captured_spare),
    "order between two pieces skipped": (piece_out_of_order, piece_in_order),
    "value between pieces left in the context": (value_left_in_the_context, values_copied_out),
    "state shared by two sessions": (state_shared, sessions_by_turns),
    "graph that keeps the first session's tensors": (sessions.first_sessions_addresses, sessions_by_turns),
    "state copied back after the record": (sessions.late_copy_back, sessions_by_turns_with_one_context),
    "session's call that does not wait for the last": (session_call_without_wait, session_by_turns),
    "reset that does not wait for the session's calls": (session_reset_without_wait, session_by_turns),
    "session that two threads call at once": (session_busy_ignored, session_busy),
    "session freed while its call is queued": (session_freed_at_once, session_freed_in_time),
}

__all__ = ["MUTANTS"]
