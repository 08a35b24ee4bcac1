"""The stream contract's clauses on real streams, held still by a latch. Each test is named after its clause."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch

import anabranch
from gpu.support import PATHS, Chain, Gpu, Make, Mlp, on_threads

# -- 1: ordered on the caller's current stream, looked up at every call ----------------------------------------------


@PATHS
@pytest.mark.parametrize("model", [torch.nn.ReLU(), Mlp(), Chain()], ids=["relu", "mlp", "chain"])
def test_clause1_starts_after_the_callers_queued_work(gpu: Gpu, compiled: Make, model: Any, graphs: bool) -> None:
    source = gpu.random(4, 256)
    engine = compiled(model, source, cuda_graphs=graphs)
    expected = gpu.load_kernels(engine, source)
    s = gpu.stream()
    x = gpu.poisoned(source, s)
    latch = gpu.latch(s)
    with torch.cuda.stream(s):
        x.copy_(source)
        y = engine(x)
        z = y + 1  # queued afterwards: sees the output
        done = s.record_event()
    assert not done.query()
    latch.open()
    s.synchronize()
    assert torch.equal(y, expected)
    assert torch.equal(z, expected + 1)


@PATHS
def test_clause1_the_stream_is_looked_up_at_every_call(gpu: Gpu, compiled: Make, graphs: bool) -> None:
    sources = [gpu.random(4, 256) for _ in range(6)]
    engine = compiled(Mlp(), sources[0], cuda_graphs=graphs)
    expected = [gpu.load_kernels(engine, x) for x in sources]
    streams = [gpu.stream(), torch.cuda.Stream(), torch.cuda.default_stream(), gpu.stream()] * 2
    inputs = [gpu.poisoned(x, s) for x, s in zip(sources, streams, strict=False)]
    latch = gpu.latch(*streams[:4])
    outputs = []
    for x, source, s in zip(inputs, sources, streams, strict=False):
        with torch.cuda.stream(s):
            outputs.append(engine(x.copy_(source)))
    latch.open()
    torch.cuda.synchronize()
    for y, e in zip(outputs, expected, strict=True):
        assert torch.equal(y, e)


@PATHS
def test_clause1_the_engines_device_decides_not_the_threads(gpu: Gpu, graphs: bool) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    # Nothing is copied from one GPU to the other: once they are peers, an allocation waits for held streams of both.
    generator = torch.Generator(device="cuda:1").manual_seed(5)
    source = torch.randn(4, 256, device="cuda:1", generator=generator)
    engine = anabranch.compile(
        Mlp().eval().requires_grad_(False).to("cuda:1"), [source], backend="eager", cuda_graphs=graphs
    )
    assert torch.cuda.current_device() == 0
    s = gpu.seam.stream(1)
    with torch.cuda.stream(s):
        x = torch.full_like(source, float("nan"))
        expected = engine(source)
    s.synchronize()
    assert torch.isfinite(expected).all()
    latch = gpu.latch(s)
    with torch.cuda.stream(s):
        x.copy_(source)
        torch.cuda.set_device(0)  # the stream stays current for its own device
        assert torch.cuda.current_stream(1) == s
        y = engine(x)
        assert torch.cuda.current_device() == 0
        done = s.record_event()
    assert not done.query()
    latch.open()
    s.synchronize()
    assert torch.equal(y, expected)
    engine.close()


# -- 2: no stream of its own that a caller could observe -------------------------------------------------------------


@PATHS
def test_clause2_leaves_stream_and_device_as_they_were(gpu: Gpu, compiled: Make, graphs: bool) -> None:
    x = gpu.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=graphs)
    for s in (gpu.stream(), torch.cuda.Stream(), torch.cuda.default_stream()):
        with torch.cuda.stream(s):
            engine(x)
            assert torch.cuda.current_stream() == s
            with contextlib.suppress(anabranch.InputError):
                engine(x.cpu())
            assert torch.cuda.current_stream() == s
        assert torch.cuda.current_device() == 0


# -- 3: calls on different streams are not ordered; sharing a context waits on the device ----------------------------


@PATHS
def test_clause3_a_held_stream_holds_no_other_call(gpu: Gpu, compiled: Make, graphs: bool) -> None:
    x1, x2 = gpu.random(4, 256), gpu.random(4, 256)
    engine = compiled(Mlp(), x1, cuda_graphs=graphs)
    expected1, expected2 = gpu.load_kernels(engine, x1), gpu.load_kernels(engine, x2)
    engine.warm(contexts=2)
    s1, s2 = gpu.stream(), gpu.stream()
    for s in (s1, s2):
        with torch.cuda.stream(s):
            engine(x1)
    torch.cuda.synchronize()
    latch = gpu.latch(s1)
    with torch.cuda.stream(s1):
        y1 = engine(x1)
    with torch.cuda.stream(s2):
        y2 = engine(x2)
    s2.synchronize()  # would never return if the second call waited for the first
    assert torch.equal(y2, expected2)
    latch.open()
    s1.synchronize()
    assert torch.equal(y1, expected1)


def test_clause3_sharing_a_context_waits_on_the_device_and_asks_no_event(
    gpu: Gpu, compiled: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [gpu.random(4, 256) for _ in range(4)]
    engine = compiled(Mlp(), sources[0], cuda_graphs=True, max_contexts=1)
    expected = [gpu.load_kernels(engine, x) for x in sources]
    streams = [gpu.stream() for _ in sources]
    inputs = [gpu.poisoned(x, s) for x, s in zip(sources, streams, strict=True)]
    waits = engine.stats().waits
    latch = gpu.latch(*streams)
    with monkeypatch.context() as m:
        m.setattr(torch.cuda.Event, "query", lambda self: pytest.fail("asked an event on the call path"))
        m.setattr(torch.cuda.Event, "synchronize", lambda self: pytest.fail("waited on the host on the call path"))
        outputs = []
        for x, source, s in zip(inputs, sources, streams, strict=True):
            with torch.cuda.stream(s):
                outputs.append(engine(x.copy_(source)))
    events = [s.record_event() for s in streams]
    assert not any(e.query() for e in events)
    latch.open()
    torch.cuda.synchronize()
    for y, e in zip(outputs, expected, strict=True):
        assert torch.equal(y, e)
    assert engine.stats().waits - waits == 4
    assert engine.stats().contexts == 1


def test_clause3_only_the_held_one_waits_for_the_least_recently_used_context(gpu: Gpu, compiled: Make) -> None:
    x = gpu.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=True, max_contexts=2)
    expected = gpu.load_kernels(engine, x)
    engine.warm(contexts=2)
    held, free, third = gpu.stream(), gpu.stream(), gpu.stream()
    latch = gpu.latch(held)
    with torch.cuda.stream(free):
        engine(x)
    with torch.cuda.stream(held):
        y = engine(x)
    with torch.cuda.stream(third):
        z = engine(x)  # takes the context of `free`, which was used longest ago
    third.synchronize()
    assert torch.equal(z, expected)
    latch.open()
    held.synchronize()
    assert torch.equal(y, expected)


def test_clause3_sixty_four_threads_share_one_context(gpu: Gpu, compiled: Make) -> None:
    sources = [gpu.random(4, 256) for _ in range(64)]
    engine = compiled(Mlp(), sources[0], cuda_graphs=True, max_contexts=1)
    expected = [gpu.load_kernels(engine, x) for x in sources]
    outputs: list[Any] = [None] * 64

    def work(i: int) -> None:
        with torch.cuda.stream(gpu.stream()):
            for _ in range(5):
                outputs[i] = engine(sources[i])

    on_threads(64, work)
    torch.cuda.synchronize()
    assert all(torch.equal(y, e) for y, e in zip(outputs, expected, strict=True))
    assert engine.stats().contexts == 1


def test_clause3_the_memory_limit_is_kept(gpu: Gpu, compiled: Make) -> None:
    x = gpu.random(64, 256)
    one = compiled(Mlp(), x, cuda_graphs=True).stats().bytes
    assert one > 0
    engine = compiled(Mlp(), x, cuda_graphs=True, memory_limit=2 * one)
    assert engine.warm(contexts=8) == 2
    assert engine.stats().bytes <= 2 * one
    none = compiled(Mlp(), x, cuda_graphs=True, memory_limit=one // 2)
    assert none.stats().contexts == 0
    assert "memory_limit" in none.explain()
    assert torch.equal(none(x), engine(x))


# -- 4: outputs are ordinary tensors of the caller; inputs and engine may go at once ---------------------------------


@PATHS
def test_clause4_outputs_are_ordinary_and_their_own(gpu: Gpu, compiled: Make, graphs: bool) -> None:
    x1, x2 = gpu.random(4, 256), gpu.random(4, 256)
    engine = compiled(Mlp(), x1, cuda_graphs=graphs)
    with torch.inference_mode():
        y1 = engine(x1)
    kept = y1.clone()
    assert not y1.is_inference()
    assert not y1.requires_grad
    y1.add_(0)  # in place, and with autograd
    y1.requires_grad_().sum().backward()
    y2 = engine(x2)
    torch.cuda.synchronize()
    assert torch.equal(y1, kept)
    assert not torch.equal(y1, y2)


@PATHS
def test_clause4_inputs_are_freed_right_after_the_call(gpu: Gpu, compiled: Make, graphs: bool) -> None:
    source = gpu.random(64, 256)
    engine = compiled(Mlp(), source, cuda_graphs=graphs)
    expected = gpu.load_kernels(engine, source)
    s = gpu.stream()
    x = gpu.poisoned(source, s)
    block = x.data_ptr()
    latch = gpu.latch(s)
    with torch.cuda.stream(s):
        y = engine(x.copy_(source))
        del x
        junk = [torch.full_like(source, float("nan")) for _ in range(8)]
    assert block in [j.data_ptr() for j in junk]
    latch.open()
    s.synchronize()
    assert torch.equal(y, expected)


@PATHS
def test_clause4_the_engine_is_dropped_with_work_in_flight(gpu: Gpu, graphs: bool) -> None:
    source = gpu.random(64, 256)
    model = Mlp().eval().requires_grad_(False).cuda()
    engine = anabranch.compile(model, [source], backend="eager", cuda_graphs=graphs)
    expected = gpu.load_kernels(engine, source)
    sizes = [p.shape for p in model.parameters()]
    s = gpu.stream()
    latch = gpu.latch(s)
    with torch.cuda.stream(s):
        y = engine(source)
    del engine, model
    gc.collect()
    # On another stream, where the freed parameters would come from first: nothing may overwrite them yet.
    junk = [torch.full(size, float("nan"), device="cuda") for size in sizes for _ in range(20)]
    torch.cuda.default_stream().synchronize()
    latch.open()
    s.synchronize()
    assert torch.equal(y, expected)
    del junk


@PATHS
def test_clause4_what_is_handed_back_is_the_callers(gpu: Gpu, compiled: Make, graphs: bool) -> None:
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

    x = gpu.random(4, 256)
    engine = compiled(Mixed(), x, cuda_graphs=graphs)
    for scale in (1.0, 2.0):
        z = x * scale
        out = engine(z)
        assert out["x"] is z
        assert out["view"].data_ptr() == z[1:].data_ptr()
        assert out["y"].untyped_storage().data_ptr() == out["part"].untyped_storage().data_ptr()
        assert torch.equal(out["y"], z * out["weight"])
        assert torch.equal(out["part"], out["y"][:, :2])
        assert torch.equal(out["wide"], out["y"][:1].expand(3, 256))
        assert out["wide"].stride() == (0, 1)


# -- 6: inside the caller's own capture ------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_clause6_two_user_graphs_replay_beside_direct_calls_after_the_engine_is_gone(
    gpu: Gpu, graphs: bool, mode: str
) -> None:
    model = Mlp().eval().requires_grad_(False).cuda().half()
    sources = [gpu.random(64, 256, dtype=torch.half) for _ in range(16)]
    engine = anabranch.compile(model, [sources[0]], backend="eager", cuda_graphs=graphs)
    other = anabranch.compile(model, [sources[0]], backend="eager", cuda_graphs=graphs)
    expected = [gpu.load_kernels(engine, x) for x in sources]
    captures = []
    for _ in range(2):
        x = torch.full_like(sources[0], float("nan"))
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g, capture_error_mode=mode):
            y = engine(engine(x) * 0 + x)  # twice in one capture
        captures.append((g, x, y))
    assert engine.stats().calls_in_captures == 4
    del engine, model
    gc.collect()
    junk = [torch.full((256, 256), float("nan"), device="cuda", dtype=torch.half) for _ in range(50)]

    def work(i: int) -> None:
        with torch.cuda.stream(gpu.stream()):
            if i < 2:
                g, x, y = captures[i]
                for k in range(100):
                    x.copy_(sources[k % 16])
                    g.replay()
                    assert torch.equal(y, expected[k % 16]), f"graph {i}, replay {k}"
            else:
                for k in range(100):
                    assert torch.equal(other(sources[(k + i) % 16]), expected[(k + i) % 16])

    on_threads(6, work)
    other.close()
    del junk


def test_clause6_what_a_graph_has_baked_in_is_freed_with_it(gpu: Gpu) -> None:
    model = Mlp(2048).eval().requires_grad_(False).cuda()
    x = gpu.random(4, 2048)
    engine = anabranch.compile(model, [x], backend="eager", cuda_graphs=False)
    gpu.load_kernels(engine, x)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        y = engine(x)
    size = sum(p.nbytes for p in model.parameters())
    del engine, model, y
    gc.collect()
    held = torch.cuda.memory_allocated()
    g.replay()
    torch.cuda.synchronize()
    del g
    gc.collect()
    gpu.seam.reap()
    gc.collect()
    assert held - torch.cuda.memory_allocated() >= size


def test_clause6_what_cannot_be_captured_raises(gpu: Gpu, compiled: Make) -> None:
    class Data(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x > 0]

    x = gpu.random(4, 256)
    known, data = compiled(Mlp(), x), compiled(Data(), x)
    new_shape = gpu.random(5, 256)
    expected = gpu.load_kernels(known, x)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        with pytest.raises(anabranch.NotCapturable, match="warm"):
            known(new_shape)
        with pytest.raises(anabranch.NotCapturable, match=r"nonzero|data-dependent"):
            data(x)
        y = known(x)  # the capture is still good
    g.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    assert torch.equal(data(x), x[x > 0])


def test_clause6_random_models_draw_anew_in_a_users_graph(gpu: Gpu, compiled: Make) -> None:
    class Noise(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    x = gpu.random(4, 256)
    engine = compiled(Noise(), x)
    assert "random" in engine.explain()
    first, second = engine(x), engine(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    drawn = engine(x)
    torch.manual_seed(3)
    assert torch.equal(drawn, x + torch.rand_like(x))
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        y = engine(x)
    g.replay()
    a = y.clone()
    g.replay()
    assert not torch.equal(a, y)


# -- 7: the same bits everywhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_clause7_the_same_bits_on_every_path_stream_thread_and_context(
    gpu: Gpu, compiled: Make, backend: str, dtype: torch.dtype
) -> None:
    x = gpu.random(65, 256, dtype=dtype)
    graph = compiled(Mlp(), x, cuda_graphs=True, backend=backend)
    direct = compiled(Mlp(), x, cuda_graphs=False, backend=backend)
    expected = gpu.load_kernels(graph, x)
    assert torch.equal(direct(x), expected)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        y = direct(x)
    g.replay()
    assert torch.equal(y, expected)
    strided = torch.stack([x, x], -1)[..., 0]
    misaligned = torch.empty(x.numel() + 1, dtype=dtype, device="cuda")[1:].view_as(x).copy_(x)
    outputs: list[Any] = [None] * 16

    def work(i: int) -> None:
        with torch.cuda.stream(gpu.stream()):
            outputs[i] = [e(v) for e in (graph, direct) for v in (x, strided, misaligned)]

    torch.cuda.synchronize()
    on_threads(16, work)
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for ys in outputs for y in ys)


def test_clause7_flags_are_frozen_at_compile(gpu: Gpu, compiled: Make) -> None:
    x = gpu.random(64, 256)
    torch.backends.cuda.matmul.allow_tf32 = False
    graph = compiled(Mlp(), x, cuda_graphs=True)
    direct = compiled(Mlp(), x, cuda_graphs=False)
    relu = compiled(torch.nn.ReLU(), x, cuda_graphs=False)
    expected = gpu.load_kernels(graph, x)
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert torch.equal(graph(x), expected)  # its graph is frozen
        with pytest.raises(anabranch.FlagsChanged, match="matmul"):
            direct(x)
        assert torch.equal(relu(x), x.relu())  # reads no flag
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.equal(direct(x), expected)


def test_clause7_autocast_and_inference_mode_of_the_caller_change_nothing(gpu: Gpu, compiled: Make) -> None:
    x = gpu.random(64, 256)
    engine = compiled(Mlp(), x, cuda_graphs=False)
    expected = gpu.load_kernels(engine, x)
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.equal(engine(x), expected)
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(engine(x), expected)


# -- 8: errors ------------------------------------------------------------------------------------------------------


@PATHS
def test_clause8_bad_input_raises_before_device_work_and_the_engine_stays_usable(
    gpu: Gpu, compiled: Make, graphs: bool
) -> None:
    x = gpu.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=graphs)
    expected = gpu.load_kernels(engine, x)
    s = gpu.stream()
    bad = [
        (x.cpu(),),
        (gpu.random(4, 255),),
        (x.double(),),
        (x.clone().requires_grad_(),),
        (x.to_sparse(),),
        (x, x),
        (),
        ("x",),
        (object(),),
    ]
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    with torch.cuda.stream(s):
        for args in bad:
            with pytest.raises(anabranch.InputError):
                engine(*args)
        assert s.query()
    assert torch.cuda.memory_allocated() == allocated
    assert torch.equal(engine(x), expected)


@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt(), torch.OutOfMemoryError("planted")])
@pytest.mark.parametrize("where", ["allocate", "launch", "record"])
def test_clause8_an_error_inside_a_call_leaves_no_half_used_context(
    gpu: Gpu, compiled: Make, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    from anabranch.devices import _cuda
    from anabranch.runtime import _context

    x = gpu.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=True, max_contexts=1)
    expected = gpu.load_kernels(engine, x)
    s = gpu.stream()
    latch = gpu.latch(s)

    def fail(*args: Any) -> None:
        raise error

    with monkeypatch.context() as m:
        if where == "allocate":
            m.setattr(_context.StaticOutputs, "allocate", fail)
        elif where == "launch":
            m.setattr(_cuda._CudaGraph, "launch", fail)
        else:
            record, calls = torch.cuda.Event.record, []

            def record_once_failing(self: Any, stream: Any = None) -> None:
                calls.append(1)
                if len(calls) == 1:
                    raise error
                record(self, stream)

            m.setattr(torch.cuda.Event, "record", record_once_failing)
        with torch.cuda.stream(s), pytest.raises(type(error)):
            engine(x)
    with torch.cuda.stream(s):
        y = engine(x)
    latch.open()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    gpu.seam.reap()
    gc.collect()
    assert engine.stats().contexts <= 1


def test_clause8_closed_engines_say_so(gpu: Gpu, compiled: Make) -> None:
    x = gpu.random(4, 256)
    engine = compiled(Mlp(), x)
    engine.close()
    engine.close()
    with pytest.raises(anabranch.EngineClosed, match="compile a new one"):
        engine(x)
