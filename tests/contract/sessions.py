"""What sessions promise, for whatever device the tier's ``rig`` is: state of its own for each, over one engine.

As ``clauses.py``, for models that keep state.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import anabranch
from contract.support import PATHS, ROUNDING, Make, Rig, assert_same, on_threads

WIDTH, LENGTH = 32, 8


class _Seeded(torch.nn.Module):
    """Layers with the same weights each time."""

    def __init__(self, **layers: torch.nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, layer in layers.items():
            self.add_module(name, layer)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


class Recurrent(_Seeded):
    """A cell whose last result is its state, replaced in each call."""

    h: torch.Tensor

    def __init__(self) -> None:
        super().__init__(both=torch.nn.Linear(2 * WIDTH, WIDTH))
        self.register_buffer("h", torch.linspace(-1, 1, WIDTH).repeat(2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.h = torch.tanh(self.both(torch.cat([x, self.h], 1)))
        return self.h


class Ring(_Seeded):
    """The last four inputs, and the place of the next one: an integer, which is an index."""

    last: torch.Tensor
    place: torch.Tensor

    def __init__(self) -> None:
        super().__init__(out=torch.nn.Linear(WIDTH, WIDTH))
        self.register_buffer("last", torch.full((4, WIDTH), 0.25))
        self.register_buffer("place", torch.tensor([1]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.last.index_copy_(0, self.place, x[:1])
        self.place.add_(1).remainder_(4)
        weights = torch.arange(1.0, 5.0, device=x.device)[:, None]
        return self.out(self.last) * weights, self.place * 1


class Streaming(_Seeded):
    """A causal convolution over chunks, of which the end of each is the next one's left context."""

    context: torch.Tensor

    def __init__(self) -> None:
        super().__init__(conv=torch.nn.Conv1d(2, 4, 5))
        self.register_buffer("context", torch.full((1, 2, 4), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunk = torch.cat([self.context, x.view(1, 2, WIDTH)], 2)
        self.context.copy_(chunk[:, :, -4:])
        return F.gelu(self.conv(chunk))


class Decoder(_Seeded):
    """One step of attention over caches of fixed length; the position is a tensor, and what lies behind is masked."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__(qkv=torch.nn.Linear(WIDTH, 3 * WIDTH), out=torch.nn.Linear(WIDTH, WIDTH))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.ones(1, 4, LENGTH, WIDTH // 4))
        self.register_buffer("places", torch.arange(LENGTH))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.view(1, 1, 4, WIDTH // 4).transpose(1, 2) for y in self.qkv(x[:1]).chunk(3, -1))
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        scores = q @ self.keys.transpose(2, 3) * (WIDTH // 4) ** -0.5
        scores = scores.masked_fill(self.places > at, float("-inf"))
        return self.out((scores.softmax(-1) @ self.values).transpose(1, 2).reshape(1, WIDTH))


MODELS = pytest.mark.parametrize("model", [Recurrent, Ring, Streaming, Decoder], ids=lambda model: model.__name__)
#: Where the kind of state does not matter.
Model = Recurrent
Inputs = list[tuple[torch.Tensor, ...]]


def series(rig: Rig, model: type[torch.nn.Module], calls: int) -> Inputs:
    """Inputs of so many calls, ready."""
    made: Inputs = []
    for i in range(calls):
        x = rig.random(2, WIDTH)
        made.append((x, torch.tensor([i % LENGTH], device=x.device)) if model is Decoder else (x,))
    rig.module.synchronize()
    return made


def alone(rig: Rig, engine: Any, *given: tuple[torch.Tensor, ...]) -> list[Any]:
    """What one session returns, with nothing beside it. Run before a latch closes: it loads kernels, also those for
    copies of the state and for ``assert_same``."""
    with engine.session() as session:
        results = [session(*x) for x in given]
        session.load(session.state)
        session.reset()
        session.clone().close()
    rig.module.synchronize()
    assert_same(results, results)
    return results


def _state(session: Any) -> Any:
    return session.state


def fill(inputs: tuple[torch.Tensor, ...], sources: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.copy_(y) for x, y in zip(inputs, sources, strict=True))


def poisoned(rig: Rig, stream: Any, sources: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Inputs that belong to ``stream``, with values that are not the call's."""
    with rig.module.stream(stream):
        inputs = tuple(torch.full_like(x, float("nan") if x.is_floating_point() else 0) for x in sources)
    rig.module.synchronize()
    return inputs


# -- each session is as if it was alone -------------------------------------------------------------------------------


@MODELS
@PATHS
def test_sessions_of_eight_threads_are_each_as_if_alone(
    rig: Rig, compiled: Make, backend: str, model: type[torch.nn.Module], graphs: bool
) -> None:
    threads, calls = 8, 20
    given = [series(rig, model, calls) for _ in range(threads)]
    eager = copy.deepcopy(model()).requires_grad_(False).to(rig.device())
    engine = compiled(model(), *given[0][0], cuda_graphs=graphs, max_contexts=2, backend=backend)
    expected = [alone(rig, engine, *inputs) for inputs in given]
    assert_same(expected[0], [eager(*x) for x in given[0]], rounding=ROUNDING)
    engine.warm(contexts=2)
    streams = [rig.stream() for _ in range(threads)]
    outputs: list[Any] = [None] * threads
    latch = rig.latch()

    def hold() -> None:
        rig.module.synchronize()
        for s in streams:
            latch.hold(s)

    ready = threading.Barrier(threads, hold, timeout=60)

    def work(i: int) -> None:
        with rig.module.stream(streams[i]):
            # As eager's, a first convolution of a thread makes a handle of cuDNN's, which waits for held streams.
            with engine.session() as session:
                session(*given[i][0])
            ready.wait()
            session = engine.session()
            outputs[i] = [session(*(x * 1 for x in inputs)) for inputs in given[i]]

    on_threads(threads, work)
    latch.open()
    rig.module.synchronize()
    for ours, theirs in zip(outputs, expected, strict=True):
        assert_same(ours, theirs)
    # The graphs are the engine's, however many sessions there are.
    assert engine.stats().contexts == (2 if graphs else 0)


@MODELS
@PATHS
def test_a_result_is_not_the_state_that_the_next_call_writes(
    rig: Rig, compiled: Make, model: type[torch.nn.Module], graphs: bool
) -> None:
    given = series(rig, model, 3)
    engine = compiled(model(), *given[0], cuda_graphs=graphs)
    expected = alone(rig, engine, *given)
    session = engine.session()
    first = session(*given[0])
    for y in torch.utils._pytree.tree_leaves(first):
        y.fill_(5)  # a caller's tensor
    assert_same([session(*x) for x in given[1:]], expected[1:])
    for y in torch.utils._pytree.tree_leaves(first):
        assert torch.equal(y, torch.full_like(y, 5))


# -- order ------------------------------------------------------------------------------------------------------------


@MODELS
@PATHS
def test_calls_of_a_session_follow_each_other_on_streams_in_turn(
    rig: Rig, compiled: Make, model: type[torch.nn.Module], graphs: bool
) -> None:
    given = series(rig, model, 6)
    engine = compiled(model(), *given[0], cuda_graphs=graphs)
    expected = alone(rig, engine, *given)
    engine.warm(contexts=3)
    held, free = rig.stream(), rig.stream()
    streams = [held, free] * 3
    inputs = [poisoned(rig, s, x) for s, x in zip(streams, given, strict=True)]
    session = engine.session()
    rig.module.synchronize()
    latch = rig.latch(held)
    outputs = []
    with rig.asks_nothing():
        for s, x, source in zip(streams, inputs, given, strict=True):
            with rig.module.stream(s):
                outputs.append(session(*fill(x, source)))
    done = free.record_event()
    rig.run_what_can()
    assert not done.query(), "the stream that nobody holds waits for the state that the held one is to write"
    latch.open()
    rig.module.synchronize()
    assert_same(outputs, expected)


@PATHS
def test_a_session_waits_for_no_other(rig: Rig, compiled: Make, graphs: bool) -> None:
    given = series(rig, Model, 3)
    engine = compiled(Model(), *given[0], cuda_graphs=graphs)
    expected = alone(rig, engine, *given)
    engine.warm(contexts=2)
    held, free = rig.stream(), rig.stream()
    sessions = [engine.session() for _ in range(2)]
    for s in (held, free):
        with rig.module.stream(s), engine.session() as other:
            other(*given[0])
    rig.module.synchronize()
    latch = rig.latch(held)
    with rig.module.stream(held):
        first = sessions[0](*given[0])
    with rig.module.stream(free):
        second = sessions[1](*given[0])
        free.synchronize()  # would never return if the one waited for the other
        assert_same(second, expected[0])
        more = [sessions[1](*x) for x in given[1:]]
    latch.open()
    rig.module.synchronize()
    assert_same([first, *more], expected)


@PATHS
def test_what_is_done_to_the_state_is_ordered_with_the_calls(rig: Rig, compiled: Make, graphs: bool) -> None:
    given = series(rig, Ring, 6)
    engine = compiled(Ring(), *given[0], cuda_graphs=graphs)
    expected = alone(rig, engine, *given[:4])
    anew = alone(rig, engine, *given[4:])
    engine.warm(contexts=4)
    held, b, c = rig.stream(), rig.stream(), rig.stream()
    session = engine.session()
    rig.module.synchronize()

    def on(stream: Any, work: Callable[[], Any]) -> Any:
        with rig.module.stream(stream):
            return work()

    latch = rig.latch(held)
    with rig.asks_nothing():
        first = [on(held, lambda: session(*given[0])), on(b, lambda: session(*given[1]))]
        saved = on(c, lambda: session.state)
        twin = on(b, session.clone)
        on(c, session.reset)
        again = [on(b, lambda: session(*given[4])), on(held, lambda: session(*given[5]))]
        of_twin = [on(c, lambda x=x: twin(*x)) for x in given[2:4]]
        c.wait_stream(held)  # the saved state is a tensor of stream c
        on(c, lambda: session.load(saved))
        more = [on(b, lambda: session(*given[2])), on(c, lambda: session(*given[3]))]
    events = [s.record_event() for s in (b, c)]
    rig.run_what_can()
    assert not any(e.query() for e in events)
    latch.open()
    rig.module.synchronize()
    assert_same([*first, *more], expected)
    assert_same(of_twin, expected[2:])
    assert_same(again, anew)


@PATHS
def test_another_session_goes_on_from_a_saved_state(rig: Rig, compiled: Make, graphs: bool) -> None:
    given = series(rig, Decoder, 4)
    engine = compiled(Decoder(), *given[0], cuda_graphs=graphs)
    expected = alone(rig, engine, *given)
    session = engine.session()
    begun = [session(*x) for x in given[:2]]
    saved = session.state
    assert sorted(saved) == ["keys", "values"], "what no call writes is no state"
    kept = {name: x.clone() for name, x in saved.items()}
    for state in (saved, {name: x.cpu() for name, x in saved.items()}):
        other = engine.session(state=state)
        assert_same([*begun, *(other(*x) for x in given[2:])], expected)
    assert_same([session(*x) for x in given[2:]], expected[2:])
    assert_same(saved, kept, "a copy, which no call writes")


# -- who goes while work is in flight ---------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("how", ["dropped", "closed"])
def test_a_session_goes_with_work_in_flight(rig: Rig, compiled: Make, graphs: bool, how: str) -> None:
    given = series(rig, Model, 3)
    engine = compiled(Model(), *given[0], cuda_graphs=graphs)
    expected = alone(rig, engine, *given)
    engine.warm(contexts=2)
    made_on, s = rig.stream(), rig.stream()
    with rig.module.stream(made_on):
        session = engine.session()
        like = session.state["h"]
    blocks = {x.data_ptr() for x in session._memory.tensors.values()}
    rig.module.synchronize()
    latch = rig.latch(s)
    with rig.module.stream(s):
        outputs = [session(*x) for x in given]
    if how == "closed":
        session.close()
    else:
        del session
        gc.collect()
    # Where the state's memory would come from first: nothing may overwrite it yet.
    with rig.module.stream(made_on):
        junk = [torch.full_like(like, float("nan")) for _ in range(20)]
    made_on.synchronize()
    assert blocks.isdisjoint(j.data_ptr() for j in junk)
    latch.open()
    s.synchronize()
    assert_same(outputs, expected)

    def comes_back() -> bool:
        with rig.module.stream(made_on):
            more = [torch.empty_like(like) for _ in range(20)]
        return blocks <= {x.data_ptr() for x in more}

    assert rig.comes_true(comes_back)
    if how == "closed":
        with pytest.raises(anabranch.SessionClosed, match=r"engine\.session\(\)"):
            session(*given[0])


@PATHS
def test_sessions_and_engine_go_with_a_reset_in_flight(rig: Rig, runtime: str, graphs: bool) -> None:
    with rig.new_lanes():
        assert_what_state_begins_as_stays(rig, runtime, graphs)


def assert_what_state_begins_as_stays(rig: Rig, runtime: str, graphs: bool) -> None:
    """Until copies of it that are queued have run, whoever goes meanwhile."""
    given = series(rig, Model, 2)
    # Made now: a stream cannot be made while another one is held.
    for scratch in [rig.seam.scratch(0) for _ in range(4)]:
        rig.seam.release_scratch(scratch)
    model = Model().eval().requires_grad_(False).to(rig.device())
    engine = anabranch.compile(model, list(given[0]), runtime=runtime, cuda_graphs=graphs, **rig.defaults)
    expected = alone(rig, engine, *given)
    block, like = engine._initial["h"].data_ptr(), engine._initial["h"].clone()
    s = rig.stream()
    session = engine.session()
    with rig.module.stream(s):
        session(*given[1])
        latch = rig.latch(s)
        session.reset()
        outputs = [session(*x) for x in given]
        begun = engine.session().state
    del session, engine
    gc.collect()

    def made_by_builds(n: int, make: Callable[[torch.Tensor], torch.Tensor]) -> set[int]:
        """Where other engines' state may come to be: on the streams that builds use."""
        made: list[torch.Tensor] = []
        scratches = [rig.seam.scratch(0) for _ in range(4)]
        for scratch in scratches:
            with rig.module.stream(scratch.stream):
                made += [make(like) for _ in range(n)]
            scratch.stream.synchronize()
        for scratch in scratches:
            rig.seam.release_scratch(scratch)
        return {x.data_ptr() for x in made}

    assert block not in made_by_builds(20, partial(torch.full_like, fill_value=float("nan")))
    latch.open()
    s.synchronize()
    assert_same(outputs, expected)
    assert_same(begun, {"h": like})
    # More than before, whose blocks may come first.
    assert rig.comes_true(lambda: block in made_by_builds(rig.small_blocks, torch.empty_like))


@PATHS
def test_an_engine_is_closed_with_calls_of_sessions_in_flight(rig: Rig, compiled: Make, graphs: bool) -> None:
    given = series(rig, Model, 3)
    engine = compiled(Model(), *given[0], cuda_graphs=graphs)
    expected = alone(rig, engine, *given[:2])
    session = engine.session()
    s = rig.stream()
    rig.module.synchronize()
    latch = rig.latch(s)
    with rig.module.stream(s):
        outputs = [session(*x) for x in given[:2]]
        engine.close()
        for work in (lambda: session(*given[2]), session.reset, session.clone, lambda: session.state, engine.session):
            with pytest.raises(anabranch.EngineClosed):
                work()
    latch.open()
    s.synchronize()
    assert_same(outputs, expected)
    session.close()
    with pytest.raises(anabranch.AnabranchError):
        session(*given[2])


# -- inside the caller's own capture ----------------------------------------------------------------------------------


@MODELS
@PATHS
def test_replays_go_on_from_the_state_that_they_find(
    rig: Rig, runtime: str, model: type[torch.nn.Module], graphs: bool
) -> None:
    given = series(rig, model, 8)
    module = model().eval().requires_grad_(False).to(rig.device())
    engine = anabranch.compile(module, list(given[0]), runtime=runtime, cuda_graphs=graphs, **rig.defaults)
    expected = alone(rig, engine, *given)
    engine.warm(captures=1)
    session = engine.session()
    outputs = [session(*given[0])]
    s = rig.stream()
    inputs = poisoned(rig, s, given[0])
    g = rig.new_graph()
    with rig.capture(g):
        for what in (engine.session, session.reset, session.clone, partial(session.load, {}), partial(_state, session)):
            with pytest.raises(anabranch.NotCapturable, match="outside"):
                what()
        result = session(*inputs)
    del what  # which has the session
    assert engine.stats().calls_in_captures == 1
    rig.module.synchronize()

    def replay(*sources: tuple[torch.Tensor, ...]) -> None:
        with rig.module.stream(s):
            for source in sources:
                fill(inputs, source)
                g.replay()
                outputs.append(torch.utils._pytree.tree_map(torch.clone, result))

    replay(given[1])
    s.synchronize()
    latch = rig.latch(s)
    replay(*given[2:4])
    rig.run_what_can()
    latch.open()
    s.synchronize()  # who replays orders that with what is outside
    outputs.append(session(*given[4]))
    rig.module.synchronize()
    replay(given[5])
    s.synchronize()
    # The graph keeps what it has baked in: the state, and the weights.
    del session, engine, module
    gc.collect()
    junk = [torch.full((2, WIDTH), float("nan"), device=rig.device()) for _ in range(50)]
    rig.module.synchronize()
    replay(*given[6:])
    s.synchronize()
    assert_same(outputs, expected)
    del junk


# -- errors -----------------------------------------------------------------------------------------------------------


def test_the_engine_of_a_model_that_keeps_state_is_not_called_itself(rig: Rig, compiled: Make) -> None:
    given = series(rig, Model, 1)
    engine = compiled(Model(), *given[0])
    (expected,) = alone(rig, engine, *given)
    s = rig.stream()
    with rig.module.stream(s), rig.nothing_queued(s):
        given[0][0].new_empty(4)  # of which a trace tells; it queues nothing
        with pytest.raises(anabranch.NeedsSession, match=r"engine\.session\(\)"):
            engine(*given[0])
    assert_same(engine.session()(*given[0]), expected)


def test_a_second_thread_gets_an_error_and_the_first_goes_on(rig: Rig, compiled: Make) -> None:
    given = series(rig, Model, 3)
    engine = compiled(Model(), *given[0])
    expected = alone(rig, engine, *given)
    session = engine.session()
    saved, outputs = session.state, list[Any]()
    amid, seen = threading.Barrier(2, timeout=60), list[str]()
    first_calls = engine._first().calls

    def stops(leaves: Sequence[Any], state: Sequence[torch.Tensor]) -> Any:
        amid.wait()  # the other's turn
        amid.wait()
        return first_calls(leaves, state)

    def first() -> None:
        with rig.module.stream(rig.stream()):
            outputs.extend(session(*x) for x in given)

    def second() -> None:
        s = rig.stream()
        for _ in given:
            amid.wait()
            with rig.module.stream(s):
                works = (lambda: session(*given[2]), session.reset, session.clone, lambda: session.state)
                for work in (*works, lambda: session.load(saved)):
                    try:
                        work()
                    except anabranch.SessionBusy as e:
                        seen.append(str(e))
            seen.append("idle" if s.query() else "something was queued")
            amid.wait()

    engine._first().calls = stops
    try:
        on_threads(2, lambda i: (first, second)[i]())
    finally:
        engine._first().calls = first_calls
    rig.module.synchronize()
    assert_same(outputs, expected)
    assert len(seen) == 6 * len(given)
    assert all("in use by another call" in said or said == "idle" for said in seen), seen


@PATHS
@pytest.mark.parametrize("mend", ["reset", "load"])
def test_a_call_that_fails_in_the_middle_breaks_its_session_alone(
    rig: Rig, compiled: Make, graphs: bool, mend: str
) -> None:
    given = series(rig, Model, 4)
    engine = compiled(Model(), *given[0], cuda_graphs=graphs)
    expected = alone(rig, engine, *given)
    anew = alone(rig, engine, *given[2:])
    engine.warm(contexts=2)
    session, other = engine.session(), engine.session()
    s = rig.stream()
    calls = engine._first().calls

    def breaks(leaves: Sequence[Any], state: Sequence[torch.Tensor]) -> Any:
        calls(leaves, state)  # which is queued
        raise RuntimeError("planted")

    elsewhere = given[0][0].cpu()
    rig.module.synchronize()
    latch = rig.latch(s)
    with rig.module.stream(s):
        outputs = [session(*x) for x in given[:2]]
        saved = session.state
        for x in (elsewhere, "x"):  # raised before anything is queued: it is whole
            with pytest.raises(anabranch.InputError):
                session(x)
        engine._first().calls = breaks
        try:
            with pytest.raises(RuntimeError, match="planted"):
                getattr(session, "_call", session)(*given[3])  # in Python, where it was planted
        finally:
            engine._first().calls = calls
        for work in (lambda: session(*given[2]), session.clone, lambda: session.state):
            with pytest.raises(anabranch.SessionBroken, match=r"planted.*reset"):
                work()
        others = [other(*x) for x in given]
        with pytest.raises(anabranch.InputError):
            session.load({})
        with pytest.raises(anabranch.SessionBroken, match="planted"):
            session(*given[2])
        if mend == "reset":
            session.reset()
        else:
            session.load(saved)
        more = [session(*x) for x in given[2:]]
    latch.open()
    s.synchronize()
    assert_same([*outputs, *more], [*expected[:2], *(anew if mend == "reset" else expected[2:])])
    assert_same(others, expected)


__all__ = sorted(name for name in dict(globals()) if name.startswith("test_"))
