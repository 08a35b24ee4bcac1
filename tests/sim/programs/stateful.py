"""Programs for the explorer: as ``engines.py``, with a backend whose runs need state that no two may share at once.

Each program takes the runtime that it is to run on.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engines import RUNTIMES, SIM, STREAMS, Scale, check, many_threads, one_thread, serve

import anabranch
import anabranch.sim
from anabranch.devices import get_device

sys.path.insert(0, str(Path(__file__).parents[2]))
from contract import stateful

stateful.install(get_device("sim"))


def make(runtime: str, contexts: int, graphs: bool) -> Any:
    """An engine with ``contexts`` execution contexts, or instances for as many direct calls, and as many more for
    captures; all of them built."""
    model, x = Scale().to(SIM), torch.empty(4, device=SIM)
    engine = anabranch.compile(
        model, [x], backend=stateful.NAME, runtime=runtime, max_contexts=contexts, cuda_graphs=graphs
    )
    engine.warm(contexts=contexts, captures=contexts)
    return engine


GRAPHS = {runtime: make(runtime, 2, graphs=True) for runtime in RUNTIMES}
#: By runtime and number of instances.
DIRECT = {runtime: {n: make(runtime, n, graphs=False) for n in (1, 2)} for runtime in RUNTIMES}
torch.accelerator.synchronize()


class Replayed:
    """A call in a graph of the caller's."""

    def __init__(self, engine: Callable[[torch.Tensor], torch.Tensor], twice: bool = False) -> None:
        self._graph = anabranch.sim.Graph()
        self._input = torch.zeros(4, device=SIM)
        torch.accelerator.current_stream().synchronize()
        with anabranch.sim.graph(self._graph, mode="thread_local"):
            self._output = engine(self._input)
            if twice:
                self._output = engine(self._output * 0 + self._input)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._input.copy_(x)
        self._graph.replay()
        return self._output * 1


def streams2_threads1_calls3_contexts2(runtime: str) -> None:
    one_thread(GRAPHS[runtime], 3)


def streams2_threads2_calls2_contexts2(runtime: str) -> None:
    many_threads(GRAPHS[runtime], 2, 2)


def streams2_threads1_calls3_instances1(runtime: str) -> None:
    one_thread(DIRECT[runtime][1], 3)


def streams2_threads1_calls3_instances2(runtime: str) -> None:
    one_thread(DIRECT[runtime][2], 3)


def streams2_threads2_calls2_instances1(runtime: str) -> None:
    many_threads(DIRECT[runtime][1], 2, 2)


def streams2_threads2_calls2_instances2(runtime: str) -> None:
    many_threads(DIRECT[runtime][2], 2, 2)


def streams3_threads3_calls1_instances2(runtime: str) -> None:
    many_threads(DIRECT[runtime][2], 3, 1)


def streams3_threads3_calls2_instances2(runtime: str) -> None:
    many_threads(DIRECT[runtime][2], 3, 2)


def streams2_threads2_first_calls_instances1(runtime: str) -> None:
    """Nothing is built yet: one thread builds the only instance there may be, and the other waits for it."""
    DIRECT[runtime][1].trim()
    many_threads(DIRECT[runtime][1], 2, 1)


def together(*works: Callable[[], None]) -> None:
    """Each in a thread."""
    workers = [threading.Thread(target=work) for work in works]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def streams2_threads1_two_captures(runtime: str) -> None:
    """One engine in two graphs, which run at once, and beside a direct call."""
    outputs: dict[int, torch.Tensor] = {}
    calls = [Replayed(DIRECT[runtime][2]) for _ in range(2)]
    for i in range(4):
        serve(calls[i % 2], STREAMS[i % 2], [i], outputs)
    serve(DIRECT[runtime][2], STREAMS[2], [4], outputs)
    check(outputs, STREAMS)


def streams2_threads1_two_calls_in_a_capture(runtime: str) -> None:
    """They share an instance, and follow each other; a direct call has another."""
    outputs: dict[int, torch.Tensor] = {}
    call = Replayed(DIRECT[runtime][2], twice=True)
    serve(call, STREAMS[0], [0, 1], outputs)
    serve(DIRECT[runtime][2], STREAMS[1], [2], outputs)
    check(outputs, STREAMS[:2])


def streams2_threads2_two_captures(runtime: str) -> None:
    """Each thread captures, and replays what it captured."""
    outputs: dict[int, Any] = dict.fromkeys(range(2))
    calls: dict[int, Any] = dict.fromkeys(range(2))

    def work(i: int) -> None:
        calls[i] = Replayed(DIRECT[runtime][2])
        serve(calls[i], STREAMS[i], [i], outputs)

    together(lambda: work(0), lambda: work(1))
    check(outputs, STREAMS[:2])


def streams2_threads1_direct_call_then_capture(runtime: str) -> None:
    """The only instance goes from a direct call, which is still queued, to a capture."""
    outputs: dict[int, torch.Tensor] = {}
    serve(DIRECT[runtime][1], STREAMS[0], [0], outputs)
    call = Replayed(DIRECT[runtime][1])
    serve(call, STREAMS[1], [1], outputs)
    check(outputs, STREAMS[:2])


def streams2_threads2_direct_call_beside_a_capture(runtime: str) -> None:
    """The capture may find the only instance unused, in the hands of the other thread, or used by it."""
    outputs: dict[int, Any] = dict.fromkeys(range(2))
    calls: list[Any] = []

    def capture() -> None:
        calls.append(Replayed(DIRECT[runtime][1]))
        serve(calls[0], STREAMS[1], [1], outputs)

    together(lambda: serve(DIRECT[runtime][1], STREAMS[0], [0], outputs), capture)
    check(outputs, STREAMS[:2])


__all__ = ["DIRECT", "GRAPHS", "Replayed", "make", "together"]
