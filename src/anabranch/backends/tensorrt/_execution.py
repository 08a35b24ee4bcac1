"""Engines at work: an execution context of each, in memory of ours, private to whoever runs it."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from anabranch import _sync
from anabranch.backends._backend import Stateful
from anabranch.backends.tensorrt._builder import Rejected, check_tensors, said
from anabranch.backends.tensorrt._compiler import Compiled
from anabranch.backends.tensorrt._onnx import input_names, named, output_names
from anabranch.devices import Stream, get_device
from anabranch.devices.cuda._driver import graph_nodes, handle
from anabranch.devices.cuda._early import complete
from anabranch.errors import AnabranchError, BuildError
from anabranch.export import Program

#: Bytes that the addresses given to an execution context have to be a multiple of.
_ALIGNMENT = 256
#: Held while TensorRT's work is captured, and nothing else is taken meanwhile: one thread at a time.
_capturing = _sync.lock("TensorRT's captures")
#: Compute capability from which on a kernel may start before the one ahead of it has ended.
_STARTS_EARLY = (9, 0)


class Engine:
    """One deserialized, immutable ``ICudaEngine`` with what execution contexts of it need. Any thread may make them."""

    def __init__(self, compiled: Compiled, name: str, device: torch.device) -> None:
        api = compiled.library.api
        segment = compiled.partition.segments[name]
        self.api, self.device = api, device
        self.seam: Any = get_device(device.type)
        self.inputs, self.outputs = segment.inputs, segment.outputs
        self._compiled, self.library = compiled, compiled.library
        parts = self._parts = SimpleNamespace(runtime=api.Runtime(compiled.library.logger), config=None, cache=None)
        weakref.finalize(self, self.seam.defer_free_code, device.index, vars(parts).clear).atexit = False
        with compiled.library.complaints() as complaints:
            parts.engine = parts.runtime.deserialize_cuda_engine(compiled.engines[name])
        if parts.engine is None:
            raise Rejected(f"TensorRT does not load its own engine: {said(complaints)}")
        self._check()
        self.workspace_bytes = int(parts.engine.device_memory_size_v2)
        self.may_start_early = torch.cuda.get_device_capability(device) >= _STARTS_EARLY
        # Kernels that are compiled for this very GPU when the first execution context is made, and kept for later ones.
        self._key = {**compiled.keys[name], "gpu": _gpu(device)}
        self._cached = b""
        if hasattr(parts.engine, "create_runtime_config"):
            config = parts.config = parts.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(api.ExecutionContextAllocationStrategy.USER_MANAGED)
            if hasattr(api, "DynamicShapesKernelSpecializationStrategy"):
                # Lazy ones change kernels in the middle of the work, behind a captured graph's back.
                config.dynamic_shapes_kernel_specialization_strategy = (
                    api.DynamicShapesKernelSpecializationStrategy.NONE
                )
            if hasattr(api, "CudaGraphStrategy"):
                config.cuda_graph_strategy = api.CudaGraphStrategy.DISABLED  # graphs are the contexts' business
            if hasattr(config, "create_runtime_cache"):
                parts.cache = config.create_runtime_cache()
                self._cached = compiled.cache.load("kernels", self._key) or b""
                if self._cached:
                    parts.cache.deserialize(self._cached)
                config.set_runtime_cache(parts.cache)

    def _check(self) -> None:
        """That its tensors are what the segment's are."""
        engine = self._parts.engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {n: (tuple(engine.get_tensor_shape(n)), engine.get_tensor_dtype(n)) for n in names}
        check_tensors(self.library, named(self.inputs, self.outputs), found)
        self.used = [n for n in input_names(len(self.inputs)) if n in names]

    def context(self) -> Any:
        """A new ``IExecutionContext`` without memory."""
        with self.library.complaints() as complaints:
            how = self._parts.config or self.api.ExecutionContextAllocationStrategy.USER_MANAGED
            made = self._parts.engine.create_execution_context(how)
        if made is None:
            raise BuildError(
                f"TensorRT could not make an execution context: {said(complaints)}. Free device memory, or use another"
                " backend."
            )
        return made

    def keep_kernels(self) -> None:
        """Store what was compiled for this GPU, if anything was."""
        if self._parts.cache is None:
            return
        now = bytes(self._parts.cache.serialize())
        if hashlib.sha256(now).digest() != hashlib.sha256(self._cached).digest():
            self._cached = now
            self._compiled.cache.store("kernels", self._key, now)


class _Call:
    """One segment in one instance: an execution context and what it is fed."""

    def __init__(self, engine: Engine, workspace: torch.Tensor | None, own: Stream | None) -> None:
        self.engine = engine
        self._own, self._fork, self._join = own, torch.Event("cuda"), torch.Event("cuda")
        #: For direct runs, where kernels would start early: the work, and tensors that it reads and writes.
        self._whole: tuple[Any, list[torch.Tensor], list[torch.Tensor]] | None = None
        #: The only reference to the execution context, which may outlive this, but not the engine.
        self._contexts = [engine.context()]
        weakref.finalize(self, engine.seam.defer_free_code, engine.device.index, self._contexts.clear).atexit = False
        if workspace is not None:
            self.context.set_device_memory(workspace.data_ptr(), engine.workspace_bytes)
        self._names = [(n, n in engine.used) for n in input_names(len(engine.inputs))]
        self._outputs = list(zip(output_names(len(engine.outputs)), engine.outputs, strict=True))

    @property
    def context(self) -> Any:
        return self._contexts[0]

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Queue it on the current stream.

        Each kernel after the whole of the one before: where kernels may start early TensorRT launches some so that they
        do. They promise to wait for what they need, and some of TensorRT-RTX 1.4's do not: with eight streams busy one
        output in ten thousand is wrong.
        """
        engine = self.engine
        stream = torch.cuda.current_stream(engine.device)
        entered = [layout.to_engine(x) for layout, x in zip(engine.inputs, inputs, strict=True)]
        is_capturing = engine.seam.is_capturing(stream)
        if self._whole is not None and not is_capturing:
            whole, read, written = self._whole
            for buffer, x in zip(read, entered, strict=True):
                buffer.copy_(x)
            whole.launch(stream)
            results = [y.clone() for y in written]
        else:
            entered = [x.clone() if x.data_ptr() % _ALIGNMENT else x for x in entered]
            results = self._bind(entered)
            if is_capturing:
                self._capture(stream)
            elif stream.cuda_stream:
                self._execute(stream)
            else:
                self._execute_beside(stream)
        return [layout.to_model(y) for layout, y in zip(engine.outputs, results, strict=True)]

    def prepare_direct(self) -> None:
        """See :meth:`anabranch.backends.Instance.prepare_direct`."""
        engine, stream = self.engine, torch.cuda.current_stream(self.engine.device)
        if not engine.may_start_early:
            return
        if not self.capturable(stream):
            raise BuildError(
                "TensorRT says that its work cannot be captured (isStreamCapturable). On this GPU anabranch needs a"
                " capture to make sure that its kernels wait for each other; use another backend."
            )
        read = [layout.empty(engine.device)[0] for layout in engine.inputs]
        written = self._bind(read)
        with _capturing:
            whole = engine.seam.whole_kernels(stream, self._execute)
        if whole.early:
            self._whole = whole, read, written

    def _bind(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Have it read these, and write new tensors, which are returned."""
        for (name, used), x in zip(self._names, inputs, strict=True):
            if used:
                self.context.set_tensor_address(name, x.data_ptr())
        results: list[torch.Tensor] = []
        for name, layout in self._outputs:
            written, result = layout.empty(self.engine.device)
            self.context.set_tensor_address(name, written.data_ptr())
            results.append(result)
        return results

    def _capture(self, stream: Stream) -> None:
        graph = self.engine.seam.graph_under_capture(stream)
        others = set(graph_nodes(graph))
        with _capturing:
            self._execute(stream)
        complete(graph, but=others)

    def capturable(self, stream: Stream) -> bool:
        context = self.context
        return not hasattr(context, "is_stream_capturable") or context.is_stream_capturable(handle(stream))

    def _execute_beside(self, stream: Stream) -> None:
        """For the default stream: on a stream of our own, forked from it and joined to it."""
        # On the default stream TensorRT makes the host wait. What is allocated here is the default stream's, and used
        # between fork and join only.
        assert self._own is not None  # whoever makes an instance for a device with streams gives it one
        self._fork.record(stream)
        self._own.wait_event(self._fork)
        try:
            self._execute(self._own)
        finally:
            self._join.record(self._own)
            stream.wait_event(self._join)

    def _execute(self, stream: Stream) -> None:
        with self.engine.library.complaints() as complaints:
            if not self.context.execute_async_v3(handle(stream)):
                raise AnabranchError(
                    f"TensorRT could not run the engine: {said(complaints)}. Compile it again, or with another backend."
                )


class Instance:
    """Everything with state that one run of the program needs. One run at a time, the next one after it on the device.

    Memory: on the stream, and from the pool, that were current when it was made.
    """

    #: Each execution context loads the kernels anew.
    loads_own_code = True

    def __init__(self, owner: TensorRTKernels, own: Stream | None) -> None:
        self._owner = owner
        # One piece for all segments: they run one after the other.
        size = max((e.workspace_bytes for e in owner.engines.values()), default=0)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=owner.device) if size else None
        calls = {name: _Call(engine, self.workspace, own) for name, engine in owner.engines.items()}
        # What the graph's code calls by name.
        self._calls = SimpleNamespace(**{n: _picked(c, owner.single[n]) for n, c in calls.items()})
        self._all = list(calls.values())
        self.nbytes = size

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return self._owner.forward(self._calls, *self._owner.weights, *inputs)

    def prepare_direct(self) -> None:
        for call in self._all:
            call.prepare_direct()

    def why_not_captured(self, stream: Stream) -> str:
        """After a first run: why this one cannot be captured, or nothing."""
        if all(call.capturable(stream) for call in self._all):
            return ""
        return "TensorRT says that its work cannot be captured (isStreamCapturable)"

    def private_memory(self) -> list[torch.Tensor]:
        return [] if self.workspace is None else [self.workspace]


def _picked(call: _Call, single: bool) -> Any:
    return (lambda *inputs: call(*inputs)[0]) if single else call


class TensorRTKernels(Stateful):
    """A compiled program on one GPU."""

    def __init__(self, compiled: Compiled, program: Program, device: torch.device) -> None:
        self.device = device
        self.graph = compiled.partition.top.graph
        self.weights = tuple(program.weights)
        self.report = compiled.report()
        self.engines = {name: Engine(compiled, name, device) for name in compiled.engines}
        self.forward: Any = type(compiled.partition.top).forward
        self.single = {n.target: n.meta["single"] for n in self.graph.nodes if n.op == "call_module"}
        self._lock = threading.Lock()

    def instance(self, own: Stream | None) -> Instance:
        get_device(self.device.type).free_code()  # making one waits for the device anyhow
        with self._lock:
            made = Instance(self, own)
            for engine in self.engines.values():
                engine.keep_kernels()
        return made

    def describe(self) -> list[str]:
        return self.report


def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.major}.{properties.minor}, {torch.version.cuda}"
