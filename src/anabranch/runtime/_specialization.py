"""An engine for one input signature: its program, its kernels, its contexts, and the three ways a call runs."""

from __future__ import annotations

import functools
import itertools
import logging
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from anabranch import _activity, _sync
from anabranch.backends import Instance, Kernels, Options, Stateful, get_backend, of_one
from anabranch.devices import Device, Lane, Scratch, Stream
from anabranch.errors import BuildError, FlagsChanged, InputError, NotCapturable
from anabranch.export import AliasOutput, Program, Signature, finisher, valid_integer
from anabranch.plan import Plan
from anabranch.plan._build import build_plan, uses_workspace
from anabranch.race import check_plan
from anabranch.runtime import _summary
from anabranch.runtime._build import neutral, process
from anabranch.runtime._comparison import why_off
from anabranch.runtime._context import Context
from anabranch.runtime._flags import Flags, sensitive
from anabranch.runtime._flops import flops_of
from anabranch.runtime._instances import Instances, Member
from anabranch.runtime._phases import Clock
from anabranch.runtime._pool import ContextPool, Limits, Reservation
from anabranch.runtime._stats import Counters

_log = logging.getLogger("anabranch")


@dataclass(frozen=True)
class Settings:
    """What an engine was compiled with, shared by all its specializations."""

    name: str
    device: Device
    index: int
    backend: str
    cuda_graphs: bool | None
    #: Those that operators read when they are queued.
    flags: Flags
    #: Those and what exporting reads.
    compile_flags: Flags
    require_full: bool = False
    #: Whether the user has named the backend.
    backend_is_given: bool = False

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu") if self.device.kind == "cpu" else torch.device(self.device.kind, self.index)


@_sync.atomics("_may_grow")
class Specialization:
    """Runs calls of one signature.

    Threads: any. Everything but the pool, ``_last_uses`` and ``_may_grow`` is immutable after ``__init__``.

    Streams: a call queues everything on the caller's stream ``s``, in this order:

    ======================  ===========================================================================
    graph path              ``s`` waits for the context's last use; inputs are copied in; the graph is
                            launched; outputs are copied out; the context's event is recorded
    direct path             the kernels; an event is recorded (for the day when the weights are freed)
    in a caller's capture   a lane is forked from ``s``; the kernels run on it; it is joined to ``s``
    ======================  ===========================================================================
    """

    def __init__(
        self,
        settings: Settings,
        program: Program,
        signature: Signature,
        limits: Limits,
        counters: Counters,
        given: Sequence[torch.Tensor] = (),
        clock: Clock | None = None,
    ) -> None:
        """Compile. Called with the build lock held; blocks until everything that was queued here is done.

        ``given``: inputs with values, for a device without streams, where they may be read at once. ``clock``: of the
        build that this is the end of.
        """
        device = settings.device
        if not program.data_dependent and not program.is_empty:
            integer, why = valid_integer(program.module.graph, signature.tensors)
            if why and device.has_streams:
                raise InputError(
                    "an engine is built on made-up inputs, and no integer was found that this model takes for all of"
                    f" its integer inputs ({signature}): {why}. Tried 0 to 16 and powers of two to 2**20; expected a"
                    " model whose indices and divisors one of them makes valid. Clamp them in the model, or leave the"
                    " part that does not out of the engine."
                )
            signature = signature.with_integer(integer)
        self.signature = signature
        self.program = program
        self.settings = settings
        self._device = device
        self._index = settings.index
        self._limits = limits
        self._counters = counters
        self._specs = signature.tensors
        self._is_lazy = any(spec.is_lazy for spec in self._specs)
        self._finish: Callable[[Sequence[Any], Sequence[torch.Tensor]], Any] = finisher(
            program.outputs, program.structure
        )
        self._flags = settings.compile_flags if program.asks_default_dtype else settings.flags
        self._sensitive = sensitive(program.module.graph) or bool(program.asks_default_dtype)
        self._workspaces = device.has_streams and uses_workspace(program)
        # The weights' last uses, for the day when they are freed. By stream: the last direct call's event; grows with
        # the number of stream handles that ever called, which the driver re-uses. Two threads on one stream may record
        # in either order: both records come after both threads' work, or after the other record. And by context (as
        # a string): its `done`.
        self._last_uses: dict[int | str, Any] = _sync.dict_("last uses")
        self._pool = self._make_pool()
        #: Whether calls may build contexts; not after a build failed.
        self._may_grow = True
        self._clock = clock or Clock()
        #: Figures of the build for explain(): microseconds a call.
        self.measured: dict[str, float] = {}

        # What depends on data cannot be compiled for one shape: operators decide as they go.
        by_operators = program.data_dependent or program.is_empty or program.takes_numbers or program.on_cpu
        self.backend = "eager" if by_operators else settings.backend
        #: If it is not the engine's, why.
        self._why_eager = str(program.direct_only)
        if device.has_streams:
            device.prepare_retire(self._index)
        self.uses_graphs, self.reason = self._build(given)
        self._built()
        if self._may_choose():
            self._choose_kernels()
        if isinstance(self._kernels, Instances):
            if not self.uses_graphs:
                with self._clock.phase("warm-up"):
                    self._kernels.prepare(1)
            with self._clock.phase("warm-up"):
                self._kernels.prepare_spare(1)  # a call in a caller's capture cannot build any
        self._check_flags()  # another thread may have set one while kernels were chosen and captured
        #: That no two steps of the plan can race. Raises PlanError before anything could run.
        self.proof = check_plan(self.plan()).raise_if_unordered()
        # Attached to this object, not to the engine: a call under way keeps it alive, and what that call queues is
        # covered by an event recorded before it lets go.
        weakref.finalize(self, _retire, device, list(program.weights), self._last_uses).atexit = False
        counters.add("specializations")
        #: Of the build, by phase.
        self.seconds = self._clock.read()

    # -- what another runtime does otherwise --------------------------------------------------------------------

    def _make_pool(self) -> ContextPool[Context]:
        return ContextPool(self._limits)

    def _set_program(self) -> None:
        """The kernels are there."""

    def _capture(self, fresh: bool, forget: Callable[[], None], scratch: Scratch | None = None) -> Context:
        """A new context; ``fresh``: in memory that nothing used before; ``scratch``: the build's, if it has one."""
        return Context.build(self._device, self._index, self._lowered, self.signature, self._workspaces, forget, fresh)

    def _built(self) -> None:
        """It is known whether calls use graphs."""

    def _ways(self, operators: Kernels) -> list[Callable[[Sequence[Any]], Any]]:
        """Two ways to run a direct call: by the compiled kernels, and by PyTorch's operators."""
        return [self._lowered, operators]  # type: ignore[list-item]

    def _take_operators(self, taken: bool) -> None:
        """Which of the two it shall be was decided."""

    # -- building -----------------------------------------------------------------------------------------------

    def _build(self, given: Sequence[torch.Tensor]) -> tuple[bool, str]:
        device = self._device
        with neutral(device, self._index):
            if not device.has_streams:
                examples = self._examples()
                run = self._lower(examples, None)
                if not self.program.direct_only and not self.program.is_empty:
                    examples = self._warm_up_on_cpu(run, examples, given)
                    self._compare(run, examples)
                self._set_program()
                return False, "the CPU has no streams to order and no graphs to capture"
            with device.building():
                return self._build_on_lane()

    def _examples(self) -> list[torch.Tensor]:
        """New inputs of this signature with made-up values, on the current stream."""
        made: list[Any] = [s.synthesize(self.settings.torch_device) for s in self._specs]
        return made + self._numbers(self.signature.values) if self.program.takes_numbers else made

    def _numbers(self, leaves: Sequence[Any]) -> list[Any]:
        """The inputs that are made of a call's numbers, on the current stream."""
        numbers = self.program.numbers
        return numbers.given(leaves, self.settings.torch_device) if numbers is not None else []

    def _lower(self, examples: Sequence[torch.Tensor], own: Stream | None) -> Kernels | Instance:
        """Have the backend make the kernels; returns what this thread may run of them.

        ``own``: a stream that nobody else has meanwhile, where there are streams.
        """
        flags, full = self.settings.flags, self.settings.require_full
        if full and self.backend != self.settings.backend and not self.program.is_empty:
            raise BuildError(
                f"require_full=True given, and backend {self.settings.backend!r} does not run this model:"
                f" {self.program.direct_only}. Leave require_full out to have PyTorch run it."
            )
        with self._clock.phase("lowering"):
            self._lowered = get_backend(self.backend).lower(self.program, examples, Options(full, flags.tf32))
            run = of_one(self._lowered, own)
        self._kernels: Kernels = (
            Instances(
                self._device,
                self._index,
                self._lowered,
                self._limits.max_contexts,
                self._examples,
                self._workspaces,
            )
            if isinstance(self._lowered, Stateful)
            else self._lowered
        )
        return run

    def _build_on_lane(self) -> tuple[bool, str]:
        device, settings = self._device, self.settings
        scratch = device.scratch(self._index)
        lane = scratch.lane
        run: Any = None
        drained = False
        try:
            if self._workspaces:
                # Before a compiler may run products: these would make them in other memory.
                lane.load_workspaces()
            with scratch.using():
                examples = self._examples()
                run = self._lower(examples, lane.stream)
                if not self.program.data_dependent and not self.program.is_empty:
                    self._warm_up(run, examples, times=2)
                    run = self._compare(run, examples)
                self._set_program()
            with self._clock.phase("warm-up"):
                lane.stream.synchronize()
            drained = True
            reason = self._why_not_captured()
            if not reason and isinstance(self._lowered, Stateful):
                reason = run.why_not_captured(lane.stream)
                if reason and settings.cuda_graphs:
                    raise BuildError(
                        f"cuda_graphs=True given, and this model cannot be captured: {reason}. Leave cuda_graphs out."
                    )
            if reason:
                return False, reason
            with self._clock.phase("capture"):
                context = self._first_context(scratch)
            if isinstance(context, str):
                return False, context
            if settings.cuda_graphs:
                self._pool.release(context)
                return True, "CUDA graphs were asked for"
            if not device.has_time:
                self._pool.release(context)
                return True, "there is no time to measure on this device"
            with scratch.memory.using(), self._clock.phase("measuring"):
                graph, direct = self._measure(context, run, examples, lane.stream)
            self.measured = {"graph": graph.us, "direct": direct.us}
            figures = f"measured {graph} as a graph, {direct} direct"
            if graph.is_better(direct):
                self._pool.release(context)
                return True, figures
            self._pool.discard(context)
            return False, figures
        finally:
            if not drained:
                lane.stream.synchronize()
            examples, run = [], None
            device.release_scratch(scratch)

    def _may_choose(self) -> bool:
        """Whether calls run direct by compiled kernels that nobody asked for."""
        return (
            not (self.uses_graphs or self.program.is_empty or self.settings.backend_is_given)
            and self.backend != "eager"
            and not isinstance(self._lowered, Stateful)
            and not self.settings.require_full
            and self._device.has_streams
            and self._device.has_time
        )

    def _choose_kernels(self) -> None:
        """Have PyTorch's operators run direct calls where they cost less than compiled kernels.

        A compiler's wrapper is Python, which costs more than a small operator, and of many threads one at a time.
        """
        device, taken = self._device, False
        operators: Any = get_backend("eager").lower(self.program, [], Options(False, self.settings.flags.tf32))
        with neutral(device, self._index), device.building(), self._clock.phase("measuring"):
            scratch = device.scratch(self._index)
            examples: list[Any] = []
            try:
                if self._workspaces:
                    scratch.lane.load_workspaces()  # first of all, as in _build_on_lane
                with scratch.using():
                    examples = self._examples()
                    compiled, eager = self._costs(self._ways(operators), examples, scratch.stream)
                taken = eager.is_better(compiled)
                self.measured |= {"compiled": compiled.us, "operators": eager.us}
            except torch.OutOfMemoryError:
                pass
            except Exception as e:  # made-up values may be at fault
                device.check_error(e)
                _log.info("%s: compiled kernels run direct calls: %s: %s", self.settings.name, type(e).__name__, str(e))
            finally:
                scratch.stream.synchronize()
                examples = []
                device.release_scratch(scratch)
        if taken:
            self._lowered = self._kernels = operators
            self.backend = "eager"
            self._why_eager = f"measured {eager} by PyTorch's operators, {compiled} by compiled kernels"
        self._take_operators(taken)

    def _warm_up_on_cpu(
        self, run: Kernels | Instance, examples: list[torch.Tensor], given: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Returns the inputs that it ran on."""
        try:
            self._warm_up(run, examples, times=1)
            return examples
        except InputError:
            if not given:
                raise
            # Made-up values may be at fault.
            inputs = [s.in_memory(x) for s, x in zip(self.signature.given, given, strict=True)]
            inputs = self._canonical(inputs + self._numbers(self.signature.values))
            self._warm_up(run, inputs, times=1)
            return inputs

    def _compare(self, run: Kernels | Instance, examples: Sequence[torch.Tensor]) -> Kernels | Instance:
        """Have PyTorch's operators run the model where compiled kernels give other results; returns what runs."""
        # In a forked child operators may wait for ever for OpenMP's threads, which are its parent's.
        if self.backend == "eager" or isinstance(self._lowered, Stateful) or process.generation:
            return run
        try:
            with self._clock.phase("warm-up"):
                why = why_off(self.program, run, examples)
        except Exception as e:  # made-up values may be at fault, or memory is short
            self._device.check_error(e)
            _log.info("%s: kernels were not compared: %s: %s", self.settings.name, type(e).__name__, str(e))
            return run
        if not why:
            return run
        if self.settings.require_full:
            raise BuildError(
                f"require_full=True given, and {why}: a fault of {self.backend!r}. Leave require_full out to have"
                " PyTorch's operators run the model."
            )
        text = "%s(%s): %s: a fault of %r. PyTorch's operators run the model instead."
        _log.warning(text, self.settings.name, self.signature, why, self.backend)
        self.backend, self._why_eager = "eager", why
        return self._lower(examples, None)

    def _warm_up(self, run: Kernels | Instance, examples: Sequence[torch.Tensor], times: int) -> None:
        """Run on made-up values: loads and tunes kernels, which no call and no capture may have to do.

        Export checks shapes; that an operator takes these dtypes shows here only.
        """
        try:
            with self._clock.phase("warm-up"):
                for _ in range(times):
                    run(examples)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # in torch.linalg, not in its stubs
            pass  # the values were at fault (not positive definite, say); the caller's own may do
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as e:  # Inductor asserts strides
            self._device.check_error(e)
            why = (str(e).splitlines() or [""])[0]
            raise InputError(
                f"the model does not run on inputs like these ({self.signature}): {type(e).__name__}: {why}."
                " Expected inputs that model(*inputs) runs on; try that first."
            ) from e

    def _why_not_captured(self) -> str:
        if self.program.is_empty:
            return "nothing is computed"
        if self.program.direct_only:
            return f"not captured: {self.program.direct_only}"
        if self.settings.cuda_graphs is False:
            return "CUDA graphs were turned off"
        return ""

    def _first_context(self, scratch: Scratch) -> Context | str:
        """A first context, or the reason why there can be none and calls run direct."""
        reservation = self._limits.book(0)
        if reservation is None:
            return f"the limit of {self._limits.max_contexts} contexts was reached by other signatures"
        try:
            context = self._build_reserved(reservation, scratch)
        except torch.OutOfMemoryError:
            return "a context did not fit into the device's memory"
        except Exception as e:
            self._device.check_error(e)
            if self.settings.cuda_graphs:
                raise
            return f"capture failed: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        if context is None:
            return f"a context exceeds memory_limit ({self._limits.memory_limit} bytes)"
        return context

    def _build_reserved(self, reservation: Reservation, scratch: Scratch | None = None) -> Context | None:
        """Build the context that there is room for; None if it takes more than the limit."""
        limited = self._limits.memory_limit is not None
        try:
            context = self._capture(limited, reservation.cancel, scratch)
        except BaseException:
            reservation.cancel()  # whoever keeps the exception keeps this frame
            raise
        fits = reservation.confirm(context.nbytes)
        self._counters.add("captures")
        self._prune_last_uses()  # before this one is on the list: it is not alive in the pool yet
        self._last_uses[f"context {next(_serial)}"] = context.done
        if not fits:
            self._may_grow = False
            return None
        if self._sensitive and not self._flags.unchanged():
            return None  # captured under somebody's temporary flags
        self._pool.add(context)
        return context

    def _build_context(self, reservation: Reservation) -> Context | None:
        """One more context, while another thread's build does not have to be waited for."""
        lock, taken = process.build_lock, list[bool]()
        try:
            # One call, as far as a signal can tell: it comes before the lock is taken, or when the list says so.
            taken.extend(map(lock.acquire, _AT_ONCE))
            if not taken[0]:
                reservation.cancel()
                return None
            with neutral(self._device, self._index), self._device.building(), _activity.building():
                return self._build_reserved(reservation)
        except Exception as e:
            # The call can do without: it runs direct. So do later ones, until trim() or warm() ask for contexts again.
            self._device.check_error(e)
            self._may_grow = False
            # Its text: a handler may keep what it is given, and an exception keeps the frames that it came through.
            _log.warning("%s: no further context was built: %s: %s", self.settings.name, type(e).__name__, str(e))
            return None
        finally:
            if taken and taken[0]:
                lock.release()

    def _prune_last_uses(self) -> None:
        """Forget the events of contexts that are gone and done."""
        alive = self._pool.events()
        for key, event in list(self._last_uses.items()):
            if isinstance(key, str) and id(event) not in alive and event.query():
                self._last_uses.pop(key, None)

    def warm(self, contexts: int, captures: int) -> int:
        """Build until there are ``contexts`` of them or a limit is reached; returns how many there are.

        Of kernels with state: instances for as many direct calls, where calls run direct, and ``captures`` of them for
        callers' graphs.
        """
        if isinstance(self._kernels, Instances):
            with process.build_lock, _activity.building():
                self._kernels.prepare_spare(captures)
                if not self.uses_graphs:
                    return self._kernels.prepare(contexts)
        if not self.uses_graphs:
            return 0
        self._may_grow = True
        with process.build_lock, neutral(self._device, self._index), self._device.building(), _activity.building():
            self._check_flags()
            try:
                while len(self._pool) < contexts:
                    reservation = self._limits.book(self._pool.estimate)
                    if reservation is None:
                        break
                    context = self._build_reserved(reservation)
                    if context is None:
                        self._check_flags()
                        break
                    self._pool.release(context)
            except BaseException:
                self._pool.discard_added()
                raise
        return len(self._pool)

    @property
    def loads_code(self) -> bool:
        """Whether its backend loads code for each context, so that the host has to wait where one is freed."""
        return isinstance(self._lowered, Stateful)

    def trim(self) -> None:
        """Give up the contexts that are idle; calls in flight keep theirs, and later calls build new ones."""
        self._may_grow = True
        self._pool.drain()
        if isinstance(self._kernels, Instances):
            self._kernels.trim()

    def _measure(
        self, context: Context, run: Kernels | Instance, examples: Sequence[torch.Tensor], stream: Stream
    ) -> tuple[_Cost, _Cost]:
        """What one call costs as a graph and direct. The context is idle afterwards."""
        with self._device.on_stream(stream):
            graph, direct = self._costs([lambda inputs: self._launch(context, inputs, stream), run], examples, stream)
        # It has run on a stream that no caller will ever have: the first caller need not count as waiting for it.
        context.used_on = None
        return graph, direct

    def _costs(
        self, ways: Sequence[Callable[[Sequence[Any]], Any]], examples: Sequence[torch.Tensor], stream: Stream
    ) -> list[_Cost]:
        """Medians for each of ``ways`` to run a call. Inputs and results are at other addresses each time, as callers'
        are. In turn: a host's clock may change between one tenth of a second and the next."""
        others = [spec.synthesize(self.settings.torch_device) for spec in self._specs]
        samples: list[list[tuple[float, float]]] = [[] for _ in ways]
        results: list[Any] = [None] * len(ways)
        for i in range(24):
            for k, run in enumerate(ways):
                start = time.perf_counter()
                before, results[k] = results[k], run(others if i % 2 else examples)
                returned = time.perf_counter()
                stream.synchronize()
                samples[k].append((time.perf_counter() - start, returned - start))
                del before
        return [_Cost(*(statistics.median(column) * 1e6 for column in zip(*s[6:], strict=True))) for s in samples]

    # -- calling ------------------------------------------------------------------------------------------------

    def takes(self, leaves: Sequence[Any]) -> bool:
        """Whether it is right for the numbers of a call that has its signature."""
        numbers = self.program.numbers
        return numbers is None or numbers.values(leaves) is not None

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run one call on the calling thread's current stream. ``leaves`` have passed validation."""
        device = self._device
        given, inputs = self._inputs(leaves)
        if not device.has_streams:
            return self._finish(given, self._run_on_cpu(inputs))
        stream = device.current_stream(self._index)
        try:
            if device.is_capturing(stream):
                results = self._run_in_capture(inputs, stream)
                self._counters.add("calls", "calls_in_captures")
            else:
                context = self._acquire(stream) if self.uses_graphs else None
                if context is not None:
                    results = self._run_graph(context, inputs, stream)
                    self._counters.add("calls", "graph_calls")
                else:
                    results = self._run_direct(inputs, stream)
                    self._counters.add("calls", "direct_calls")
        except Exception as e:
            device.check_error(e)
            raise
        return self._finish(given, results)

    def _inputs(self, leaves: Sequence[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The tensors of a call, and what lies in memory of them, which is what steps read."""
        given = [x for x in leaves if isinstance(x, torch.Tensor)]
        for position, what in self.program.absolute:
            if given[position].storage_offset():
                raise InputError(
                    f"input {position} begins {given[position].storage_offset()} elements into its storage, and the"
                    f" model reads from the storage's beginning ({what}). Pass x.clone(), or leave storage_offset out."
                )
        inputs = given
        if self._is_lazy:
            inputs = [spec.in_memory(x) for spec, x in zip(self.signature.given, given, strict=True)]
        return given, inputs + self._numbers(leaves) if self.program.numbers is not None else inputs

    def _acquire(self, stream: Stream) -> Context | None:
        choice = self._pool.acquire(stream.stream_id, self._may_build)
        if isinstance(choice, Reservation):
            context = self._build_context(choice)
            if context is not None or not self._shares():
                return context
            choice = self._pool.acquire(stream.stream_id, lambda: False)
            assert not isinstance(choice, Reservation)
        if choice is not None and choice.used_on is not None and choice.used_on != stream.stream_id:
            self._counters.add("waits")
        return choice

    def _shares(self) -> bool:
        """Whether a call that could not build a context takes one that there is, instead of running direct.

        Where kernels have state a direct call would build that, which takes as long.
        """
        return isinstance(self._kernels, Instances)

    def _may_build(self) -> bool:
        # A context captured now would have today's flags baked in, not the engine's.
        return self._may_grow and (not self._sensitive or self._flags.unchanged())

    def _run_graph(self, context: Context, inputs: Sequence[torch.Tensor], stream: Stream) -> list[torch.Tensor]:
        try:
            results = self._launch(context, inputs, stream)
        except BaseException:
            # Part of it may be queued: whatever that is, the context is freed after it, and used by no other call.
            self._pool.discard(context)
            try:
                context.done.record(stream)
            except BaseException:
                # Nothing says when the device is done with it, so it is never freed.
                _never_freed.append(context)
            raise
        self._pool.release(context)
        return results

    def _launch(self, context: Context, inputs: Sequence[torch.Tensor], stream: Stream) -> list[torch.Tensor]:
        # Why no two calls can disturb each other here: the context is this thread's alone from acquire to release.
        # Whatever an earlier call queued that touches the context's memory was queued before that call recorded
        # `done`; everything that this call queues comes after the wait for it, on one stream; and the next call's
        # wait binds to the record that this call makes last, because it can take the context only after that.
        #
        #     call A on stream 1                       call B on stream 2 (after A's release, on the host)
        #     wait done; copy in; launch; copy out
        #     record done  ------------------------->  wait done; copy in; launch; copy out; record done
        #
        # The wait is made on the same stream too: a stream's handle may have died and been given to a new stream.
        results, copies = context.outputs.allocate()
        stream.wait_event(context.done)
        for static, x in zip(context.inputs, inputs, strict=True):
            static.copy_(x)
        context.graph.launch(stream)
        for new, static in copies:
            new.copy_(static)
        context.done.record(stream)
        context.used_on = stream.stream_id
        return results

    def _run_on_cpu(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        results = self._run_kernels(inputs)
        self._counters.add("calls", "direct_calls")
        return results

    def _run_kernels(
        self, inputs: Sequence[torch.Tensor], kernels: Kernels | Instance | None = None
    ) -> Sequence[torch.Tensor]:
        """Queue the kernels on the current stream, under the flags that the engine was compiled with.

        Other threads may set flags while the kernels are queued (``torch.export`` does, for as long as it traces): so
        the flags are looked at before and after, and a run in which they changed is thrown away.
        """
        kernels = kernels or self._kernels
        if not self._sensitive:
            return kernels(self._canonical(inputs))
        for _ in range(3):
            self._check_flags()
            results = kernels(self._canonical(inputs))
            if self._flags.unchanged():
                return results
        raise FlagsChanged(
            "numerics flags changed again and again during a call, in another thread; set them once, before the calls"
        )

    def _run_direct(self, inputs: Sequence[torch.Tensor], stream: Stream) -> Sequence[torch.Tensor]:
        event = self._last_uses.get(stream.stream_id)
        if event is None:
            event = self._last_uses.setdefault(stream.stream_id, self._device.event())
        # The stream may be a new one under the handle of one that died: what that one still runs stays covered.
        stream.wait_event(event)
        try:
            return self._run_kernels(inputs)
        finally:
            event.record(stream)

    def _run_in_capture(self, inputs: Sequence[torch.Tensor], stream: Stream) -> Sequence[torch.Tensor]:
        # Not on the caller's stream itself: two graphs that a caller captures on one stream would have that stream's
        # cuBLAS workspace in common, and their replays on two streams would race for it. A lane has its own.
        device = self._device
        if self.program.data_dependent:
            raise NotCapturable(
                f"this call is inside a CUDA graph capture, and the model is {self.program.direct_only}, which needs"
                " the host to look at results. Call the engine outside the capture."
            )
        if self.program.on_cpu:
            raise NotCapturable(
                f"this call is inside a CUDA graph capture, and the model is {self.program.direct_only}: a graph would"
                " keep the values of this call. Call the engine outside the capture, or compile another one with all"
                f" inputs on {self.settings.torch_device}."
            )
        if self.program.is_empty:
            return []
        if self._sensitive:
            self._check_flags()  # before anything enters the capture
        with device.building():
            lane = device.join_capture(stream, self._index, keep=self)
            run = self._for_capture(stream, lane)
            # On the mere suspicion: memory that the lane first got inside the capture would be the caller's pool's.
            if self._sensitive:
                lane.load_workspaces()
        fork, join = device.event(), device.event()
        fork.record(stream)
        lane.stream.wait_event(fork)
        try:
            with device.on_stream(lane.stream):
                results = self._run_kernels(inputs, run)
            device.hand_over(results, stream)
            return results
        finally:
            # Also after an error: a lane left forked would invalidate the caller's capture as a whole.
            join.record(lane.stream)
            stream.wait_event(join)

    def _for_capture(self, stream: Stream, lane: Lane) -> Kernels | Instance:
        """What a call may run on ``lane``, in the capture under way on ``stream``, for as long as its graph lives."""
        if not isinstance(self._kernels, Instances):
            return self._kernels
        for kept in self._device.kept_by_capture(stream):
            if isinstance(kept, _Kept) and kept.owner is self and kept.lane is lane:
                return kept.member.run  # calls of one capture and stream follow each other
        member = self._kernels.take()
        if member is None:
            # Built now, it would load code, which invalidates a capture in the global mode.
            raise NotCapturable(
                f"this call is inside a CUDA graph capture, and no execution context of {self.backend} is left for"
                " it: each captured graph keeps one, of each stream that calls come on in it. Before the captures call"
                " engine.warm(captures=N), N being how many graphs you capture."
            )
        kept = _Kept(self, lane, member)
        self._device.join_capture(stream, self._index, keep=kept)
        return kept.member.run

    def _canonical(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Inputs with the strides and the alignment that the kernels were compiled (and algorithms chosen) for.

        On the CPU PyTorch's operators take any, and give eager's bits for it. Where there are graphs a call has the
        same bits with one and without.
        """
        if self.backend == "eager" and not self._device.has_streams:
            return list(inputs)
        device = self.settings.torch_device
        tensors = [
            x if spec.matches(x) else spec.empty(device).copy_(x) for x, spec in zip(inputs, self._specs, strict=False)
        ]
        return tensors + list(inputs[len(tensors) :])  # and numbers

    def _check_flags(self) -> None:
        if self._sensitive and not self._flags.unchanged():
            raise FlagsChanged(
                f"numerics flags changed since compile: {self._flags.changes()}. This call would not give the"
                " engine's bits. Set them back, or compile a new engine under the new flags."
            )

    # -- looking ------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """What a call does, as plain data."""
        return build_plan(
            self.program,
            self._specs,
            name=f"{self.settings.name}({self.signature})",
            device=self.settings.torch_device,
            backend=self.backend,
            captured=self.uses_graphs,
            reason=self.reason,
            graph=self._lowered.graph if isinstance(self._lowered, Stateful) else None,
            notes={f"{how} path, us a call": f"{us:.1f}" for how, us in self.measured.items()},
        )

    def summary(self) -> _summary.SignatureSummary:
        """What it consists of, as plain data. Floating-point operations are counted at the first time."""
        instances = self._kernels if isinstance(self._kernels, Instances) else None
        return _summary.SignatureSummary(
            signature=str(self.signature),
            captured=self.uses_graphs,
            backend=self.backend,
            reason=self.reason,
            uncaptured=self.program.uncaptured,
            operators=_summary.Shared(_summary.count_operators(self.program.module.graph), self.uses_graphs),
            flops=_summary.Shared(self._flops, self.uses_graphs),
            seconds=self.seconds,
            contexts=len(self._pool),
            bytes_per_context=self._pool.estimate if self.uses_graphs else 0,
            bytes=self._pool.nbytes + (instances.nbytes if instances is not None else 0),
            measured_us=self.measured,
        )

    @functools.cached_property
    def _flops(self) -> int | None:
        counts = flops_of(self.program.module.graph).values()
        return None if None in counts else sum(n for n in counts if n)

    def explain(self) -> list[str]:
        """Why it runs as it does, a line each."""
        settings = self.settings
        way = "captured: one CUDA graph launch a call" if self.uses_graphs else "direct"
        lines = [f"{self.signature}: {way} ({self.reason})"]
        lines += [f"  {line}" for line in self.summary().lines()]
        lines.append(f"  plan: {self.proof.pairs} conflicting pairs of accesses, all ordered")
        if isinstance(self._lowered, Stateful):
            lines += [f"  {line}" for line in self._lowered.describe()]
            if isinstance(self._kernels, Instances):
                if len(self._kernels):
                    lines.append(f"  instances of direct calls: {len(self._kernels)}, {self._kernels.nbytes} bytes")
                lines.append(f"  instances for callers' graphs: {self._kernels.spare} left")
        if self.backend != settings.backend and not self.program.is_empty:
            lines.append(f"  backend eager instead of {settings.backend}: {self._why_eager}")
        if self.uses_graphs:
            lines.append(f"  contexts: {len(self._pool)}, {self._pool.estimate} bytes each")
            lines.append(
                "  direct while a context is being built, and inside a caller's own capture (on a forked lane)"
            )
        elif settings.device.has_streams and self.program.data_dependent:
            lines.append("  the host waits in each call, as eager does for these operators")
        handed_back = sum(isinstance(o, AliasOutput) for o in self.program.outputs)
        if handed_back:
            lines.append(f"  {handed_back} output(s) are inputs or parameters (or views of them), handed back as such")
        if self._sensitive and settings.device.kind == "cuda" and settings.flags["torch.backends.cudnn.benchmark"]:
            lines.append("  not deterministic across threads: torch.backends.cudnn.benchmark was on at compile")
        if self.program.numbers is not None:
            lines.append(f"  {self.program.numbers.explain()}")
        if self.program.is_random:
            lines.append("  results differ from call to call: the model draws random numbers")
        lines += [f"  {note}" for note in self.program.notes]
        if self._sensitive and settings.device.kind != "cuda":
            lines.append("  CPU reductions give the same bits only under the same torch.get_num_threads()")
        return lines


#: Contexts of which nothing says when the device is done with them.
_never_freed: list[Context] = []
#: Latencies that differ by less than this share of them are alike.
_ALIKE = 0.1
#: Names contexts in ``_last_uses``.
_serial = itertools.count()
#: Arguments for a lock's acquire(): take it only if it is free.
_AT_ONCE = (False,)


@dataclass(frozen=True)
class _Cost:
    """Of a call, in microseconds: until its results are there, and until it returned to the host."""

    us: float
    host_us: float

    def is_better(self, other: _Cost) -> bool:
        """Whose results are there first; of two that differ by no more than such figures do, who returns first."""
        if abs(self.us - other.us) > _ALIKE * min(self.us, other.us):
            return self.us < other.us
        return self.host_us <= other.host_us

    def __str__(self) -> str:
        return f"{self.us:.0f} us (host {self.host_us:.1f})"


class _Kept:
    """An instance that the calls of ``owner`` on ``lane`` use in a caller's graph: the graph's, until it is gone."""

    def __init__(self, owner: Specialization, lane: Lane, member: Member) -> None:
        self.owner = owner
        self.lane = lane
        self.member = member


def _retire(device: Device, weights: list[torch.Tensor], last_uses: dict[int | str, Any]) -> None:
    device.retire(list(last_uses.values()), weights)
