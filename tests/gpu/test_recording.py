"""Graphs bound to their caller's tensors, on a GPU: what is found, what is refused, and what runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from anabranch.devices import get_device
from anabranch.export import TensorSpec
from anabranch.runtime._process import neutral
from gpu.support import Chain, Gpu, Make, assert_same

Kernels = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@pytest.fixture(scope="module")
def native(gpu_probe: str | None) -> Any:
    """The native runtime's module, which has the log of allocations."""
    if gpu_probe is not None:
        pytest.skip(gpu_probe)
    from anabranch.runtime._native import core

    return core


class Recorder:
    """Records, with lanes and memory of its own."""

    def __init__(self, native: Any) -> None:
        from anabranch.devices.cuda import _recorder

        self.native = native
        self.module = _recorder
        self.device: Any = get_device("cuda")
        self.made: list[Any] = []

    def __call__(self, kernels: Kernels, inputs: Sequence[Tensor], workspaces: bool = False) -> Any:
        specs = [TensorSpec.of(x) for x in inputs]
        kernels(inputs)
        device = self.device
        lane, memory, scratch = device.acquire_lane(0), device.memory(0), device.scratch(0)
        with neutral(device, 0), device.relaxed():
            made = self.module.record(
                device, lane, memory, scratch, lambda _: kernels, specs, workspaces, self.native.AllocationLog()
            )
        device.release_scratch(scratch)
        self.made.append((made, [lane], [memory]))
        return made

    def again(self, known: Any, kernels: Kernels, inputs: Sequence[Tensor], workspaces: bool = False) -> Any:
        specs = [TensorSpec.of(x) for x in inputs]
        device = self.device
        lane, memory, scratch = device.acquire_lane(0), device.memory(0), device.scratch(0)
        with neutral(device, 0), device.relaxed():
            made = self.module.record_again(
                known, device, lane, memory, scratch, lambda _: kernels, specs, workspaces, self.native.AllocationLog()
            )
        device.release_scratch(scratch)
        self.made.append((made, [lane], [memory]))
        return made

    def close(self) -> None:
        torch.cuda.synchronize()
        for made, lanes, memories in self.made:
            if not isinstance(made, str):
                made.destroy()
                made.results.clear()
            # Given back, not dropped: a pool that dies while the thread allocates from another one aborts the process.
            for lane in lanes:
                self.device.release_lane(lane)
            for memory in memories:
                self.device.release_memory(memory)


@pytest.fixture
def record(native: Any) -> Iterator[Recorder]:
    recorder = Recorder(native)
    yield recorder
    recorder.close()


def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, device="cuda").to(dtype)


def buffers(recording: Any) -> set[int]:
    return {r.buffer for r in recording.table.relocations}


def run(recording: Any, inputs: Sequence[Tensor], direct: bool = False) -> list[Tensor]:
    """As a call would: into new memory, on the current stream."""
    stream = torch.cuda.current_stream()
    storages = [torch.full((n,), 0xFF, dtype=torch.uint8, device="cuda") for n in recording.storages]
    launch = recording.launch_kernels if direct else recording.launch
    launch(inputs, [s.data_ptr() for s in storages], stream)
    bound = recording.table.bound
    return [
        view.on(storages[view.storage]) if bound[view.storage] else static.clone()
        for view, static in zip(recording.views, recording.results, strict=True)
    ]


# -- what is bound ------------------------------------------------------------------------------------------------


def test_one_kernel_runs_without_a_graph(record: Recorder) -> None:
    x = of(1, 3, 5, dtype=torch.half)
    r = record(lambda i: [torch.relu(i[0] - 0.5)], [x])
    assert not isinstance(r, str), r
    assert buffers(r) <= {0, 1}
    r = record(lambda i: [torch.relu(i[0])], [x])
    assert not isinstance(r, str), r
    assert r.table.why_not_direct == ""
    assert buffers(r) == {0, 1}
    x = of(1, 3, 5, dtype=torch.half) - 0.5
    for direct in (False, True):
        assert_same(run(r, [x], direct)[0], torch.relu(x))


def test_results_are_those_of_the_inputs_that_are_given(record: Recorder) -> None:
    r = record(lambda i: [i[0] * i[1] + 1, i[1] - i[0]], [of(64, 64), of(64, 64)])
    assert not isinstance(r, str), r
    assert r.table.bound == (True, True)
    results: list[Any] = []
    for _ in range(5):
        x, y = of(64, 64), of(64, 64)
        results.append((run(r, [x, y]), [x * y + 1, y - x]))
    for got, wanted in results:
        assert_same(list(got), list(wanted))


def test_two_views_of_one_storage_share_one_in_the_result_too(record: Recorder) -> None:
    def kernels(i: Sequence[Tensor]) -> list[Tensor]:
        y = i[0] * 2
        return [y[:4], y[2:]]

    r = record(kernels, [of(8, 100)])
    assert not isinstance(r, str), r
    assert r.storages == (8 * 100 * 4,)
    x = of(8, 100)
    a, b = run(r, [x])
    assert_same(a, x[:4] * 2)
    assert_same(b, x[2:] * 2)
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def test_matrix_products_with_workspaces(record: Recorder) -> None:
    x, y = of(64, 8192, dtype=torch.half), of(8192, 64, dtype=torch.half)
    r = record(lambda i: [torch.relu(i[0] @ i[1])], [x, y], workspaces=True)
    assert not isinstance(r, str), r
    x, y = of(64, 8192, dtype=torch.half), of(8192, 64, dtype=torch.half)
    assert_same(run(r, [x, y])[0], torch.relu(x @ y))


def test_inputs_need_no_better_alignment_than_a_calls_have(record: Recorder) -> None:
    r = record(lambda i: [i[0] + 1], [of(1000)])
    assert not isinstance(r, str), r
    assert r.alignment == 16
    x = of(1004)[4:]
    assert x.data_ptr() % 32 == 16
    assert_same(run(r, [x])[0], x + 1)


def test_garbage_in_the_padding_of_parameters(record: Recorder) -> None:
    """PyTorch's clamp hands structs over whose padding holds what was on the stack."""
    r = record(lambda i: [torch.relu(i[0]).clamp(0.25, 0.5)], [of(100, dtype=torch.half)])
    assert not isinstance(r, str), r
    x = of(100, dtype=torch.half)
    assert_same(run(r, [x])[0], x.clamp(0.25, 0.5))


def test_an_input_that_nothing_reads(record: Recorder) -> None:
    r = record(lambda i: [i[1] + 1], [of(4), of(8)])
    assert not isinstance(r, str), r
    assert buffers(r) == {1, 2}


def test_tensors_without_elements(record: Recorder) -> None:
    r = record(lambda i: [i[0] * 2, i[1] + 1], [of(0, 4), of(8)])
    assert not isinstance(r, str), r
    assert r.table.bound == (True, True)
    x = of(8)
    empty, y = run(r, [of(0, 4), x])
    assert empty.shape == (0, 4)
    assert_same(y, x + 1)


# -- what is not --------------------------------------------------------------------------------------------------


def into_the_trap(i: Sequence[Tensor]) -> list[Tensor]:
    # Of kernels without padding in their parameters: garbage there may be an old address, which is refused.
    big = i[0] * 2
    quarter = len(big) // 4
    part = big[:quarter] + big[quarter : 2 * quarter]
    del big
    return [part * n for n in range(1, 5)]


def test_the_trap(record: Recorder) -> None:
    """Outputs that take the place of a larger temporary: what wrote the temporary goes on writing there."""

    r = record(into_the_trap, [of(1 << 14)])
    assert not isinstance(r, str), r
    assert all(r.table.bound)
    blocks = r.capture.allocations
    assert any(a.overlaps(b) for a in r.capture.outputs for b in blocks if b.nbytes > a.nbytes)
    x = of(1 << 14)
    got = run(r, [x])
    assert_same(list(got), list(into_the_trap([x])))


def test_bound_all_the_same_the_trap_would_be_seen(record: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial run finds what the analysis would have let through: here, every step has the output's address."""
    from anabranch.devices.cuda import _relocation

    honest = _relocation._allocation_of

    def naive(output: Any, capture: Any) -> Any:
        found = honest(output, capture)
        return None if found is None else (found[0], 0)

    def place(memory: Any, address: int, node: int) -> Any:
        return real(memory, address, 1 << 30)

    real = _relocation._Memory.place
    monkeypatch.setattr(_relocation, "_allocation_of", naive)
    monkeypatch.setattr(_relocation._Memory, "place", place)
    made = record(into_the_trap, [of(1 << 14)])
    assert isinstance(made, str)
    assert "bound to other tensors" in made


def test_an_output_that_is_an_input(record: Recorder) -> None:
    assert "input's memory" in record(lambda i: [i[0] + 1, i[0][1:]], [of(8)])


def test_an_output_that_is_a_weight_is_copied_out(record: Recorder) -> None:
    w = of(8)
    r = record(lambda i: [i[0] + w, w], [of(8)])
    assert not isinstance(r, str), r
    assert r.table.bound == (True, False)
    x = of(8)
    assert_same(list(run(r, [x])), [x + w, w])


def test_copies_that_touch_inputs_or_outputs(record: Recorder) -> None:
    assert "a copy: address 0 is the address of an input or output" in record(lambda i: [i[0].clone()], [of(1 << 12)])


def test_results_that_differ_from_run_to_run(record: Recorder) -> None:
    step = torch.zeros(8, device="cuda")

    def kernels(i: Sequence[Tensor]) -> list[Tensor]:
        step.add_(1)
        return [i[0] + step]

    assert "two direct runs" in record(kernels, [of(8)])


def test_under_a_profiler_it_says_so(record: Recorder) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        made = record(lambda i: [i[0] + 1], [of(8)])
    assert "a profiler watches" in made
    assert not isinstance(record(lambda i: [i[0] + 1], [of(8)]), str)


# -- further captures ---------------------------------------------------------------------------------------------


def test_further_captures_hold_and_do_not_disturb_each_other(record: Recorder) -> None:
    w = of(256, 256)

    def kernels(i: Sequence[Tensor]) -> list[Tensor]:
        return [torch.relu(i[0] @ w) @ w]

    x = of(8, 256)
    first = record(kernels, [x], workspaces=True)
    assert not isinstance(first, str), first
    others = [record.again(first, kernels, [x], workspaces=True) for _ in range(3)]
    for r in (first, *others):
        assert not isinstance(r, str), r
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [of(8, 256) for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for r, stream, x in zip((first, *others), streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            results.append(run(r, [x])[0])
    torch.cuda.synchronize()
    for got, x in zip(results, inputs, strict=True):
        assert_same(got, kernels([x])[0])


def test_a_further_capture_of_another_program_does_not_hold(record: Recorder) -> None:
    first = record(lambda i: [i[0] + 1], [of(8)])
    assert not isinstance(first, str), first
    assert "other bits" in record.again(first, lambda i: [i[0] + 2], [of(8)])
    assert "differ in step 0" in record.again(first, lambda i: [i[0] * 2], [of(8)])


# -- compiled programs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model(gpu: Gpu, compiled: Make, record: Recorder, backend: str) -> None:
    x = gpu.random(32, 32)
    s = compiled(Chain(), x, backend=backend, cuda_graphs=True)._first()
    r = record(s.choice.kernels, [x], s.unit.workspaces)
    assert not isinstance(r, str), r
    assert 0 in buffers(r)
    assert all(r.table.bound)
    y = gpu.random(32, 32)
    assert_same(run(r, [y])[0], s.choice.kernels([y])[0])


# -- the log of allocations ---------------------------------------------------------------------------------------


def test_the_log_has_this_threads_allocations_and_frees(native: Any) -> None:
    log = native.AllocationLog()
    torch.empty(1 << 12, dtype=torch.uint8, device="cuda")
    x = torch.empty(1 << 10, dtype=torch.uint8, device="cuda")
    log.begin()
    other = threading.Thread(target=lambda: torch.empty(1 << 12, dtype=torch.uint8, device="cuda"))
    other.start()
    other.join()
    y = torch.empty(100, dtype=torch.uint8, device="cuda")
    at = y.data_ptr()
    torch.empty(100)  # on the CPU
    del y, x
    events = log.end()
    torch.empty(1 << 14, dtype=torch.uint8, device="cuda")
    assert events[0][0] == at
    assert events[0][1] >= 512
    assert events[1] == (at, -events[0][1], 0)
    assert [n < 0 for _, n, _ in events] == [False, True, True]


def test_the_log_counts_the_steps_of_a_capture(native: Any) -> None:
    device: Any = get_device("cuda")
    lane, memory = device.acquire_lane(0), device.memory(0)
    log = native.AllocationLog()

    def steps() -> list[Tensor]:
        log.begin(device.graph_under_capture(lane.stream))
        kept = []
        for _ in range(3):
            kept.append(torch.empty(8, device="cuda"))
            kept[-1].fill_(1)
            kept[-1].add_(1)
        events.extend(log.end())
        return kept

    events: list[Any] = []
    with neutral(device, 0), device.relaxed():
        graph, _ = device.capture(lane, memory, steps)
    graph.destroy()
    device.release_lane(lane)
    device.release_memory(memory)
    assert [step for _, _, step in events] == [0, 2, 4]


def test_a_log_ends_on_its_own_thread(native: Any) -> None:
    log = native.AllocationLog()
    with pytest.raises(RuntimeError, match="not running"):
        log.end()
    log.begin()
    with pytest.raises(RuntimeError, match="running already"):
        log.begin()
    errors: list[str] = []

    def end() -> None:
        try:
            log.end()
        except RuntimeError as e:
            errors.append(str(e))

    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    assert "ends on the thread that began it" in errors[0]
    assert log.end() == []
    # While a log runs, PyTorch's question whether a profiler runs is answered, and with no.
    log.begin()
    assert not torch._C._autograd._profiler_enabled()
    log.end()
