"""One model of ``benchmarks/zoo.py``, in this process: is what anabranch makes of it right, and what does it cost?

The figures of a model are gathered in one dictionary, which is handed on after each step: whatever ends the process,
what was found before is kept.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import fcntl
import gc
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._inductor.async_compile import CompiledTritonKernels
from torch._inductor.utils import clear_caches
from torch.utils import _pytree as pytree
from zoo_models import Inputs, make

import anabranch
from anabranch import _judge
from anabranch.errors import AnabranchError

THREADS, CALLS_A_THREAD = 4, 24
#: An error of eager's, relative to the largest value expected, from which on nothing is left to compare with.
_LOST = 0.5
#: An error of eager's by inputs that differ by an ulp, from which on the model is run with the backend eager, too.
_STEEP = 1e-5
#: How results in one dtype are paired with those in another.
_LOOSELY: dict[str, Any] = {"dtypes": False, "strides": False, "devices": False}
#: Contexts that are built beyond the first one, to see what one takes.
FURTHER = 2

Call = Callable[[Inputs], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How a model is run; ``lock``: a file that processes of a run hold while they measure time."""

    device: str
    dtype: str
    backend: str | None = None
    flip: bool = False
    overhead: bool = False
    rounds: int = 5
    lock: str = ""


class Stopped(Exception):
    """The model cannot be judged further; the row says why."""


def prepare(device: str) -> None:
    """What a process, or a machine, pays once is no model's build: C++ that is compiled at first use, libraries."""
    x = torch.ones(8, 8, device=device)
    layer = torch.nn.Linear(8, 8).eval().requires_grad_(False).to(device)
    torch.compile(lambda x: x * 2 + 1)(x)
    with anabranch.compile(layer, inputs=[x]) as engine:
        engine(x)


@dataclass
class Subject:
    """A model that is run, and the row that says how it went, which is told after each step."""

    name: str
    options: Options
    tell: Callable[[Row], None]
    row: Row = field(default_factory=dict)
    engine: Any = None
    peer: Any = None

    def run(self) -> None:
        """Only one thread may be running."""
        torch.set_grad_enabled(False)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self.row |= {"model": self.name, "dtype": self.options.dtype, "stage": "start"}
        self.device = torch.device(self.options.device)
        self.gauge = _Gauge(self.device)
        try:
            self._steps()
        except Stopped:
            return
        self.row["stage"] = "done"
        self.tell(self.row)

    def _steps(self) -> None:
        with self._stage("prepare"):
            prepare(self.options.device)
        with self._stage("make"):
            self.model, self.given = make(self.name)
            self.row["parameters"] = sum(p.numel() for p in self.model.parameters())
        with self._stage("eager"):
            self._eager()
        self._build()
        with self._stage("serial calls"):
            self._serial()
        with self._stage("summary"):
            self._summary()
        with self._stage("threads"):
            self._threads()
        with self._stage("latency"):
            self._latency()
        if self.device.type == "cuda":
            with self._aside("profile"):
                self.row["launches"] = _profiled(lambda: self.engine_call(self.sets[0]))
        if self.options.overhead:
            with self._aside("reduce-overhead"):
                self._overhead()

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.row["stage"] = name
        self.tell(self.row)
        try:
            yield
        except Exception as error:
            self.row |= {
                "failure": f"{type(error).__name__}: {error}"[:1500],
                "refused": isinstance(error, AnabranchError),
            }
            self.tell(self.row)
            raise Stopped from error

    @contextlib.contextmanager
    def _aside(self, name: str) -> Iterator[None]:
        """A stage of figures only: if it fails, they are missing."""
        self.row["stage"] = name
        self.tell(self.row)
        try:
            yield
        except Exception as error:
            self.row.setdefault("aside", {})[name] = f"{type(error).__name__}: {error}"[:500]

    # -- what is expected ---------------------------------------------------------------------------------------------

    def _eager(self) -> None:
        """Float32 results, and those in the dtype that is judged: float32 too where eager cannot do it in half."""
        dtype = getattr(torch, self.options.dtype)
        self.base = self.gauge.now()
        self.model = self.model.to(self.device)
        # On the host, so that they are not among what is held on the device.
        self.wide = [_moved(self._kept(self.model, _cast(i, self.device, torch.float32))) for i in self.given]
        whole = copy.deepcopy(self.model.cpu()) if dtype is not torch.float32 else self.model
        why = self._why_not_judged_in(dtype)
        if why:
            self.row |= {"dtype": "float32", "dtype_reason": why}
            self.model = whole  # that which was in half has lost digits
            self._convert(torch.float32)
        del whole
        use = self.gauge.call(lambda: self.eager_call(self.sets[0]))
        self.resident = use.before - self.base
        if self.resident.known:
            weights = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self._weights()}
            self.row["memory"] = {
                "weights": sum(weights.values()),
                "eager": (use.peak - self.base).data(),
                "eager_activations": use.grown.data(),
            }
            # What one more caller takes: libraries have workspaces for each stream.
            with _stream(self.device):
                self.row["memory"]["eager_stream"] = self.gauge.call(lambda: self.eager_call(self.sets[0])).grown.data()

    def _convert(self, dtype: torch.dtype) -> None:
        # By way of the host: what lies between the old weights and the new ones would count as eager's memory.
        self.model = self.model.cpu().to(dtype)
        self.gauge.now()
        self.model = self.model.to(self.device)
        self.sets = [_cast(i, self.device, dtype) for i in self.given]

    def _why_not_judged_in(self, dtype: torch.dtype) -> str:
        """Eager may not do it in half, or have nothing left of the result there: zeros, or no numbers at all."""
        self._convert(dtype)
        if dtype is torch.float32:
            return ""
        try:
            low = [self._kept(self.model, i) for i in self.sets]
            self._wait()
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]
        pairs = [_judge.pair(a, b, **_LOOSELY) for a, b in zip(low, self.wide, strict=True)]
        lost = max((_error(near) for other, near in pairs if not other), default=0.0)
        return f"eager's error in {self.options.dtype} is {lost:.1f}" if not lost < _LOST else ""

    def _weights(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def _kept(self, call: Any, inputs: Inputs) -> Any:
        """The results, in memory of their own; what shares memory goes on sharing it."""
        return copy.deepcopy(call(*_copied(inputs.args), **_copied(inputs.kwargs or {})))

    def eager_call(self, i: Inputs) -> Any:
        return self.model(*i.args, **(i.kwargs or {}))

    def engine_call(self, i: Inputs) -> Any:
        return self.engine(*i.args, **(i.kwargs or {}))

    def peer_call(self, i: Inputs) -> Any:
        return self.peer(*i.args, **(i.kwargs or {}))

    # -- builds -------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        """Both, each with an empty cache of its own, until the first results are there."""
        order = ["compile", "ours"] if self.options.flip else ["ours", "compile"]
        self.row["builds"] = [{"first": order[0]}]
        for who in order:
            if who == "ours":
                with self._stage("build"):
                    self._timed("ours", self._build_ours, self.engine_call)
                    self._contexts()
            else:
                with self._aside("build of torch.compile"):
                    self._timed("compile", self._build_peer, self.peer_call)
                if "build of torch.compile" in self.row.get("aside", {}):
                    self.peer = None

    def _build_ours(self) -> None:
        first = self.sets[0]
        options = {"backend": self.options.backend} if self.options.backend else {}
        self.engine = anabranch.compile(self.model, inputs=list(first.args), kwargs=first.kwargs, **options)

    def _build_peer(self) -> None:
        self.peer = torch.compile(self.model, dynamic=False)

    def _timed(self, who: str, build: Callable[[], None], call: Call) -> None:
        inputs = _copied(self.sets[0])
        with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
            os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
            _forget()
            before = self.gauge.now()
            began = time.perf_counter()
            build()
            call(inputs)
            self._wait()
            self.row["builds"][0][f"{who}_s"] = round(time.perf_counter() - began, 2)
            built = self.gauge.peak()
            # A second call of torch.compile may compile again.
            self._wait_for(call(self.sets[1]))
            use = self.gauge.call(lambda: call(inputs))
        if self.resident.known:
            self.row["memory"][who] = (use.peak - before + self.resident).data()
            self.row["memory"][f"{who}_build"] = (built - before + self.resident).data()

    def _contexts(self) -> None:
        """What each further context takes; nothing where there are none."""
        before, held = self.gauge.now(), self.engine.stats().contexts
        if not self.resident.known or not held:
            return
        self.engine.warm(contexts=held + FURTHER)
        built = self.engine.stats().contexts - held
        if built > 0:
            self.row["memory"]["further_context"] = ((self.gauge.now() - before) // built).data()

    # -- right? -------------------------------------------------------------------------------------------------------

    def _serial(self) -> None:
        self.reference = [self._kept(self.engine, i) for i in self.sets]
        again = [self._kept(self.engine, i) for i in self.sets]
        self.row["repeats"] = not any(_differences(a, b) for a, b in zip(again, self.reference, strict=True))
        structure: list[str] = []
        errors = dict.fromkeys(("error", "eager_error", "error_to_eager", "integers_differ"), 0.0)
        if self.row["dtype"] == "float32":
            errors |= {"moved_error": 0.0, "moved_integers_differ": 0.0}
        for i, got, wide in zip(self.sets, self.reference, self.wide, strict=True):
            low = self._kept(self.model, i)
            structure += _judge.pair(got, low)[0]
            _note(errors, ("error_to_eager", "integers_differ"), got, low)
            if self.row["dtype"] == "float32":
                moved = self._kept(self.model, _moved_by_an_ulp(i))
                _note(errors, ("moved_error", "moved_integers_differ"), moved, low)
            other, of_eager = _judge.pair(low, wide, **_LOOSELY)
            if other:  # Eager itself finds other things in this dtype: boxes, say.
                self.row["eager_differs"] = other[0][:200]
                continue
            errors["eager_error"] = max(errors["eager_error"], _error(of_eager))
            errors["error"] = max(errors["error"], _error(_judge.pair(got, wide, **_LOOSELY)[1]))
        self.row |= errors
        if errors.get("moved_error", 0) > _STEEP:
            self.row |= self._exactly()
        self.row["structure"] = structure[0][:300] if structure else ""

    def _exactly(self) -> Row:
        """How far from eager's the results of an engine are that rounds as eager does."""
        first, errors = self.sets[0], {"exact_error": 0.0, "exact_integers_differ": 0.0}
        with anabranch.compile(self.model, inputs=list(first.args), kwargs=first.kwargs, backend="eager") as engine:
            for i in self.sets:
                _note(errors, tuple(errors), self._kept(engine, i), self._kept(self.model, i))
        return errors

    def _threads(self) -> None:
        """Calls from threads on streams of their own; each result must have the bits of that of a call by itself."""
        wrong, calls, errors, said = [0] * THREADS, [0] * THREADS, [], []
        start = threading.Barrier(THREADS)

        def work(number: int) -> None:
            try:
                torch.set_grad_enabled(False)
                with _stream(self.device):
                    start.wait()
                    for turn in range(CALLS_A_THREAD):
                        which = (number * 3 + turn) % len(self.sets)
                        inputs = _copied(self.sets[which])
                        got = self.engine_call(inputs)
                        del inputs
                        found = _differences(got, self.reference[which])
                        wrong[number] += bool(found)
                        calls[number] += 1
                        said.extend(found[:1])
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}"[:500])
                start.abort()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.row |= {"calls": sum(calls), "wrong": sum(wrong), "wrong_first": said[0][:300] if said else ""}
        if errors:
            self.row["thread_error"] = errors[0]

    # -- what it costs ------------------------------------------------------------------------------------------------

    def _summary(self) -> None:
        content = self.engine.summary()
        signatures, fragments = content["signatures"], content["fragments"]
        first = signatures[0] if signatures else {"backend": content["backend"], "seconds": {}}
        self.row["summary"] = {
            "captured": bool(signatures) and all(s["captured"] for s in signatures) and fragments is None,
            "backend": first["backend"],
            "reason": first.get("reason", "") if fragments is None else f"in several graphs: {fragments['why']}",
            **{k: _sum_of_shares([s[k] for s in signatures]) for k in ("operators", "flops")},
            "seconds": first["seconds"],
            "reasons": [f"{r['operator']}: {r['why']} ({r['source']})" for s in signatures[:1] for r in s["reasons"]][
                :5
            ],
            "runtime": content["runtime"],
        }
        if fragments is not None:
            self.row["summary"]["graphs"] = len(fragments["graphs"])

    def _latency(self) -> None:
        calls = {"us": self.engine_call, "eager_us": self.eager_call}
        if self.peer is not None:
            calls["compile_us"] = self.peer_call
        self._alternate(calls)

    def _overhead(self) -> None:
        """Last, as forgetting what Dynamo compiled ends ``torch.compile``'s turn."""
        torch._dynamo.reset()
        self.peer = torch.compile(self.model, dynamic=False, mode="reduce-overhead")
        for _ in range(4):
            self._wait_for(self.peer_call(self.sets[0]))
        self._alternate({"us_beside_overhead": self.engine_call, "overhead_us": self.peer_call})

    def _alternate(self, calls: dict[str, Call]) -> None:
        """Each in turn, in rounds; the medians. One process of a run measures at a time."""
        with _held(self.options.lock):
            once = {k: self._sample(call, 3) for k, call in calls.items()}
            count = {k: int(min(max(2e5 / us, 3), 30)) for k, us in once.items()}
            rounds = [{k: self._sample(c, count[k]) for k, c in calls.items()} for _ in range(self.options.rounds)]
        for k in calls:
            self.row[k] = round(statistics.median(r[k] for r in rounds), 1)
            self.row.setdefault("rounds", {})[k] = [round(r[k], 1) for r in rounds]

    def _sample(self, call: Call, count: int) -> float:
        """Microseconds until the results of a call are there: the median of so many."""
        took = []
        for _ in range(count):
            began = time.perf_counter()
            call(self.sets[0])
            self._wait()
            took.append(time.perf_counter() - began)
        return statistics.median(took) * 1e6

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _wait_for(self, _: Any) -> None:
        self._wait()


# -- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bytes:
    """What PyTorch's allocator gave out and what it reserved, which counts the pools of graphs in full, and what was
    taken from the device as the driver counts it; None where that is not known."""

    allocated: int | None = None
    reserved: int | None = None
    device: int | None = None

    def __add__(self, other: _Bytes) -> _Bytes:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: _Bytes) -> _Bytes:
        return self._with(other, lambda a, b: a - b)

    def __floordiv__(self, by: int) -> _Bytes:
        return self._with(self, lambda a, _: a // by)

    def _with(self, other: _Bytes, how: Callable[[int, int], int]) -> _Bytes:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return _Bytes(*(None if a is None or b is None else how(a, b) for a, b in pairs))

    @property
    def known(self) -> bool:
        return self.allocated is not None

    def data(self) -> dict[str, int | None]:
        return asdict(self)


@dataclass(frozen=True)
class _Use:
    before: _Bytes
    peak: _Bytes

    @property
    def grown(self) -> _Bytes:
        return self.peak - self.before


@dataclass(frozen=True)
class _Gauge:
    device: torch.device

    def now(self) -> _Bytes:
        """What is held while nothing runs and nothing is cached; the peak is looked for from here on."""
        if self.device.type != "cuda":
            return _Bytes()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return _Bytes(torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), self._taken())

    def peak(self) -> _Bytes:
        """The most that was held since. What libraries take beside PyTorch's allocator is taken for lasting."""
        if self.device.type != "cuda":
            return _Bytes()
        torch.cuda.synchronize()
        reserved, taken = torch.cuda.max_memory_reserved(), self._taken()
        outside = None if taken is None else taken - torch.cuda.memory_reserved() + reserved
        return _Bytes(torch.cuda.max_memory_allocated(), reserved, outside)

    def call(self, call: Callable[[], Any]) -> _Use:
        """What is held before a call, and the most during it."""
        before = self.now()
        result = call()
        use = _Use(before, self.peak())
        del result
        return use

    def _taken(self) -> int | None:
        return _of_this_process(str(torch.cuda.get_device_properties(self.device).uuid))


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t"""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu", ctypes.c_uint),
        ("compute", ctypes.c_uint),
    )


def _of_this_process(uuid: str) -> int | None:
    """Bytes of a GPU that the driver counts as this process's; None where it does not say."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, count = ctypes.c_void_p(), ctypes.c_uint(256)
    processes = (_Process * count.value)()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(device))
        or nvml.nvmlDeviceGetComputeRunningProcesses_v3(device, ctypes.byref(count), processes)
    )
    found = [p.used for p in processes[: count.value] if p.pid == os.getpid()]
    return None if failed or len(found) != 1 else int(found[0])


# -- kernels ----------------------------------------------------------------------------------------------------------


def _profiled(call: Callable[[], Any]) -> dict[str, int]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # The first one starts the profiler's libraries.
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        return launches(json.loads(file.read_text()))


def launches(trace: dict[str, Any]) -> dict[str, int]:
    """Kernels that ran, and how many of them a launch of a CUDA graph brought, in a trace of ``torch.profiler``."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "correlation" in e.get("args", {})]
    graphs = {
        e["args"]["correlation"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "GraphLaunch" in e["name"]
    }
    kernels = [e["args"]["correlation"] for e in events if e.get("cat") == "kernel"]
    return {"all": len(kernels), "captured": sum(k in graphs for k in kernels)}


# -- small things -----------------------------------------------------------------------------------------------------


def _forget() -> None:
    """What Inductor keeps in memory: kernels that both need would be compiled by the first one only."""
    clear_caches()
    CompiledTritonKernels.cache_clear()


def _cast(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    def one(x: Any) -> Any:
        return x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x

    return Inputs(pytree.tree_map(one, inputs.args), pytree.tree_map(one, inputs.kwargs))


def _moved_by_an_ulp(inputs: Inputs) -> Inputs:
    """Each number is its neighbour, the next one up: what a result does then, it does of any rounding."""

    def one(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return torch.nextafter(x, torch.full_like(x, float("inf")))

    return Inputs(pytree.tree_map(one, inputs.args), pytree.tree_map(one, inputs.kwargs))


def _moved(value: Any) -> Any:
    return pytree.tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, value)


def _copied(value: Any) -> Any:
    if isinstance(value, Inputs):
        return Inputs(_copied(value.args), _copied(value.kwargs))
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, value)


def _differences(got: Any, reference: Any) -> list[str]:
    return _judge.differences(got, reference, nan_bits=True, strides=False)


def _note(errors: dict[str, float], names: tuple[str, ...], got: Any, wanted: Any) -> None:
    """Keep the largest error so far, and the largest share of integers that differ, under these two names."""
    _, pairs = _judge.pair(got, wanted, strides=False)
    for name, value in zip(names, (_error(pairs), _integers_differ(pairs)), strict=True):
        errors[name] = max(errors[name], value)


def _error(pairs: list[_judge.Pair]) -> float:
    floats = [p for p in pairs if p.expected.is_floating_point() or p.expected.is_complex()]
    return max((_judge.error(p.actual, p.expected.to(p.actual.device)) for p in floats), default=0.0)


def _integers_differ(pairs: list[_judge.Pair]) -> float:
    """The share of elements of integers and booleans that differ, in the worst tensor."""
    whole = [p for p in pairs if not (p.expected.is_floating_point() or p.expected.is_complex()) and p.actual.numel()]
    return max((float((p.actual != p.expected).float().mean()) for p in whole), default=0.0)


def _stream(device: torch.device) -> Any:
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _held(lock: str) -> Iterator[None]:
    if not lock:
        yield
        return
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sum_of_shares(counts: list[Row]) -> Row:
    """What of all graphs runs captured and direct; a graph whose count depends on data counts for nothing."""
    captured, direct = (sum(c[way] or 0 for c in counts) for way in ("captured", "direct"))
    return {
        "captured": captured,
        "direct": direct,
        "share_captured": captured / (captured + direct) if captured + direct else None,
    }
