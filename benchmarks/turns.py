"""Systems that run on threads, timed in turn: what benchmarks of whole models on threads share."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[Any], Any]


def on_threads(
    call: Call, inputs: Sequence[Sequence[Any]], streams: Sequence[Any], seconds: float
) -> tuple[float, list[list[Any]]]:
    """Calls a second of all threads, and the last result of each thread for each of its inputs.

    A thread has a stream, and inputs of its own, and looks at the device after every call.
    """
    results: list[list[Any]] = [[None] * len(mine) for mine in inputs]
    counts, start, over = [0] * len(inputs), threading.Barrier(len(inputs) + 1), threading.Event()
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(streams[number]):
                start.wait()
                turn = 0
                while not over.is_set() or turn < len(inputs[number]):
                    results[number][turn % len(inputs[number])] = call(inputs[number][turn % len(inputs[number])])
                    torch.cuda.current_stream().synchronize()
                    turn += 1
                counts[number] = turn
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(inputs))]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    time.sleep(seconds)  # what is measured: a length of time
    over.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counts) / (time.perf_counter() - began), results


@dataclass
class Race:
    """Calls a second of systems, which take turns in rounds, in one order and then in the other."""

    systems: Mapping[str, Call]
    inputs: Sequence[Sequence[Any]]
    streams: Sequence[Any] = ()
    #: Calls a second of each round.
    rates: dict[str, list[float]] = field(default_factory=dict)

    def warm(self, seconds: float) -> None:
        """Run each of them, untimed, for what it does once for a thread and for a stream."""
        self.streams = self.streams or [torch.cuda.Stream() for _ in self.inputs]
        for call in self.systems.values():
            on_threads(call, self.inputs, self.streams, seconds)

    def run(self, rounds: int, seconds: float, look: Callable[[str, list[list[Any]]], None]) -> None:
        """Time them, after :meth:`warm`; ``look`` gets the results of each system in each round."""
        self.rates = {name: [] for name in self.systems}
        for turn in range(rounds):
            for name in list(self.systems) if turn % 2 else list(self.systems)[::-1]:
                rate, results = on_threads(self.systems[name], self.inputs, self.streams, seconds)
                self.rates[name].append(round(rate, 1))
                look(name, results)

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(rates) for name, rates in self.rates.items()}
