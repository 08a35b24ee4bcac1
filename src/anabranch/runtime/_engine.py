"""The engine: what ``anabranch.compile`` returns and what user threads call."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram

from anabranch import _activity, _sync
from anabranch.devices import Device
from anabranch.errors import BuildError, DeviceLost, EngineClosed, InputError, NotCapturable, UnsupportedModel
from anabranch.export import Mixed, NotExported, Signature, about_hooks, keyword_order_matters
from anabranch.plan import Plan
from anabranch.runtime import _phases
from anabranch.runtime._calls import Runtime
from anabranch.runtime._compiler import Compiler
from anabranch.runtime._given import check_modes, device_of, inputs_of, tensors_for
from anabranch.runtime._guarded import Guarded
from anabranch.runtime._phases import Clock
from anabranch.runtime._pool import Limits
from anabranch.runtime._process import OfOneProcess, is_neutral, neutral, process
from anabranch.runtime._python import PythonCalls
from anabranch.runtime._ranges import Place
from anabranch.runtime._session import Session, refuse_without_session
from anabranch.runtime._settings import DEFAULT_MAX_CONTEXTS, Settings
from anabranch.runtime._shapes import Shapes
from anabranch.runtime._specialization import Specialization
from anabranch.runtime._stats import Counters, Stats
from anabranch.runtime._table import Table

_log = logging.getLogger("anabranch")


@_sync.atomics("_closed", "_guarded")
class Engine(OfOneProcess):
    """A compiled model. Made by :func:`anabranch.compile`; immutable to its callers.

    Threads: any number may call it at once. Streams: each call is ordered on the calling thread's current stream of
    the engine's device, looked up at every call, exactly as one built-in PyTorch operator would be; see
    ``docs/contract.md`` for what else a call promises.
    """

    _runtime = Runtime("python", Limits, Counters, PythonCalls)
    _kind_of_session = Session

    def __init__(
        self,
        settings: Settings,
        model: torch.nn.Module | ExportedProgram,
        precision: torch.dtype | Mixed | None,
        limits: Limits,
        in_fragments: bool,
        dynamic: bool | None = None,
    ) -> None:
        self._settings, self._precision = settings, precision
        self._device: Device = settings.device
        self._index, self._torch_device, self._limits = settings.index, settings.torch_device, limits
        self._counters: Counters = self._runtime.make_counters()
        self._table = Table(self._torch_device, keyword_order_matters(model), dynamic)
        parts = self._runtime, self._limits, self._counters, self._table
        self._compiler: Compiler | None = Compiler(settings, model, precision, *parts)
        #: What state of the model begins as, by name: of each buffer that it is known to write.
        self.states, self._initial_counts = self._compiler.initial, self._compiler.counts
        hooks = weakref.WeakMethod(self._added), weakref.WeakMethod(self._removed)
        self._shapes = Shapes(self._table, limits, self._compiler, *hooks)
        self._hooks = about_hooks(self._compiler.snapshot.module)
        if self._hooks:
            warnings.warn(f"{settings.name} is compiled {self._hooks}", stacklevel=3)
        #: What serves signatures that torch.export refuses, once there was one.
        self._guarded: Guarded | None = None
        self._in_fragments, self._closed, self._generation = in_fragments, False, process.generation
        process.register(self)

    # -- calling ------------------------------------------------------------------------------------------------

    @_activity.call
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on these inputs and return what it returns.

        Output tensors are new, ordinary tensors of the current stream; an output that is an input or a parameter of
        the model is that tensor itself. Inputs may be freed, and the engine dropped, as soon as this returns.

        A signature that was not seen before is compiled first. Raises before any device work is queued:
        :class:`~anabranch.errors.InputError`, :class:`~anabranch.errors.EngineClosed`,
        :class:`~anabranch.errors.FlagsChanged`, :class:`~anabranch.errors.NotCapturable`; and
        :class:`~anabranch.errors.DeviceLost` after a CUDA error that lasts.
        """
        kept: list[Any] = []
        return self._call_for(None, args, kwargs, kept)

    def _call_for(self, session: Session | None, args: Any, kwargs: Any, kept: list[Any]) -> Any:
        """A call of ``session``, or one of a model that keeps no state. What is given up meanwhile is ``kept`` until
        the caller's call is over, and freed behind it."""
        if process.is_exiting:
            process.wait_for_exit()
        if self._closed or self._generation != process.generation or self._device.lost():
            self._check_usable()
        if torch._C._len_torch_dispatch_stack():
            check_modes()
        leaves, key = self._table.key(args, kwargs)
        specialization = self._table.find(key, leaves)
        if specialization is None and self._guarded is None:
            specialization = self._specialization(args, kwargs)
            self._counters.add("waits_for_build")
        if specialization is None:
            return self._call_guarded(args, kwargs)
        kept.append(specialization)
        if specialization.program.state and session is None:
            refuse_without_session(self, specialization.program.state)
        if specialization.is_range:
            if (padded := self._table.padded(specialization, leaves)) is not None:
                structure = self._table.flatten(args, kwargs)[1]
                with neutral(self._device, self._index):
                    return padded.cut(self._call_for(session, *padded.call(structure), kept))
            self._shapes.met(key, leaves, lambda: self._table.flatten(args, kwargs)[1], specialization)
        run = specialization.calls if session is None else partial(session.run, specialization)
        if is_neutral(self._device, self._index):
            with self._device.range(self._settings.name):
                return run(leaves)
        with neutral(self._device, self._index), self._device.range(self._settings.name):
            return run(leaves)

    def session(self, state: Mapping[str, torch.Tensor] | None = None) -> Session:
        """State of its own for a series of calls, over the weights of this engine; see :class:`Session`.

        :param state: to go on from, of a :attr:`Session.state`. None: the model's buffers as they were at compile.
        """
        self._check_usable()
        return self._kind_of_session(self, self.states, state)

    def _call_guarded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a model that torch.export refuses."""
        guarded, device, index = self._guarded, self._device, self._index
        assert guarded is not None
        if device.has_streams and device.is_capturing(device.current_stream(index)):
            guarded.refuse_capture()
        self._settings.flags.check()  # Python between graphs runs operators, which may read any
        with neutral(device, index), device.range(self._settings.name):
            results = guarded(args, kwargs)
        self._counters.add("calls", "graph_calls" if guarded.is_captured else "direct_calls")
        return results

    def _take_apart(self, why: NotExported, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have Dynamo trace the model. With the build lock held. Raises ``why`` where there are to be no fragments."""
        if not self._in_fragments:
            raise why
        assert self._compiler is not None
        mine = weakref.ref(self)

        def make_engine(model: torch.nn.Module, inputs: Sequence[Any], free: frozenset[Place]) -> Engine:
            engine = mine()
            if engine is None:
                raise EngineClosed("the engine that this graph was a part of is gone; compile a new one")
            return engine._of_fragment(model, inputs, free)

        settings, device, index = self._settings, self._device, self._index
        guarded = Guarded(self._compiler.snapshot, why, make_engine, settings, self._table.ranges, self._precision)
        with neutral(device, index), device.relaxed():
            if device.has_streams:
                device.current_stream(index).synchronize()  # inputs that were written just before
            given = args, kwargs, self._table.declared_others(args, kwargs)
            self._compiler.aside(lambda: guarded.prepare(*given), lasting=True)
        self._guarded = guarded

    def _of_fragment(self, model: torch.nn.Module, inputs: Sequence[Any], free: frozenset[Place]) -> Engine:
        """An engine for one graph of a model that is taken apart, of which these sizes vary.

        Limits that the user gave are for all graphs together. The default is for each: a call takes a context of every
        graph in turn, and as many calls are to be in flight as of a model in one.
        """
        if (device := device_of(model, (inputs, {}))) != self._torch_device:
            raise InputError(f"its tensors are on {device}, and the engine is on {self._torch_device}")
        settings = replace(self._settings, name=f"{self._settings.name}, a graph")
        if (limits := self._limits).memory_limit is None and limits.max_contexts == DEFAULT_MAX_CONTEXTS:
            limits = self._runtime.make_limits(limits.max_contexts, None)
        engine = type(self)(settings, model, self._precision, limits, False, None if free else False)
        engine._table.keep_on_cpu(tuple(inputs), {})
        engine._table.vary(inputs, free)
        engine._table.primary = engine._specialization(tuple(inputs), {})
        return engine

    def _specialization(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], clock: Clock | None = None
    ) -> Specialization | None:
        """The specialization for these inputs, compiled if need be. Blocks while another thread builds.

        None: torch.export refuses the model, and :attr:`_guarded` is there. ``clock``: of the build, if it has begun.
        """
        leaves, key = self._table.key(args, kwargs)
        device, index = self._device, self._index
        if device.has_streams and device.is_capturing(device.current_stream(index)):
            raise NotCapturable(
                "this call is inside a CUDA graph capture, and its input signature was not compiled before, which"
                f" cannot be done there. Call engine.warm(...) first. Compiled: {self._table}"
            )
        with process.alone(), _activity.building():
            found = self._table.find(key, leaves)
            if found is not None or self._guarded is not None:
                return found
            self._check_usable()
            assert self._compiler is not None  # it is usable, and this thread has the lock
            leaves, structure = self._table.flatten(args, kwargs)
            signature = Signature.of(leaves, structure, self._torch_device)
            try:
                place, made = self._compiler.make(key, signature, (args, kwargs), leaves, clock or Clock())
            except NotExported as why:
                self._take_apart(why, args, kwargs)
                return None
            self._added(place, made)
            self._shapes.attend()
            _log.info("%s(%s): %s", self._settings.name, made.signature, _phases.describe(made.seconds))
            return made

    def _try_to_serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compile for calls with these inputs, if the model takes them at all."""
        try:
            self._specialization(args, kwargs)
        except (InputError, UnsupportedModel, BuildError) as e:
            _log.info("%s: compiled for other sizes only: %s", self._settings.name, e)

    def _added(self, key: Any, made: Specialization) -> None:
        """A specialization is ready for calls. With the build lock held."""

    def _removed(self, made: Specialization) -> None:
        """A specialization is given up. With the build lock held."""

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineClosed(f"{self!r} was closed; compile a new one")
        if self._generation != process.generation:
            raise EngineClosed(
                f"{self!r} belongs to the parent of this forked process, whose device memory this process cannot use."
                " Compile in the child, or start children with multiprocessing's 'spawn'."
            )
        lost = self._device.lost()
        if lost:
            raise DeviceLost(f"the device was lost earlier in this process: {lost}. Start a new process.")

    def after_fork(self) -> None:
        if self._device.survives_fork:
            self._generation = process.generation

    def _first(self) -> Specialization:
        """The specialization that the engine was compiled for."""
        primary = self._table.primary
        if primary is None:  # closed, perhaps by another thread at this moment
            raise EngineClosed(f"{self!r} was closed; compile a new one")
        return primary

    # -- building ahead, giving back ----------------------------------------------------------------------------

    def warm(
        self,
        inputs: Sequence[Any] | None = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
        contexts: int = 1,
        captures: int = 1,
    ) -> int:
        """Compile a signature ahead (default: the one that the engine was compiled for) and build its contexts.

        Of a shape among those that one specialization serves, this captures the graph.

        :param contexts: how many execution contexts there shall be; the engine's limits hold.
        :param captures: of TensorRT, in how many CUDA graphs of your own you are going to capture calls: each keeps
            an execution context (of each stream that calls come from in it), which cannot be made inside a capture.
            One is there to begin with. They come on top of ``max_contexts``, and direct calls do not use them.
        :returns: how many contexts there are; 0 where calls run direct and need none.
        """
        self._check_usable()
        if inputs is None and kwargs is None:
            if self._guarded is not None:
                return sum(engine.warm(contexts=contexts, captures=captures) for engine in self._guarded.engines())
            return self._first().warm(contexts, captures)
        args, keywords = tensors_for(inputs_of(None, inputs, kwargs), self._torch_device)
        leaves, key = self._table.key(args, keywords)
        specialization = self._table.find(key, leaves) or self._specialization(args, keywords)
        if specialization is None:
            return self.warm(contexts=contexts, captures=captures)
        return self._of_one_shape(args, keywords, specialization).warm(contexts, captures)

    def _of_one_shape(self, args: tuple[Any, ...], kwargs: dict[str, Any], found: Specialization) -> Specialization:
        """The specialization with graphs for the very shape of a call, where ``found`` serves many; else ``found``."""
        if not found.is_range or found.why_no_graphs:
            return found
        given, structure = self._table.flatten(args, kwargs)
        if (padded := self._table.padded(found, given)) is not None:
            args, kwargs = padded.call(structure)
        leaves, key = self._table.key(args, kwargs)
        signature = Signature.of(leaves, structure, self._torch_device)
        with process.build_lock, _activity.building():
            return self._shapes.capture(key, signature, found, wanted=True) or found

    def trim(self) -> None:
        """Give the memory of idle contexts back to the driver. Later calls build contexts anew.

        The host may wait for the device, because freeing memory does, and for a build under way. PyTorch's allocator
        does not allow it while other code in the process captures a CUDA graph or allocates from a pool of its own.
        """
        self._check_usable()
        with process.build_lock, self._device.relaxed(), _activity.building():
            for specialization in self._table:
                specialization.trim()
            for engine in self._guarded.engines() if self._guarded is not None else ():
                engine.trim()
            try:
                self._device.trim()
            except Exception as e:
                self._device.check_error(e)
                raise

    def close(self) -> None:
        """Free everything; calls that are in flight finish, later ones raise ``EngineClosed``. May be repeated.

        With the backend ``tensorrt`` the host waits for the device, because freeing TensorRT's code does.
        """
        self._closed = True
        with process.build_lock, _activity.building():
            loads_code = any(s.loads_code for s in self._table)
            for engine in self._guarded.engines() if self._guarded is not None else ():
                engine.close()
            self._guarded = None
            self._shapes.close()
            self._table.clear()
            self._compiler = None
            if loads_code:
                self._device.free_code()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- looking ------------------------------------------------------------------------------------------------

    @property
    def runtime(self) -> str:
        """Which runtime its calls run on: ``"native"`` or ``"python"``."""
        return self._runtime.name

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self._torch_device

    @property
    def seam(self) -> Device:
        """The device's implementation, for tools."""
        return self._device

    @property
    def plan(self) -> Plan:
        """The plan for the signature that the engine was compiled for. Of a model in fragments: of its first graph."""
        return self.plans[0] if self._guarded is not None else self._first().plan()

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of each signature compiled so far."""
        return tuple(s.plan() for s in self._all())

    @property
    def is_captured(self) -> bool:
        """Whether calls of a signature, or a graph of a model in fragments, use a CUDA graph."""
        return any(s.is_captured for s in self._all())

    def _all(self) -> list[Specialization]:
        """Those of its own signatures, and those of the graphs of a model in fragments."""
        graphs = self._guarded.engines() if self._guarded is not None else ()
        return [*self._table, *(s for engine in graphs for s in engine._table)]

    def explain(self) -> str:
        """What runs captured, what direct, and why; one paragraph a signature."""
        cast = self._compiler.cast if self._compiler is not None else None
        lines = [f"{self!r}", *(cast.explain() if cast is not None else ())]
        if self._hooks:
            lines.append(self._hooks)
        for specialization in self._table:
            lines += specialization.explain()
        lines += self._guarded.explain() if self._guarded is not None else ()
        lines += [*self._table.varying.explain(), *self._table.ranges.explain(), *self._shapes.explain()]
        limit = self._limits.memory_limit
        memory = "no limit on memory" if limit is None else f"{limit} bytes"
        lines.append(
            f"limits: {self._limits.max_contexts} contexts, {memory}; beyond them a call waits on the device for the"
            " least recently used context"
        )
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """What the engine consists of, for tools: dicts, lists, strings, numbers and None; ``json.dumps`` takes it.

        ``signatures`` has an entry for each signature compiled so far, of each graph where there are several: its
        ``backend``; whether it is ``captured``, and the ``reason``; ``reasons``, the operators that forbid it, each
        with ``why``, ``operator`` and ``source`` (the model's line); how many ``operators`` and ``flops``
        (floating-point operations a call) run ``captured`` and ``direct``, with ``share_captured`` from 0 to 1 (None
        where there are none); ``seconds`` of the build by phase and in ``total``; ``contexts``, how many;
        ``bytes_per_context``; ``bytes`` that all of them hold now. ``measured_us`` has the microseconds of a call as a
        ``graph`` and ``direct`` where both were measured, and of a direct one by ``compiled`` kernels and by PyTorch's
        ``operators``. ``state``: each buffer that a session has, by ``name``, ``shape``, ``dtype``, ``bytes``;
        ``writes``: the inputs that it writes into. ``pieces`` has, where a call runs in several, for each whether it is
        ``captured``, its ``backend``, how many ``operators``, and ``why`` it runs direct; then ``captured`` says
        whether any is, and ``measured_us`` has what is captured as ``pieces`` and ``direct``. ``precision``: see Mixed.

        ``fragments`` is None but for a model that torch.export refuses: then it has ``why``; ``graphs``, an entry for
        each graph, with how many ``operators`` it has, why they run ``by_operators`` of PyTorch's, or nothing, where it
        ``ends`` (``reason`` and ``source``, or None where the function ends), ``python_us``, the microseconds of Python
        from its end to the next graph where they were measured, and the summaries of its ``engines``; and
        ``past_limit``, functions that Dynamo compiles no more.

        Any thread. Nothing is queued on a device. Floating-point operations are counted, from shapes, the first time.
        """
        stats = self.stats()
        return {
            "model": self._settings.name,
            "device": str(self._torch_device),
            "backend": self._settings.backend,
            "runtime": self.runtime,
            "contexts": stats.contexts,
            "bytes": stats.bytes,
            "max_contexts": self._limits.max_contexts,
            "memory_limit": self._limits.memory_limit,
            "signatures": [s.summary().data() for s in self._all()],
            "fragments": self._guarded.summary() if self._guarded is not None else None,
        }

    def stats(self) -> Stats:
        """Counters since compile."""
        stats = self._counters.snapshot()
        stats.contexts, stats.bytes = self._limits.held()
        for engine in self._guarded.engines() if self._guarded is not None else ():
            made = engine.stats()
            stats.waits += made.waits
            stats.captures += made.captures
            stats.specializations += made.specializations
            if engine._limits is not self._limits:
                stats.contexts += made.contexts
                stats.bytes += made.bytes
        return stats

    def __repr__(self) -> str:
        about = self._settings
        return f"<anabranch engine {about.name} on {self._torch_device}, {about.backend}, {self.runtime}>"
