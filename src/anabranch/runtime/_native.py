"""The native runtime's Python half: it builds what the C++ in ``_core`` runs, and takes the calls out of the ordinary.

Importing this module builds and loads the C++.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from anabranch.backends import Instance, Kernels, Stateful, of_one
from anabranch.devices import Scratch, Stream
from anabranch.export import ComputedOutput, Program
from anabranch.runtime import _library
from anabranch.runtime._build import neutral, process
from anabranch.runtime._context import Context, StaticOutputs
from anabranch.runtime._engine import Engine
from anabranch.runtime._flat import Branch, Check, FlatProgram, Number, Pick, flatten
from anabranch.runtime._specialization import Specialization
from anabranch.runtime._stats import Stats

_log = logging.getLogger("anabranch")
core: Any = _library.load()
process.watch(core.exit, core.calls_under_way)

Limits: Any = core.Limits
"""As :class:`anabranch.runtime._pool.Limits`."""


class Counters:
    """As :class:`anabranch.runtime._stats.Counters`: the C++ counts calls, Python the rest."""

    def __init__(self) -> None:
        self.core = core.Counters()

    def add(self, *names: str) -> None:
        for name in names:
            self.core.add(name)

    def take_back(self, name: str, count: int) -> None:
        """So many calls of this kind were none of a user's."""
        self.core.add(name, -count)
        self.core.add("calls", -count)

    def snapshot(self) -> Stats:
        return Stats(**self.core.read())


class Pool:
    """The C++ pool of one signature, as :class:`anabranch.runtime._pool.ContextPool` for whoever builds contexts."""

    def __init__(self, signature: Any) -> None:
        self._signature = signature
        self._alive: weakref.WeakSet[Context] = weakref.WeakSet()
        process.register(self)

    @property
    def estimate(self) -> int:
        """Bytes of the last context built: what the next will take."""
        return int(self._signature.estimate())

    @property
    def nbytes(self) -> int:
        """Bytes of the contexts that are alive."""
        return sum(context.nbytes for context in list(self._alive))

    def add(self, context: Context) -> None:
        """Count a context that was just built; it is in its builder's hands."""
        self._alive.add(context)
        results, recording = context.outputs.results, context.recording
        if recording is None:
            inputs: list[Any] = list(context.inputs)
            bound = [False] * len({y.untyped_storage()._cdata for y in results})
            kernels = []
        else:
            inputs = [None] * len(recording.capture.inputs)
            bound = list(recording.table.bound)
            kernels = [kernel_tuple(patch) for patch in recording.patched]
        context.slot = self._signature.add(
            context, context.done, context.graph.native, inputs, results, bound, kernels, context.nbytes
        )

    def release(self, context: Context) -> None:
        """Give a context back that no caller has used."""
        self._signature.release(context.slot, None)

    def discard(self, context: Context) -> None:
        """Give up a context; it is freed once its queued work is done."""
        self._signature.discard(context.slot)

    def discard_added(self) -> None:
        """Give up the context that this thread has added and nobody got: an interrupt came in between."""
        self._signature.discard_added()

    def drain(self) -> None:
        """Take all idle contexts out for good."""
        self._signature.drain()

    def events(self) -> set[int]:
        """Identities of the events of the contexts that are alive."""
        return {id(context.done) for context in list(self._alive)}

    def after_fork(self) -> None:
        self._signature.after_fork()

    def __len__(self) -> int:
        return int(self._signature.alive())


def kernel_tuple(patch: Any) -> tuple[Any, ...]:
    """A kernel of a recording, as the C++ takes it."""
    kernel = patch.kernel
    return (
        patch.handle,
        (kernel.function, kernel.kernel, kernel.context),
        kernel.grid,
        kernel.block,
        kernel.shared,
        kernel.params,
        [offset for offset, _ in kernel.layout],
        kernel.packed,
        patch.words,
    )


class NativeSpecialization(Specialization):
    """As its base; calls run in C++, and come here for what is not known there: captures of callers, kernels that only
    Python can launch, and building."""

    _pool: Pool  # type: ignore[assignment]

    def _make_pool(self) -> Any:
        settings, device = self.settings, self._device
        if device.has_streams:
            core.on_device_error(device.call_error)
        self._core = core.Signature(
            settings.torch_device,
            device.native_api(core),
            [replace(spec, on_cpu=False).empty(torch.device("meta")) for spec in self._specs],
            self._limits,
            self._counters.core,  # type: ignore[attr-defined]
            weakref.ref(self),
        )
        #: Calls that only measured, by how they are counted.
        self._tries: Counter[str] = Counter()
        #: Why a direct call goes through Python, or None where it does not.
        self.through_python: str | None = "nothing is computed"
        #: Whether the C++ has Python launch the kernels, and does the rest of such a call itself.
        self._launches = False
        #: A recording that shows which kernels take which addresses from a call.
        self._known: Any = None
        #: Why graphs have memory of their own for inputs and results, or None where they use the caller's.
        self.copies: str | None = None if device.kind == "cuda" else "not for this device"
        return Pool(self._core)

    @property
    def _may_grow(self) -> bool:
        return bool(self._core.may_grow())

    @_may_grow.setter
    def _may_grow(self, value: bool) -> None:
        self._core.set_may_grow(value)

    def _set_program(self) -> None:
        if self.program.is_empty:
            return
        program = translate(self.program) if self.backend == "eager" else f"{self.backend} launches its kernels itself"
        unchanged = self._flags.unchanged if self._sensitive else None
        watched = unchanged, not self.program.asks_default_dtype
        if not isinstance(program, str):
            self.through_python = None
            self._core.set_program(program, *watched)
        else:
            self.through_python = program
            if isinstance(self._lowered, Stateful) or self.program.takes_numbers:
                return
            self._core.set_python(self._lowered, *watched)
            self._launches = True
        self._keep_weights()

    def _ways(self, operators: Kernels) -> list[Callable[[Sequence[Any]], Any]]:
        program = translate(self.program)
        if isinstance(program, str):
            return super()._ways(operators)

        def compiled(inputs: Sequence[Any]) -> Any:
            self._core.set_program(None, None, False)
            return self._try("direct_calls", inputs)

        def by_operators(inputs: Sequence[Any]) -> Any:
            self._core.set_program(program, None, False)
            return self._try("direct_calls", inputs)

        return [compiled, by_operators]

    def _try(self, kind: str, inputs: Sequence[Any]) -> Any:
        """A call that only measures."""
        self._tries[kind] += 1
        return self._core.run(inputs)

    def _forget_tries(self) -> None:
        for kind, times in self._tries.items():
            self._counters.take_back(kind, times)  # type: ignore[attr-defined]
        self._tries.clear()
        self._core.forget_uses()

    def _take_operators(self, taken: bool) -> None:
        self._forget_tries()
        if taken:
            self._known = None
            self._core.set_kernels([], [])
            self._set_program()
        else:
            self._core.set_program(None, None, False)

    def _keep_weights(self) -> None:
        """Direct calls note their last use of the weights."""
        if self.program.weights and self._device.has_streams:
            device, last_uses = self._device, self._last_uses
            # The dict keeps the event as long as the weights may need it, this signature's C++ half as long as calls.
            self._core.set_last_uses(lambda stream: last_uses.setdefault(_key(stream), device.event()))

    def _capture(self, fresh: bool, forget: Callable[[], None], scratch: Scratch | None = None) -> Context:
        if self.copies is None:
            context = self._capture_bound(fresh, forget, scratch)
            if not isinstance(context, str):
                return context
            self.copies = context
        return super()._capture(fresh, forget, scratch)

    def _capture_bound(self, fresh: bool, forget: Callable[[], None], given: Scratch | None = None) -> Context | str:
        """A context whose graph reads and writes its callers' own tensors; or why there can be none."""
        from anabranch.devices.cuda import _captured, _recorder

        device: Any = self._device
        index, specs, log = self._index, self._specs, core.AllocationLog()
        source = partial(of_one, self._lowered)
        lane, memory = device.acquire_lane(index), device.memory(index, fresh)
        scratch = given or device.scratch(index)
        made: Any = None
        parts: list[Any] = [None]  # see Context
        try:
            if self._known is None:
                made = _recorder.record(device, lane, memory, scratch, source, specs, self._workspaces, log)
            else:
                made = _recorder.record_again(
                    self._known, device, lane, memory, scratch, source, specs, self._workspaces, log
                )
            if not isinstance(made, str):
                if self._known is None:
                    self._learn(made)
                kept: Any = lane
                if not made.table.workspaces and not isinstance(self._lowered, Stateful):
                    # Nothing of the lane is in the graph, so the next context can be captured on it.
                    _captured.wait(lane)
                    device.release_lane(lane)
                    lane = kept = None
                nbytes = memory.nbytes() + (kept.hidden_nbytes() if kept is not None else 0)
                outputs = StaticOutputs(made.results)
                kernels = made.kernels
                # The context's: what is known of the kernels shall not keep its memory.
                made.results, made.kernels = [], None
                context = Context(device, index, made.graph, kept, memory, [], outputs, nbytes, forget, parts, kernels)
                context.recording = made
                return context
        except BaseException:
            if parts:
                parts.pop()
                if made is not None and not isinstance(made, str):
                    made.destroy()
                if lane is not None:
                    device.release_lane(lane)
                device.release_memory(memory)
            raise
        finally:
            if given is None:
                device.release_scratch(scratch)
        device.release_lane(lane)
        device.release_memory(memory)
        return str(made)

    def _learn(self, recording: Any) -> None:
        """The first recording of this signature's kernels."""
        self._known = recording
        self._core.set_alignment(recording.alignment)
        if not recording.table.why_not_direct and self.through_python and not isinstance(self._lowered, Stateful):
            self._core.set_kernels(recording.results, [kernel_tuple(patch) for patch in recording.patches])
            self.through_python = None

    def _built(self) -> None:
        runs = not (self.program.is_empty or self.program.direct_only)
        if runs and not self.uses_graphs and self.through_python and self._known is None and self.copies is None:
            # For what a capture shows of the kernels: few of them can be launched without it.
            try:
                with neutral(self._device, self._index), self._device.building(), self._clock.phase("capture"):
                    self._capture_bound(False, lambda: None)
            except Exception as e:
                self._device.check_error(e)
                _log.info("%s: kernels stay with Python: %s: %s", self.settings.name, type(e).__name__, str(e))
        self._core.set_graphs(self.uses_graphs)

    def _measure(
        self, context: Context, run: Kernels | Instance, examples: Sequence[torch.Tensor], stream: Stream
    ) -> tuple[Any, Any]:
        def graph(inputs: Sequence[Any]) -> Any:
            self._core.set_graphs(True)
            return self._try("graph_calls", inputs)

        def direct(inputs: Sequence[Any]) -> Any:
            self._core.set_graphs(False)
            return run(inputs) if self.through_python else self._try("direct_calls", inputs)

        with self._device.on_stream(stream):
            self._pool.release(context)
            costs = self._costs([graph, direct], examples, stream)
        self._forget_tries()
        self._core.take(context.slot)
        return costs[0], costs[1]

    @property
    def runs_here(self) -> bool:
        """Whether the C++ can run calls at all."""
        return self.uses_graphs or self.through_python is None or self._launches

    @property
    def finish(self) -> str:
        """How the C++ makes the result of a call; see ``EngineBase`` in ``_core/python.cpp``."""
        outputs, structure = self.program.outputs, self.program.structure
        plain = [o.index if isinstance(o, ComputedOutput) and not o.is_lazy else -1 for o in outputs]
        if plain == list(range(len(outputs))):
            if structure.is_leaf():
                return "1"
            if structure.type in (tuple, list) and all(s.is_leaf() for s in structure.children()):
                return structure.type.__name__[0]
        return "p"

    def _build_native(self, reservation: Any) -> int | None:
        """Asked by the C++ for one more context: its slot; 0 to take one there is; None to run direct."""
        if self._sensitive and not self._flags.unchanged():
            return 0  # a context captured now would have today's flags baked in
        context = self._build_context(reservation)
        if context is None:
            return 0 if self._shares() else None
        return context.slot

    def __call__(self, leaves: Sequence[Any]) -> Any:
        if not self.runs_here:
            return super().__call__(leaves)
        given, inputs = self._inputs(leaves)
        try:
            results = self._core.run(inputs)
        except Exception as e:
            self._device.check_error(e)
            raise
        if results is None:
            return super().__call__(leaves)
        return self._finish(given, results)

    @property
    def takes_plain_tensors(self) -> bool:
        """Whether it serves every call of ordinary tensors of its shapes, strides and dtypes, as the C++ tells them."""
        of_one_layout = self.program.reads_layout and self.signature.layouts is not None
        return not (self._is_lazy or of_one_layout or self.program.absolute or self.program.on_cpu)

    def _acquire(self, stream: Stream) -> None:
        return None  # the C++ had a look: this call runs direct

    def explain(self) -> list[str]:
        lines = super().explain()
        if self.through_python and not self.program.is_empty:
            lines.append(f"  through Python, when direct: {self.through_python}")
        if self.uses_graphs:
            lines.append(f"  inputs and results are copied: {self.copies}" if self.copies else "  nothing is copied")
        if self._sensitive and not self.through_python and self._known is None and not self._core.sees_flags():
            lines.append("  through Python, when direct: a look at the numerics flags before and after")
        return lines


_keys = iter(range(1 << 62))


def _key(stream: int) -> str:
    """Names one more event of a stream among the last uses: threads that share a stream have one each."""
    return f"stream {stream}, {next(_keys)}"


def translate(program: Program) -> Any:
    """``program`` for the C++ to run operator by operator, or the reason why it cannot."""
    flat = flatten(program)
    if isinstance(flat, str):
        return flat
    try:
        return _translate(flat, program.weights_for_eager())
    except (RuntimeError, TypeError) as e:
        return (str(e).splitlines() or [""])[0]


def _translate(flat: FlatProgram, weights: list[torch.Tensor]) -> Any:
    made = core.Program(weights, flat.inputs - len(weights))
    for step in flat.steps:
        if isinstance(step, Pick):
            made.pick(step.slot, step.position)
        elif isinstance(step, Number):
            made.number(step.name, step.arguments)
        elif isinstance(step, Check):
            made.check(step.holds, step.message)
        elif isinstance(step, Branch):
            yes, no = _translate(step.yes, []), _translate(step.no, [])
            made.branch(step.condition, yes, no, step.operands, len(step.yes.results))
        else:
            try:
                made.call(step.name, step.overload, step.arguments)
            except (RuntimeError, TypeError) as e:
                raise RuntimeError(f"{step.name}: {(str(e).splitlines() or [''])[0]}") from e
    made.finish(flat.results)
    return made


class NativeEngine(core.EngineBase, Engine):
    """An engine whose calls are C++: see ``EngineBase`` in ``_core/python.cpp`` for which of them."""

    runtime = "native"
    _make_limits: Callable[..., Any] = staticmethod(Limits)
    _make_counters: Callable[..., Any] = staticmethod(Counters)
    _make_specialization: Callable[..., Any] = staticmethod(NativeSpecialization)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return Engine.__call__(self, *args, **kwargs)

    def _failed(self, error: BaseException) -> None:
        """An exception leaves a call; raises the one to put in its place, if any."""
        if isinstance(error, Exception):
            self._device.check_error(error)

    def _add(self, key: Any, made: Specialization) -> None:
        super()._add(key, made)
        assert isinstance(made, NativeSpecialization)
        # Calls with keywords, containers or numbers have the structure in their key: they come by Python.
        is_flat = all(isinstance(part, tuple) for part in key)
        if is_flat and made.takes_plain_tensors and made.runs_here and not self._device.is_profiled:
            core.register(self, made, made._core, made.finish)

    def close(self) -> None:
        core.set_usable(self, False)
        super().close()
        core.clear(self)

    def after_fork(self) -> None:
        super().after_fork()
        core.set_usable(self, not self._closed and self._generation == process.generation)
