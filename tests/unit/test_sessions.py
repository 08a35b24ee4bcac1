"""Sessions: state of its own for each series of calls, over one engine; and inputs that a call writes into.

What needs streams is in ``tests/sim`` and ``tests/contract``; which programs a model that writes becomes, in
``test_state_export.py``.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_of import Model
from torch import nn
from torch.nn import functional as F

import anabranch
import anabranch.dynamo
from anabranch import Dim, Input
from anabranch.runtime._builder import Builder
from anabranch.runtime._phases import Clock
from anabranch.runtime._unit import Unit
from contract.support import ROUNDING, assert_same, on_threads

BACKENDS = pytest.mark.parametrize("backend", ["eager", "inductor"])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + sum(shape) + 1))


def with_weights(model: nn.Module, seed: int = 5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()


class Recurrent(nn.Module):
    """Its state is assigned, and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 6)
        self.register_buffer("h", drawn(2, 6, seed=9))

    def forward(self, x: torch.Tensor) -> Any:
        self.h = self.cell(x, self.h)
        return self.h, self.h.sum()


class Ring(nn.Module):
    """The last five inputs; where the next one goes is state, too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(5, 4))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last.index_copy_(0, self.at, x[:1])
        self.at.add_(1).remainder_(5)
        return self.last.cumsum(0)


class Streaming(nn.Module):
    """A causal convolution over chunks of a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 4)
        self.register_buffer("before", torch.zeros(1, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.before, x], 2)
        self.before.copy_(x[:, :, -3:])
        return self.conv(x)


class Decoder(nn.Module):
    """Attention over a cache of fixed length, filled by prompts and by single steps."""

    LENGTH = 16

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        for name in ("k", "v"):
            self.register_buffer(name, torch.zeros(1, 2, self.LENGTH, 4))
        self.register_buffer("length", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        at = self.length + torch.arange(n)
        q, k, v = (y.view(1, n, 2, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        self.k.index_copy_(2, at, k)
        self.v.index_copy_(2, at, v)
        self.length.add_(n)
        mask = torch.arange(self.LENGTH)[None] <= at[:, None]
        y = F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(1, n, 8))


#: How each is made, the shape of its input, and the names of its state.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "recurrent": (Recurrent, (2, 4), {"h"}),
    "ring buffer": (Ring, (2, 4), {"last", "at"}),
    "streaming convolution": (Streaming, (1, 2, 5), {"before"}),
    "decoder": (Decoder, (1, 1, 8), {"k", "v", "length"}),
}


def made(name: str, backend: str = "eager", **options: Any) -> tuple[Any, nn.Module, tuple[int, ...]]:
    make, shape, _ = MODELS[name]
    model = with_weights(make())
    return anabranch.compile(model, [drawn(*shape)], backend=backend, **options), model, shape


def ring(**options: Any) -> Any:
    return made("ring buffer", **options)[0]


def in_eager(model: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*inputs, **kwargs)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.named_buffers()}


# -- results and state -------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("name", MODELS)
def test_calls_go_on_from_one_another_as_in_eager(runtime: str, backend: str, name: str) -> None:
    engine, model, shape = made(name, backend)
    rounding = None if backend == "eager" else ROUNDING
    before, eager = buffers(model), copy.deepcopy(model)
    session, other = engine.session(), engine.session()
    inputs = [drawn(*shape, seed=k) for k in range(7)]
    results = []
    for k, x in enumerate(inputs):
        results.append(session(x))
        assert_same(results[-1], in_eager(eager, x), f"call {k}", rounding=rounding)
    held = buffers(eager)
    assert session.state.keys() == MODELS[name][2]
    assert_same(session.state, {n: held[n] for n in session.state}, rounding=rounding)
    assert_same(buffers(model), before, "the user's model")
    assert_same(other.state, {n: before[n] for n in other.state}, "another session")
    session.reset()
    assert_same(session.state, {n: before[n] for n in session.state}, "after a reset")
    assert_same([session(x) for x in inputs], results, "the same calls again")
    assert engine.stats().calls == 14


def test_what_is_returned_is_never_the_state() -> None:
    engine, _, shape = made("recurrent")
    session = engine.session()
    first, _ = session(drawn(*shape))
    kept = first.clone()
    first.zero_()
    assert_same(session.state["h"], kept)
    state = session.state
    session(drawn(*shape, seed=1))
    assert_same(state["h"], kept, "what `state` gave is a copy")
    assert "output 0 is the state 'h': a copy of it is returned" in engine.explain()


def test_a_clone_goes_on_from_where_the_session_is(runtime: str) -> None:
    engine, _, shape = made("decoder")
    session = engine.session()
    for k in range(3):
        session(drawn(*shape, seed=k))
    clone = session.clone()
    assert_same(clone.state, session.state)
    ours, theirs = ([s(drawn(*shape, seed=k)) for k in range(4, 7)] for s in (session, clone))
    assert_same(ours, theirs)
    clone.reset()
    assert session.state["length"] == 6
    assert clone.state["length"] == 0
    session.close()
    clone(drawn(*shape))


def test_a_state_is_saved_and_loaded(runtime: str) -> None:
    engine, _, shape = made("decoder")
    session = engine.session()
    for k in range(3):
        session(drawn(*shape, seed=k))
    file = io.BytesIO()
    torch.save(session.state, file)
    expected = [session(drawn(*shape, seed=k)) for k in (5, 6)]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    session.load(saved)
    assert_same([session(drawn(*shape, seed=k)) for k in (5, 6)], expected)
    another, _, _ = made("decoder")
    for new in (another.session(saved), another.session(state=dict(reversed(saved.items())))):
        assert_same([new(drawn(*shape, seed=k)) for k in (5, 6)], expected)
    new.reset()
    assert new.state["length"] == 0, "a reset is to the model's own state, not to what it began from"
    for x in saved.values():
        x.zero_()
    assert session.state["length"] == 5


LOADS: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (lambda state: {"last": state["last"]}, "state 'at' is missing; expected 'last', 'at'"),
    (lambda state: {**state, "new": torch.zeros(1)}, "state 'new' is none of the model's"),
    (lambda state: {**state, "at": torch.zeros(2, dtype=torch.long)}, r"'at' is torch.int64 of shape \(2,\); expected"),
    (lambda state: {**state, "last": torch.zeros(5, 4).double()}, "'last' is torch.float64 .* expected torch.float32"),
    (lambda state: {**state, "at": 3}, "state 'at' is a int; expected a tensor"),
    (lambda state: list(state.values()), "a list was given; expected a dict"),
]


@pytest.mark.parametrize(("change", "message"), LOADS)
def test_what_is_no_state_of_the_model_is_not_loaded(change: Callable[..., Any], message: str) -> None:
    engine = ring()
    session = engine.session()
    session(drawn(2, 4))
    state = session.state
    with pytest.raises(anabranch.InputError, match=message):
        session.load(change(state))
    assert_same(session.state, state)
    session(drawn(2, 4))
    with pytest.raises(anabranch.InputError, match=message):
        engine.session(change(state))


@pytest.mark.parametrize("name", MODELS)
def test_sessions_on_many_threads_are_as_one_alone(runtime: str, name: str) -> None:
    engine, _, shape = made(name)
    sessions = [engine.session() for _ in range(8)]
    results: list[list[Any]] = [[] for _ in sessions]
    barrier = threading.Barrier(len(sessions))

    def work(i: int) -> None:
        barrier.wait(30)
        for k in range(10):
            results[i].append(sessions[i](drawn(*shape, seed=20 * i + k)))

    on_threads(len(sessions), work)
    for i, session in enumerate(sessions):
        alone = engine.session()
        assert_same(results[i], [alone(drawn(*shape, seed=20 * i + k)) for k in range(10)], f"session {i}")
        assert_same(session.state, alone.state)


def test_compiled_sessions_on_many_threads_are_as_one_alone() -> None:
    engine, _, shape = made("decoder", "inductor")
    sessions = [engine.session() for _ in range(8)]
    results: list[list[Any]] = [[] for _ in sessions]

    def work(i: int) -> None:
        for k in range(10):
            results[i].append(sessions[i](drawn(*shape, seed=20 * i + k)))

    on_threads(len(sessions), work)
    for i in range(len(sessions)):
        alone = engine.session()
        assert_same(results[i], [alone(drawn(*shape, seed=20 * i + k)) for k in range(10)], f"session {i}")


def test_one_session_may_move_from_thread_to_thread(runtime: str) -> None:
    engine, model, shape = made("recurrent")
    session, lock = engine.session(), threading.Lock()

    def work(i: int) -> None:
        for _ in range(5):
            with lock:
                session(torch.ones(shape))

    on_threads(4, work)
    for _ in range(20):
        in_eager(model, torch.ones(shape))
    assert_same(session.state["h"], model.h)


# -- the engine itself, and the model ----------------------------------------------------------------------------------


def test_the_engine_of_a_model_with_state_is_not_called_itself(runtime: str) -> None:
    engine = ring()
    for _ in range(2):
        with pytest.raises(anabranch.NeedsSession, match=r"keeps state \('last', 'at'\).*engine\.session\(\)") as error:
            engine(drawn(2, 4))
        assert "eval()" not in str(error.value)
    with pytest.raises(anabranch.SessionError):
        engine(drawn(7, 4))
    engine.session()(drawn(2, 4))


def test_batch_normalization_in_training_mode_gets_a_hint(runtime: str) -> None:
    norm = nn.Sequential(nn.BatchNorm1d(4)).train()
    engine = anabranch.compile(norm, [drawn(6, 4)], backend="eager")
    with pytest.raises(anabranch.NeedsSession, match=r"Call model\.eval\(\) first if that was not meant\."):
        engine(drawn(6, 4))
    session, eager = engine.session(), copy.deepcopy(norm)
    for k in range(3):
        assert_same(session(drawn(6, 4, seed=k)), in_eager(eager, drawn(6, 4, seed=k)))
    assert_same(session.state, buffers(eager))
    assert norm[0].num_batches_tracked == 0


def test_a_model_without_state_has_sessions_that_do_as_the_engine_does(runtime: str) -> None:
    model = with_weights(nn.Linear(4, 3))
    engine = anabranch.compile(model, [drawn(2, 4)], backend="eager")
    with engine.session() as session:
        assert_same(session(drawn(2, 4)), engine(drawn(2, 4)))
        assert session.state == {}
        session.load({})
        session.reset()


def test_the_model_and_its_sessions_are_apart(runtime: str) -> None:
    """The user's buffers are not written, and what is written into them later is not the sessions'."""
    engine, model, shape = made("recurrent")
    model.h.fill_(3.0)
    early, initial = engine.session(), drawn(2, 6, seed=9)
    assert_same(early.state["h"], initial)
    with torch.no_grad():
        model.cell.weight_hh.mul_(0.5)  # weights are in common, as of every engine
    eager = copy.deepcopy(model)
    eager.h.copy_(initial)
    for k in range(3):
        assert_same(early(drawn(*shape, seed=k)), in_eager(eager, drawn(*shape, seed=k)))
    assert (model.h == 3.0).all()
    late = engine.session()
    assert_same(late.state["h"], initial)
    model.load_state_dict({k: torch.zeros_like(x) for k, x in model.state_dict().items()})
    late.reset()
    assert_same(late.state["h"], initial)


def test_a_copy_of_a_model_is_compiled_like_the_model() -> None:
    model = with_weights(Recurrent())
    in_eager(model, drawn(2, 4))  # its buffer is now a result of an operator
    engine = anabranch.compile(copy.deepcopy(model), [drawn(2, 4)], backend="eager")
    session = engine.session()
    assert_same(session.state["h"], model.h)
    assert_same(session(drawn(2, 4, seed=1)), in_eager(model, drawn(2, 4, seed=1)))


def test_a_counter_of_pythons_is_still_refused() -> None:
    def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.h.add_(x)
        return self.h * self.calls

    model = Model(counted, h=torch.zeros(3))
    model.calls = 0
    with pytest.raises(anabranch.UnsupportedModel, match="calls"):
        anabranch.compile(model, [drawn(3)], backend="eager")
    assert not model.h.any()
    assert model.calls == 0


def test_a_thousand_sessions_are_a_thousand_states() -> None:
    engine, _, shape = made("decoder")
    engine.session()(drawn(*shape))

    def tensors() -> list[torch.Tensor]:
        gc.collect()
        return [x for x in gc.get_objects() if type(x) is torch.Tensor]

    before = len(tensors())
    sessions = [engine.session() for _ in range(1000)]
    for session in sessions[::100]:
        session(drawn(*shape))
    assert len(tensors()) == before + 3 * 1000
    assert len({x.data_ptr() for s in sessions for x in s._memory.tensors.values()}) == 3000
    sizes = {sum(x.untyped_storage().nbytes() for x in s._memory.tensors.values()) for s in sessions}
    assert sizes == {2 * 2 * 16 * 4 * 4 + 8}
    assert f"{sizes.pop()} bytes of state" in repr(session)
    del session, sessions
    assert len(tensors()) == before


@pytest.mark.parametrize("name", list(MODELS))
def test_what_is_measured_of_a_direct_call_computes(runtime: str, name: str) -> None:
    """Also where the C++ leaves a call to Python, since it writes state, and numerics flags decide how."""
    engine, _, shape = made(name)
    (of_one,) = engine._table
    with of_one.calls.trying_direct() as direct:
        results = direct([drawn(*shape), *(s.initial.clone() for s in of_one.unit.program.state)])
    assert results
    assert all(bool(x.any()) for x in results)
    assert engine.stats().calls == 0


def test_explain_tells_of_state_and_writes(runtime: str) -> None:
    text = ring().explain()
    assert f"  state of a session: last, at; {5 * 4 * 4 + 8} bytes" in text
    assert "writes into what it is given" not in text
    assert "  copies " not in text, "a ring buffer is written in place"

    def both(self: Any, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        y.add_(x)
        z.mul_(2)
        self.h.add_(y)
        return self.h + 1

    engine = anabranch.compile(Model(both, h=torch.zeros(3)), [drawn(3) for _ in range(3)], backend="eager")
    assert "  writes into what it is given: input 1, input 2" in engine.explain()
    assert "  state of a session: h; 12 bytes" in engine.explain()


def test_explain_tells_what_operators_copy(runtime: str) -> None:
    engine, _, _ = made("recurrent")
    assert "  copies 48 bytes of state a call: it is not all computed where it lies" in engine.explain()
    turned = engine_for(lambda self, x: x.copy_(x.flip(0)), drawn(3, 4))
    assert "  copies 48 bytes of what it writes a call" in turned.explain()


def test_a_summary_tells_of_state_and_writes(runtime: str) -> None:
    engine = ring(dynamic=False)
    engine.session()(drawn(3, 4))
    first, second = engine.summary()["signatures"]
    assert (
        first["state"]
        == second["state"]
        == [
            {"name": "last", "shape": [5, 4], "dtype": "float32", "bytes": 80},
            {"name": "at", "shape": [1], "dtype": "int64", "bytes": 8},
        ]
    )
    assert first["writes"] == []
    (plain,) = anabranch.compile(nn.ReLU(), [drawn(3)], backend="eager").summary()["signatures"]
    assert plain["state"] == plain["writes"] == []
    (cache,) = engine_for(updated, {"k": drawn(6, 4), "v": drawn(6, 4)}, drawn(1, 4), torch.tensor([0])).summary()[
        "signatures"
    ]
    assert cache["state"] == []
    assert cache["writes"] == ["input 0", "input 1"]
    assert json.loads(json.dumps(engine.summary())) == engine.summary()


# -- a session at work, broken, closed ---------------------------------------------------------------------------------


def held(engine: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Calls of the engine's signature say when they have begun, and wait to be let on."""
    begun, let_on = threading.Event(), threading.Event()
    (specialization,) = engine._table
    calls = specialization.calls

    def slow(*args: Any) -> Any:
        begun.set()
        assert let_on.wait(30)
        return calls(*args)

    monkeypatch.setattr(specialization, "calls", slow)
    return begun, let_on


def test_two_calls_of_one_session_at_once(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model, shape = made("recurrent")
    session, other = engine.session(), engine.session()
    state = session.state
    begun, let_on = held(engine, monkeypatch)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(session(drawn(*shape))))
    thread.start()
    assert begun.wait(30)
    attempts: list[Callable[[], Any]] = [
        lambda: session(drawn(*shape)),
        lambda: session.state,
        lambda: session.load(state),
        session.reset,
        session.clone,
    ]
    for attempt in attempts:
        with pytest.raises(anabranch.SessionBusy, match=r"is in use by another call at this moment.*for each thread"):
            attempt()
    other.reset()
    let_on.set()
    thread.join(30)
    assert_same(results, [in_eager(model, drawn(*shape))], "the first call, undisturbed")
    assert_same(session.state["h"], model.h)
    assert_same(session(drawn(*shape, seed=1)), in_eager(model, drawn(*shape, seed=1)))


def test_a_session_is_not_called_from_within_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ring()
    session = engine.session()
    (specialization,) = engine._table
    calls = specialization.calls

    def again(*args: Any) -> Any:
        with pytest.raises(anabranch.SessionBusy):
            session(drawn(2, 4))
        return calls(*args)

    monkeypatch.setattr(specialization, "calls", again)
    session(drawn(2, 4))
    assert session.state["at"] == 1


def test_a_session_that_is_closed_in_the_middle_of_a_call(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model, shape = made("recurrent")
    session = engine.session()
    begun, let_on = held(engine, monkeypatch)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(session(drawn(*shape))))
    thread.start()
    assert begun.wait(30)
    session.close()
    let_on.set()
    thread.join(30)
    assert_same(results, [in_eager(model, drawn(*shape))])
    with pytest.raises(anabranch.SessionClosed):
        session(drawn(*shape))


def looked_up(self: Any, x: torch.Tensor, at: torch.Tensor) -> Any:
    self.h.add_(x)
    return self.h * 2, F.embedding(at, self.table)


def test_a_call_that_fails_in_the_middle_breaks_its_session(runtime: str) -> None:
    model = Model(looked_up, h=torch.zeros(3), table=drawn(5, 2)).eval()
    engine = anabranch.compile(model, [drawn(3), torch.tensor([1])], backend="eager")
    session, other = engine.session(), engine.session()
    good, bad = (drawn(3), torch.tensor([4])), (drawn(3), torch.tensor([5]))
    session(*good)
    saved = session.state
    for mend in (session.reset, lambda: session.load(saved)):
        with pytest.raises(IndexError):
            session(*bad)
        for attempt in (lambda: session(*good), lambda: session.state, session.clone):
            with pytest.raises(anabranch.SessionBroken, match=r"IndexError: .*session\.reset\(\)"):
                attempt()
        with pytest.raises(anabranch.InputError, match="is missing"):
            session.load({})
        with pytest.raises(anabranch.SessionBroken, match="IndexError"):
            session(*good)
        mend()
        session(*good)
    assert_same(session.state["h"], saved["h"] + good[0])
    assert_same(other(*good), engine.session()(*good), "other sessions are whole")


def test_errors_before_anything_runs_break_no_session(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(looked_up, h=torch.zeros(3), table=drawn(5, 2)).eval()
    engine = anabranch.compile(model, [drawn(3), torch.tensor([1])], backend="eager")
    session, good = engine.session(), (drawn(3), torch.tensor([4]))
    session(*good)
    state = session.state
    wrong: list[tuple[Any, ...]] = [
        (),
        good[:1],
        (drawn(4), good[1]),
        (drawn(3).double()[:2], good[1]),
        (drawn(3).requires_grad_(), good[1]),
        (drawn(3).to_sparse(), good[1]),
        (torch.empty(3, device="meta"), good[1]),
        ({1, 2}, good[1]),
    ]
    for inputs in wrong:
        with pytest.raises(anabranch.InputError):
            session(*inputs)
        assert_same(session.state, state)

    def failing(*args: Any) -> Any:
        raise anabranch.BuildError("no kernels today")

    monkeypatch.setattr(engine._compiler, "make", failing)
    with pytest.raises(anabranch.BuildError):
        session(drawn(1, 3), good[1])
    assert_same(session.state, state)
    session(*good)


def test_flags_that_changed_before_a_call_break_no_session(runtime: str) -> None:
    engine, _, shape = made("recurrent")
    session = engine.session()
    session(drawn(*shape))
    state, before = session.state, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(anabranch.FlagsChanged):
            session(drawn(*shape))
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same(session.state, state)


def test_flags_that_change_within_a_call_break_its_session(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, shape = made("recurrent")
    session = engine.session()
    (specialization,) = engine._table
    monkeypatch.setattr(specialization.unit.watch, "unchanged", lambda: False)
    with pytest.raises(anabranch.FlagsChanged, match=r"what it wrote \(state 'h'\)"):
        session(drawn(*shape))
    with pytest.raises(anabranch.SessionBroken, match="FlagsChanged"):
        session(drawn(*shape))


def test_a_session_that_is_closed(runtime: str) -> None:
    engine = ring()
    with engine.session() as session:
        session(drawn(2, 4))
        state = session.state
    session.close()
    attempts: list[Callable[[], Any]] = [
        lambda: session(drawn(2, 4)),
        lambda: session.state,
        lambda: session.load(state),
        session.reset,
        session.clone,
    ]
    for attempt in attempts:
        with pytest.raises(anabranch.SessionClosed, match=r"make another one with engine\.session\(\)"):
            attempt()
    assert repr(session).endswith("closed>")


def test_sessions_of_an_engine_that_is_closed(runtime: str) -> None:
    engine = ring()
    session = engine.session()
    session(drawn(2, 4))
    state = session.state
    engine.close()
    attempts: list[Callable[[], Any]] = [
        lambda: session(drawn(2, 4)),
        lambda: session.state,
        lambda: session.load(state),
        session.reset,
        session.clone,
        engine.session,
    ]
    for attempt in attempts:
        with pytest.raises(anabranch.EngineClosed):
            attempt()
    assert "bytes of state" in repr(session)
    session.close()


def test_a_session_keeps_its_engine() -> None:
    engine = ring()
    session = engine.session()
    del engine
    gc.collect()
    session(drawn(2, 4))
    assert session.state["at"] == 1


def test_modes_of_the_caller(runtime: str) -> None:
    engine, model, shape = made("recurrent")
    with torch.inference_mode():
        session = engine.session()
        ours = session(drawn(*shape))
        state, clone = session.state, session.clone()
        session.load(state)
    assert not any(x.is_inference() for x in (*ours, *state.values()))
    with torch.enable_grad():
        again = session(drawn(*shape, seed=1))
        assert_same(clone(drawn(*shape, seed=1)), again)
    assert not any(x.requires_grad for x in (*again, *session.state.values()))
    assert_same(ours, in_eager(model, drawn(*shape)))
    assert_same(again, in_eager(model, drawn(*shape, seed=1)))
    with torch.inference_mode():
        state = {name: x + 0 for name, x in state.items()}
    session.load(state)
    assert_same(session(drawn(*shape, seed=1)), again)


# -- several signatures ------------------------------------------------------------------------------------------------


@BACKENDS
def test_prompts_and_steps_go_into_one_state(runtime: str, backend: str) -> None:
    engine, model, _ = made("decoder", backend, dynamic=False)
    rounding = None if backend == "eager" else ROUNDING
    session = engine.session()
    for n in (5, 1, 1, 3, 1):
        assert_same(session(drawn(1, n, 8, seed=n)), in_eager(model, drawn(1, n, 8, seed=n)), rounding=rounding)
    assert engine.stats().specializations == 3
    assert session.state["length"] == 11
    assert_same(session.state, buffers(model), rounding=rounding)


def as_last_seen(self: Any, x: torch.Tensor) -> Any:
    if x.shape[0] > 1:
        self.h.copy_(x[-1])
        return x * self.g
    return x + self.h, self.h


def test_a_signature_that_only_reads_what_another_writes(runtime: str) -> None:
    model = Model(as_last_seen, h=drawn(4), g=torch.ones(4))
    engine = anabranch.compile(model, [drawn(3, 4)], backend="eager", dynamic=False)
    session, eager = engine.session(), copy.deepcopy(model)
    for k, n in enumerate((1, 3, 1, 1, 3, 1)):
        assert_same(session(drawn(n, 4, seed=k)), in_eager(eager, drawn(n, 4, seed=k)), f"call {k}")
    assert session.state.keys() == {"h"}
    with pytest.raises(anabranch.NeedsSession, match="'h'"):
        engine(drawn(1, 4))
    states = [[x["name"] for x in s["state"]] for s in engine.summary()["signatures"]]
    assert states == [["h"], ["h"]]


def test_a_state_that_was_read_before_it_was_known_to_be_written(runtime: str) -> None:
    model = Model(as_last_seen, h=drawn(4), g=torch.ones(4))
    engine = anabranch.compile(model, [drawn(1, 4)], backend="eager", dynamic=False)
    expected = engine(drawn(1, 4))
    session = engine.session()
    for _ in range(2):
        with pytest.raises(anabranch.UnsupportedModel, match=r"writes 'h', and calls of other inputs .*Compile for"):
            session(drawn(3, 4))
        assert_same(session(drawn(1, 4)), expected, "nothing has run")
        assert_same(engine(drawn(1, 4)), expected)


def test_sessions_get_state_that_later_signatures_write(runtime: str) -> None:
    def grows(self: Any, x: torch.Tensor) -> Any:
        self.h.add_(x.sum(0))
        if x.shape[0] > 1:
            self.g.mul_(x[0])
            return self.g + self.h
        return self.h + 1

    model = Model(grows, h=torch.zeros(4), g=torch.full((4,), 2.0))
    engine = anabranch.compile(model, [drawn(1, 4)], backend="eager", dynamic=False)
    session, eager = engine.session(), copy.deepcopy(model)
    assert session.state.keys() == {"h"}
    for k, n in enumerate((1, 2, 1, 2)):
        if k > 1:
            model.g.fill_(7.0)  # it is known to be state
        assert_same(session(drawn(n, 4, seed=k)), in_eager(eager, drawn(n, 4, seed=k)), f"call {k}")
    assert_same(session.state, buffers(eager))
    session.reset()
    assert_same(session.state, {"h": torch.zeros(4), "g": torch.full((4,), 2.0)})


@BACKENDS
def test_a_declared_size_beside_state(runtime: str, backend: str) -> None:
    model = with_weights(Decoder())
    given = Input((1, Dim("tokens", 1, 8), 8))
    engine = anabranch.compile(model, [given], backend=backend)
    rounding = None if backend == "eager" else ROUNDING
    built = engine.stats().specializations
    session = engine.session()
    for n in (5, 1, 1, 3, 2, 1):
        assert_same(session(drawn(1, n, 8, seed=n)), in_eager(model, drawn(1, n, 8, seed=n)), rounding=rounding)
    assert engine.stats().specializations == built == 2
    assert_same(session.state, buffers(model), rounding=rounding)
    with pytest.raises(anabranch.InputError, match="declared as 1 to 8"):
        session(drawn(1, 9, 8))
    assert session.state["length"] == 13


def test_a_second_length_beside_state(runtime: str) -> None:
    engine, model, _ = made("streaming convolution")
    session = engine.session()
    for n in (5, 7, 4, 5, 9):
        assert_same(session(drawn(1, 2, n, seed=n)), in_eager(model, drawn(1, 2, n, seed=n)))
    assert engine.stats().specializations == 2
    assert "1, 2, *" in engine.explain()
    assert_same(session.state["before"], model.before)


def test_a_number_that_varies_beside_state(runtime: str) -> None:
    def decayed(self: Any, x: torch.Tensor, by: float) -> torch.Tensor:
        self.h.mul_(by).add_(x)
        return self.h + by

    model = Model(decayed, h=torch.zeros(3))
    engine = anabranch.compile(model, [drawn(3), 0.5], backend="eager")
    session, eager = engine.session(), copy.deepcopy(model)
    for by in (0.5, 0.25, 0.75, 0.1, 0.5):
        assert_same(session(drawn(3), by), in_eager(eager, drawn(3), by))
    assert engine.stats().specializations == 2


@BACKENDS
def test_half_precision_keeps_the_type_of_state(backend: str) -> None:
    model = with_weights(Decoder())
    engine = anabranch.compile(model, [drawn(1, 1, 8)], backend=backend, precision=torch.bfloat16)
    session = engine.session()
    for k in range(4):
        y, expected = session(drawn(1, 1, 8, seed=k)), in_eager(model, drawn(1, 1, 8, seed=k))
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, expected, atol=0.03, rtol=0.03)
    assert {name: x.dtype for name, x in session.state.items()} == {
        "k": torch.float32,
        "v": torch.float32,
        "length": torch.int64,
    }
    torch.testing.assert_close(session.state["k"], model.k, atol=0.03, rtol=0.03)


# -- inputs that are written -------------------------------------------------------------------------------------------


def added(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.add_(y)


def updated(self: Any, cache: dict[str, torch.Tensor], x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    cache["k"].index_copy_(0, at, x)
    cache["v"][at] = x * 2
    return (cache["k"] * cache["v"]).sum(0)


def engine_for(fn: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return anabranch.compile(Model(fn).eval(), list(inputs), **{"backend": "eager", **options})


@BACKENDS
def test_an_input_is_written_and_handed_back(runtime: str, backend: str) -> None:
    x, y = drawn(3, 4), drawn(4)
    first = x.clone()
    engine = engine_for(added, x, y, backend=backend)
    assert_same(x, first, "compiling writes nothing")
    for k in range(3):
        x, y = drawn(3, 4, seed=k), drawn(4, seed=k)
        expected, version = x + y, x._version
        assert engine(x, y) is x
        assert_same(x, expected)
        assert x._version > version
        assert y._version == 0


@BACKENDS
def test_written_inputs_that_lie_otherwise(runtime: str, backend: str) -> None:
    def strange(self: Any, x: torch.Tensor) -> Any:
        x[1:].mul_(2)
        x.t()[0].add_(1)
        return x, x.t(), x[0], x.sum()

    engine = engine_for(strange, drawn(3, 4), backend=backend, dynamic=False)
    whole = drawn(8, 10)
    layouts: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda w: w[2:5, 1:9:2],
        lambda w: w.t()[3:6, :4],
        lambda w: w.view(-1)[1:13].view(3, 4),
        lambda w: w.as_strided((3, 4), (9, 2), 3),
        lambda w: w[:4, :3].t(),
    ]
    for lay in layouts:
        ours, theirs = whole.clone(), whole.clone()
        x, y = lay(ours), lay(theirs)
        model = Model(strange)
        if x.shape != (3, 4):
            continue
        a, b = engine(x), in_eager(model, y)
        assert_same(ours, theirs, f"all of the memory, strides {x.stride()}")
        assert a[0] is x
        assert [r.stride() for r in a[:3]] == [r.stride() for r in b[:3]]
        assert all(r.untyped_storage().data_ptr() == ours.untyped_storage().data_ptr() for r in a[:3])
        assert_same(list(a), list(b), rounding=ROUNDING)


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_memory_that_stands_for_several_elements_is_not_written(runtime: str, dynamic: bool | None) -> None:
    engine = engine_for(added, drawn(3, 4), drawn(4), dynamic=dynamic)
    for x in (drawn(1, 4).expand(3, 4), drawn(3, 1).expand(3, 4), drawn(9).as_strided((3, 4), (2, 1))):
        before = x.clone()
        with pytest.raises((anabranch.InputError, anabranch.UnsupportedModel), match=r"one place in.* memory|expanded"):
            engine(x, drawn(4))
        assert_same(x.clone(), before)
    x = drawn(3, 4)
    assert engine(x, drawn(1).expand(4)) is x, "what is only read may be expanded"
    assert_same(x, drawn(3, 4) + drawn(1))


def test_tensors_that_share_memory_with_what_is_written(runtime: str) -> None:
    engine = engine_for(added, drawn(3, 4), drawn(3, 4))
    x, whole = drawn(3, 4), drawn(5, 4)
    for a, b in ((x, x), (x, x.view(3, 4)), (whole[:3], whole[2:])):
        before = a.clone()
        with pytest.raises(anabranch.InputError, match=r"input [01] and input [01] share memory, and the model writes"):
            engine(a, b)
        assert_same(a.clone(), before)
    whole = drawn(6, 4)
    expected = whole[:3] + whole[3:]
    engine(whole[:3], whole[3:])
    assert_same(whole[:3].clone(), expected, "beside one another in one storage")
    reading = engine_for(lambda self, x, y: x + y, drawn(3, 4), drawn(3, 4))
    assert_same(reading(x, x), x + x)


def test_inference_tensors_are_written(runtime: str) -> None:
    engine = engine_for(added, drawn(3), drawn(3))
    with torch.inference_mode():
        x = drawn(3) + 0
        assert x.is_inference()
        assert engine(x, drawn(3, seed=1)) is x
        assert_same(x, drawn(3) + drawn(3, seed=1))
    assert engine(x, drawn(3, seed=2)) is x
    assert_same(x.clone(), drawn(3) + drawn(3, seed=1) + drawn(3, seed=2))


def test_what_requires_a_gradient_is_written_under_no_grad(runtime: str) -> None:
    x = drawn(3).requires_grad_()
    engine = engine_for(added, drawn(3), drawn(3))
    with pytest.raises(anabranch.InputError, match="input 0 requires grad"):
        engine(x, drawn(3))
    with torch.no_grad():
        assert engine(x, drawn(3, seed=1)) is x
    assert x.is_leaf
    assert x.requires_grad
    assert_same(x.detach(), drawn(3) + drawn(3, seed=1))


def test_a_graph_for_gradients_sees_that_a_tensor_was_written(runtime: str) -> None:
    w, x = drawn(3).requires_grad_(), drawn(3)
    loss = (w * x).sum()
    engine_for(added, drawn(3), drawn(3))(x, drawn(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@BACKENDS
def test_a_cache_of_tensors_in_a_dict(runtime: str, backend: str) -> None:
    def cache() -> dict[str, torch.Tensor]:
        return {"k": torch.zeros(6, 4), "v": torch.ones(6, 4)}

    engine = engine_for(updated, cache(), drawn(1, 4), torch.tensor([0]), backend=backend)
    ours, theirs = cache(), cache()
    kept = dict(ours)
    for k in range(8):
        inputs = drawn(1, 4, seed=k), torch.tensor([k % 6])
        a, b = engine(ours, *inputs), in_eager(Model(updated), theirs, *inputs)
        assert_same(a, b, rounding=None if backend == "eager" else ROUNDING)
        assert_same(ours, theirs)
    assert all(ours[name] is kept[name] for name in kept)
    assert engine.stats().specializations == 1


def test_keyword_inputs_are_written(runtime: str) -> None:
    def model(self: Any, x: torch.Tensor, *, out: torch.Tensor, cache: dict[str, torch.Tensor]) -> torch.Tensor:
        cache["sum"].add_(x)
        return out.copy_(x * 2)

    given = {"out": torch.zeros(3), "cache": {"sum": torch.zeros(3)}}
    engine = anabranch.compile(Model(model).eval(), [drawn(3)], kwargs=given, backend="eager")
    for k in range(3):
        assert engine(drawn(3, seed=k), **given) is given["out"]
        assert_same(given["out"], drawn(3, seed=k) * 2)
    assert_same(given["cache"]["sum"], drawn(3) + drawn(3, seed=1) + drawn(3, seed=2))


def test_threads_write_into_tensors_of_their_own(runtime: str) -> None:
    engine = engine_for(added, drawn(3, 4), drawn(3, 4))

    def work(i: int) -> None:
        x, expected = drawn(3, 4, seed=i), drawn(3, 4, seed=i)
        for k in range(50):
            y = drawn(3, 4, seed=k)
            engine(x, y)
            expected += y
        assert_same(x, expected)

    on_threads(8, work)


def test_written_inputs_of_sizes_that_vary(runtime: str) -> None:
    engine = engine_for(added, Input((Dim("n", 1, 64), 4)), Input((4,)))
    for n in (5, 9, 1, 64):
        x, y = drawn(n, 4), drawn(4, seed=n)
        expected = x + y
        assert engine(x, y) is x
        assert_same(x, expected)
        strided = drawn(n, 8)[:, ::2]
        expected = strided + y
        assert engine(strided, y) is strided
        assert_same(strided.clone(), expected)


def test_state_and_inputs_are_written_in_one_call(runtime: str) -> None:
    def model(self: Any, x: torch.Tensor) -> Any:
        self.h.add_(x)
        x.copy_(self.h * 2)
        return x, self.h

    engine = anabranch.compile(Model(model, h=torch.zeros(3)), [drawn(3)], backend="eager")
    session, eager = engine.session(), Model(model, h=torch.zeros(3))
    for k in range(3):
        x, y = drawn(3, seed=k), drawn(3, seed=k)
        a, b = session(x), in_eager(eager, y)
        assert a[0] is x
        assert_same(list(a), list(b))
        assert_same(x, y)
    assert_same(session.state["h"], eager.h)


def test_a_session_is_cloned_and_not_copied(runtime: str) -> None:
    session = anabranch.compile(Ring().eval(), [drawn(2, 4)], backend="eager", runtime=runtime).session()
    for copies in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(anabranch.InputError, match=r"in one place only\. Use session\.clone\(\), or save"):
            copies(session)


def test_tensorrt_leaves_what_writes_to_operators(runtime: str) -> None:
    engine = anabranch.compile(Ring().eval(), [drawn(2, 4)], backend="eager", runtime=runtime)
    unit, calls = engine._first().unit, engine._first().calls
    settings = replace(engine._settings, backend="tensorrt")
    for_tensorrt = Unit(settings, unit.program, unit.signature, unit.limits, unit.counters)
    choice = Builder(for_tensorrt, calls, Clock())._choice
    assert choice.backend == "eager"
    assert "TensorRT's engines write results only" in choice.why_eager


# -- where there are no sessions ---------------------------------------------------------------------------------------


def test_graphs_of_dynamo_that_write_a_buffer_run_by_operators() -> None:
    eager, model = Ring().eval(), Ring().eval()
    compiled = torch.compile(model, backend="anabranch", options={"backend": "eager"})
    for k in range(3):
        assert_same(in_eager(compiled, drawn(2, 4, seed=k)), in_eager(eager, drawn(2, 4, seed=k)))
    assert_same(buffers(model), buffers(eager))
    assert any("it writes a buffer" in graph["by_operators"] for graph in anabranch.dynamo.summary()["graphs"])
    torch.compiler.reset()


def test_a_model_in_several_graphs_that_writes() -> None:
    def branching(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(y)
        return x * 2 if x.sum() > 0 else x * 3

    engine, model = engine_for(branching, drawn(3), drawn(3)), Model(branching)
    for k in range(4):
        ours, theirs = drawn(3, seed=k), drawn(3, seed=k)
        assert_same(engine(ours, drawn(3)), in_eager(model, theirs, drawn(3)))
        assert_same(ours, theirs)

    def keeping(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.h.add_(x)
        return x * 2 if x.sum() > 0 else x * 3

    with pytest.raises(anabranch.UnsupportedModel, match="changes 'h' in place"):
        anabranch.compile(Model(keeping, h=torch.zeros(3)), [drawn(3)], backend="eager")


class CountsWords(nn.Module):
    """Takes integers, and counts them in a state that is an index, too."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 4)
        self.register_buffer("rows", torch.arange(32.0).view(8, 4))
        self.register_buffer("place", torch.tensor(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.rows.index_copy_(0, self.place + torch.arange(ids.shape[0], device=ids.device), self.words(ids))
        self.place.add_(ids.shape[0])
        return self.rows.sum(0) * self.place


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_looking_for_valid_integers_writes_no_state(backend: str) -> None:
    model = CountsWords().eval().requires_grad_(False)
    ids = [torch.tensor([3]), torch.tensor([7]), torch.tensor([1])]
    given = ids[0].clone()
    engine = anabranch.compile(model, [given], backend=backend, dynamic=False)
    assert torch.equal(given, ids[0])
    assert int(model.place) == 2
    assert int(engine.session().state["place"]) == 2
    assert torch.equal(engine.session().state["rows"], model.rows)
    session = engine.session()
    for x in ids:
        torch.testing.assert_close(session(x), model(x))


class Holder:
    """No module: it has tensors that are registered as buffers elsewhere."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors

    def add(self, x: torch.Tensor) -> torch.Tensor:
        self.tensors[0].mul_(0.5).add_(x)
        self.tensors[1].add_(1)
        return self.tensors[0] / self.tensors[1]


class HoldsElsewhere(nn.Module):
    def __init__(self, registered: bool = True) -> None:
        super().__init__()
        self.holder = Holder([torch.linspace(-1, 1, 6), torch.tensor(1.0)])
        if registered:
            for i, x in enumerate(self.holder.tensors):
                self.register_buffer(f"kept_{i}", x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.holder.add(x) * 2


def test_buffers_that_something_beside_the_module_holds_are_state() -> None:
    model, inputs = HoldsElsewhere().eval(), [torch.randn(6) for _ in range(4)]
    engine = anabranch.compile(model, [inputs[0]], backend="eager", require_full=True)
    sessions = [engine.session() for _ in range(2)]
    expected = [model(x) for x in inputs]
    for session in sessions:
        assert all(torch.equal(session(x), y) for x, y in zip(inputs, expected, strict=True))
    assert sorted(sessions[0].state) == ["kept_0", "kept_1"]
    assert torch.equal(sessions[1].state["kept_0"], model.kept_0)


def test_a_tensor_that_is_no_buffer_is_not_changed_in_place() -> None:
    model = HoldsElsewhere(registered=False).eval()
    for require_full in (True, False):
        with pytest.raises(anabranch.UnsupportedModel, match=r"[Rr]egister"):
            anabranch.compile(model, [torch.randn(6)], backend="eager", require_full=require_full)
