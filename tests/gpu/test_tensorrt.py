"""TensorRT's engines on a GPU: right on many streams, in both runtimes, in callers' captures and beside them."""

from __future__ import annotations

import copy
import gc
import importlib.util
import threading

import pytest
import torch
from torch import nn

import anabranch
from anabranch.backends.tensorrt import library
from anabranch.bench import find_work
from anabranch.devices.cuda._driver import graph_edges
from anabranch.devices.cuda._early import early_edges
from gpu.support import Gpu, Make, assert_same, on_threads

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")),
    reason="neither tensorrt nor tensorrt_rtx is installed",
)

#: As compile decides, with a graph, direct.
WAYS = pytest.mark.parametrize("graphs", [None, True, False], ids=["auto", "graph", "direct"])


def convolutions(dtype: torch.dtype) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=4),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 16 * 16, 64),
    )
    return model.to(dtype), (1, 3, 32, 32)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest, relative to the largest magnitude."""
    return ((y.float() - expected).abs().max() / expected.abs().max()).item()


@WAYS
@pytest.mark.parametrize("work", ["relu", "residual", "encoder"])
def test_eight_threads_on_eight_streams_get_their_own_outputs(
    gpu: Gpu, compiled: Make, work: str, graphs: bool | None
) -> None:
    about = find_work(work)
    model = about.make().half()
    shape = about.shape_on("cuda")
    inputs = [gpu.random(*shape, dtype=torch.float16) * (0.5 + 0.25 * i) for i in range(8)]
    engine = compiled(model, inputs[0], backend="tensorrt", cuda_graphs=graphs)
    expected = [engine(x) for x in inputs]
    torch.cuda.synchronize()
    with torch.no_grad():
        float32 = about.make().cuda()
        for x, y in zip(inputs, expected, strict=True):
            ours, eager = error(y, float32(x.float())), error(model(x), float32(x.float()))
            assert ours <= max(2 * eager, 1e-3), (ours, eager)
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(8)]
    torch.cuda.synchronize()

    def work_on(i: int) -> None:
        with torch.cuda.stream(gpu.stream()):
            for j in range(60):
                k = (i + j) % 8
                y = engine(inputs[k])
                wrong[i] += (y != expected[k]).any()
                y.fill_(float("nan"))
            torch.cuda.current_stream().synchronize()

    on_threads(8, work_on)
    assert [int(n) for n in wrong] == [0] * 8
    stats = engine.stats()
    assert stats.graph_calls + stats.direct_calls == stats.calls
    if graphs is not None:
        assert (stats.graph_calls > 0) is graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_precision_is_as_exact_as_eager(gpu: Gpu, compiled: Make, dtype: torch.dtype) -> None:
    model, shape = convolutions(dtype)
    x = gpu.random(*shape, dtype=dtype)
    is_wide = dtype is torch.float32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        engine = compiled(model, x, backend="tensorrt", require_full=not is_wide or library().keeps_float32)
        y = engine(x)
        text = engine.explain()
    exact = convolutions(torch.float32)[0].eval().cuda()
    exact.load_state_dict(model.float().state_dict())
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = exact(x.float())
        eager = error(model.to(dtype)(x), expected)
    assert y.dtype == dtype
    for kind in ("products", "convolutions"):
        assert (f"{kind} of float32 in TF32" in text) is (is_wide and not library().keeps_float32)
    assert error(y, expected) <= max(2 * eager, 1e-5 if is_wide else 1e-3)


@WAYS
def test_each_kind_of_float32_operators_is_in_tf32_only_where_pytorch_allows_it(
    gpu: Gpu, compiled: Make, graphs: bool | None
) -> None:
    """Products alone, which PyTorch has in float32 by default, beside convolutions, which it has in TF32."""
    torch.manual_seed(7)
    product = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval().cuda()
    x = gpu.random(256, 512)
    expected = copy.deepcopy(product).double()(x.double())
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    engine = compiled(product, x, backend="tensorrt", cuda_graphs=graphs)
    assert error(engine(x), expected.float()) <= 1e-5
    assert ("products of float32 in TF32" in engine.explain()) is not library().keeps_float32

    convolution = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval().cuda()
    image = gpu.random(2, 32, 32, 32)
    expected = copy.deepcopy(convolution).double()(image.double())
    engine = compiled(convolution, image, backend="tensorrt", cuda_graphs=graphs, require_full=True)
    assert error(engine(image), expected.float()) <= 1e-2
    assert "in TF32" not in engine.explain()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.AdaptiveMaxPool2d(4)], ids=["strided", "adaptive"])
def test_max_pooling_keeps_nan(gpu: Gpu, compiled: Make, dtype: torch.dtype, pool: nn.Module) -> None:
    x = gpu.random(2, 8, 16, 16, dtype=dtype)
    x.view(-1)[::11] = float("nan")
    x.view(-1)[5::17] = float("inf")
    x.view(-1)[6::7] = -float("inf")
    # PyTorch 2.11 exports no adaptive pooling to ONNX: its own operator runs it there.
    whole = isinstance(pool, nn.MaxPool2d) or torch.__version__ >= (2, 13)
    engine = compiled(nn.Sequential(pool, nn.ReLU()), x, backend="tensorrt", require_full=whole)
    expected = pool(x).relu()
    assert bool(expected.isnan().any())
    torch.testing.assert_close(engine(x), expected, rtol=0, atol=0, equal_nan=True)


@WAYS
def test_the_default_stream_is_a_stream_like_others(gpu: Gpu, compiled: Make, graphs: bool | None) -> None:
    model, shape = convolutions(torch.float16)
    inputs = [gpu.random(*shape, dtype=torch.float16) for _ in range(3)]
    engine = compiled(model, inputs[0], backend="tensorrt", cuda_graphs=graphs)
    with torch.cuda.stream(gpu.stream()):
        expected = [engine(x) for x in inputs]
    torch.cuda.synchronize()
    for x, y in zip(inputs, expected, strict=True):
        # Queued on the default stream before and after: the call is ordered with both.
        source = torch.full_like(x, float("nan"))
        source.copy_(x)
        result = engine(source)
        copy = result.clone()
        source.fill_(float("nan"))
        result.fill_(float("nan"))
        assert_same(copy, y)


@WAYS
def test_several_calls_of_several_engines_in_several_captures(gpu: Gpu, compiled: Make, graphs: bool | None) -> None:
    model, shape = convolutions(torch.float16)
    x = gpu.random(*shape, dtype=torch.float16)
    engine = compiled(model, x, backend="tensorrt", cuda_graphs=graphs)
    inputs = [gpu.random(*shape, dtype=torch.float16) for _ in range(4)]
    expected = [engine(i) for i in inputs]
    engine.warm(captures=2)
    buffers, outputs, made = [], [], []
    for _ in range(2):
        buffer = [inputs[0].clone(), inputs[1].clone()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="global"):
            outputs.append([engine(b) for b in buffer])
        buffers.append(buffer)
        made.append(graph)
    third = torch.cuda.CUDAGraph()
    with torch.cuda.graph(third), pytest.raises(anabranch.NotCapturable, match=r"engine\.warm\(captures=N\)"):
        engine(x)
    torch.cuda.synchronize()
    for turn in range(6):
        for i in range(2):
            for k in range(2):
                buffers[i][k].copy_(inputs[(turn + i + k) % 4])
        torch.cuda.synchronize()
        streams = [gpu.stream() for _ in range(3)]
        for i in range(2):
            with torch.cuda.stream(streams[i]):
                for y in outputs[i]:
                    y.fill_(float("nan"))
                made[i].replay()
        with torch.cuda.stream(streams[2]):
            beside = engine(inputs[turn % 4])
        torch.cuda.synchronize()
        assert_same(beside, expected[turn % 4])
        for i in range(2):
            for k in range(2):
                assert_same(outputs[i][k], expected[(turn + i + k) % 4], f"{turn}, {i}, {k}")


def early_convolutions(gpu: Gpu) -> tuple[nn.Module, list[torch.Tensor]]:
    """A network of which TensorRT-RTX 1.4 launches most kernels early on compute capability 9.0, and inputs."""
    pytest.importorskip("torchvision", reason="the network is torchvision's")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU starts no kernel early")
    about = find_work("resnet18")
    inputs = [gpu.random(*about.shape_on("cuda"), dtype=torch.float16) * (0.5 + 0.25 * i) for i in range(8)]
    return about.make().half(), [x.contiguous(memory_format=torch.channels_last) for x in inputs]


def test_every_kernel_waits_for_the_whole_of_the_one_before(gpu: Gpu, compiled: Make) -> None:
    model, inputs = early_convolutions(gpu)
    engine = compiled(model, inputs[0], backend="tensorrt", cuda_graphs=False)
    expected = engine(inputs[0]).clone()
    # What TensorRT queues by itself, and what an instance makes of it.
    lowered = engine._first().choice.kernels
    with torch.cuda.stream(gpu.stream()):
        instance = lowered.instance(gpu.stream())
        instance([inputs[0]])
        instance.prepare_direct()
        torch.cuda.synchronize()
        call = instance._all[0]
        assert call._buffers is not None, "TensorRT starts no kernel of it early: the test has no object"
        raw, whole = (torch.cuda.CUDAGraph(keep_graph=True) for _ in range(2))
        for graph, queue in ((raw, call._execute), (whole, call._capture)):
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                queue(torch.cuda.current_stream())
    assert early_edges(raw.raw_cuda_graph())
    assert not early_edges(whole.raw_cuda_graph())
    assert len(graph_edges(raw.raw_cuda_graph())[0]) == len(graph_edges(whole.raw_cuda_graph())[0])
    # In a caller's capture, which has kernels of the caller's too.
    engine.warm(captures=1)
    mine = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(mine):
        y = engine(inputs[0] * 1.0) + 1.0
    assert not early_edges(mine.raw_cuda_graph())
    mine.instantiate()
    y.fill_(float("nan"))
    mine.replay()
    torch.cuda.synchronize()
    assert_same(y, expected + 1.0)


@pytest.mark.parametrize(("graphs", "calls"), [(True, 2500), (False, 200)], ids=["graph", "direct"])
def test_kernels_that_start_early_spoil_nothing(gpu: Gpu, compiled: Make, graphs: bool, calls: int) -> None:
    """Of as many calls with graphs, TensorRT's own launches spoil two on average."""
    model, inputs = early_convolutions(gpu)
    engine = compiled(model, inputs[0], backend="tensorrt", cuda_graphs=graphs, max_contexts=8)
    engine.warm(contexts=8)
    expected = [engine(x) for x in inputs]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(8)]
    torch.cuda.synchronize()

    def work_on(i: int) -> None:
        with torch.cuda.stream(gpu.stream()):
            for j in range(calls):
                y = engine(inputs[(i + j) % 8])
                wrong[i] += (y != expected[(i + j) % 8]).any()
                y.fill_(float("nan"))
            torch.cuda.current_stream().synchronize()

    on_threads(8, work_on)
    assert [int(n) for n in wrong] == [0] * 8


class GlobalCaptures:
    """A thread that captures one graph after the other in the global mode, in which CUDA forbids all other threads what
    could spoil a capture: to allocate memory, to load code. Who does so nevertheless invalidates it, and finds himself
    refused."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.graphs = 0
        self._stop, self._going = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        try:
            x = torch.randn(64, device="cuda")
            stream = torch.cuda.Stream()
            while not self._stop.is_set():
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.stream(stream):
                    graph.capture_begin(capture_error_mode="global")
                    try:
                        y = x
                        for _ in range(200):
                            y = y * 1.01 + 0.5
                    finally:
                        graph.capture_end()  # left under way, it would forbid everything to all tests that follow
                    graph.replay()
                    stream.synchronize()
                self.graphs += 1
                self._going.set()
        except BaseException as e:
            self.errors.append(e)
        finally:
            self._going.set()

    def __enter__(self) -> GlobalCaptures:
        self._thread.start()
        self._going.wait()
        self.before = self.graphs
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if exc[0] is None:
            assert not self.errors, self.errors[0]
            assert self.graphs > self.before


@WAYS
def test_calls_beside_other_codes_captures_do_them_no_harm(gpu: Gpu, compiled: Make, graphs: bool | None) -> None:
    model, shape = convolutions(torch.float16)
    inputs = [gpu.random(*shape, dtype=torch.float16) for _ in range(3)]
    engine = compiled(model, inputs[0], backend="tensorrt", cuda_graphs=graphs)
    with torch.cuda.stream(gpu.stream()):
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        expected = [engine(x) for x in inputs]

        def call(k: int) -> None:
            nonlocal wrong
            wrong += (engine(inputs[k % 3]) != expected[k % 3]).any()

        for k in range(6):
            call(k)  # kernels are loaded and memory is there, as eager would need it
        torch.cuda.current_stream().synchronize()
        with GlobalCaptures():
            for k in range(200):
                call(k)
        assert int(wrong) == 0


def test_not_a_number_stays_one(gpu: Gpu, compiled: Make) -> None:
    for model in (nn.ReLU(), nn.Hardtanh(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())):
        x = gpu.random(1, 3, 4, 4, dtype=torch.float16)
        engine = compiled(model, x, backend="tensorrt", require_full=True)
        x[0, 1, 2, 3] = float("nan")
        with torch.no_grad():
            expected = model(x)
        assert torch.equal(engine(x).isnan(), expected.isnan()), model


def test_memory_comes_back_when_an_engine_is_gone(gpu: Gpu, runtime: str) -> None:
    def use() -> None:
        model, shape = convolutions(torch.float16)
        x = gpu.random(*shape, dtype=torch.float16)
        model = model.eval().requires_grad_(False).cuda()
        with anabranch.compile(model, [x], backend="tensorrt", runtime=runtime, max_contexts=4) as engine:
            engine.warm(contexts=4, captures=2)
            with torch.cuda.stream(gpu.stream()):
                engine(x)
        torch.cuda.synchronize()

    def allocated() -> int:
        gc.collect()  # exported programs refer to themselves
        torch.cuda.synchronize()
        gpu.seam.collect()
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")  # PyTorch's allocator looks now whether streams are done with what was freed
        return torch.cuda.memory_allocated()

    use()
    before = allocated()
    for _ in range(3):
        use()
        assert allocated() <= before
