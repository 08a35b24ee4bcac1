"""Programs for the explorer: engines of models that ``torch.export`` refuses: graphs, with Python between them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import engines
import torch
from engines import RUNTIMES, SIM, SOURCES, many_threads, one_thread

import anabranch

sys.path.insert(0, str(Path(__file__).parents[2]))
from contract.support import has_memory

# Explored programs have one, and Dynamo guards how many there are: it would trace again, with a lock of its own held.
torch.set_num_threads(1)


class Broken(torch.nn.Module):
    """A graph, Python that looks at no value, a graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(x * 2 + 1)
        h = h if has_memory(h) else h + 1
        return torch.relu(h * 3 - 1)


#: Engines that models call, by runtime and limit: the one that each model is compiled into.
INNER: dict[Any, Any] = {}


@torch.compiler.disable
def _inner(key: Any, x: torch.Tensor) -> torch.Tensor:
    """What the engine gives that calls itself no more; by hand before there is one. Dynamo has no guards on it here."""
    inner = INNER.get(key)
    return inner(x, False) if inner is not None else torch.relu(torch.relu(x * 2 + 1) * 3 - 1)


class Recursive(torch.nn.Module):
    """Calls its own engine between two graphs, once. Of the same size, so that all of its graphs have engines."""

    def __init__(self, key: Any = None) -> None:
        super().__init__()
        self.key = key

    def forward(self, x: torch.Tensor, again: bool = True) -> torch.Tensor:
        h = torch.relu(x * 2 + 1)
        h = h if has_memory(h) else h + 1
        if again:
            h = h + _inner(self.key, x)
        return torch.relu(h * 3 - 1)


def make(model: type[Any], runtime: str, limit: int) -> Any:
    """An engine with as many contexts as ``limit`` lets it have, built."""
    key = (model, runtime, limit)
    x = torch.arange(4.0).to(SIM)
    with torch.no_grad():
        made = model(key) if model is Recursive else model()
        engine = anabranch.compile(
            made.to(SIM), [x], backend="eager", runtime=runtime, max_contexts=limit, cuda_graphs=True
        )
        INNER[key] = engine
        for _ in range(12):  # until all graphs have their engines
            engine(x + 1)
            if model is Recursive:
                engine(x + 1, False)
        engine.warm(contexts=limit)
    # Else the explorer would see operators, and no context.
    assert not any(graph["by_operators"] for graph in engine.summary()["fragments"]["graphs"])
    assert engine.stats().captures
    return engine


ENGINES = {
    (model, runtime, limit): make(model, runtime, limit)
    for model in (Broken, Recursive)
    for runtime in RUNTIMES
    for limit in (1, 2)
}
EXPECTED = {model: [model()(x) for x in SOURCES] for model in (Broken, Recursive)}
torch.accelerator.synchronize()


def _run(model: Any, runtime: str, limit: int, threads: int, calls: int) -> None:
    engines.EXPECTED = EXPECTED[model]
    call = ENGINES[model, runtime, limit]
    if threads == 1:
        one_thread(call, calls)
    else:
        many_threads(call, threads, calls)


def broken_threads1_calls3(runtime: str, limit: int) -> None:
    _run(Broken, runtime, limit, 1, 3)


def broken_threads2_calls2(runtime: str, limit: int) -> None:
    _run(Broken, runtime, limit, 2, 2)


def broken_threads2_calls1(runtime: str, limit: int) -> None:
    _run(Broken, runtime, limit, 2, 1)


def recursive_threads1_calls2(runtime: str, limit: int) -> None:
    _run(Recursive, runtime, limit, 1, 2)


def recursive_threads2_calls1(runtime: str, limit: int) -> None:
    _run(Recursive, runtime, limit, 2, 1)


__all__ = ["ENGINES", "Broken", "Recursive"]
