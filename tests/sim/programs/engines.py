"""Programs for the explorer: one shared engine, called from threads on streams of their own.

Importing this module compiles the engines; each schedule starts from that state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

import anabranch
import anabranch.sim

SIM = torch.device("sim", 0)


class Scale(torch.nn.Module):
    """Wrong inputs give wrong outputs, and NaN stays NaN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * 2 + 1)


STREAMS = [torch.Stream(SIM) for _ in range(3)]
#: What each call gets, and what it must return.
SOURCES = [torch.arange(1.0, 5.0) + 10 * i for i in range(12)]
EXPECTED = [Scale()(x) for x in SOURCES]
INPUTS = [x.to(SIM) for x in SOURCES]


def make(runtime: str, contexts: int, graphs: bool = True) -> Any:
    """An engine with ``contexts`` execution contexts, built; without graphs it runs direct."""
    model, x = Scale().to(SIM), torch.empty(4, device=SIM)
    engine = anabranch.compile(model, [x], backend="eager", runtime=runtime, max_contexts=contexts, cuda_graphs=graphs)
    engine.warm(contexts=contexts)
    return engine


RUNTIMES = ("python", "native")
#: By runtime and number of contexts.
ENGINES = {runtime: {contexts: make(runtime, contexts) for contexts in (1, 2, 3)} for runtime in RUNTIMES}
DIRECT = {runtime: make(runtime, 1, graphs=False) for runtime in RUNTIMES}
torch.accelerator.synchronize()

Call = Callable[[torch.Tensor], torch.Tensor]


def serve(call: Call, stream: torch.Stream, indices: Sequence[int], outputs: dict[int, torch.Tensor]) -> None:
    """Calls from one thread on one stream: the input is made there and dropped right after the call."""
    with torch.no_grad(), stream:
        for i in indices:
            x = INPUTS[i] * 1
            outputs[i] = call(x)
            del x


def check(outputs: dict[int, torch.Tensor], streams: Sequence[torch.Stream]) -> None:
    for stream in streams:
        stream.synchronize()
    for i, y in sorted(outputs.items()):
        got = y.cpu()
        assert torch.equal(got, EXPECTED[i]), f"call {i} returned {got.tolist()}, expected {EXPECTED[i].tolist()}"


def one_thread(call: Call, calls: int, streams: int = 2) -> None:
    """One thread, its calls on the streams in turn."""
    outputs: dict[int, torch.Tensor] = {}
    for i in range(calls):
        serve(call, STREAMS[i % streams], [i], outputs)
    check(outputs, STREAMS[:streams])


def many_threads(call: Call, threads: int, calls: int) -> None:
    """Each thread on a stream of its own."""
    # Filled in advance: in the order in which threads would add to it, results would be dropped in the end.
    outputs: dict[int, Any] = dict.fromkeys(range(threads * calls))
    workers = [
        threading.Thread(target=serve, args=(call, STREAMS[t], range(t * calls, (t + 1) * calls), outputs))
        for t in range(threads)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    check(outputs, STREAMS[:threads])


def streams2_threads1_calls3_contexts1(runtime: str) -> None:
    one_thread(ENGINES[runtime][1], 3)


def streams2_threads1_calls3_contexts2(runtime: str) -> None:
    one_thread(ENGINES[runtime][2], 3)


def streams2_threads2_calls2_contexts1(runtime: str) -> None:
    many_threads(ENGINES[runtime][1], 2, 2)


def streams2_threads2_calls2_contexts2(runtime: str) -> None:
    many_threads(ENGINES[runtime][2], 2, 2)


def streams2_threads1_calls3_direct(runtime: str) -> None:
    one_thread(DIRECT[runtime], 3)


def streams2_threads2_calls2_direct(runtime: str) -> None:
    many_threads(DIRECT[runtime], 2, 2)


def streams3_threads3_calls1_contexts2(runtime: str) -> None:
    many_threads(ENGINES[runtime][2], 3, 1)


def streams3_threads3_calls1_contexts1(runtime: str) -> None:
    many_threads(ENGINES[runtime][1], 3, 1)


def streams3_threads3_calls2_contexts2(runtime: str) -> None:
    many_threads(ENGINES[runtime][2], 3, 2)


__all__ = ["DIRECT", "ENGINES", "STREAMS", "check", "make", "many_threads", "one_thread", "serve"]
