"""Calls of models in fragments under every interleaving: graphs with Python between, and a model in its own engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from contract.support import has_memory

PROGRAMS = "fragments"


def _explored(programs: Any, program: str, runtime: str, limit: int, schedules: int) -> Any:
    from anabranch.sim import explore

    verdict = explore(getattr(programs, program), args=(runtime, limit), schedules=schedules)
    assert not verdict.failed, verdict.report()
    assert len(verdict.outcomes) == 1
    return verdict


def _slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# How many schedules are not equivalent; see `test_runtime.py`. Each takes 0.1 to 0.15 s of CPU time: a process with
# Dynamo in it is forked. PyTorch 2.13 traces a graph anew there, and finds the one that is there with its engine.
@pytest.mark.parametrize(
    ("program", "runtime", "limit", "schedules"),
    [
        *(
            (p, r, n, 1)
            for p in ("broken_threads1_calls3", "recursive_threads1_calls2")
            for r in ("python", "native")
            for n in (1, 2)
        ),
        ("broken_threads2_calls1", "python", 1, 4),
        ("broken_threads2_calls1", "native", 1, 8),
        ("broken_threads2_calls1", "python", 2, 20),
        _slow("broken_threads2_calls1", "native", 2, 64),
        ("broken_threads2_calls2", "python", 1, 28),
        _slow("broken_threads2_calls2", "python", 2, 608),
        _slow("recursive_threads2_calls1", "python", 1, 28),
    ],
)
def test_every_interleaving(programs: Any, program: str, runtime: str, limit: int, schedules: int) -> None:
    verdict = _explored(programs, program, runtime, limit, 2000)
    assert verdict.kind == "exhaustive"
    assert verdict.schedules == schedules


# Of the native runtime, 1,452 and 1,742 schedules are not equivalent, which takes four minutes each.
@pytest.mark.parametrize(
    ("program", "runtime", "schedules"),
    [
        ("recursive_threads2_calls1", "python", 30),
        _slow("recursive_threads2_calls1", "native", 500),
        _slow("broken_threads2_calls2", "native", 500),
    ],
)
def test_many_interleavings_with_one_context(programs: Any, program: str, runtime: str, schedules: int) -> None:
    _explored(programs, program, runtime, 1, schedules)


# -- nobody waits for a context whose holder runs Python -------------------------------------------------------------


class Meets(torch.nn.Module):
    """Between its graphs each call waits for another thread's call to be there, too."""

    barrier: threading.Barrier | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(x * 2 + 1)
        h = h if has_memory(h) else h + 1
        self.meet()
        return torch.relu(h * 3 - 1)

    @torch.compiler.disable
    def meet(self) -> None:
        if Meets.barrier is not None:
            Meets.barrier.wait(timeout=5)


def _two_calls_meet(programs: Any, engine: Any, ended: Callable[[], object] = lambda: None) -> list[BaseException]:
    """What goes wrong in two calls from two threads that wait for each other. ``ended``: called after each."""
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with torch.no_grad(), torch.Stream(programs.SIM):
                x = torch.arange(4.0).to(programs.SIM) + number
                y = engine(x)
                torch.accelerator.current_stream().synchronize()
                assert torch.equal(y, torch.relu(torch.relu(x * 2 + 1) * 3 - 1))
        except BaseException as e:
            errors.append(e)
        finally:
            ended()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    Meets.barrier = threading.Barrier(2)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        Meets.barrier = None
    return errors


def _engine(programs: Any, runtime: str) -> Any:
    import anabranch

    torch._dynamo.reset()
    x = torch.arange(4.0).to(programs.SIM)
    with torch.no_grad():
        made = Meets().eval().to(programs.SIM)
        engine = anabranch.compile(made, [x], backend="eager", runtime=runtime, max_contexts=1, cuda_graphs=True)
    assert engine.stats().contexts == 1
    return engine


@pytest.mark.parametrize("runtime", ["python", "native"])
def test_no_call_waits_for_a_context_whose_holder_runs_python(programs: Any, runtime: str) -> None:
    assert _two_calls_meet(programs, _engine(programs, runtime)) == []


def test_a_context_kept_across_python_is_found(programs: Any) -> None:
    engine = _engine(programs, "python")
    (first,) = (e for e in engine._guarded.engines() if e.is_captured)
    pool: Any = first._first().calls._pool
    release, kept = pool.release, []
    pool.release = kept.append  # the mutant: it is kept until the call as a whole has ended
    outcome = _two_calls_meet(programs, engine, lambda: [release(kept.pop()) for _ in list(kept)])
    assert any(isinstance(e, threading.BrokenBarrierError) for e in outcome)
