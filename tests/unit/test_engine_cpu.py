"""Calls on the CPU: the answers, their layout, many threads at once, and how an engine ends."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import anabranch
from anabranch import _activity
from anabranch.runtime import _process
from anabranch.runtime._cost import Cost
from anabranch.runtime._process import process

pytestmark = pytest.mark.usefixtures("seeded", "runtime")

both_backends = pytest.mark.parametrize("backend", ["eager", "inductor"])
THREADS = 16


class Net(nn.Module):
    """A convolution, a branch, a product: small, with an output that is not contiguous in some layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.side = nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.conv(x)) + self.side(x).sigmoid()
        return self.head(y.mean((2, 3))), y


def build(model: nn.Module, *inputs: Any, backend: str = "eager", **options: Any) -> anabranch.Engine:
    return anabranch.compile(model.eval(), list(inputs), backend=backend, **options)


def eager(model: nn.Module, *inputs: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(*inputs)


def in_threads(n: int, work: Callable[[int], Any], timeout: float = 120) -> list[Any]:
    """Run ``work(i)`` in ``n`` threads that start together; their results, or the first error."""
    results: list[Any] = [None] * n
    errors: list[BaseException] = []
    barrier = threading.Barrier(n)

    def body(i: int) -> None:
        try:
            barrier.wait()
            results[i] = work(i)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout)
        assert not t.is_alive(), "a call hangs"
    if errors:
        raise errors[0]
    return results


# -- the answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@both_backends
def test_outputs_equal_eager(backend: str, dtype: torch.dtype) -> None:
    model = Net().to(dtype).eval()
    engine = build(model, anabranch.Input((2, 3, 9, 7), dtype), backend=backend)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for _ in range(3):
        x = torch.randn(2, 3, 9, 7).to(dtype)
        for given, expected in zip(engine(x), eager(model, x), strict=True):
            if backend == "eager":
                assert torch.equal(given, expected)
            torch.testing.assert_close(given, expected, atol=tolerance, rtol=tolerance)
            assert given.stride() == expected.stride()


def layouts() -> dict[str, torch.Tensor]:
    big = torch.randn(4, 6, 12, 14)
    flat = torch.randn(2 * 3 * 9 * 7 + 8)
    return {
        "contiguous": torch.randn(2, 3, 9, 7),
        "channels_last": torch.randn(2, 3, 9, 7).to(memory_format=torch.channels_last),
        "transposed": torch.randn(2, 3, 7, 9).transpose(2, 3),
        "sliced": big[1:3, 2:5, 3:12, 4:11],
        "strided": big[::2, ::2, :9, ::2],
        "expanded": torch.randn(2, 3, 1, 7).expand(2, 3, 9, 7),
        "misaligned": flat[1 : 1 + 2 * 3 * 9 * 7].view(2, 3, 9, 7),
        "one": torch.randn(1, 3, 1, 1),
        "empty batch": torch.randn(0, 3, 9, 7),
        "empty strided": torch.empty_strided((0, 3, 9, 7), (1, 2, 3, 4)),
    }


@pytest.mark.parametrize("name", list(layouts()))
def test_every_input_layout_equals_eager(name: str) -> None:
    model = Net().eval()
    engine = build(model, torch.randn(2, 3, 9, 7))
    x = layouts()[name]
    before = x.clone()
    for given, expected in zip(engine(x), eager(model, x), strict=True):
        torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-6)
        if x.is_contiguous() or name in ("channels_last", "transposed"):
            assert given.stride() == expected.stride()
    assert torch.equal(x, before), "an input was written"


def test_every_input_layout_equals_eager_inductor() -> None:
    model = nn.Sequential(nn.Hardswish(), nn.Softmax(1))
    engine = build(model, torch.randn(2, 3, 9, 7), backend="inductor")
    for name, x in layouts().items():
        if name in ("one", "empty strided"):
            continue  # further shapes cost a compile each
        given, expected = engine(x), eager(model, x)
        torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_an_empty_batch_with_other_strides_runs_on_inductor() -> None:
    model = nn.Linear(3, 4).eval()
    engine = build(model, torch.randn(0, 3), backend="inductor")
    assert engine(torch.empty_strided((0, 3), (7, 2))).shape == (0, 4)
    assert engine(torch.randn(0, 3)).shape == (0, 4)
    assert engine.stats().specializations == 1


def test_a_channels_last_output_is_channels_last() -> None:
    model = nn.Conv2d(3, 8, 3).eval()
    x = torch.randn(2, 3, 9, 7).to(memory_format=torch.channels_last)
    for backend in ("eager", "inductor"):
        y = build(model, x, backend=backend)(x)
        assert y.stride() == eager(model, x).stride()
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_misaligned_input_is_right_on_inductor() -> None:
    engine = build(nn.GELU(), torch.randn(64), backend="inductor")
    base = torch.randn(80)
    for offset in range(5):
        x = base[offset : offset + 64]
        torch.testing.assert_close(engine(x), eager(nn.GELU(), x))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16], ids=str)
def test_precision_keeps_the_types_of_inputs_and_outputs(precision: torch.dtype) -> None:
    model = Net().eval()
    engine = build(model, torch.randn(2, 3, 9, 7), precision=precision)
    x = torch.randn(2, 3, 9, 7)
    outs, expecteds = engine(x), eager(model, x)
    for given, expected in zip(outs, expecteds, strict=True):
        assert given.dtype is torch.float32
        torch.testing.assert_close(given, expected, atol=0.05, rtol=0.05)
    assert not torch.equal(outs[0], expecteds[0]), "nothing was computed in the lower precision"
    assert model.conv.weight.dtype is torch.float32, "the user's module was converted"


def test_precision_leaves_integer_inputs_and_outputs_alone() -> None:
    class Pick(nn.Module):
        def forward(self, x: torch.Tensor, i: torch.Tensor) -> Any:
            return x[i], x.argmax(), i + 1

    x, i = torch.randn(300, 4), torch.tensor([257, 0, 299])
    engine = build(Pick(), x, i, precision=torch.bfloat16)
    rows, best, after = engine(x, i)
    torch.testing.assert_close(rows, x[i], atol=0.02, rtol=0.02)
    assert best.dtype is torch.int64
    assert torch.equal(after, i + 1)


# -- signatures -------------------------------------------------------------------------------------------------------


@both_backends
def test_further_signatures_are_compiled_at_first_use(backend: str) -> None:
    model = nn.Softsign()
    engine = build(model, torch.randn(2, 3), backend=backend)
    assert engine.stats().specializations == 1
    for x in (torch.randn(5, 3), torch.randn(2, 3), torch.randn(5, 3), torch.randn(5, 3).double()):
        torch.testing.assert_close(engine(x), eager(model, x))
    assert engine.stats().specializations == 3
    assert len(engine.plans) == 3


def test_warm_compiles_ahead() -> None:
    engine = build(nn.ReLU(), torch.randn(2, 3))
    assert engine.warm() == 0, "the CPU needs no contexts"
    assert engine.stats().specializations == 1
    assert engine.warm([anabranch.Input((7, 3))], contexts=4) == 0
    assert engine.stats().specializations == 2
    engine(torch.randn(7, 3))
    engine.trim()
    x = torch.randn(7, 3)
    assert torch.equal(engine(x), x.relu())
    assert engine.stats().specializations == 2


def test_stats_count() -> None:
    engine = build(nn.ReLU(), torch.randn(2, 3))
    assert engine.stats() == anabranch.Stats(specializations=1)
    for _ in range(5):
        engine(torch.randn(2, 3))
    with pytest.raises(anabranch.InputError):
        engine(torch.randn(2, 3, requires_grad=True))
    assert engine.stats() == anabranch.Stats(calls=5, direct_calls=5, specializations=1)
    snapshot = engine.stats()
    engine(torch.randn(2, 3))
    assert snapshot.calls == 5, "a snapshot does not move"


def test_explain_and_repr_name_what_runs(runtime: str) -> None:
    engine = build(nn.Linear(3, 4), torch.randn(2, 3))
    engine(torch.randn(5, 3))
    text = engine.explain()
    assert "float32[2, 3]: direct" in text
    assert "float32[*, 3]: direct" in text, "the size has had a second value"
    assert "16 contexts" in text
    assert repr(engine) == f"<anabranch engine Linear on cpu, eager, {runtime}>"
    assert engine.device == torch.device("cpu")


# -- the caller's modes -----------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default_dtype": lambda: default_dtype(torch.float64),
    "default_device": lambda: torch.device("meta"),
}


@pytest.mark.clause(7)
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("new_signature", [False, True], ids=["compiled", "new signature"])
def test_modes_around_a_call_change_nothing(mode: str, new_signature: bool) -> None:
    model = Net().eval()
    engine = build(model, torch.randn(2, 3, 9, 7))
    x = torch.randn(4 if new_signature else 2, 3, 9, 7)
    expecteds = eager(model, x)
    if new_signature and mode == "default_dtype":
        # What the model's code makes while it is traced would be of that type.
        with MODES[mode](), pytest.raises(anabranch.FlagsChanged, match="set_default_dtype"):
            engine(x)
        outs = engine(x)
    else:
        with MODES[mode]():
            outs = engine(x)
    for given, expected in zip(outs, expecteds, strict=True):
        assert torch.equal(given, expected)
        assert given.dtype is torch.float32
        assert given.device.type == "cpu"
        assert not given.is_inference()
        assert not given.requires_grad
        assert given.grad_fn is None
        given.add_(1)  # an ordinary tensor


@pytest.mark.parametrize("mode", ["inference_mode", "autocast", "enable_grad"])
def test_modes_around_an_inductor_call_change_nothing(mode: str) -> None:
    model = Net().eval()
    engine = build(model, torch.randn(2, 3, 9, 7), backend="inductor")
    x = torch.randn(2, 3, 9, 7)
    expecteds = engine(x)
    with MODES[mode]():
        outs = engine(x)
    for given, expected in zip(outs, expecteds, strict=True):
        assert torch.equal(given, expected)
        assert not given.is_inference()
        assert not given.requires_grad


def test_an_inductor_call_shares_nothing_with_a_thread_that_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(Net(), torch.randn(2, 3, 9, 7), backend="inductor")
    x = torch.randn(2, 3, 9, 7)
    expecteds = engine(x)
    # As while another thread exports. The notes are kept in one dict of the process, without a lock.
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(torch.fx.traceback, "annotate", lambda notes: pytest.fail(f"a call leaves notes: {notes}"))
    for given, expected in zip(engine(x), expecteds, strict=True):
        assert torch.equal(given, expected)


def test_modes_around_compile_change_nothing() -> None:
    model = Net().eval()
    x = torch.randn(2, 3, 9, 7)
    for mode in ("inference_mode", "autocast", "no_grad"):
        with MODES[mode]():
            engine = build(model, x)
        outs = engine(x)
        assert torch.equal(outs[0], eager(model, x)[0]), mode
        assert not outs[0].is_inference()


def test_inputs_made_in_inference_mode_are_taken() -> None:
    model = Net().eval()
    engine = build(model, torch.randn(2, 3, 9, 7))
    with torch.inference_mode():
        x = torch.randn(2, 3, 9, 14)[..., ::2]
    out = engine(x)
    assert torch.equal(out[0], eager(model, x.contiguous())[0])
    assert not out[0].is_inference()


def test_a_call_leaves_the_modes_alone() -> None:
    engine = build(nn.ReLU(), torch.randn(2))
    with torch.inference_mode(), torch.autocast("cpu"):
        engine(torch.randn(2))
        engine(torch.randn(3))
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_an_input_that_requires_grad_is_taken_where_grad_is_off() -> None:
    engine = build(nn.ReLU(), torch.randn(4))
    x = torch.randn(4, requires_grad=True)
    with torch.no_grad():
        y = engine(x)
    assert torch.equal(y, x.detach().relu())
    assert not y.requires_grad


# -- flags ------------------------------------------------------------------------------------------------------------


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


FLAGS = {
    "torch.use_deterministic_algorithms": deterministic_algorithms,
    "torch.set_float32_matmul_precision": matmul_precision,
}


@pytest.mark.parametrize("flag", list(FLAGS))
def test_a_changed_flag_is_refused_where_it_could_matter_until_it_is_set_back(flag: str) -> None:
    model = nn.Linear(3, 4).eval()
    engine = build(model, torch.randn(2, 3))
    x = torch.randn(2, 3)
    for _ in range(2):
        with FLAGS[flag]():
            with pytest.raises(anabranch.FlagsChanged, match=flag):
                engine(x)
            with pytest.raises(anabranch.FlagsChanged, match=flag):
                engine(torch.randn(5, 3))
        assert torch.equal(engine(x), eager(model, x))
    assert engine(torch.randn(5, 3)).shape == (5, 4)


@pytest.mark.parametrize("flag", list(FLAGS))
def test_a_changed_flag_does_not_matter_to_relu(flag: str) -> None:
    engine = build(nn.ReLU(), torch.randn(2, 3))
    x = torch.randn(2, 3)
    with FLAGS[flag]():
        assert torch.equal(engine(x), x.relu())


_FLAGS_OF_BACKENDS = """
import torch, anabranch
from anabranch.runtime._flags import Flags
torch.backends.cuda.matmul.fp32_precision = "tf32"
x = torch.randn(2, 3)
engine = anabranch.compile(torch.nn.Linear(3, 4).eval(), [x])
assert engine(x).shape == (2, 4)
assert engine(torch.randn(5, 3)).shape == (5, 4)
torch.backends.cudnn.conv.fp32_precision = "tf32"
flags = Flags("cuda")
assert flags.tf32.products and flags.tf32.convolutions and flags.unchanged()
torch.backends.cuda.matmul.fp32_precision = "ieee"
assert not flags.unchanged() and "cuda.matmul.fp32_precision was 'tf32' at compile" in flags.changes()
"""


@pytest.mark.parametrize("runtime", ["native"], indirect=True)  # the process of its own takes that of "auto"
def test_flags_may_be_set_by_backend() -> None:
    # In a process of its own: PyTorch has no way back to one precision for all.
    done = subprocess.run([sys.executable, "-c", _FLAGS_OF_BACKENDS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@both_backends
def test_compiling_touches_no_process_wide_flag(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[str] = []
    for name in ("mkldnn", "nnpack", "cudnn"):
        module = getattr(torch.backends, name)
        original = module.set_flags

        def spy(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            touched.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, "set_flags", spy)
    engine = build(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 9, 7), backend=backend)
    engine(torch.randn(3, 3, 9, 7))
    assert touched == []


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.clause(7)
@both_backends
def test_sixteen_threads_get_the_bits_of_serial_calls(backend: str) -> None:
    engine = build(Net().eval(), torch.randn(2, 3, 9, 7), backend=backend)
    inputs = [[torch.randn(2, 3, 9, 7) for _ in range(20)] for _ in range(THREADS)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        serial = [[engine(x) for x in xs] for xs in inputs]
        concurrent = in_threads(THREADS, lambda i: [engine(x) for x in inputs[i]])
    finally:
        torch.set_num_threads(before)
    for mine, theirs in zip(concurrent, serial, strict=True):
        for (a, b), (c, d) in zip(mine, theirs, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
    assert engine.stats().calls == 2 * 20 * THREADS


@both_backends
def test_sixteen_first_calls_of_one_signature_compile_it_once(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).eval()
    engine = build(model, torch.randn(2, 3), backend=backend)
    inputs = torch.randn(THREADS, 5, 3)
    outs = in_threads(THREADS, lambda i: engine(inputs[i]))
    for x, y in zip(inputs, outs, strict=True):
        torch.testing.assert_close(y, eager(model, x))
    assert engine.stats().specializations == 2


def test_threads_with_a_signature_each_get_their_own() -> None:
    engine = build(nn.Softplus(), torch.randn(1), dynamic=False)

    def work(i: int) -> None:
        for _ in range(10):
            x = torch.randn(i + 1, 3)
            torch.testing.assert_close(engine(x), nn.functional.softplus(x))

    in_threads(8, work)
    assert engine.stats().specializations == 9


def test_calls_go_on_while_another_thread_compiles_a_signature() -> None:
    model = Net().eval()
    engine = build(model, torch.randn(2, 3, 9, 7), dynamic=False)
    x = torch.randn(2, 3, 9, 7)
    expected = engine(x)[0]
    built = threading.Event()

    def work(i: int) -> int:
        if i == 0:
            for n in range(3, 9):
                engine(torch.randn(n, 3, 9, 7))
            built.set()
            return 0
        calls = 0
        while not built.is_set():
            assert torch.equal(engine(x)[0], expected)
            calls += 1
        return calls

    _, *calls = in_threads(3, work)
    assert min(calls) > 10
    assert engine.stats().specializations == 7


def test_engines_of_one_model_may_be_compiled_by_many_threads_at_once() -> None:
    model = Net().eval()
    x = torch.randn(2, 3, 9, 7)
    expected = eager(model, x)[0]
    for out in in_threads(4, lambda i: build(model, x)(x)[0]):
        torch.testing.assert_close(out, expected)


def test_compile_does_not_look_at_a_model_that_another_thread_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.export puts stand-ins in the place of a module's parameters for as long as it traces.
    from anabranch.runtime import _compiler

    model = nn.Linear(3, 3).eval()
    x = torch.randn(2, 3)
    expected = eager(model, x)
    results: list[Any] = []

    def compile_too() -> None:
        try:
            results.append(build(model, x)(x))
        except BaseException as e:
            results.append(e)

    other = threading.Thread(target=compile_too)
    export = _compiler.export_program

    def slow_export(*args: Any, **kwargs: Any) -> Any:
        if other.ident is None:
            weight = model.weight
            model.weight = nn.Parameter(torch.empty(3, 3, device="meta"), requires_grad=False)
            try:
                other.start()
                other.join(0.5)  # it waits for this export; if it looks at the model, it has failed by then
            finally:
                model.weight = weight
        return export(*args, **kwargs)

    monkeypatch.setattr(_compiler, "export_program", slow_export)
    torch.testing.assert_close(build(model, x)(x), expected)
    other.join()
    (result,) = results
    assert isinstance(result, torch.Tensor), result
    torch.testing.assert_close(result, expected)


# -- the end ----------------------------------------------------------------------------------------------------------


def test_a_closed_engine_refuses_calls() -> None:
    engine = build(nn.ReLU(), torch.randn(2))
    engine.close()
    engine.close()
    for use in (lambda: engine(torch.randn(2)), engine.warm, engine.trim, lambda: engine.plan):
        with pytest.raises(anabranch.EngineClosed, match="compile a new one"):
            use()
    assert engine.stats().calls == 0
    assert "ReLU" in engine.explain()


def test_a_with_block_closes() -> None:
    with build(nn.ReLU(), torch.randn(2)) as engine:
        assert engine(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    with pytest.raises(anabranch.EngineClosed):
        engine(torch.randn(2))


def test_close_while_others_call_lets_them_finish() -> None:
    model = nn.Linear(30, 30).eval()
    engine = build(model, torch.randn(8, 30))
    x = torch.randn(8, 30)
    expected = engine(x)
    finished: list[int] = []

    def work(i: int) -> None:
        if i == 0:
            time.sleep(0.02)
            engine.close()
            return
        n = 0
        try:
            while True:
                assert torch.equal(engine(x), expected)
                n += 1
        except anabranch.EngineClosed:
            finished.append(n)

    in_threads(5, work)
    assert len(finished) == 4


@pytest.mark.parametrize("how", ["close", "del"])
@both_backends
def test_the_weights_go_with_the_engine(how: str, backend: str) -> None:
    model = nn.Linear(3, 4).eval()
    engine = build(model, torch.randn(2, 3), backend=backend)
    engine(torch.randn(2, 3))
    weight, alive = weakref.ref(model.weight), weakref.ref(engine)
    if how == "close":
        engine.close()
    else:
        del engine
        assert alive() is None, "an engine is freed at once, not by the next garbage collection"
    del model
    gc.collect()
    assert weight() is None


@pytest.mark.clause(4)
def test_outputs_outlive_the_engine() -> None:
    engine = build(nn.Hardtanh(), torch.randn(50))
    x = torch.randn(50) * 3
    y = engine(x)
    engine.close()
    del engine
    gc.collect()
    assert torch.equal(y, x.clamp(-1, 1))


# -- fork and exit ----------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], bool], timeout: float = 30) -> int:
    """Exit status of a forked child that runs ``work``; a child that hangs is killed and counts as 99."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns that threads do not survive
        pid = os.fork()
    if pid == 0:
        status = 98
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return 99


@contextmanager
def held_by_another_thread(lock: Any) -> Iterator[None]:
    taken, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert taken.wait(10)
        yield
    finally:
        release.set()
        thread.join()


@pytest.mark.clause(5)
def test_an_engine_works_in_a_forked_child() -> None:
    model = nn.Linear(3, 4).eval()
    engine = build(model, torch.randn(2, 3))
    x, wide = torch.randn(2, 3), torch.randn(5, 3)
    if torch.cuda.is_initialized():
        wide = x  # torch.export starts CUDA where there is one, which a forked child cannot do again
    expected, expected_wide = eager(model, x), eager(model, wide)
    assert in_child(lambda: torch.equal(engine(x), expected) and torch.equal(engine(wide), expected_wide)) == 0
    assert torch.equal(engine(x), expected), "and goes on in the parent"


# The native runtime's counters and limits have no locks. That of its pool is held while calls are under way at a fork:
# tests/sim/test_faults.py.
@pytest.mark.parametrize(
    ("runtime", "which"), [("python", "build"), ("python", "counters"), ("python", "limits"), ("native", "build")]
)
def test_a_lock_held_at_the_fork_does_not_hang_the_child(runtime: str, which: str) -> None:
    engine = build(nn.ReLU(), torch.randn(4), runtime=runtime)
    x, wide = torch.randn(4), torch.randn(9)
    if torch.cuda.is_initialized():
        wide = x  # torch.export starts CUDA where there is one, which a forked child cannot do again
    locks = {
        "build": lambda: process.build_lock,
        "counters": lambda: engine._counters._tally._lock,
        "limits": lambda: engine._limits._lock,
    }
    with held_by_another_thread(locks[which]()):
        status = in_child(
            lambda: (
                torch.equal(engine(x), x.relu())
                and torch.equal(engine(wide), wide.relu())
                and engine.stats().calls == 2
            )
        )
    assert status == 0


@pytest.mark.clause(5)
def test_a_child_forked_amid_a_compile_runs_what_was_compiled_and_refuses_the_rest(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anabranch.runtime import _compiler

    model = nn.Linear(3, 4).eval()
    engine = build(model, torch.randn(2, 3))
    x, expected = torch.randn(2, 3), eager(model, torch.ones(5, 3))
    amid, go_on = threading.Event(), threading.Event()
    export = _compiler.export_program

    def slow_export(*args: Any, **kwargs: Any) -> Any:
        amid.set()
        assert go_on.wait(30)
        return export(*args, **kwargs)

    def child() -> bool:
        _compiler.export_program = export
        assert torch.equal(engine(x), eager(model, x))
        for use in (
            lambda: engine(torch.randn(7, 3)),
            lambda: engine.warm([torch.randn(8, 3)]),
            lambda: build(nn.ReLU(), torch.randn(2)),
        ):
            with pytest.raises(anabranch.EngineClosed, match=r"forked while another thread .* compiled"):
                use()
        return True

    monkeypatch.setattr(_compiler, "export_program", slow_export)
    results: list[Any] = []
    other = threading.Thread(target=lambda: results.append(engine(torch.ones(5, 3))))
    other.start()
    try:
        assert amid.wait(30)
        assert in_child(child) == 0
    finally:
        go_on.set()
        other.join()
    torch.testing.assert_close(results[0], expected)
    if not torch.cuda.is_initialized():
        assert in_child(lambda: engine(torch.randn(9, 3)).shape == (9, 4)) == 0, "a fork in between is no fork amid"


@pytest.mark.clause(5)
def test_inductor_compiles_in_a_child_of_a_process_in_which_it_has_compiled() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU()).eval()
    engine = build(model, torch.randn(2, 3), backend="inductor")
    # torch.export starts CUDA where there is one, which a forked child cannot do again.
    x = torch.randn(2 if torch.cuda.is_initialized() else 5, 3)
    expected = eager(model, x)
    assert in_child(lambda: torch.allclose(engine(x), expected), timeout=120) == 0


@pytest.mark.clause(5)
def test_the_interpreter_exits_with_threads_still_calling(run_python: Any, runtime: str) -> None:
    done = run_python(
        """
        import atexit
        atexit.register(lambda: print("last call", torch.equal(engine(x), expected)))  # runs after the engine's own
        import threading, torch, anabranch
        model = torch.nn.Linear(16, 16).eval()
        engine = anabranch.compile(model, [torch.randn(4, 16)], backend="eager", runtime=RUNTIME)
        x = torch.randn(4, 16)
        expected = engine(x)
        started = threading.Barrier(5)
        def spin():
            engine(x)
            started.wait()
            while True:
                engine(x)
        for _ in range(4):
            threading.Thread(target=spin, daemon=True).start()
        started.wait()
        """.replace("RUNTIME", repr(runtime))
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "last call True\n"
    assert "Traceback" not in done.stderr


def test_the_interpreter_exits_while_a_thread_compiles(run_python: Any, runtime: str) -> None:
    done = run_python(
        """
        import threading, torch, anabranch
        model = torch.nn.Linear(16, 16).eval()
        engine = anabranch.compile(model, [torch.randn(4, 16)], backend="eager", runtime=RUNTIME)
        xs = [torch.randn(n, 16) for n in range(100)]
        started = threading.Event()
        def work():
            for x in xs:
                started.set()
                engine(x)
        threading.Thread(target=work, daemon=True).start()
        started.wait()
        """.replace("RUNTIME", repr(runtime))
    )
    assert done.returncode == 0, done.stderr


def test_the_exit_waits_for_a_thread_until_it_wants_the_interpreter_no_more() -> None:
    """One that is about to stop may have lost the GIL. At the interpreter's end it would be unwound, C++ and all."""
    paused, go = threading.Event(), threading.Event()

    def in_call() -> None:
        process.wait_for_exit()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code is _process._stop.__code__:
            frame.f_trace_opcodes = True
            if event == "opcode":
                paused.set()
                go.wait()
        return trace

    def work() -> None:
        sys.settrace(trace)
        in_call()

    _activity.call(in_call)
    try:
        threading.Thread(target=work, daemon=True).start()
        assert paused.wait(30)
        assert process._others()
        go.set()
        end = time.monotonic() + 30
        while process._others() and time.monotonic() < end:
            time.sleep(0.001)
        assert not process._others()
        begins: Any = types.SimpleNamespace(f_code=_process._stop.__code__, f_lasti=0)
        assert not _process._has_stopped(begins)
    finally:
        _activity._calls.remove(in_call.__code__)


def test_a_spawned_script_exits_cleanly_after_a_fork_with_an_engine(run_python: Any, runtime: str) -> None:
    done = run_python(
        """
        import os, torch, anabranch
        engine = anabranch.compile(torch.nn.ReLU(), [torch.randn(4)], runtime=RUNTIME, backend="eager")
        x = torch.randn(4)
        pid = os.fork()
        ok = torch.equal(engine(x), x.relu())
        if pid == 0:
            raise SystemExit(0 if ok else 1)  # with atexit handlers and all
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """.replace("RUNTIME", repr(runtime))
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("graph", "direct", "expected"),
    [
        ((10.0, 5.0), (12.0, 3.0), True),  # its results are there first
        ((12.0, 3.0), (10.0, 5.0), False),
        ((10.0, 5.0), (10.9, 3.0), False),  # alike: the caller is back first
        ((10.9, 3.0), (10.0, 5.0), True),
        ((10.0, 3.0), (10.0, 3.0), True),
    ],
)
def test_what_a_call_costs_is_its_latency_and_among_alike_ones_its_host_time(
    graph: tuple[float, float], direct: tuple[float, float], expected: bool
) -> None:
    assert Cost(*graph).is_better(Cost(*direct)) is expected
