"""Who computes it: eager PyTorch, compilers, other engines, and ours, each in the best set-up that we know for it."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from anabranch.bench._work import Work, installed
from anabranch.errors import InputError

Call = Callable[[torch.Tensor], Any]
#: The system that every run compares with: it is built and measured first, and a run without it has failed.
BASELINE = "eager"


@dataclass
class Subject:
    """What a system gets: the model in place and in dtype, and one example of its input."""

    work: Work
    model: torch.nn.Module
    example: torch.Tensor
    #: The most streams that will be asked for: a system may prepare for them while it is being built.
    streams: int
    #: ``time.monotonic()`` at which building should be over; systems that build several engines stop before.
    deadline: float = float("inf")

    @property
    def device(self) -> torch.device:
        return self.example.device


class Ready:
    """A built system. Thread ``i`` calls ``slots(n)[i]``, on a stream of its own; slot 0 is the building thread's."""

    #: True: one thread launches for all streams, through :meth:`launches`.
    one_thread = False
    #: A line about the set-up, for the report.
    note = ""

    def __init__(self, call: Call) -> None:
        self.call = call

    def slots(self, n: int) -> list[Call]:
        """What each of ``n`` threads calls. Raises :class:`NotReady` when this system cannot serve that many."""
        return [self.call] * n

    def launches(self, n: int) -> list[Callable[[], Any]]:
        """For ``one_thread``: what starts slot ``i`` on the current stream, inputs being in place."""
        raise NotImplementedError


class NotReady(Exception):
    """A system that cannot serve so many streams; the message says why."""


@dataclass(frozen=True)
class System:
    """A system under test. ``family``: ``peer``, ``bound`` (not a product) or ``ours``.

    ``contiguous``: it wants its input in this layout and gets it so, whatever suits the others.
    ``cores``: how many cores its build may use. ``slow``: the highest starts first. ``apart``: each of its works gets a
    process of its own, since a fault was seen, which would take the others along, or since its builds are the longest.
    ``needs``: modules, all of them; of a tuple of modules one is enough. ``extra``: run only where it is named.
    """

    name: str
    label: str
    build: Callable[[Subject], Ready]
    devices: tuple[str, ...] = ("cuda", "cpu")
    family: str = "peer"
    needs: tuple[str | tuple[str, ...], ...] = ()
    contiguous: bool = False
    cores: int = 1
    slow: int = 0
    apart: bool = False
    extra: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def order(self) -> tuple[bool, bool, int]:
        """Builds begin in this order: what the others are compared with first, what takes many cores last."""
        return self.name not in (BASELINE, "bound"), self.cores > 1, -self.slow

    def missing(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if device not in self.devices:
            return f"not for {device}"
        for need in self.needs:
            modules = (need,) if isinstance(need, str) else need
            if not any(map(installed, modules)):
                return f"{' or '.join(modules)} is not installed"
        return None


# -- PyTorch ------------------------------------------------------------------------------------------------------


def _eager(subject: Subject) -> Ready:
    return Ready(subject.model)


def _compile(subject: Subject, mode: str | None = None) -> Ready:
    return Ready(torch.compile(subject.model, dynamic=False, mode=mode))


def _aoti(subject: Subject) -> Ready:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.package.package import load_package

    program = torch.export.export(subject.model, (subject.example,))
    # The folder lives as long as this process; the loader maps the library from it.
    folder = Path(tempfile.mkdtemp(prefix="anabranch-bench-"))
    path = aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    # One runner would make the host wait whenever another thread's call is in flight.
    package = load_package(path, num_runners=max(1, subject.streams))
    return Ready(package)


class _Bound(Ready):
    """torch.compile's output in a private CUDA graph with private buffers per stream, launched by one thread.

    No product: its input has to be in the buffers before, and whoever wants the output must take it out in time.
    """

    one_thread = True
    note = "replays only; inputs are in place"

    def __init__(self, subject: Subject) -> None:
        self._prepare(subject, torch.compile(subject.model, dynamic=False))

    def _prepare(self, subject: Subject, compiled: Any) -> None:
        super().__init__(compiled)
        self.compiled, self.example = compiled, subject.example
        self.graphs: list[tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = []

    def _capture(self) -> None:
        x = self.example.clone()
        lane = torch.cuda.Stream()
        lane.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(lane):
            for _ in range(3):
                self.compiled(x)
        lane.synchronize()
        graph = torch.cuda.CUDAGraph()
        # On a stream of its own: graphs captured on one stream share cuBLAS's workspace, and spoil each other's.
        with torch.cuda.graph(graph, stream=lane):
            y = self.compiled(x)
        self.graphs.append((graph, x, y))

    def slots(self, n: int) -> list[Call]:
        while len(self.graphs) < n:
            self._capture()

        def call(i: int, x: torch.Tensor) -> torch.Tensor:
            graph, buffer, y = self.graphs[i]
            buffer.copy_(x)
            graph.replay()
            return y

        return [functools.partial(call, i) for i in range(n)]

    def launches(self, n: int) -> list[Callable[[], Any]]:
        self.slots(n)
        return [graph.replay for graph, _, _ in self.graphs[:n]]


class _TensorRTBound(_Bound):
    """As :class:`_Bound`, of what the backend ``tensorrt`` makes of it, with an instance for each graph."""

    def __init__(self, subject: Subject) -> None:
        import anabranch

        engine = anabranch.compile(subject.model, (subject.example,), backend="tensorrt", max_contexts=1)
        self._prepare(subject, engine)

    def _capture(self) -> None:
        self.compiled.warm(captures=1)
        super()._capture()


# -- Torch-TensorRT -----------------------------------------------------------------------------------------------


class _TensorRT(Ready):
    """Torch-TensorRT. ``graphs``: None; ``"auto"``, its ``enable_cudagraphs``; ``"subgraph"``, one graph for each
    engine of the model. ``copies``: None, all threads share one engine; else how many engines there may be."""

    def __init__(self, subject: Subject, python: bool, graphs: str | None, copies: int | None) -> None:
        import torch_tensorrt

        # Without a handler it fills stderr with remarks about plugins; what is raised says what went wrong.
        logging.disable(logging.CRITICAL)
        self.trt = torch_tensorrt
        self.graphs, self.copies = graphs, copies
        first = torch_tensorrt.compile(
            subject.model, ir="dynamo", inputs=[subject.example], min_block_size=1, use_python_runtime=python
        )
        self.engines = [first]
        wanted = min(copies, subject.streams) if copies else 1
        copying = 0.0
        # What comes after the copies takes about as long as one of them.
        while len(self.engines) < wanted and time.monotonic() + 2.0 * copying < subject.deadline - 5.0:
            start = time.monotonic()
            self.engines.append(copy.deepcopy(first))
            copying = max(copying, time.monotonic() - start)
        if graphs == "subgraph":
            torch_tensorrt.runtime.set_cudagraphs_mode(True)
        # enable_cudagraphs() is a context manager: entered for the life of this process, as a server would.
        self.managers = [torch_tensorrt.runtime.enable_cudagraphs(e) for e in self.engines] if graphs == "auto" else []
        self.calls = [m.__enter__() for m in self.managers] or list(self.engines)
        whole = type(self.calls[0]).__name__ == "CudaGraphsTorchTensorRTModule"
        engines = f"{len(self.calls)} engine{'s' * (len(self.calls) > 1)}"
        self.note = f"{engines}, {'one graph for the whole model' if whole else 'a graph for each engine'}"
        if not graphs:
            self.note = engines
        super().__init__(self.calls[0])

    def slots(self, n: int) -> list[Call]:
        if self.copies is None:
            return [self.calls[0]] * n
        if n > len(self.calls):
            raise NotReady(f"{len(self.calls)} engines built")
        return list(self.calls[:n])


def _tensorrt(subject: Subject, python: bool, graphs: str | None, shared: bool) -> Ready:
    # Sixteen engines of one network can hold 18 GB, and three of the five set-ups with an engine a thread are C++.
    copies = min(4, subject.work.copies) if python else subject.work.copies
    return _TensorRT(subject, python, graphs, None if shared else copies)


def _tensorrt_systems() -> Iterator[System]:
    kinds = [
        (python, graphs, shared) for shared in (True, False) for python in (False, True) for graphs in (None, "auto")
    ]
    for python, graphs, shared in [*kinds, (False, "subgraph", False)]:
        runtime, who = "python" if python else "cpp", "shared" if shared else "each"
        suffix = {None: "", "auto": "-graphs", "subgraph": "-subgraphs"}[graphs]
        text = {None: "", "auto": " + CUDA graphs", "subgraph": " + CUDA graph per subgraph"}[graphs]
        yield System(
            f"trt-{runtime}{suffix}-{who}",
            f"Torch-TensorRT {'Python' if python else 'C++'}{text}, {'shared' if shared else 'engine a thread'}",
            functools.partial(_tensorrt, python=python, graphs=graphs, shared=shared),
            devices=("cuda",),
            needs=("torch_tensorrt",),
            contiguous=True,  # it would copy any other layout to this one at each call
            slow=0 if shared else 2,
            apart=shared and python and not graphs,
        )


# -- ONNX Runtime -------------------------------------------------------------------------------------------------


def _onnx(subject: Subject) -> Ready:
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(subject.model, (subject.example,), dynamo=True)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def call(x: torch.Tensor) -> Any:
        outputs = [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]
        return outputs[0] if len(outputs) == 1 else outputs

    return Ready(call)


# -- anabranch ----------------------------------------------------------------------------------------------------


class _Anabranch(Ready):
    """``cuda_graphs``: None, as compile decides."""

    def __init__(self, subject: Subject, backend: str, runtime: str, cuda_graphs: bool | None = None) -> None:
        import anabranch

        # A context for each stream, all built ahead in this thread. With more allowed, threads build some while they
        # call, and cuDNN's search may choose another algorithm in another thread (docs/contract.md).
        self.engine = anabranch.compile(
            subject.model,
            [subject.example],
            backend=backend,
            runtime=runtime,
            cuda_graphs=cuda_graphs,
            max_contexts=subject.streams,
        )
        super().__init__(self.engine)
        plan = self.engine.plan
        self.note = f"{'captured' if plan.captured else 'direct'}: {plan.reason}"
        if backend == "tensorrt":
            # How much of the model TensorRT runs: a figure of it says little where most fell back.
            shares = [line.strip() for line in self.engine.explain().splitlines() if "of FLOPs" in line]
            self.note = "; ".join([self.note, *shares])

    def slots(self, n: int) -> list[Call]:
        built = self.engine.warm(contexts=n)
        if built < n and self.engine.plan.captured:
            # No fault of the engine's, and it goes on with fewer: the log says what a figure was measured with.
            print(f"{built} of {n} contexts were built", flush=True)
        return [self.engine] * n


def _our_systems() -> Iterator[System]:
    from anabranch.backends import BACKENDS
    from anabranch.runtime._compile import RUNTIMES

    for backend in (b for b in BACKENDS if b != "tensorrt"):
        for runtime in RUNTIMES:
            name = f"anabranch-{backend}-{runtime}"
            label = f"anabranch {backend}, {runtime} runtime"
            build = functools.partial(_Anabranch, backend=backend, runtime=runtime)
            yield System(name, label, build, family="ours", slow=0 if backend == "eager" else 1)
    # As compile decides, in each runtime; and what it has to decide between.
    for runtime, suffix, graphs in (
        *((runtime, "", None) for runtime in RUNTIMES),
        ("native", "-graphs", True),
        ("native", "-direct", False),
    ):
        text = {None: "", True: " + CUDA graphs", False: ", no CUDA graphs"}[graphs]
        yield System(
            f"anabranch-tensorrt-{runtime}{suffix}",
            f"anabranch tensorrt, {runtime} runtime{text}",
            functools.partial(_Anabranch, backend="tensorrt", runtime=runtime, cuda_graphs=graphs),
            devices=("cuda",),
            family="ours",
            needs=(("tensorrt", "tensorrt_rtx"),),
            slow=1,
            extra=graphs is not None,
        )


def _mode(mode: str) -> Callable[[Subject], Ready]:
    return functools.partial(_compile, mode=mode)


SYSTEMS: dict[str, System] = {
    s.name: s
    for s in (
        System("eager", "PyTorch eager", _eager),
        System("compile", "torch.compile", _compile, slow=1),
        System(
            "compile-overhead", "torch.compile reduce-overhead", _mode("reduce-overhead"), ("cuda",), slow=1, apart=True
        ),
        System(
            "compile-autotune",
            "torch.compile max-autotune",
            _mode("max-autotune"),
            ("cuda",),
            cores=8,
            slow=3,
            apart=True,
        ),
        System("aoti", "AOTInductor", _aoti, slow=1, apart=True),
        *_tensorrt_systems(),
        System("onnxruntime", "ONNX Runtime", _onnx, ("cpu",), needs=("onnxruntime", "onnxscript"), contiguous=True),
        *_our_systems(),
        System("bound", "graph + buffers per stream, 1 thread", _Bound, ("cuda",), "bound", slow=1),
        System(
            "bound-tensorrt",
            "anabranch tensorrt's graph + buffers per stream, 1 thread",
            _TensorRTBound,
            ("cuda",),
            "bound",
            needs=(("tensorrt", "tensorrt_rtx"),),
            slow=1,
            extra=True,
        ),
    )
}


def default_systems(device: str) -> list[str]:
    return [s.name for s in SYSTEMS.values() if device in s.devices and not s.extra]


def find_system(name: str) -> System:
    """A name of ``SYSTEMS``, or ``module:callable``; the callable gets a :class:`Subject` and returns a
    :class:`Ready`, or just what is to be called."""
    if name in SYSTEMS:
        return SYSTEMS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise InputError(f"system {name!r} given; expected one of {', '.join(SYSTEMS)}, or module:callable")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise InputError(f"system {name!r}: {e}. Expected module:callable with the module on PYTHONPATH.") from e

    def build(subject: Subject) -> Ready:
        made = function(subject)
        return made if isinstance(made, Ready) else Ready(made)

    return System(name, attribute, build)
