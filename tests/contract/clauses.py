"""The stream contract's clauses, for whatever device the tier's ``rig`` is. Each test is named after its clause.

``tests/gpu`` runs them on CUDA and ``tests/sim`` on the simulated device: ``from contract.clauses import *`` takes all
of them, so that a new one is tested everywhere. What a module leaves out it deletes, with the reason in its
``LEFT_OUT``. A module names the backends of clause 7 in a fixture ``backend``.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import anabranch
from contract.pieces import PieceMlp
from contract.support import PATHS, ROUNDING, Chain, Keeps, Make, Mlp, Rig, assert_same, on_threads

# -- 1: ordered on the caller's current stream, looked up at every call ----------------------------------------------


@PATHS
@pytest.mark.parametrize("model", [torch.nn.ReLU(), Mlp(), Chain(), PieceMlp()], ids=["relu", "mlp", "chain", "pieces"])
def test_clause1_starts_after_the_callers_queued_work(rig: Rig, compiled: Make, model: Any, graphs: bool) -> None:
    source = rig.random(4, 256)
    engine = compiled(model, source, cuda_graphs=graphs)
    expected = rig.load_kernels(engine, source)
    rig.build_ahead(engine, contexts=2)
    s = rig.stream()
    x = rig.poisoned(source, s)
    latch = rig.latch(s)
    with rig.module.stream(s):
        x.copy_(source)
        y = engine(x)
        z = y + 1  # queued afterwards: sees the output
        done = s.record_event()
    rig.run_what_can()
    assert not done.query()
    latch.open()
    s.synchronize()
    assert_same(y, expected)
    assert_same(z, expected + 1)


@PATHS
def test_clause1_the_stream_is_looked_up_at_every_call(rig: Rig, compiled: Make, graphs: bool) -> None:
    sources = [rig.random(4, 256) for _ in range(6)]
    engine = compiled(Mlp(), sources[0], cuda_graphs=graphs)
    expected = [rig.load_kernels(engine, x) for x in sources]
    rig.build_ahead(engine, contexts=5)
    streams = [rig.stream(), rig.module.Stream(), rig.module.default_stream(), rig.stream()] * 2
    inputs = [rig.poisoned(x, s) for x, s in zip(sources, streams, strict=False)]
    latch = rig.latch(*streams[:4])
    outputs = []
    for x, source, s in zip(inputs, sources, streams, strict=False):
        with rig.module.stream(s):
            outputs.append(engine(x.copy_(source)))
    latch.open()
    rig.module.synchronize()
    for y, e in zip(outputs, expected, strict=True):
        assert_same(y, e)


@PATHS
def test_clause1_the_engines_device_decides_not_the_threads(rig: Rig, runtime: str, graphs: bool) -> None:
    if rig.module.device_count() < 2:
        pytest.skip("needs two devices")
    # Nothing is copied from one device to the other: once they are peers, an allocation waits for held streams of both.
    source = rig.random(4, 256, index=1)
    model = Mlp().eval().requires_grad_(False).to(rig.device(1))
    engine = anabranch.compile(model, [source], runtime=runtime, cuda_graphs=graphs, **rig.defaults)
    assert rig.module.current_device() == 0
    s = rig.seam.stream(1)
    with rig.module.stream(s):
        x = torch.full_like(source, float("nan"))
        expected = engine(source)
    s.synchronize()
    assert torch.isfinite(expected).all()
    latch = rig.latch(s)
    with rig.module.stream(s):
        x.copy_(source)
        rig.module.set_device(0)  # the stream stays current for its own device
        assert rig.module.current_stream(1) == s
        y = engine(x)
        assert rig.module.current_device() == 0
        done = s.record_event()
    rig.run_what_can()
    assert not done.query()
    latch.open()
    s.synchronize()
    assert_same(y, expected)
    engine.close()
    del engine
    gc.collect()
    rig.seam.collect()
    assert rig.module.current_device() == 0


# -- 2: no stream of its own that a caller could observe -------------------------------------------------------------


@PATHS
def test_clause2_leaves_stream_and_device_as_they_were(rig: Rig, compiled: Make, graphs: bool) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=graphs)
    for s in (rig.stream(), rig.module.Stream(), rig.module.default_stream()):
        with rig.module.stream(s):
            engine(x)
            assert rig.module.current_stream() == s
            with contextlib.suppress(anabranch.InputError):
                engine(x.cpu())
            assert rig.module.current_stream() == s
        assert rig.module.current_device() == 0


# -- 3: calls on different streams are not ordered; sharing a context waits on the device ----------------------------


@PATHS
def test_clause3_a_held_stream_holds_no_other_call(rig: Rig, compiled: Make, graphs: bool) -> None:
    x1, x2 = rig.random(4, 256), rig.random(4, 256)
    engine = compiled(Mlp(), x1, cuda_graphs=graphs)
    expected1, expected2 = rig.load_kernels(engine, x1), rig.load_kernels(engine, x2)
    engine.warm(contexts=2)
    s1, s2 = rig.stream(), rig.stream()
    for s in (s1, s2):
        with rig.module.stream(s):
            engine(x1)
    rig.module.synchronize()
    latch = rig.latch(s1)
    with rig.module.stream(s1):
        y1 = engine(x1)
    with rig.module.stream(s2):
        y2 = engine(x2)
    s2.synchronize()  # would never return if the second call waited for the first
    assert_same(y2, expected2)
    latch.open()
    s1.synchronize()
    assert_same(y1, expected1)


def test_clause3_sharing_a_context_waits_on_the_device_and_asks_no_event(rig: Rig, compiled: Make) -> None:
    sources = [rig.random(4, 256) for _ in range(4)]
    engine = compiled(Mlp(), sources[0], cuda_graphs=True, max_contexts=1)
    expected = [rig.load_kernels(engine, x) for x in sources]
    streams = [rig.stream() for _ in sources]
    inputs = [rig.poisoned(x, s) for x, s in zip(sources, streams, strict=True)]
    waits = engine.stats().waits
    latch = rig.latch(*streams)
    with rig.asks_nothing():
        outputs = []
        for x, source, s in zip(inputs, sources, streams, strict=True):
            with rig.module.stream(s):
                outputs.append(engine(x.copy_(source)))
    events = [s.record_event() for s in streams]
    rig.run_what_can()
    assert not any(e.query() for e in events)
    latch.open()
    rig.module.synchronize()
    for y, e in zip(outputs, expected, strict=True):
        assert_same(y, e)
    assert engine.stats().waits - waits == 4
    assert engine.stats().contexts == 1


def test_clause3_only_the_held_one_waits_for_the_least_recently_used_context(rig: Rig, compiled: Make) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=True, max_contexts=2)
    expected = rig.load_kernels(engine, x)
    engine.warm(contexts=2)
    held, free, third = rig.stream(), rig.stream(), rig.stream()
    latch = rig.latch(held)
    with rig.module.stream(free):
        engine(x)
    with rig.module.stream(held):
        y = engine(x)
    with rig.module.stream(third):
        z = engine(x)  # takes the context of `free`, which was used longest ago
    third.synchronize()
    assert_same(z, expected)
    latch.open()
    held.synchronize()
    assert_same(y, expected)


def test_clause3_sixty_four_threads_share_one_context(rig: Rig, compiled: Make) -> None:
    sources = [rig.random(4, 256) for _ in range(64)]
    engine = compiled(Mlp(), sources[0], cuda_graphs=True, max_contexts=1)
    expected = [rig.load_kernels(engine, x) for x in sources]
    outputs: list[Any] = [None] * 64

    def work(i: int) -> None:
        with rig.module.stream(rig.stream()):
            for _ in range(5):
                outputs[i] = engine(sources[i])

    on_threads(64, work)
    rig.module.synchronize()
    assert_same(outputs, expected)
    assert engine.stats().contexts == 1


def test_clause3_the_memory_limit_is_kept(rig: Rig, compiled: Make) -> None:
    x = rig.random(64, 256)
    with rig.new_lanes():
        # With a limit, as the other: its contexts are in memory that nothing used before, and as large as need be.
        one = compiled(Mlp(), x, cuda_graphs=True, memory_limit=1 << 40).stats().bytes
        assert one > 0
        engine = compiled(Mlp(), x, cuda_graphs=True, memory_limit=2 * one)
        assert engine.warm(contexts=8) == 2
        # On a used lane it could be smaller than half of the others, and fit.
        none = compiled(Mlp(), x, cuda_graphs=True, memory_limit=one // 2)
    assert engine.stats().bytes <= 2 * one
    assert none.stats().contexts == 0
    assert "memory_limit" in none.explain()
    assert_same(none(x), engine(x))


# -- 4: outputs are ordinary tensors of the caller; inputs and engine may go at once ---------------------------------


@PATHS
def test_clause4_outputs_are_ordinary_and_their_own(rig: Rig, compiled: Make, graphs: bool) -> None:
    x1, x2 = rig.random(4, 256), rig.random(4, 256)
    engine = compiled(Mlp(), x1, cuda_graphs=graphs)
    with torch.inference_mode():
        y1 = engine(x1)
    kept = y1.clone()
    assert not y1.is_inference()
    assert not y1.requires_grad
    y1.add_(0)  # in place, and with autograd
    y1.requires_grad_().sum().backward()
    y2 = engine(x2)
    rig.module.synchronize()
    assert_same(y1, kept)
    assert not torch.equal(y1, y2)


@PATHS
def test_clause4_inputs_are_freed_right_after_the_call(rig: Rig, compiled: Make, graphs: bool) -> None:
    source = rig.random(64, 256)
    engine = compiled(Mlp(), source, cuda_graphs=graphs)
    expected = rig.load_kernels(engine, source)
    rig.build_ahead(engine, contexts=2)
    s = rig.stream()
    x = rig.poisoned(source, s)
    block = x.data_ptr()
    latch = rig.latch(s)
    with rig.module.stream(s):
        y = engine(x.copy_(source))
        del x
        junk = [torch.full_like(source, float("nan")) for _ in range(8)]
    assert block in [j.data_ptr() for j in junk]
    latch.open()
    s.synchronize()
    assert_same(y, expected)


@PATHS
@pytest.mark.parametrize("amid", [contextlib.nullcontext, FakeTensorMode], ids=["anywhere", "export"])
def test_clause4_the_engine_is_dropped_with_work_in_flight(
    rig: Rig, runtime: str, graphs: bool, amid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a garbage collection amid an export, where modes of PyTorch's make tensors into others."""
    ignored: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda of: ignored.append(repr(of.exc_value)))
    source = rig.random(64, 256)
    model = Mlp().eval().requires_grad_(False).to(rig.device())
    engine = anabranch.compile(model, [source], runtime=runtime, cuda_graphs=graphs, **rig.defaults)
    expected = rig.load_kernels(engine, source)
    rig.build_ahead(engine, contexts=2)
    sizes = [p.shape for p in model.parameters()]
    s = rig.stream()
    latch = rig.latch(s)
    with rig.module.stream(s):
        y = engine(source)
    with amid():
        del engine, model
        gc.collect()
    # On another stream, where the freed parameters would come from first: nothing may overwrite them yet.
    junk = [torch.full(size, float("nan"), device=rig.device()) for size in sizes for _ in range(20)]
    rig.module.default_stream().synchronize()
    latch.open()
    s.synchronize()
    assert_same(y, expected)
    assert not ignored
    del junk


@PATHS
def test_clause4_what_is_handed_back_is_the_callers(rig: Rig, compiled: Make, graphs: bool) -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(256))

        def forward(self, x: torch.Tensor) -> Any:
            y = x * self.weight
            return {
                "x": x,
                "view": x[1:],
                "weight": self.weight,
                "y": y,
                "part": y[:, :2],
                "wide": y[:1].expand(3, 256),
            }

    x = rig.random(4, 256)
    engine = compiled(Mixed(), x, cuda_graphs=graphs)
    for scale in (1.0, 2.0):
        z = x * scale
        out = engine(z)
        assert out["x"] is z
        assert out["view"].data_ptr() == z[1:].data_ptr()
        assert out["y"].untyped_storage().data_ptr() == out["part"].untyped_storage().data_ptr()
        assert_same(out["y"], z * out["weight"])
        assert_same(out["part"], out["y"][:, :2])
        assert_same(out["wide"], out["y"][:1].expand(3, 256))
        assert out["wide"].stride() == (0, 1)


def _poisoned(rig: Rig, stream: Any, *sources: torch.Tensor) -> list[torch.Tensor]:
    return [rig.poisoned(x, stream) for x in sources]


@PATHS
def test_clause4_a_write_into_an_input_is_ordered_as_an_operators_is(rig: Rig, compiled: Make, graphs: bool) -> None:
    sources = rig.random(4, 256), rig.random(4, 256)
    model = Keeps()
    engine = compiled(model, *sources, cuda_graphs=graphs)
    expected = rig.series(engine, *sources, calls=2)
    inputs = [x.clone() for x in sources]
    assert_same(expected[0], model(*inputs), rounding=ROUNDING)
    rig.build_ahead(engine, contexts=2)
    s = rig.stream()
    kept, x = _poisoned(rig, s, *sources)
    twice = rig.poisoned(x, s)
    version = kept._version
    latch = rig.latch(s)
    with rig.module.stream(s):
        kept.copy_(sources[0])
        x.copy_(sources[1])
        twice.copy_(sources[1] * 2)
        before = kept * 1  # queued ahead of the call: sees what it is going to write over
        first = engine(kept, x)
        between = kept * 1
        second = engine(kept, twice)
        after = kept * 1
        done = s.record_event()
    # Where nothing has run yet: a graph for gradients that keeps a tensor looks at its version on the host.
    assert kept._version >= version + 3
    assert x._version == version + 1
    assert first[0] is kept
    assert second[0] is kept
    rig.run_what_can()
    assert not done.query()
    latch.open()
    s.synchronize()
    assert_same(before, sources[0])
    assert_same([between, *first[1:]], list(expected[0]))
    assert_same([after, *second[1:]], list(expected[1]))
    assert_same(x, sources[1], "what is only read")


@PATHS
def test_clause4_writes_on_two_streams_share_a_context_and_no_order(rig: Rig, compiled: Make, graphs: bool) -> None:
    sources = [(rig.random(4, 256), rig.random(4, 256)) for _ in range(2)]
    engine = compiled(Keeps(), *sources[0], cuda_graphs=graphs)
    expected = [rig.series(engine, *given)[0] for given in sources]
    engine.warm(contexts=2)
    held, free = rig.stream(), rig.stream()
    inputs = [_poisoned(rig, s, *given) for s, given in zip((held, free), sources, strict=True)]
    for s, given in zip((held, free), inputs, strict=True):
        with rig.module.stream(s):
            engine(*(x.clone() for x in given))  # what a first call on a stream needs
    rig.module.synchronize()
    latch = rig.latch(held)
    results = []
    for s, given, source in zip((held, free), inputs, sources, strict=True):
        with rig.module.stream(s):
            results.append(engine(*(x.copy_(y) for x, y in zip(given, source, strict=True))))
    free.synchronize()  # would never return if this write waited for the other's
    assert_same(results[1], expected[1])
    with rig.module.stream(free):
        for _ in range(3):  # of which one takes the context of the stream that is held, where there are contexts
            results[1] = engine(*(x.copy_(y) for x, y in zip(inputs[1], sources[1], strict=True)))
    latch.open()
    rig.module.synchronize()
    assert_same(results, expected)


@PATHS
def test_clause4_a_written_input_is_freed_right_after_the_call(rig: Rig, compiled: Make, graphs: bool) -> None:
    sources = rig.random(64, 256), rig.random(64, 256)
    engine = compiled(Keeps(), *sources, cuda_graphs=graphs)
    (expected,) = rig.series(engine, *sources)
    rig.build_ahead(engine, contexts=2)
    s = rig.stream()
    kept, x = _poisoned(rig, s, *sources)
    blocks = {kept.data_ptr(), x.data_ptr()}
    latch = rig.latch(s)
    with rig.module.stream(s):
        _, old, new = engine(kept.copy_(sources[0]), x.copy_(sources[1]))
        del kept, x, _
        junk = [torch.full_like(sources[0], 7.0) for _ in range(8)]
    assert blocks <= {j.data_ptr() for j in junk}
    latch.open()
    s.synchronize()
    assert_same([old, new], list(expected[1:]))
    # What is written into the memory that is another's by now came before that was.
    assert all(torch.equal(j, torch.full_like(j, 7.0)) for j in junk)


@PATHS
@pytest.mark.parametrize("layout", ["strided", "misaligned"])
def test_clause4_what_lies_beside_a_written_input_is_left_alone(
    rig: Rig, compiled: Make, graphs: bool, layout: str
) -> None:
    sources = rig.random(4, 256), rig.random(4, 256)
    engine = compiled(Keeps(), *sources, cuda_graphs=graphs)
    expected = rig.series(engine, *sources, calls=2)

    def part_of(whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the call is given, and the rest."""
        if layout == "strided":
            return whole.view(4, 256, 2)[..., 0], whole.view(4, 256, 2)[..., 1]
        return whole[1:1025].view(4, 256), torch.cat([whole[:1], whole[1025:]])

    around = rig.random(2048)
    s = rig.stream()
    (whole,) = _poisoned(rig, s, around)
    x = rig.poisoned(sources[1], s)
    kept, _ = part_of(whole)
    engine(*(y.clone() for y in (kept, x)))
    with rig.module.stream(s):
        # Kernels that only such a layout needs.
        engine(part_of(around.clone())[0], sources[1])
        part_of(whole.clone())[1].clone()
        assert_same(kept.clone(), kept.clone())
    rig.module.synchronize()
    rig.build_ahead(engine, contexts=2)
    latch = rig.latch(s)
    with rig.module.stream(s):
        whole.copy_(around)
        kept.copy_(sources[0])
        first = engine(kept, x.copy_(sources[1]))
        middle = kept.clone(memory_format=torch.contiguous_format)
        second = engine(kept, x.copy_(sources[1] * 2))
    assert first[0] is kept
    assert second[0] is kept
    latch.open()
    s.synchronize()
    assert_same([middle, *first[1:]], list(expected[0]))
    assert_same([kept.contiguous(), *second[1:]], list(expected[1]))
    assert_same(part_of(whole)[1], part_of(around)[1])


# -- 6: inside the caller's own capture ------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_clause6_two_user_graphs_replay_beside_direct_calls_after_the_engine_is_gone(
    rig: Rig, runtime: str, graphs: bool, mode: str
) -> None:
    model = Mlp().eval().requires_grad_(False).to(rig.device()).half()
    sources = [rig.random(64, 256, dtype=torch.half) for _ in range(16)]
    engine, other = (
        anabranch.compile(model, [sources[0]], runtime=runtime, cuda_graphs=graphs, **rig.defaults) for _ in range(2)
    )
    expected = [rig.load_kernels(engine, x) for x in sources]
    engine.warm(captures=2)
    captures = []
    for _ in range(2):
        x = torch.full_like(sources[0], float("nan"))
        g = rig.new_graph()
        with rig.capture(g, mode):
            y = engine(engine(x) * 0 + x)  # twice in one capture
        captures.append((g, x, y))
    assert engine.stats().calls_in_captures == 4
    del engine, model
    gc.collect()
    junk = [torch.full((256, 256), float("nan"), device=rig.device(), dtype=torch.half) for _ in range(50)]
    rig.module.synchronize()  # the threads below write to what this stream filled

    def work(i: int) -> None:
        with rig.module.stream(rig.stream()):
            if i < 2:
                g, x, y = captures[i]
                for k in range(100):
                    x.copy_(sources[k % 16])
                    g.replay()
                    assert_same(y, expected[k % 16], f"graph {i}, replay {k}")
            else:
                for k in range(100):
                    assert_same(other(sources[(k + i) % 16]), expected[(k + i) % 16])

    on_threads(6, work)
    other.close()
    del junk


@PATHS
def test_clause6_an_engine_that_goes_inside_a_capture_does_it_no_harm(rig: Rig, runtime: str, graphs: bool) -> None:
    x = rig.random(64, 256)
    model = Mlp().eval().requires_grad_(False).to(rig.device())
    engine, going = (
        anabranch.compile(model, [x], runtime=runtime, cuda_graphs=graphs, **rig.defaults) for _ in range(2)
    )
    expected = rig.load_kernels(engine, x)
    rig.load_kernels(going, x)
    gc.collect()
    g = rig.new_graph()
    with rig.capture(g, "global"):
        del going
        gc.collect()
        rig.seam.collect()
        y = engine(x)
    y.fill_(float("nan"))
    g.replay()
    rig.module.synchronize()
    assert_same(y, expected)
    engine.close()


@PATHS
def test_clause6_compiling_beside_other_codes_capture_does_it_no_harm(rig: Rig, runtime: str, graphs: bool) -> None:
    assert_a_capture_beside_is_unharmed(rig, runtime, graphs, call_amid=True)


def assert_a_capture_beside_is_unharmed(rig: Rig, runtime: str, graphs: bool, *, call_amid: bool) -> None:
    """Another thread's capture is under way while a model is compiled and warmed, and called where ``call_amid`` says
    so; otherwise it is called once the capture has ended."""
    x, source = rig.random(64, 256), rig.random(64)
    model = Mlp().eval().requires_grad_(False).to(rig.device())
    # What the direct call needs of this thread and stream, as eager's would: libraries' handles, their workspaces.
    model(x)
    g, captured = rig.new_graph(), list[torch.Tensor]()
    under_way, compiled, errors = threading.Event(), threading.Event(), list[BaseException]()

    def other_code() -> None:
        try:
            with rig.capture(g, "global"):
                captured.append(source * 2)
                under_way.set()
                compiled.wait(300)
                captured.append(captured[0] + 1)
        except BaseException as e:
            errors.append(e)
        finally:
            under_way.set()

    thread = threading.Thread(target=other_code)
    thread.start()
    try:
        under_way.wait()
        engine = anabranch.compile(model, [x], runtime=runtime, cuda_graphs=graphs, **rig.defaults)
        engine.warm(contexts=2)
        y = engine(x) if call_amid else None
    finally:
        compiled.set()
        thread.join()
    assert not errors, errors[0]
    if not call_amid:
        y = engine(x)
    g.replay()
    rig.module.synchronize()
    assert_same(captured[1], source * 2 + 1)
    assert_same(y, rig.load_kernels(engine, x))
    engine.close()


def test_clause6_what_a_graph_has_baked_in_is_freed_with_it(rig: Rig, runtime: str) -> None:
    model = Mlp(2048).eval().requires_grad_(False).to(rig.device())
    x = rig.random(4, 2048)
    engine = anabranch.compile(model, [x], runtime=runtime, cuda_graphs=False, **rig.defaults)
    rig.load_kernels(engine, x)
    g = rig.new_graph()
    with rig.capture(g):
        y = engine(x)
    size = sum(p.nbytes for p in model.parameters())
    del engine, model, y
    gc.collect()
    held = rig.module.memory_allocated()
    g.replay()
    rig.module.synchronize()
    del g
    assert rig.comes_true(lambda: held - rig.module.memory_allocated() >= size)


def test_clause6_what_cannot_be_captured_raises(rig: Rig, compiled: Make) -> None:
    class Data(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0]

    x = rig.random(4, 256)
    known, data = compiled(Mlp(), x), compiled(Data(), x)
    new_shape = rig.random(5, 256)
    expected = rig.load_kernels(known, x)
    g = rig.new_graph()
    with rig.capture(g):
        with pytest.raises(anabranch.NotCapturable, match="warm"):
            known(new_shape)
        with pytest.raises(anabranch.NotCapturable, match=r"nonzero|data-dependent"):
            data(x)
        y = known(x)  # the capture is still good
    g.replay()
    rig.module.synchronize()
    assert_same(y, expected)
    assert_same(data(x), x[x > 0])


def test_clause6_random_models_draw_anew_in_a_users_graph(rig: Rig, compiled: Make) -> None:
    class Noise(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    x = rig.random(4, 256)
    engine = compiled(Noise(), x)
    assert "random" in engine.explain()
    first, second = engine(x), engine(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    drawn = engine(x)
    torch.manual_seed(3)
    assert_same(drawn, x + torch.rand_like(x))
    g = rig.new_graph()
    with rig.capture(g):
        y = engine(x)
    g.replay()
    a = y.clone()
    g.replay()
    assert not torch.equal(a, y)


@PATHS
def test_clause6_replays_write_into_the_callers_input_again(rig: Rig, runtime: str, graphs: bool) -> None:
    sources = rig.random(64, 256), rig.random(64, 256)
    model = Keeps().eval().requires_grad_(False).to(rig.device())
    engine = anabranch.compile(model, list(sources), runtime=runtime, cuda_graphs=graphs, **rig.defaults)
    expected = rig.series(engine, *sources, calls=4)
    engine.warm(captures=2)
    kept, x = (torch.full_like(y, float("nan")) for y in sources)
    rig.module.synchronize()
    g = rig.new_graph()
    with rig.capture(g):
        before = kept * 1
        result = engine(kept, x)
        after = kept * 1
    assert result[0] is kept
    assert engine.stats().calls_in_captures == 1
    assert kept.isnan().all(), "a capture writes nothing"
    del engine, model
    gc.collect()
    junk = [torch.full((256, 256), float("nan"), device=rig.device()) for _ in range(20)]
    rig.module.synchronize()
    s = rig.stream()
    with rig.module.stream(s):  # what a first replay needs
        g.replay()
    s.synchronize()
    latch = rig.latch(s)
    seen = []
    with rig.module.stream(s):
        kept.copy_(sources[0])
        for i in range(4):
            x.copy_(sources[1] * (i + 1))
            g.replay()
            seen.append([y.clone() for y in (before, after, *result)])
    rig.run_what_can()
    latch.open()
    s.synchronize()
    olds = [sources[0], *(of[0] for of in expected)]
    for old, (was, now, *results), of in zip(olds, seen, expected, strict=False):
        assert_same(was, old)
        assert_same([now, *results], [of[0].clone(), *of])
    del junk


# -- 7: the same bits everywhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_clause7_the_same_bits_on_every_path_stream_thread_and_context(
    rig: Rig, compiled: Make, backend: str, dtype: torch.dtype
) -> None:
    x = rig.random(65, 256, dtype=dtype)
    graph = compiled(Mlp(), x, cuda_graphs=True, backend=backend)
    direct = compiled(Mlp(), x, cuda_graphs=False, backend=backend)
    expected = rig.load_kernels(graph, x)
    assert_same(direct(x), expected)
    g = rig.new_graph()
    with rig.capture(g):
        y = direct(x)
    g.replay()
    assert_same(y, expected)
    strided = torch.stack([x, x], -1)[..., 0]
    misaligned = torch.empty(x.numel() + 1, dtype=dtype, device=rig.device())[1:].view_as(x).copy_(x)
    outputs: list[Any] = [None] * 16

    def work(i: int) -> None:
        with rig.module.stream(rig.stream()):
            outputs[i] = [e(v) for e in (graph, direct) for v in (x, strided, misaligned)]

    rig.module.synchronize()
    on_threads(16, work)
    rig.module.synchronize()
    for ys in outputs:
        for y in ys:
            assert_same(y, expected)


def test_clause7_flags_are_frozen_at_compile(rig: Rig, compiled: Make) -> None:
    x = rig.random(64, 256)
    rig.fast_matmul(False)
    graph = compiled(Mlp(), x, cuda_graphs=True)
    direct = compiled(Mlp(), x, cuda_graphs=False)
    relu = compiled(torch.nn.ReLU(), x, cuda_graphs=False)
    expected = rig.load_kernels(graph, x)
    try:
        rig.fast_matmul(True)
        assert_same(graph(x), expected)  # its graph is frozen
        with pytest.raises(anabranch.FlagsChanged, match="matmul"):
            direct(x)
        assert_same(relu(x), x.relu())  # reads no flag
    finally:
        rig.fast_matmul(False)
    assert_same(direct(x), expected)


def test_clause7_autocast_and_inference_mode_of_the_caller_change_nothing(rig: Rig, compiled: Make) -> None:
    x = rig.random(64, 256)
    engine = compiled(Mlp(), x, cuda_graphs=False)
    expected = rig.load_kernels(engine, x)
    with torch.autocast(rig.kind, dtype=torch.float16):
        assert_same(engine(x), expected)
    with torch.inference_mode(), torch.autocast(rig.kind, dtype=torch.bfloat16):
        assert_same(engine(x), expected)


# -- 8: errors ------------------------------------------------------------------------------------------------------


@PATHS
def test_clause8_bad_input_raises_before_device_work_and_the_engine_stays_usable(
    rig: Rig, compiled: Make, graphs: bool
) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=graphs)
    expected = rig.load_kernels(engine, x)
    s = rig.stream()
    bad = [
        (x.cpu(),),
        (rig.random(4, 255),),
        (x.double(),),
        (x.clone().requires_grad_(),),
        (rig.sparse(x),),
        (x, x),
        (),
        ("x",),
        (object(),),
    ]
    # The first time, a lane with its workspace may be made, which is kept.
    for _ in range(2):
        rig.module.synchronize()
        gc.collect()  # what exceptions keep
        allocated = rig.module.memory_allocated()
        with rig.module.stream(s), rig.nothing_queued(s):
            x.new_empty(4)  # of which a trace tells; it queues nothing
            for args in bad:
                with pytest.raises(anabranch.InputError):
                    engine(*args)
    gc.collect()
    assert rig.module.memory_allocated() == allocated
    assert_same(engine(x), expected)


# Of the Python runtime: each of its steps is a method that can be made to raise. `faults.py` has the same for both
# runtimes, with faults of the device.
@pytest.mark.parametrize("runtime", ["python"])
@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt(), torch.OutOfMemoryError("planted")])
@pytest.mark.parametrize("where", ["allocate", "launch", "record"])
def test_clause8_an_error_inside_a_call_leaves_no_half_used_context(
    rig: Rig, compiled: Make, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    from anabranch.runtime import _context

    x = rig.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=True, max_contexts=1)
    expected = rig.load_kernels(engine, x)
    s = rig.stream()
    # Where contexts are to be built ahead, the next call's could not be while the stream is held.
    latch = rig.latch(*[] if rig.builds_ahead else [s])

    def fail(*args: Any) -> None:
        raise error

    with monkeypatch.context() as m:
        if where == "allocate":
            m.setattr(_context.StaticOutputs, "allocate", fail)
        elif where == "launch":
            m.setattr(rig.graph_class, "launch", fail)
        else:
            record, calls = rig.event_class.record, []

            def record_once_failing(self: Any, stream: Any = None) -> None:
                calls.append(1)
                if len(calls) == 1:
                    raise error
                record(self, stream)

            m.setattr(rig.event_class, "record", record_once_failing)
        with rig.module.stream(s), pytest.raises(type(error)):
            engine(x)
    with rig.module.stream(s):
        y = engine(x)
    latch.open()
    rig.module.synchronize()
    assert_same(y, expected)
    rig.seam.collect()
    gc.collect()
    assert engine.stats().contexts <= 1


def test_clause8_closed_engines_say_so(rig: Rig, compiled: Make) -> None:
    x = rig.random(4, 256)
    engine = compiled(Mlp(), x)
    engine.close()
    engine.close()
    with pytest.raises(anabranch.EngineClosed, match="compile a new one"):
        engine(x)


__all__ = sorted(name for name in dict(globals()) if name.startswith("test_"))
