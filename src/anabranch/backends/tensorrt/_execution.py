"""Engines at work: an execution context of each, in memory of ours, private to whoever runs it."""

from __future__ import annotations

import hashlib
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from anabranch.export._sizes import size_of

#: Bytes that the addresses given to an execution context have to be a multiple of.
_ALIGNMENT = 256
#: Shapes of a range of which an instance keeps the work of direct calls, where kernels would start early.
_MOST_SHAPES = 32
#: Of each input, or of each result.
_Shapes = list[tuple[int, ...]]
#: Compute capability from which on a kernel may start before the one ahead of it has ended.
_STARTS_EARLY = (9, 0)


class Engine:
    """One deserialized, immutable ``ICudaEngine`` with what execution contexts of it need. Any thread may make them.

    Whoever calls something of TensorRT's that belongs to it holds :attr:`calling`: the engine, its execution contexts
    and its cache of kernels have one thread at a time. TensorRT's documentation allows a context for each thread; the
    notes on TensorRT-RTX 1.3 speak of "thread-safe execution, up to one network per thread". What queues work, or loads
    code, takes turns with captures, too (:meth:`CudaDevice.without_captures`).
    """

    def __init__(self, compiled: Compiled, name: str, device: torch.device) -> None:
        api = compiled.library.api
        segment = compiled.partition.segments[name]
        self.api, self.device = api, device
        seam: Any = get_device(device.type)
        self.seam = seam
        self.inputs, self.outputs = segment.inputs, segment.outputs
        self._compiled, self.library = compiled, compiled.library
        self.calling = _sync.lock("a TensorRT engine")
        parts = self._parts = SimpleNamespace(runtime=api.Runtime(compiled.library.logger), config=None, cache=None)
        self.free_later(self, vars(parts).clear)
        with seam.without_captures(), compiled.library.complaints() as complaints:
            parts.engine = parts.runtime.deserialize_cuda_engine(compiled.engines[name])
        if parts.engine is None:
            raise Rejected(f"TensorRT does not load its own engine: {said(complaints)}")
        self._check()
        #: Whether sizes of its inputs vary: each context is told of them ahead of a run.
        self.is_range = any(-1 in layout.bound for layout in self.inputs)
        profile = compiled.profile
        #: The largest shapes, as they lie in memory, of inputs and of results.
        self.largest = [
            [x.physical if profile is None else profile.shapes(x.physical_sizes)[-1] for x in side]
            for side in (self.inputs, self.outputs)
        ]
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

    def inputs_at(self, values: Mapping[Any, int]) -> list[tuple[int, ...]]:
        """Shapes of its inputs, as they lie in memory, where the symbols have these values."""
        return [tuple(size_of(n, values) for n in x.physical_sizes) for x in self.inputs]

    def free_later(self, owner: Any, free: Callable[[], None]) -> None:
        """Have ``free`` called where the host may wait, some time after ``owner`` has gone."""
        freed = partial(_free, self.seam, self.calling, free)
        weakref.finalize(owner, self.seam.defer_free_code, self.device.index, freed).atexit = False

    def context(self) -> Any:
        """A new ``IExecutionContext`` without memory."""
        with self.seam.without_captures(), self.calling, self.library.complaints() as complaints:
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
        with self.calling:
            now = bytes(self._parts.cache.serialize())
        if hashlib.sha256(now).digest() != hashlib.sha256(self._cached).digest():
            self._cached = now
            self._compiled.cache.store("kernels", self._key, now)


def _free(seam: Any, calling: Any, free: Callable[[], None]) -> None:
    with seam.without_captures(), calling:
        free()


class _Call:
    """One segment in one instance: an execution context and what it is fed."""

    def __init__(self, engine: Engine, own: Stream | None) -> None:
        self.engine = engine
        self._own, self._fork, self._join = own, torch.Event("cuda"), torch.Event("cuda")
        #: For direct runs, where kernels would start early: memory for what the work reads and writes, as large as it
        #: can get; and the work with the shapes of its results, by shapes, in the order of the last uses. None: nothing
        #: starts early there.
        self._buffers: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
        self._whole: dict[Any, tuple[Any, _Shapes]] = {}
        #: What the execution context was told of, and what it said of its results.
        self._shapes: _Shapes | None = None
        self._results: _Shapes = [layout.physical for layout in engine.outputs]
        #: The only reference to the execution context, which may outlive this, but not the engine.
        self._contexts = [engine.context()]
        engine.free_later(self, self._contexts.clear)
        self._names = [(n, n in engine.used) for n in input_names(len(engine.inputs))]
        self._outputs = list(zip(output_names(len(engine.outputs)), engine.outputs, strict=True))

    @property
    def context(self) -> Any:
        return self._contexts[0]

    def workspace_bytes(self, values: Mapping[Any, int] | None) -> int:
        """What it needs: for these values of symbols and no others, or for all."""
        engine = self.engine
        if values is None or not engine.is_range:
            return engine.workspace_bytes
        self._set_shapes(engine.inputs_at(values))
        with engine.calling:
            return min(int(self.context.update_device_memory_size_for_shapes()), engine.workspace_bytes)

    def set_workspace(self, workspace: torch.Tensor) -> None:
        """Any one that is as large as it needs."""
        with self.engine.calling:
            self.context.set_device_memory(workspace.data_ptr(), workspace.numel())

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Queue it on the current stream.

        Each kernel after the whole of the one before: where kernels may start early TensorRT launches some so that they
        do. They promise to wait for what they need, and some of TensorRT-RTX 1.4's do not: with eight streams busy one
        output in ten thousand is wrong.
        """
        engine = self.engine
        stream = torch.cuda.current_stream(engine.device)
        entered = [layout.to_engine(x) for layout, x in zip(engine.inputs, inputs, strict=True)]
        is_capturing, shapes = engine.seam.is_capturing(stream), [tuple(x.shape) for x in entered]
        # The first run after a change of shapes may do what no capture takes.
        assert not is_capturing or not engine.is_range or shapes == self._shapes, "not run on these shapes before"
        results = None if is_capturing or self._buffers is None else self._run_whole(entered, shapes, stream)
        if results is None:
            self._set_shapes(shapes)
            entered = [x.clone() if x.data_ptr() % _ALIGNMENT else x for x in entered]
            made = [y.empty(engine.device, n) for y, n in zip(engine.outputs, self._results, strict=True)]
            results = self._bind(entered, made)
            if is_capturing:
                self._capture(stream)
            else:
                self._queue(stream)
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
        read, written = (
            [torch.empty(n, dtype=x.dtype, device=engine.device) for x, n in zip(side, largest, strict=True)]
            for side, largest in zip((engine.inputs, engine.outputs), engine.largest, strict=True)
        )
        self._buffers = read, written
        assert self._shapes is not None  # a run came first
        whole = self._whole_of(self._shapes, stream)
        if whole is None and not engine.is_range:
            self._buffers = None

    def _run_whole(self, inputs: Sequence[torch.Tensor], shapes: _Shapes, stream: Stream) -> list[torch.Tensor] | None:
        """Run on copies of these inputs, which have these shapes; None: nothing would start early.

        On shapes that it has run on, nothing of TensorRT's is called.
        """
        key = tuple(shapes)
        if key not in self._whole:
            # The first run after a change of shapes may do more than later ones, which none has to in a capture.
            self._set_shapes(shapes)
            read = self._of_buffers(0, shapes)
            for buffer, x in zip(read, inputs, strict=True):
                buffer.copy_(x)
            self._bind(read, self._written(self._results))
            self._queue(stream)
            assert self._own is not None  # see _execute_beside
            self._whole_of(shapes, self._own)
            self._forget_whole(stream)
        whole, results = self._whole[key] = self._whole.pop(key)
        if whole is None:
            return None
        for buffer, x in zip(self._of_buffers(0, shapes), inputs, strict=True):
            buffer.copy_(x)
        whole.launch(stream)
        return [y.clone() for _, y in self._written(results)]

    def _whole_of(self, shapes: _Shapes, stream: Stream) -> Any | None:
        """Capture the work on what the context was told of, which it has run on; ``stream`` is ours."""
        self._bind(self._of_buffers(0, shapes), self._written(self._results))
        whole = self.engine.seam.whole_kernels(stream, self._execute)
        made, _ = self._whole[tuple(shapes)] = (whole if whole.early else None), self._results
        return made

    def _forget_whole(self, stream: Stream) -> None:
        """Of the shapes whose last use is longest ago, where there are too many."""
        while len(self._whole) > _MOST_SHAPES:
            parts = [self._whole.pop(next(iter(self._whole)))]
            # Its last launch is ahead of what is on the stream now.
            done = torch.Event("cuda")
            done.record(stream)
            self.engine.seam.defer_free(self.engine.device.index, [done], parts, parts.clear)

    def _of_buffers(self, side: int, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        assert self._buffers is not None
        return [x.view(-1)[: math.prod(n)].view(n) for x, n in zip(self._buffers[side], shapes, strict=True)]

    def _written(self, shapes: _Shapes) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As :meth:`Layout.empty`, in the memory for direct runs."""
        made = self._of_buffers(1, shapes)
        return [(y, y.permute(layout.inverse)) for layout, y in zip(self.engine.outputs, made, strict=True)]

    def _set_shapes(self, shapes: _Shapes) -> None:
        """Tell the execution context what it is going to be run on. Work that this needs comes with the next run."""
        if shapes == self._shapes:
            return
        self._shapes = None
        if self.engine.is_range:
            with self.engine.calling, self.engine.library.complaints() as complaints:
                for (name, used), layout, shape in zip(self._names, self.engine.inputs, shapes, strict=True):
                    if used and -1 in layout.bound and not self.context.set_input_shape(name, shape):
                        raise AnabranchError(
                            f"TensorRT does not take shape {list(shape)} for {name} of an engine that was built for"
                            f" it: {said(complaints)}. Compile with dynamic=False, or with another backend."
                        )
                self._results = [tuple(self.context.get_tensor_shape(name)) for name, _ in self._outputs]
        self._shapes = shapes

    def _bind(
        self, inputs: Sequence[torch.Tensor], results: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Have it read and write these; ``results`` as of :meth:`Layout.empty`, of which the second are returned."""
        with self.engine.calling:
            for (name, used), x in zip(self._names, inputs, strict=True):
                if used:
                    self.context.set_tensor_address(name, x.data_ptr())
            for (name, _), (written, _) in zip(self._outputs, results, strict=True):
                self.context.set_tensor_address(name, written.data_ptr())
        return [result for _, result in results]

    def _capture(self, stream: Stream) -> None:
        graph = self.engine.seam.graph_under_capture(stream)
        others = set(graph_nodes(graph))
        self._execute(stream)
        complete(graph, but=others)

    def capturable(self, stream: Stream) -> bool:
        context = self.context
        with self.engine.calling:
            return not hasattr(context, "is_stream_capturable") or context.is_stream_capturable(handle(stream))

    def _queue(self, stream: Stream) -> None:
        (self._execute if handle(stream) else self._execute_beside)(stream)

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
        engine = self.engine
        with engine.seam.without_captures(), engine.calling, engine.library.complaints() as complaints:
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

    def __init__(self, owner: TensorRTKernels, own: Stream | None, values: Mapping[Any, int] | None) -> None:
        """``values``: of the symbols in sizes, where it is for these alone."""
        self._owner = owner
        calls = {name: _Call(engine, own) for name, engine in owner.engines.items()}
        # One piece for all segments: they run one after the other.
        size = max((call.workspace_bytes(values) for call in calls.values()), default=0)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=owner.device) if size else None
        if self.workspace is not None:
            for call in calls.values():
                call.set_workspace(self.workspace)
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

    def instance(self, own: Stream | None, values: Mapping[Any, int] | None = None) -> Instance:
        get_device(self.device.type).free_code()  # making one waits for the device anyhow
        with self._lock:
            made = Instance(self, own, values)
            for engine in self.engines.values():
                engine.keep_kernels()
        return made

    def describe(self) -> list[str]:
        return self.report


def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.major}.{properties.minor}, {torch.version.cuda}"
