"""Many threads, other code at work, long runs, ends of processes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

import anabranch
from anabranch._judge import differences
from gpu.support import PATHS, Chain, Gpu, Make, Mlp, assert_same, on_threads


class OtherCode:
    """Threads that do what other code in the process does: allocate, copy, draw random numbers, synchronize."""

    def __init__(self, n: int = 4) -> None:
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(n)]

    def _work(self) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not self._stop.is_set():
                    torch.randn(1000, device="cuda")
                    torch.full((1 << 18,), float("nan"), device="cuda")
                    torch.randn(100).cuda()
                    torch.ones(1, device="cuda").item()
                    torch.nn.functional.dropout(torch.ones(64, device="cuda"))
                    gc.collect(0)
        except BaseException as e:
            self.errors.append(e)

    def __enter__(self) -> OtherCode:
        for t in self._threads:
            t.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for t in self._threads:
            t.join()
        assert not self.errors, self.errors[0]


def test_a_pools_size_can_be_asked_for_however_often(gpu: Gpu) -> None:
    # PyTorch takes a reference from the numbers of a pool's id each time. Above 256, they are freed when none is left.
    pools = [gpu.seam.memory(0, fresh=True) for _ in range(260)]
    memory: Any = pools[-1]
    with memory.using():
        x = torch.ones(1 << 20, device="cuda")
    first, second = memory._id
    before = sys.getrefcount(first), sys.getrefcount(second)
    assert max(first, second) > 256
    for _ in range(50):
        assert memory.nbytes() >= x.nbytes
    assert (sys.getrefcount(first), sys.getrefcount(second)) == before


@pytest.mark.clause(5)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("graphs", [True, None], ids=["graph", "auto"])
def test_sixty_four_threads_make_their_first_call_at_once(
    gpu: Gpu, compiled: Make, graphs: bool | None, backend: str
) -> None:
    engine = compiled(Mlp(), gpu.random(4, 256), cuda_graphs=graphs, backend=backend)
    sources = [gpu.random(7, 256) for _ in range(64)]  # a signature that nobody has compiled
    outputs: list[Any] = [None] * 64
    with OtherCode():

        def work(i: int) -> None:
            with torch.cuda.stream(gpu.stream()):
                x = sources[i].clone()
                outputs[i] = engine(x)
                del x
                torch.full((7, 256), float("nan"), device="cuda")
                torch.cuda.current_stream().synchronize()

        on_threads(64, work)
    assert engine.stats().specializations == 2
    serial = [engine(x) for x in sources]
    torch.cuda.synchronize()
    wrong = sum(bool(differences(y, e)) for y, e in zip(outputs, serial, strict=True))
    assert wrong == 0


def test_contexts_are_built_while_other_code_works(gpu: Gpu, compiled: Make) -> None:
    sources = [gpu.random(4, 256) for _ in range(16)]
    engine = compiled(Mlp(), sources[0], cuda_graphs=True)
    expected = [gpu.load_kernels(engine, x) for x in sources]
    with OtherCode():

        def work(i: int) -> None:
            with torch.cuda.stream(gpu.stream()):
                for k in range(50):
                    assert_same(engine(sources[(i + k) % 16]), expected[(i + k) % 16])

        on_threads(16, work)
        for _ in range(5):
            engine.trim()
            assert engine.warm(contexts=4) == 4
    assert engine.stats().captures > 16


class Convolves(torch.nn.Module):
    """Needs a handle of cuDNN's and one of cuBLAS's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(torch.relu(self.conv(x)))
        return y


@pytest.mark.clause(6)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_a_thread_that_never_ran_a_kernel_calls_inside_its_capture(
    gpu: Gpu, compiled: Make, backend: str, mode: str
) -> None:
    sources = [gpu.random(2, 3, 16, 16) for _ in range(2)]
    engine = compiled(Convolves(), sources[0], backend=backend)
    expected = [gpu.load_kernels(engine, x) for x in sources]
    # Handles that threads before have left behind are taken again: as many threads as there may be, at once.
    there, found, inputs = threading.Barrier(12, timeout=60), list[Any](), [x.clone() for x in sources[:1] * 12]
    turns = threading.Lock()  # PyTorch allows one capture at a time

    def work(i: int) -> None:
        graph = torch.cuda.CUDAGraph()
        there.wait()
        with turns, gpu.capture(graph, mode):
            y = engine(inputs[i])
        there.wait()
        found.append((graph, inputs[i], y))

    on_threads(12, work)
    for graph, x, y in found:
        for source, wanted in zip(sources, expected, strict=True):
            x.copy_(source)
            graph.replay()
            torch.cuda.synchronize()
            assert_same(y, wanted)


@PATHS
def test_ten_thousand_calls_do_not_grow(gpu: Gpu, compiled: Make, graphs: bool) -> None:
    x = gpu.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=graphs)
    streams = [gpu.stream() for _ in range(8)]

    def calls(n: int) -> None:
        for i in range(n):
            with torch.cuda.stream(streams[i % 8]):
                engine(x)
        torch.cuda.synchronize()

    calls(500)
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    calls(10_000)
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() == reserved


def test_engines_come_and_go_without_growth(gpu: Gpu, runtime: str) -> None:
    x = gpu.random(64, 256)
    model = Mlp().eval().requires_grad_(False).cuda()

    def once() -> None:
        engine = anabranch.compile(model, [x], backend="eager", runtime=runtime, cuda_graphs=True)
        engine.warm(contexts=3)
        engine(x)
        torch.cuda.synchronize()
        del engine
        gc.collect()
        gpu.seam.collect()

    for _ in range(3):
        once()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(10):
        once()
    assert torch.cuda.memory_allocated() <= allocated
    assert torch.cuda.memory_reserved() <= reserved


def test_scratch_does_not_grow_with_contexts(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch's allocator keeps what is freed by stream: on each context's own stream, scratch took as much once more.
    x = gpu.random(1, 3, 1080, 1920)
    options: dict[str, Any] = {"backend": "eager", "runtime": "native", "cuda_graphs": True, "max_contexts": 6}
    engine = anabranch.compile(torch.nn.ReLU(), [x], **options)
    pools: list[Any] = []
    seam: Any = gpu.seam
    monkeypatch.setattr(seam, "memory", lambda *given, of=seam.memory: pools.append(of(*given)) or pools[-1])

    def held() -> int:
        """What no context has."""
        return torch.cuda.memory_reserved() - sum(pool.nbytes() for pool in pools)

    assert engine.warm(contexts=2) == 2
    before = held()
    assert engine.warm(contexts=6) == 6
    assert held() <= before
    engine.close()


def test_a_build_keeps_no_memory_that_nobody_can_have(gpu: Gpu) -> None:
    # Temporaries of warm-up, of tuning, and of the capture to compare with stay where empty_cache() finds them.
    x = gpu.random(8, 512, 4096)

    def build() -> tuple[int, int]:
        with anabranch.compile(Chain(), [x], cuda_graphs=True) as engine:
            gpu.load_kernels(engine, x)
            torch.cuda.empty_cache()
            return torch.cuda.memory_reserved(), engine.stats().bytes

    build()
    gpu.seam.trim()
    before = torch.cuda.memory_reserved()
    reserved, contexts = build()
    # Two lanes, with a workspace of 32 MiB each, may have been made.
    assert reserved - before <= contexts + 2 * (36 << 20)


def test_trim_gives_memory_back(gpu: Gpu, compiled: Make) -> None:
    x = gpu.random(4096, 1024)
    engine = compiled(Chain(), x, cuda_graphs=True)
    expected = gpu.load_kernels(engine, x)
    engine.warm(contexts=4)  # lanes stay, with their workspaces
    engine.trim()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    engine.warm(contexts=4)
    grown = torch.cuda.memory_reserved()
    assert grown - before >= 4 * x.nbytes
    assert engine.stats().bytes >= 4 * x.nbytes
    engine.trim()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < (grown - before) // 4
    assert engine.stats().contexts == 0
    assert_same(engine(x), expected)


def test_clearing_all_cublas_workspaces_takes_none_from_a_live_graph(gpu: Gpu, compiled: Make) -> None:
    x = gpu.random(64, 256, dtype=torch.half)
    engine = compiled(Mlp(), x, cuda_graphs=True)
    expected = gpu.load_kernels(engine, x)
    for _ in range(3):
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        junk = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(40)]
        assert_same(engine(x), expected)
        torch.cuda.synchronize()
        assert all(bool((j == 7.0).all()) for j in junk)
        del junk


_WORK_IN_FLIGHT = """
import os, sys, threading, torch, anabranch
sys.path.insert(0, {root!r})
from gpu.support import Mlp
x = torch.randn(4, 256, device="cuda")
model = Mlp().eval().requires_grad_(False).cuda()
engine = anabranch.compile(model, [x], backend="eager", runtime={runtime!r}, cuda_graphs={graphs})
streams = [torch.cuda.Stream() for _ in range(4)]
big = torch.randn(4096, 4096, device="cuda")
for s in streams:
    with torch.cuda.stream(s):
        for _ in range(20):
            big @ big
        engine(x)
"""


def _run(code: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    return _run_code(_WORK_IN_FLIGHT + code, **variables)


def _run_code(code: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    code = code.format(root=os.path.dirname(os.path.dirname(os.path.abspath(__file__))), **variables)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.clause(5)
@PATHS
def test_interpreter_exit_with_work_in_flight_is_clean(runtime: str, graphs: bool) -> None:
    code = """
def forever():
    with torch.cuda.stream(torch.cuda.Stream()):
        while True:
            engine(x)
threading.Thread(target=forever, daemon=True).start()
print("end")
"""
    done = _run(code, runtime=runtime, graphs=graphs)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "end\n"
    assert "Error" not in done.stderr
    assert "terminate" not in done.stderr


@pytest.mark.clause(5)
@PATHS
def test_a_forked_child_is_refused_and_both_end_cleanly(runtime: str, graphs: bool) -> None:
    code = """
import gc
pid = os.fork()
if pid == 0:
    try:
        engine(x)
    except anabranch.EngineClosed as e:
        print("child:", type(e).__name__, flush=True)
    del engine
    gc.collect()
    sys.exit(0)
_, status = os.waitpid(pid, 0)
y = engine(x)
torch.cuda.synchronize()
print("parent:", os.waitstatus_to_exitcode(status), bool(torch.isfinite(y).all()))
"""
    done = _run(code, runtime=runtime, graphs=graphs)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "child: EngineClosed\nparent: 0 True\n"


@PATHS
def test_a_lost_device_is_named_at_every_call(runtime: str, graphs: bool) -> None:
    code = """
bad = torch.arange(4, device="cuda")[torch.tensor([9], device="cuda")]
for _ in range(3):
    try:
        engine(x)
        torch.cuda.synchronize()
    except anabranch.DeviceLost as e:
        print("lost")
    except RuntimeError as e:
        print("other", type(e).__name__)
"""
    done = _run(code, runtime=runtime, graphs=graphs)
    lines = done.stdout.split()
    assert lines[-1] == "lost", done.stdout + done.stderr
    assert done.stdout.count("other") <= 1  # the synchronize of the first round is not ours


_READS_UNDER_A_LATCH = """
import sys
sys.path.insert(0, "{root}/src")
import torch
from anabranch.devices import get_device
device = get_device("cuda")
x, held = torch.ones(1000, device="cuda"), device.stream(0)
torch.equal(x, x)  # loads kernels, and PyTorch's host allocator then has the one block that it needs
latch = device.latch()
latch.hold(held)
print(torch.equal(x, x), held.query(), flush=True)
latch.open()
held.synchronize()
"""


def test_the_host_reads_a_tensor_while_a_first_latch_holds_another_stream() -> None:
    """In a process of its own: what the host allocator has in store is what this one has used."""
    done = _run_code(_READS_UNDER_A_LATCH)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True False\n"


@pytest.mark.clause(5)
def test_thread_exit_leaves_its_contexts_to_others(gpu: Gpu, compiled: Make) -> None:
    x = gpu.random(4, 256)
    engine = compiled(Mlp(), x, cuda_graphs=True, max_contexts=2)
    expected = gpu.load_kernels(engine, x)
    for _ in range(40):
        outputs: list[Any] = []

        def work(outputs: list[Any] = outputs) -> None:
            with torch.cuda.stream(gpu.stream()):
                outputs.append(engine(x))

        t = threading.Thread(target=work)
        t.start()
        t.join()
        torch.cuda.synchronize()
        assert_same(outputs[0], expected)
    assert engine.stats().contexts == 2


def test_streams_that_are_never_destroyed_are_told_by_their_numbers(gpu: Gpu) -> None:
    """What the native runtime relies on, where it lets a stream come back to its context without a wait for itself."""
    ours = [torch.cuda.Stream(priority=p) for p in (0, -1) for _ in range(40)]  # more than a pool has
    assert torch.cuda.default_stream().stream_id == 0
    assert all(s.stream_id & 1 for s in ours)
    assert len({s.cuda_stream for s in ours}) < len(ours)
    made = gpu.seam.stream(0)
    assert isinstance(made, torch.cuda.ExternalStream)
    assert made.stream_id == made.cuda_stream
    assert made.stream_id & 1 == 0
