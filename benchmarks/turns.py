"""Systems that run on threads, timed in turn: what benchmarks of whole models on threads share."""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Call = Callable[[Any], Any]
Results = list[list[Any]]


class Crew:
    """Threads that live as long as the race, as a server's do, each with a stream and inputs of its own.

    Libraries prepare much once for each thread: of cuDNN, PyTorch keeps a plan of each convolution by thread.
    """

    def __init__(self, inputs: Sequence[Sequence[Any]]) -> None:
        self._inputs = inputs
        self._orders: list[queue.SimpleQueue[Callable[[int], None] | None]] = [queue.SimpleQueue() for _ in inputs]
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(len(inputs))]
        for thread in self._threads:
            thread.start()

    def _work(self, number: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            while (order := self._orders[number].get()) is not None:
                error: BaseException | None = None
                try:
                    order(number)
                except BaseException as e:
                    error = e
                self._done.put(error)

    def run(self, call: Call, seconds: float) -> tuple[float, Results]:
        """Calls a second of all threads, and the last result of each for each of its inputs. A thread looks at the
        device after every call."""
        results: Results = [[None] * len(mine) for mine in self._inputs]
        counts, over = [0] * len(self._inputs), threading.Event()

        def order(number: int) -> None:
            mine, turn = self._inputs[number], 0
            while not over.is_set() or turn < len(mine):
                results[number][turn % len(mine)] = call(mine[turn % len(mine)])
                torch.cuda.current_stream().synchronize()
                turn += 1
            counts[number] = turn

        began = time.perf_counter()
        for orders in self._orders:
            orders.put(order)
        time.sleep(seconds)  # what is measured: a length of time
        over.set()
        errors = [error for error in (self._done.get() for _ in self._orders) if error is not None]
        took = time.perf_counter() - began
        if errors:
            raise errors[0]
        return sum(counts) / took, results

    def close(self) -> None:
        for orders in self._orders:
            orders.put(None)
        for thread in self._threads:
            thread.join()


class Race:
    """Calls a second of systems, which take turns in rounds, in one order and then in the other."""

    def __init__(self, systems: Mapping[str, Call], crew: Crew) -> None:
        self._systems, self._crew = systems, crew
        #: Calls a second of each round.
        self.rates: dict[str, list[float]] = {name: [] for name in systems}

    def warm(self, seconds: float) -> None:
        """Run each of them, untimed, for what it does once for a thread and for a stream."""
        for call in self._systems.values():
            self._crew.run(call, seconds)

    def run(self, rounds: int, seconds: float, look: Callable[[str, Results], None]) -> None:
        """Time them, after :meth:`warm`; ``look`` gets the results of each system in each round."""
        for turn in range(rounds):
            for name in list(self._systems) if turn % 2 else list(self._systems)[::-1]:
                rate, results = self._crew.run(self._systems[name], seconds)
                self.rates[name].append(round(rate, 1))
                look(name, results)

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(rates) for name, rates in self.rates.items()}


@contextmanager
def race(systems: Mapping[str, Call], inputs: Sequence[Sequence[Any]]) -> Iterator[Race]:
    """A race of ``systems`` on as many threads as there are sets of ``inputs``."""
    crew = Crew(inputs)
    try:
        yield Race(systems, crew)
    finally:
        crew.close()
