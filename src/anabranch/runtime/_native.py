"""The native runtime's Python half: it builds what the C++ in ``_core`` runs, and takes the calls out of the ordinary.

Importing this module builds and loads the C++.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from anabranch.backends import Instance, Kernels, Stateful, Wrapped
from anabranch.devices import Stream
from anabranch.export import ComputedOutput, Room, TensorSpec
from anabranch.runtime import _library
from anabranch.runtime._bound import Bound, kernel_tuple
from anabranch.runtime._calls import Runtime
from anabranch.runtime._context import Context
from anabranch.runtime._contexts import Contexts
from anabranch.runtime._cost import Way
from anabranch.runtime._direct import Direct
from anabranch.runtime._engine import Engine
from anabranch.runtime._phases import Clock
from anabranch.runtime._process import neutral, process
from anabranch.runtime._session import Session
from anabranch.runtime._specialization import Specialization
from anabranch.runtime._stats import Parted
from anabranch.runtime._translation import translate, translate_wrapper
from anabranch.runtime._unit import Unit

_log = logging.getLogger("anabranch")
core: Any = _library.load()
process.watch(core.exit, core.calls_under_way)
#: Programs of kernels, or why there are none: those of a range serve each of its shapes. With the build lock held.
_programs: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

Limits: Any = core.Limits
"""As :class:`anabranch.runtime._pool.Limits`."""


class Counters(Parted):
    """As :class:`anabranch.runtime._stats.Counters`: the C++ counts calls, Python the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.core = core.Counters()

    def add(self, *names: str) -> None:
        for name in names:
            self.core.add(name)

    def take_back(self, name: str, count: int) -> None:
        """So many calls of this kind were none of a user's."""
        self.core.add(name, -count)
        self.core.add("calls", -count)

    def read(self) -> dict[str, int]:
        counts: dict[str, int] = self.core.read()
        return counts


class Pool:
    """The C++ pool of one signature, as :class:`anabranch.runtime._pool.ContextPool` for whoever builds contexts."""

    def __init__(self, specialization: Any) -> None:
        self._specialization = specialization
        self._alive: weakref.WeakSet[Context] = weakref.WeakSet()
        process.register(self)

    @property
    def may_grow(self) -> bool:
        """Whether calls may build contexts; not after a build failed."""
        return bool(self._specialization.may_grow())

    @may_grow.setter
    def may_grow(self, value: bool) -> None:
        self._specialization.set_may_grow(value)

    @property
    def estimate(self) -> int:
        """Bytes of the last context built: what the next will take."""
        return int(self._specialization.estimate())

    @property
    def nbytes(self) -> int:
        """Bytes of the contexts that are alive."""
        return sum(context.nbytes for context in list(self._alive))

    def add(self, context: Context) -> None:
        """Count a context that was just built; it is in its builder's hands."""
        context.slot = self._specialization.add(self.described(context))

    def described(self, context: Context) -> tuple[Any, ...]:
        """A new context as the C++ takes it to put it into the pool."""
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
        return context, context.done, context.graph.native, inputs, results, bound, kernels, context.nbytes

    def release(self, context: Context) -> None:
        """Give a context back that no caller has used."""
        self._specialization.release(context.slot, None)

    def discard(self, context: Context) -> None:
        """Give up a context; it is freed once its queued work is done."""
        self._specialization.discard(context.slot)

    def discard_added(self) -> None:
        """Give up the context that this thread has added and nobody got: an interrupt came in between."""
        self._specialization.discard_added()

    def drain(self) -> None:
        """Take all idle contexts out for good."""
        self._specialization.drain()

    def events(self) -> set[int]:
        """Identities of the events of the contexts that are alive."""
        return {id(context.done) for context in list(self._alive)}

    def after_fork(self) -> None:
        self._specialization.after_fork()

    def __len__(self) -> int:
        return int(self._specialization.alive())


class NativeCalls:
    """See :class:`anabranch.runtime._calls.Calls`.

    Calls run in C++ (``_core/``), and come to :attr:`direct` for what is not known there: captures of callers, and
    kernels with state.
    """

    def __init__(self, unit: Unit) -> None:
        self._unit, self._device = unit, unit.device
        if unit.device.has_streams:
            core.on_device_error(unit.device.call_error)
        self.core = core.Specialization(
            unit.torch_device,
            unit.device.native_api(core),
            [_meta(spec) for spec in unit.specs],
            unit.written,
            range(len(unit.signature.given), len(unit.signature.given) + len(unit.states)),
            unit.limits,
            unit.counters.core,
            weakref.ref(self),
        )
        self.direct = Direct(unit)
        self._pool = Pool(self.core)
        self._bound = Bound(unit, core, self.core)
        self.contexts = Contexts(unit, self._pool, self._bound, self.direct.last_uses)
        #: Calls that only measured, by how they are counted.
        self._tries: Counter[str] = Counter()
        self._why_python: str | None = "nothing is computed"
        #: Whether the C++ has Python launch the kernels, and does the rest of such a call itself.
        self._launches = False
        self._uses_graphs = False
        #: Asked by the C++, for what it does not put together itself.
        self._finish = unit.finish

    def __call__(self, leaves: Sequence[Any], state: Sequence[torch.Tensor] = ()) -> Any:
        given, inputs = self._unit.inputs(leaves, state)
        used = self.direct.canonical(inputs) if self._unit.signature.is_range else inputs
        try:
            results = self.core.run(used) if self.runs_here else None
            if results is None:
                results = self.direct(used)
            if used is not inputs:
                self._unit.write_back(inputs, used)
        except Exception as e:
            self._device.check_error(e)
            raise
        return self._unit.finish(given, results)

    @property
    def through_python(self) -> str | None:
        """Why a direct call goes through Python, or None where it does not."""
        return None if self._bound.launches else self._why_python

    @property
    def runs_here(self) -> bool:
        """Whether the C++ can run calls at all."""
        return self._uses_graphs or self.through_python is None or self._launches

    @property
    def finish(self) -> str:
        """How the C++ makes the result of a call; see ``EngineBase`` in ``_core``."""
        outputs, structure = self._unit.program.outputs, self._unit.program.structure
        plain = [o.index if isinstance(o, ComputedOutput) and not o.is_lazy else -1 for o in outputs]
        if plain == list(range(len(outputs))):
            if structure.is_leaf():
                return "1"
            if structure.type in (tuple, list) and all(s.is_leaf() for s in structure.children()):
                return structure.type.__name__[0]
        return "p"

    @property
    def takes_plain_tensors(self) -> bool:
        """Whether it serves every call of ordinary tensors of its shapes, strides and dtypes, as the C++ tells them."""
        program = self._unit.program
        of_one_layout = program.reads_layout and self._unit.signature.layouts is not None
        return not (
            self._unit.is_lazy or of_one_layout or program.absolute or program.on_cpu or self._unit.signature.is_range
        )

    def take_uses(self) -> int:
        return int(self.core.take_uses())

    def build(self, reservation: Any) -> tuple[Any, ...] | bool | None:
        """Asked by the C++ for one more context, which it puts into the pool. None: there is none, and the call runs
        direct; True: it takes one that there is."""
        if not self._unit.watch.unchanged():
            return True  # a context captured now would have today's flags baked in
        context = self.contexts.one_more(reservation)
        if context is None:
            return True if self.contexts.are_shared else None
        return self._pool.described(context)

    def explain(self) -> list[str]:
        lines = []
        if self.through_python and not self._unit.program.is_empty:
            lines.append(f"through Python, when direct: {self.through_python}")
        if self._uses_graphs:
            copies = self._bound.copies
            lines.append(f"inputs and results are copied: {copies}" if copies else "nothing is copied")
        knows = self._bound.known is not None or self.core.sees_flags()
        if self._unit.watch.reads_any and not self.through_python and not knows:
            lines.append("through Python, when direct: a look at the numerics flags before and after")
        return lines

    # -- building -----------------------------------------------------------------------------------------------

    def set_kernels(self, kernels: Kernels | Stateful, backend: str) -> None:
        self.contexts.kernels = kernels
        self.direct.set_kernels(kernels, backend)
        program, watch = self._unit.program, self._unit.watch
        if program.is_empty:
            return
        translated = self._translated(kernels, backend)
        # A recorded launch is for the sizes that it was recorded with.
        self._bound.forget(may_launch=isinstance(translated, str) and not self._unit.signature.is_range)
        watched = watch.flags.unchanged if watch.reads_any else None, not program.asks_default_dtype
        if not isinstance(translated, str):
            self._why_python = None
            self.core.set_program(translated, *watched)
        else:
            self._why_python = translated
            if isinstance(kernels, Stateful) or program.takes_numbers:
                return
            self.core.set_python(kernels, *watched)
            self._launches = True
        if program.weights and self._device.has_streams:
            # The last uses keep the event as long as the weights may need it, the C++ as long as calls.
            self.core.set_last_uses(self.direct.last_uses.one_more)

    def _translated(self, kernels: Any, backend: str) -> Any:
        """What queues ``kernels`` without Python, or why that is Python."""
        if kernels in _programs:
            return _programs[kernels]
        if self._unit.written and self._unit.program.data_dependent:
            return "it writes, and what the C++ cannot compute with shows too late"
        if backend == "eager":
            made = translate(self._unit.program)
        else:
            made = f"{backend} launches its kernels itself"
            if isinstance(kernels, Wrapped) and self._device.has_streams:
                program = translate_wrapper(kernels, self._unit)
                made = f"{made}: {program}" if isinstance(program, str) else program
        if not isinstance(kernels, Stateful):
            _programs[kernels] = made
        return made

    @contextmanager
    def trying_graph(self, context: Context, direct: Kernels | Instance, stream: Stream) -> Iterator[Sequence[Way]]:
        def by_graph(inputs: Sequence[Any]) -> Any:
            self.core.set_graphs(True)
            return self._try("graph_calls", inputs, direct)

        def by_kernels(inputs: Sequence[Any]) -> Any:
            self.core.set_graphs(False)
            return direct(inputs) if self.through_python else self._try("direct_calls", inputs, direct)

        self._pool.release(context)
        yield [by_graph, by_kernels]
        self._forget_tries()
        self.core.take(context.slot)

    @contextmanager
    def trying_operators(self, operators: Kernels) -> Iterator[Sequence[Way]]:
        program = translate(self._unit.program)
        if isinstance(program, str):
            yield [self.direct.kernels, operators]
            return
        own = _programs.get(self.direct.kernels)
        own = None if isinstance(own, str) else own

        def compiled(inputs: Sequence[Any]) -> Any:
            self.core.set_program(own, None, False)
            return self._try("direct_calls", inputs, self.direct.kernels)

        def by_operators(inputs: Sequence[Any]) -> Any:
            self.core.set_program(program, None, False)
            return self._try("direct_calls", inputs, operators)

        try:
            yield [compiled, by_operators]
        finally:
            self._forget_tries()
            self.core.set_program(own, None, False)

    @contextmanager
    def trying_direct(self) -> Iterator[Way]:
        def by_core(inputs: Sequence[Any]) -> Any:
            return self._try("direct_calls", inputs, self.direct.run)

        try:
            yield by_core if self.runs_here else self.direct.run
        finally:
            self._forget_tries()

    def _try(self, kind: str, inputs: Sequence[Any], otherwise: Way) -> Any:
        """A call that only measures; by ``otherwise`` where the C++ declines, as a call then is."""
        results = self.core.run(inputs)
        if results is None:
            return otherwise(inputs)
        self._tries[kind] += 1
        return results

    def _forget_tries(self) -> None:
        for kind, times in self._tries.items():
            self._unit.counters.take_back(kind, times)
        self._tries.clear()
        self.core.forget_uses()

    def ready(self, uses_graphs: bool, clock: Clock) -> None:
        program, bound, kernels = self._unit.program, self._bound, self.contexts.kernels
        runs = not (program.is_empty or program.direct_only or self._unit.signature.is_range)
        is_unknown = self.through_python and bound.known is None and bound.copies is None
        if runs and not uses_graphs and is_unknown:
            # For what a capture shows of the kernels: few of them can be launched without it.
            try:
                with neutral(self._device, self._unit.index), self._device.relaxed(), clock.phase("capture"):
                    bound.capture(kernels, False, lambda: None)
            except Exception as e:
                self._device.check_error(e)
                name = self._unit.settings.name
                _log.info("%s: kernels stay with Python: %s: %s", name, type(e).__name__, str(e))
        self._uses_graphs = uses_graphs
        self.core.set_graphs(uses_graphs)


def _meta(spec: TensorSpec) -> torch.Tensor | None:
    """What tells the C++ shape, strides and dtype of an input; None: it takes any."""
    return None if spec.is_open or spec.free else replace(spec, on_cpu=False).empty(torch.device("meta"))


class NativeSession(core.SessionBase, Session):
    """A session whose calls are C++: see ``SessionBase`` in ``_core/python/session.cpp`` for which of them."""

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return Session.__call__(self, *args, **kwargs)

    def _failed(self, error: BaseException) -> None:
        """An exception leaves a call; raises the one to put in its place, if any."""
        self._break(error)
        self._changed()
        if isinstance(error, Exception):
            self._device.check_error(error)

    def _began(self, memory: Any) -> None:
        core.begin_session(self, self._engine, self._busy, memory, memory.done)
        self._write_counts(self._counts)

    def _bind(self, specialization: Specialization, state: Sequence[torch.Tensor], rooms: Sequence[Room]) -> None:
        calls: Any = specialization.calls
        if isinstance(calls, NativeCalls):
            slots = {name: i for i, name in enumerate(self._initial)}
            core.bind_session(self, calls, calls.core, state, [(slots[r.name], r.step, r.limit) for r in rooms])

    def _read_counts(self) -> dict[str, int | None]:
        return dict(zip(self._initial, core.session_counts(self), strict=False))

    def _write_counts(self, counts: Mapping[str, int | None]) -> None:
        core.set_session_counts(self, [counts.get(name) for name in self._initial])

    def _changed(self) -> None:
        core.forget_stream(self)
        core.set_session_usable(self, self._memory is not None and not self._why_broken)

    def close(self) -> None:
        super().close()
        core.end_session(self)


class NativeEngine(core.EngineBase, Engine):
    """An engine whose calls are C++: see ``EngineBase`` in ``_core/python/engine.cpp`` for which of them."""

    _runtime = Runtime("native", Limits, Counters, NativeCalls)
    _kind_of_session = NativeSession

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return Engine.__call__(self, *args, **kwargs)

    def _failed(self, error: BaseException) -> None:
        """An exception leaves a call; raises the one to put in its place, if any."""
        if isinstance(error, Exception):
            self._device.check_error(error)

    def _added(self, key: Any, made: Specialization) -> None:
        calls: Any = made.calls
        # Calls with keywords, containers or numbers have the structure in their key: they come by Python.
        is_flat = all(isinstance(part, tuple) for part in key)
        if is_flat and calls.takes_plain_tensors and calls.runs_here and not self._device.is_profiled:
            core.register(self, calls, calls.core, calls.finish)

    def _removed(self, made: Specialization) -> None:
        if hasattr(made.calls, "core"):
            core.unregister(self, made.calls.core)

    def close(self) -> None:
        core.set_usable(self, False)
        super().close()
        core.clear(self)

    def after_fork(self) -> None:
        super().after_fork()
        core.set_usable(self, not self._closed and self._generation == process.generation)
