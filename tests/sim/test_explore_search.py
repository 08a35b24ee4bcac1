"""The reduction is sound: on random programs it covers every Mazurkiewicz trace that all schedules together have."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from explore_model import Model, random_model, trace_of

from anabranch.explore._dependence import Step
from anabranch.explore._run import Run
from anabranch.explore._search import Unreduced, search

LIMIT = 2500


class Seen:
    """Runs a model and notes what came out: outcomes, and the traces as sets of steps with what precedes each."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.outcomes: set[str] = set()
        self.traces: set[frozenset[object]] = set()

    def run(self, prefix: Sequence[str], sleep: dict[str, Step]) -> Run:
        run = self._model.run(prefix, sleep)
        if run.end != "cut":
            self.outcomes.add(run.outcome)
            self.traces.add(trace_of(run))
        return run


def _everything(model: Model) -> Seen | None:
    """None if it has more schedules than the limit."""
    seen, walk = Seen(model), Unreduced()
    while (prefix := walk.next()) is not None:
        if walk.given > LIMIT:
            return None
        walk.take(seen.run(prefix, {}))
    return seen


@pytest.mark.parametrize("part", range(4))
def test_every_trace_of_random_programs_is_covered(part: int) -> None:
    compared = runs = traces = 0
    for seed in range(80 * part, 80 * (part + 1)):
        model = random_model(seed)
        everything = _everything(model)
        if everything is None:
            continue
        reduced = Seen(model)
        walk = search(reduced.run)
        assert walk.finished
        assert reduced.outcomes == everything.outcomes, (seed, model.threads)
        assert reduced.traces == everything.traces, (seed, model.threads)
        compared += 1
        runs += walk.runs
        traces += len(everything.traces)
    assert compared > 60
    # Of source-DPOR one hopes for about one run a trace; the rest are cut, or repetitions.
    assert runs <= 1.05 * traces


def test_a_limit_leaves_the_tree_unfinished() -> None:
    model = Model({f"T{i}": [("write", "a")] for i in range(3)})
    assert search(Seen(model).run).runs == 6
    assert not search(Seen(model).run, limit=5).finished


@pytest.mark.parametrize(
    ("threads", "traces"),
    [
        ({"T0": [("write", "a")], "T1": [("write", "b")]}, 1),
        ({"T0": [("write", "a")], "T1": [("write", "a")]}, 2),
        ({f"T{i}": [("write", "a")] for i in range(4)}, 24),
        ({f"T{i}": [("add", "a")] for i in range(4)}, 1),
        ({"T0": [("write", "a")], "T1": [("read", "a")], "T2": [("read", "a")]}, 4),
        ({f"T{i}": [("acquire", "a"), ("write", "x"), ("release", "a")] for i in range(3)}, 6),
        # Whoever takes the first lock first: two orders; the deadlock is a third.
        (
            {
                "T0": [("acquire", "a"), ("acquire", "b"), ("release", "b"), ("release", "a")],
                "T1": [("acquire", "b"), ("acquire", "a"), ("release", "a"), ("release", "b")],
            },
            3,
        ),
        # Tried before the acquire, while it is held, after the release.
        ({"T0": [("try", "a"), ("release", "a")], "T1": [("acquire", "a"), ("release", "a")]}, 3),
        ({"T0": [("wait", "f"), ("read", "a")], "T1": [("write", "a"), ("set", "f")]}, 1),
        ({"T0": [("wait", "f")], "T1": [("set", "f"), ("clear", "f")]}, 2),
        # A copy of pinned memory is before, between or after the two steps of the other thread.
        ({"T0": [("push", ("s1", "o", "a", True))], "T1": [("write", "a"), ("write", "b")]}, 3),
    ],
)
def test_number_of_traces(threads: dict[str, list[tuple[str, object]]], traces: int) -> None:
    seen = Seen(Model(threads))
    walk = search(seen.run)
    assert len(seen.traces) == traces
    assert walk.runs - walk.cut == traces
