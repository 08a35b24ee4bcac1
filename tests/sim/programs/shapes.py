"""Programs for the explorer: one shared engine that serves a range, with graphs for the shapes that repeat.

Each schedule starts from engines as they are here; the thread that captures begins in the program.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

import anabranch
import anabranch.sim
from anabranch import Dim, Input
from anabranch.devices import _turns
from anabranch.runtime import _shapes
from anabranch.runtime._specialization import Specialization

SIM = torch.device("sim", 0)
RUNTIMES = ("python", "native")


class Scale(torch.nn.Module):
    """Wrong inputs give wrong outputs, and NaN stays NaN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * 2 + 1)


STREAMS = [torch.Stream(SIM) for _ in range(2)]
#: By size, what calls get in turn, and must return.
SOURCES = {n: [torch.arange(1.0, 1.0 + n) + 10 * n + 100 * i for i in range(4)] for n in (3, 4, 5)}
EXPECTED = {n: [Scale()(x) for x in given] for n, given in SOURCES.items()}
INPUTS = {n: [x.to(SIM) for x in given] for n, given in SOURCES.items()}


def make(runtime: str, limit: int, *captured: int) -> Any:
    """An engine for sizes from 2 on that may have ``limit`` contexts, with graphs for those of ``captured``."""
    inputs = [Input((Dim("n", 2),), device=SIM)]
    engine = anabranch.compile(Scale().to(SIM), inputs, backend="eager", runtime=runtime, max_contexts=limit)
    for n in captured:
        assert engine.warm([INPUTS[n][0]]) == 1
    return engine


#: Nothing is captured so far; there is room for one.
FRESH = {runtime: make(runtime, 1) for runtime in RUNTIMES}
#: Size 3 has the one graph for which there is room.
FULL = {runtime: make(runtime, 1, 3) for runtime in RUNTIMES}
#: Sizes 3 and 4 have been called once: the next call of either asks for its graph.
for _engine in FRESH.values():
    for _n in (3, 4):
        _engine(INPUTS[_n][0])
torch.accelerator.synchronize()


def call(engine: Any, n: int, stream: torch.Stream, times: Sequence[int], outputs: dict[Any, Any]) -> None:
    with torch.no_grad(), stream:
        for i in times:
            x = INPUTS[n][i] * 1
            outputs[n, i] = engine(x)
            del x


def check(outputs: dict[Any, Any]) -> None:
    for stream in STREAMS:
        stream.synchronize()
    for (n, i), y in sorted(outputs.items()):
        got = y.cpu()
        assert torch.equal(got, EXPECTED[n][i]), f"size {n}: {got.tolist()}, expected {EXPECTED[n][i].tolist()}"


def _beside(work: Callable[[], None], own: Callable[[], None]) -> None:
    errors: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as e:
            errors.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    own()
    thread.join()
    assert not errors, errors[0]


def a_new_shape_while_another_is_captured(runtime: str, calls: int = 2) -> None:
    """One thread's call has its shape captured aside; the other's shape is a new one."""
    engine = FRESH[runtime]
    outputs: dict[Any, Any] = dict.fromkeys([(n, i) for n in (3, 5) for i in range(calls)])
    _beside(
        lambda: call(engine, 3, STREAMS[0], range(calls), outputs),
        lambda: call(engine, 5, STREAMS[1], range(calls), outputs),
    )
    check(outputs)


def a_graph_leaves_while_a_call_is_about_to_take_it(runtime: str, calls: int = 2) -> None:
    """One thread calls the shape that has the only graph; the other wants it for a shape of its own."""
    engine = FULL[runtime]
    outputs: dict[Any, Any] = dict.fromkeys([(3, i) for i in range(calls)] + [(4, 0)])

    def own() -> None:
        with STREAMS[1]:
            engine.warm([INPUTS[4][0]])
        call(engine, 4, STREAMS[1], [0], outputs)

    _beside(lambda: call(engine, 3, STREAMS[0], range(calls), outputs), own)
    check(outputs)


def a_wait_for_the_device_while_a_shape_is_captured(runtime: str, calls: int = 2) -> None:
    """One thread's call has its shape captured aside; the other waits for the whole device, as programs do anywhere."""
    engine = FRESH[runtime]
    outputs: dict[Any, Any] = dict.fromkeys([(3, i) for i in range(calls)])
    _beside(
        torch.accelerator.synchronize,
        lambda: call(engine, 3, STREAMS[0], range(calls), outputs),
    )
    check(outputs)


# -- mutants -----------------------------------------------------------------------------------------------------------


def with_a_graph_that_is_found_for_another_shape(runtime: str) -> None:
    """What is captured for one shape is found by calls of another."""
    add = _shapes.Table.add

    def elsewhere(table: Any, key: Any, signature: Any, made: Specialization) -> Any:
        ((_, dtype),) = key
        return add(table, ((torch.Size([5]), dtype),), signature, made)

    with mock.patch.object(_shapes.Table, "add", elsewhere):
        a_new_shape_while_another_is_captured(runtime)
        FRESH[runtime]._shapes.wait()


def with_memory_that_goes_at_once(runtime: str) -> None:
    """What a shape gives up is freed while its last call may still be running."""
    seam = type(FULL[runtime].seam)
    with mock.patch.object(seam, "defer_free", lambda self, index, events, parts, free: free()):
        a_graph_leaves_while_a_call_is_about_to_take_it(runtime)


def with_waits_that_take_no_turns(runtime: str) -> None:
    """Whoever waits for the device does not look whether something is being captured."""
    with mock.patch.object(_turns.Turns, "waiting", return_value=contextlib.nullcontext()):
        _beside(torch.accelerator.synchronize, lambda: FRESH[runtime].warm([INPUTS[3][0]]))
