"""Programs that write, in C++: what they write of a caller's, and sessions, on the CPU and on the simulated device."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch import cpp
from contract.support import Rig, assert_same, on_threads

pytestmark = pytest.mark.usefixtures("rig")


class Cache(torch.nn.Module):
    """State of two buffers: rows, and where the next one goes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("rows", torch.randn(4, 8))
        self.register_buffer("at", torch.zeros(1, dtype=torch.int64))
        for p in self.parameters():
            torch.nn.init.uniform_(p, -1, 1)

    def forward(self, x: torch.Tensor) -> Any:
        self.rows.index_copy_(0, self.at, self.linear(x))
        self.at.add_(1).remainder_(4)
        return self.rows * 2, self.rows


class Writing(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        x.mul_(2).add_(y)
        return x, x + 1


@pytest.fixture(params=["cpu", "sim"])
def where(request: pytest.FixtureRequest, rig: Rig) -> torch.device:
    return rig.device() if request.param == "sim" else torch.device("cpu")


@pytest.fixture
def model() -> Cache:
    torch.manual_seed(3)
    return Cache().eval().requires_grad_(False)


@pytest.fixture
def cache(tmp_path: Path, model: Cache) -> Path:
    cpp.save_program(model, [torch.empty(1, 8)], tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def writing(tmp_path: Path) -> Path:
    cpp.save_program(Writing(), [torch.empty(3, 4), torch.empty(4)], tmp_path / "writing")
    return tmp_path / "writing"


def expected_of(model: Cache, device: torch.device, inputs: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Eager's results of one call after the other, of a model of its own."""
    own = copy.deepcopy(model).to(device)
    return [[y.clone().cpu() for y in own(x)] for x in inputs]


def assert_all_same(results: list[Any], expected: list[Any]) -> None:
    assert len(results) == len(expected)
    for got, right in zip(results, expected, strict=True):
        for y, z in zip(got, right, strict=True):
            assert_same(y.cpu(), z)


# -- inputs that are written -----------------------------------------------------------------------------------------


def test_the_callers_tensor_is_written(rig: Rig, core: Any, writing: Path, where: Any) -> None:
    engine = core.Engine(str(writing), where)
    x, y = rig.random(3, 4).to(where), rig.random(4).to(where)
    before, version = x.clone(), x._version
    first, second = engine.run([x, y])
    assert first is x
    assert x._version > version
    assert_same(x.cpu(), (before * 2 + y).cpu())
    assert_same(second.cpu(), (before * 2 + y + 1).cpu())


def test_what_lies_otherwise_is_written_too(rig: Rig, core: Any, writing: Path, where: Any) -> None:
    engine = core.Engine(str(writing), where)
    y = rig.random(4).to(where)
    wide, moved = rig.random(3, 9).to(where), rig.random(13).to(where)
    with torch.inference_mode():
        inference = rig.random(4, 3).to(where).clone().mT
    for x in (wide[:, 1:5], moved[1:].view(3, 4), rig.random(4, 3).to(where).mT, inference):
        before = x.clone()
        with torch.inference_mode(x.is_inference()):
            first, second = engine.run([x, y])
        assert first is x
        assert not second.is_inference()
        assert_same(x.cpu().contiguous(), (before * 2 + y).cpu().contiguous())
        assert_same(second.cpu().contiguous(), (before * 2 + y + 1).cpu().contiguous())


def test_what_cannot_be_written_is_refused_and_unchanged(rig: Rig, core: Any, writing: Path, where: Any) -> None:
    engine = core.Engine(str(writing), where)
    x, y = rig.random(3, 4).to(where), rig.random(4).to(where)
    before = x.clone()
    with pytest.raises(core.InputError, match=r"input 0 and input 1 share memory, and the model writes into input 0"):
        engine.run([x, x[1]])
    with pytest.raises(core.InputError, match=r"input 0 is expanded: .* Pass x\.contiguous\(\)"):
        engine.run([x[:1].expand(3, 4), y])
    with pytest.raises(core.InputError, match=r"input 1 is float32\[3\]; this engine takes float32\[4\]"):
        engine.run([x, y[:3]])
    assert_same(x.cpu(), before.cpu())


@pytest.mark.parametrize("strided", [False, True])
def test_a_write_is_ordered_on_the_current_stream(rig: Rig, core: Any, writing: Path, strided: bool) -> None:
    engine = core.Engine(str(writing), rig.device())
    value, y, stream = rig.random(3, 4), rig.random(4), rig.stream()
    x = rig.poisoned(rig.random(4, 3), stream).mT if strided else rig.poisoned(value, stream)
    latch = rig.latch(stream)
    with rig.module.stream(stream):
        x.copy_(value)
        engine.run([x, y])
        copied = x.clone()
        x.fill_(float("nan"))
    rig.run_what_can()
    latch.open()
    with rig.module.stream(stream):
        assert_same(copied.cpu().contiguous(), (value * 2 + y).cpu())


@pytest.mark.parametrize("strided", [False, True])
def test_a_capture_of_a_call_that_writes_is_refused_and_stays_good(
    rig: Rig, core: Any, writing: Path, strided: bool
) -> None:
    engine = core.Engine(str(writing), rig.device())
    x, y, graph = rig.random(3, 4), rig.random(4), rig.new_graph()
    given = rig.random(4, 3).mT if strided else rig.random(3, 4)
    before, copied = given.clone(), torch.full_like(x, float("nan"))
    with rig.capture(graph):
        with pytest.raises(core.NotCapturable, match="outside the capture"):
            engine.run([given, y])
        copied.copy_(x)
    graph.replay()
    rig.module.synchronize()
    assert_same(copied.cpu(), x.cpu())
    assert_same(given.cpu(), before.cpu())


# -- sessions --------------------------------------------------------------------------------------------------------


def test_an_engine_with_state_needs_a_session(rig: Rig, core: Any, cache: Path, where: Any) -> None:
    engine = core.Engine(str(cache), where)
    with pytest.raises(core.NeedsSession, match=r"keeps state \('\w+', '\w+'\).*session = engine\.session\(\)"):
        engine.run([rig.random(1, 8).to(where)])


def test_sessions_go_on_from_call_to_call_each_by_itself(
    rig: Rig, core: Any, cache: Path, model: Cache, where: Any
) -> None:
    engine = core.Engine(str(cache), where)
    inputs = [[rig.random(1, 8).to(where) for _ in range(6)] for _ in range(2)]
    sessions = [engine.session() for _ in inputs]
    results: list[list[Any]] = [[], []]
    for k in range(6):
        for i in range(2):
            results[i].append(sessions[i].run([inputs[i][k]]))
    for i in range(2):
        assert_all_same(results[i], expected_of(model, where, inputs[i]))
    # Without the file's engine, which sessions keep.
    engine.destroy()
    sessions[0].reset()
    assert_all_same([sessions[0].run([x]) for x in inputs[1]], expected_of(model, where, inputs[1]))


def test_two_threads_with_a_session_each_get_what_one_alone_gets(
    rig: Rig, core: Any, cache: Path, model: Cache, where: Any
) -> None:
    engine = core.Engine(str(cache), where)
    inputs = [[rig.random(1, 8).to(where) for _ in range(25)] for _ in range(2)]
    results: list[Any] = [None] * 2

    def work(i: int) -> None:
        with rig.module.stream(rig.stream()):
            session = engine.session()
            results[i] = [[y.cpu() for y in session.run([x])] for x in inputs[i]]

    on_threads(2, work)
    for i in range(2):
        alone = engine.session()
        assert_all_same(results[i], [[y.cpu() for y in alone.run([x])] for x in inputs[i]])
        assert_all_same(results[i], expected_of(model, where, inputs[i]))


def test_state_is_copied_loaded_reset_and_cloned(rig: Rig, core: Any, cache: Path, model: Cache, where: Any) -> None:
    session = core.Engine(str(cache), where).session()
    inputs = [rig.random(1, 8).to(where) for _ in range(4)]
    expected = expected_of(model, where, inputs)
    assert_same(session.state()["rows"].cpu(), model.rows)
    assert_all_same([session.run([x]) for x in inputs[:2]], expected[:2])
    kept, other = session.state(), session.clone()
    assert set(kept) == {"rows", "at"}
    kept["rows"].add_(1)  # a copy
    kept["rows"].sub_(1)
    kept = {name: x.clone() for name, x in session.state().items()}
    assert_all_same([session.run([x]) for x in inputs[2:]], expected[2:])
    assert_all_same([other.run([x]) for x in inputs[2:]], expected[2:])
    session.load({name: x.cpu() for name, x in kept.items()})
    assert_all_same([session.run([x]) for x in inputs[2:]], expected[2:])
    session.reset()
    assert_all_same([session.run([x]) for x in inputs], expected)
    with torch.inference_mode():
        assert not any(x.is_inference() for x in (*session.state().values(), *session.run([inputs[0]])))


def test_states_that_do_not_fit_are_refused_and_nothing_changes(rig: Rig, core: Any, cache: Path, where: Any) -> None:
    session = core.Engine(str(cache), where).session()
    good = session.state()
    for state, message in [
        ({"rows": good["rows"]}, r"state 'at' is missing; expected "),
        ({**good, "more": good["at"]}, r"state 'more' is none of the model's; expected "),
        ({**good, "rows": good["rows"][:2]}, r"state 'rows' is float32\[2, 8\]; expected float32\[4, 8\]"),
        ({**good, "rows": good["rows"].double()}, r"state 'rows' is float64\[4, 8\]; expected float32\[4, 8\]"),
        ({**good, "rows": torch.zeros(4, 8).to_sparse()}, r"state 'rows' is no plain tensor with memory"),
    ]:
        with pytest.raises(core.InputError, match=message):
            session.load(state)
    for name, x in session.state().items():
        assert_same(x.cpu(), good[name].cpu())


def test_calls_on_several_streams_follow_each_other(rig: Rig, core: Any, cache: Path, model: Cache) -> None:
    engine = core.Engine(str(cache), rig.device())
    inputs = [rig.random(1, 8) for _ in range(3)]
    expected = expected_of(model, rig.device(), inputs)
    session = engine.session()
    streams = [rig.stream() for _ in inputs]
    latch = rig.latch(streams[0])
    results = []
    for x, stream in zip(inputs, streams, strict=True):
        with rig.module.stream(stream):
            results.append(session.run([x]))
    with rig.module.stream(rig.stream()):
        state = session.state()
        other = session.clone()
    with rig.module.stream(rig.stream()):
        further = other.state()
    # The later calls would be done by now, if they did not wait for the first one.
    rig.run_what_can()
    latch.open()
    rig.module.synchronize()
    assert_all_same(results, expected)
    assert_same(state["rows"].cpu(), expected[-1][1])
    assert_same(further["rows"].cpu(), expected[-1][1])


def test_the_memory_of_state_is_used_again_only_after_its_last_use(
    rig: Rig, core: Any, cache: Path, model: Cache
) -> None:
    engine = core.Engine(str(cache), rig.device())
    x, stream = rig.random(1, 8), rig.stream()
    (expected,) = expected_of(model, rig.device(), [x])
    session = engine.session()
    rig.module.synchronize()
    latch = rig.latch(stream)
    with rig.module.stream(stream):
        results = session.run([x])
    session.destroy()
    engine.destroy()
    # On the stream that the state was made on, where its memory would come from first.
    junk = [torch.full((4, 8), float("nan"), device=rig.device()) for _ in range(40)]
    junk += [torch.full((1,), 3, dtype=torch.int64, device=rig.device()) for _ in range(40)]
    rig.module.default_stream().synchronize()
    latch.open()
    rig.module.synchronize()
    assert_all_same([results], [expected])
    del junk


def test_a_second_call_at_the_same_moment_is_refused(rig: Rig, core: Any) -> None:
    x = rig.random(4)
    engine = core.waiting(torch.ones_like(x), x)
    session, stream = engine.session(), rig.stream()
    session.run([x])  # what it loads
    latch = rig.latch(stream)
    failed: list[BaseException] = []

    def work() -> Any:
        with rig.module.stream(stream):
            while True:
                try:
                    return session.run([x])
                except core.SessionBusy:
                    continue  # the other thread was looking at that moment
                except BaseException as e:
                    return failed.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    refused = []
    while thread.is_alive() and not refused:
        thread.join(0.01)  # let it in
        try:
            session.load({})  # which queues nothing
        except core.InputError:
            continue
        except core.SessionBusy as e:
            refused.append(str(e))
            for other in (session.reset, session.clone, lambda: session.run([x])):
                with pytest.raises(core.SessionBusy, match="in use by another call"):
                    other()
    latch.open()
    thread.join()
    assert refused
    assert not failed
    assert_same(session.state()["sum"].cpu(), (torch.ones(4) + x.cpu() + x.cpu()))


class Fails(torch.nn.Module):
    """Its lookup fails on the CPU, after a write."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(4))

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        self.sum += i
        return torch.index_select(self.sum, 0, i)


def test_a_session_is_broken_after_a_call_that_failed_until_it_is_reset_or_loaded(core: Any, tmp_path: Path) -> None:
    cpp.save_program(Fails(), [torch.zeros(1, dtype=torch.int64)], tmp_path / "p")
    session = core.Engine(str(tmp_path / "p"), torch.device("cpu")).session()
    good, bad = torch.tensor([1]), torch.tensor([99])
    kept = session.state()
    for mend in (session.reset, lambda: session.load(kept)):
        with pytest.raises(core.InputError):
            session.run([good.float()])
        (y,) = session.run([good])  # not broken by that
        assert y.item() == 1
        with pytest.raises((RuntimeError, IndexError), match="out of range"):
            session.run([bad])
        for use in (lambda: session.run([good]), session.state, session.clone):
            with pytest.raises(core.SessionBroken, match=r"out of range.*Call session\.reset\(\)"):
                use()
        with pytest.raises(core.InputError, match="is missing"):
            session.load({})
        with pytest.raises(core.SessionBroken):
            session.state()
        mend()
        assert_same(session.state()["sum"], torch.zeros(4))


def test_inside_a_capture_a_session_is_refused_and_is_what_it_was(rig: Rig, core: Any, cache: Path) -> None:
    session = core.Engine(str(cache), rig.device()).session()
    x, graph = rig.random(1, 8), rig.new_graph()
    before = session.state()
    y = torch.full_like(x, float("nan"))
    with rig.capture(graph):
        for use in (lambda: session.run([x]), session.state, session.clone, session.reset):
            with pytest.raises(core.NotCapturable, match="outside the capture"):
                use()
        with pytest.raises(core.NotCapturable, match="outside the capture"):
            session.load(before)
        y.copy_(x)
    graph.replay()
    rig.module.synchronize()
    assert_same(y.cpu(), x.cpu())
    for name, kept in session.state().items():
        assert_same(kept.cpu(), before[name].cpu())


def test_programs_without_a_file_that_write_what_they_may_not(core: Any) -> None:
    x, state = torch.randn(4), torch.ones(4)
    core.make("aten::add_", "Tensor", 1, 2, [state], x)
    for arguments, message in [
        (("aten::add_", "Tensor", 0, 2, [state], x), "it writes into slot 0, which is not said to be written"),
        (("aten::add", "Tensor", 1, 1, [state], x), "slot 1 is a result, and it is state"),
        (("aten::add", "Tensor", 1, 3, [state, state], x), "state 'sum' is given twice"),
        (("aten::add", "Tensor", 1, 2, [torch.ones(4, 2)[:, 0]], x), "state 'sum' is not dense in memory"),
        (("aten::add", "Tensor", 1, 2, [state.to("meta")], x), "state 'sum' is on meta; this engine runs on cpu"),
    ]:
        with pytest.raises(core.InputError, match=message):
            core.make(*arguments)
