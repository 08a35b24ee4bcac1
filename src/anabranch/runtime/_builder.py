"""Builds what the calls of one specialization run: lowers, warms up, compares, captures and measures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

from anabranch.backends import RESULTS_ONLY, Instance, Kernels, Options, Stateful, get_backend, of_one
from anabranch.devices import Stream
from anabranch.errors import BuildError, InputError
from anabranch.export import Program, is_random, shape_at
from anabranch.runtime._calls import Calls
from anabranch.runtime._comparison import why_off
from anabranch.runtime._context import Context
from anabranch.runtime._contexts import refuse_graphs
from anabranch.runtime._cost import measure
from anabranch.runtime._instances import Instances
from anabranch.runtime._phases import Clock
from anabranch.runtime._process import neutral, process
from anabranch.runtime._unit import Unit

_log = logging.getLogger("anabranch")
#: Of measuring a shape of a range, of which there are many: calls wait meanwhile for the interpreter.
_ROUNDS_OF_SHAPE = 8


@dataclass
class Choice:
    """What calls run, and why."""

    backend: str
    #: If it is not the engine's, why.
    why_eager: str
    #: Of the backend.
    kernels: Kernels | Stateful | None = None
    #: Of kernels that have state.
    instances: Instances | None = None
    uses_graphs: bool = False
    #: Why calls use graphs, or do not.
    reason: str = ""
    #: Figures for explain(): microseconds a call.
    measured: dict[str, float] = field(default_factory=dict)


class _Inputs(NamedTuple):
    """What kernels are run on while they are built."""

    values: Sequence[torch.Tensor]
    #: Has them be as they were before a run that writes them.
    renew: Callable[[Sequence[torch.Tensor]], None]
    is_made_up: bool

    @property
    def named(self) -> str:
        return "made-up inputs" if self.is_made_up else "the inputs given"


def _are_integers(x: torch.Tensor) -> bool:
    """Whether there are some that are not zero."""
    is_whole = not x.is_floating_point() and not x.is_complex() and x.dtype is not torch.bool
    return is_whole and bool(x.any())


class Builder:
    """One build. Owner: the thread that builds, with the build lock held. The host waits for lanes of its own only."""

    def __init__(self, unit: Unit, calls: Calls, clock: Clock, lowered: Choice | None = None) -> None:
        """``lowered``: of a build for many sizes, of which this one is for some: its kernels are taken."""
        self._unit, self._calls, self._clock = unit, calls, clock
        self._device, self._settings, self._program = unit.device, unit.settings, unit.program
        program = unit.program
        # What depends on data cannot be compiled for one shape: operators decide as they go.
        by_operators = program.data_dependent or program.is_empty or program.takes_numbers or program.on_cpu
        why = str(program.direct_only)
        if self._settings.backend == "tensorrt" and program.written:
            by_operators, why = True, RESULTS_ONLY
        self._choice = Choice("eager" if by_operators else self._settings.backend, why)
        self._lowered = lowered
        if lowered is not None:
            self._choice = Choice(lowered.backend, lowered.why_eager)

    def build(self, given: Sequence[torch.Tensor]) -> Choice:
        """Have everything made that calls need. Blocks until everything that was queued here is done.

        ``given``: inputs with values, for a device without streams, where they may be read at once.
        """
        choice, device, unit = self._choice, self._device, self._unit
        with neutral(device, unit.index):
            if device.has_streams:
                with device.relaxed():
                    choice.uses_graphs, choice.reason = self._build_on_lane()
            else:
                self._build_on_cpu(given)
                choice.reason = "the CPU has no streams to order and no graphs to capture"
        self._calls.ready(choice.uses_graphs, self._clock)
        if self._may_choose():
            self._choose_kernels()
        instances = self._calls.direct.instances
        if instances is not None:
            with self._clock.phase("warm-up"):
                if not choice.uses_graphs:
                    instances.prepare(1)
                if not unit.signature.is_range:
                    instances.prepare_spare(1)  # a call in a caller's capture cannot build any
        unit.watch.check()  # another thread may have set a flag while kernels were chosen and captured
        return choice

    def _build_on_cpu(self, given: Sequence[torch.Tensor]) -> None:
        inputs = _Inputs(self._unit.examples(), self._unit.renew, is_made_up=True)
        run = self._lower(inputs.values, None)
        if not self._program.direct_only and not self._program.is_empty:
            try:
                self._warm_up(run, inputs.values, times=1)
            except InputError:
                if not given:
                    raise
                inputs = self._of_the_caller(given, inputs.values)  # made-up values may be at fault
                self._warm_up(run, inputs.values, times=1)
            run = self._compare(run, inputs)
            if inputs.is_made_up and any(_are_integers(x) for x in given):
                # Made-up integers are zeros: a fault at others does not show there.
                self._compare(run, self._of_the_caller(given, inputs.values))
        self._set_kernels()

    def _of_the_caller(self, given: Sequence[torch.Tensor], made_up: Sequence[torch.Tensor]) -> _Inputs:
        """The inputs that were given at compile. The caller's own are for the call to write into."""
        unit, signature = self._unit, self._unit.signature
        values = [s.in_memory(x) for s, x in zip(signature.given, given, strict=True)]
        values += made_up[len(values) : len(unit.specs) - len(signature.numbers)]
        values += unit.numbers(signature.values)
        values = values if self._choice.backend == "eager" else unit.canonical(values)

        def renew(inputs: Sequence[torch.Tensor]) -> None:
            for i in unit.written:
                inputs[i].copy_(values[i])

        return _Inputs([x.clone() if i in unit.written else x for i, x in enumerate(values)], renew, is_made_up=False)

    def _build_on_lane(self) -> tuple[bool, str]:
        """Whether calls use graphs, and why."""
        device, settings = self._device, self._settings
        scratch = device.scratch(self._unit.index)
        lane = scratch.lane
        run: Any = None
        drained = False
        try:
            if self._unit.workspaces:
                # Before a compiler may run products: these would make them in other memory.
                lane.load_workspaces()
            with scratch.using():
                examples = self._unit.examples()
                run = self._lower(examples, lane.stream)
                if not self._program.data_dependent and not self._program.is_empty:
                    draws = self._program.is_random and self._choice.backend == "eager"
                    times = 2 if self._lowered is None else 1  # else variants of kernels are chosen
                    self._warm_up(self._without_draws if draws else run, examples, times)
                    run = self._compare(run, _Inputs(examples, self._unit.renew, is_made_up=True))
                self._set_kernels()
            with self._clock.phase("warm-up"):
                lane.stream.synchronize()
            drained = True
            reason = self._why_not_captured()
            if not reason and isinstance(self._choice.kernels, Stateful):
                reason = run.why_not_captured(lane.stream)
                if reason and settings.cuda_graphs:
                    refuse_graphs(reason)
            if reason:
                return False, reason
            with self._clock.phase("capture"):
                context = self._calls.contexts.first(scratch)
            if isinstance(context, str):
                return False, context
            if settings.cuda_graphs or not device.has_time:
                self._calls.contexts.pool.release(context)
                asked = "CUDA graphs were asked for"
                return True, asked if settings.cuda_graphs else "there is no time to measure on this device"
            with scratch.memory.using(), self._clock.phase("measuring"):
                return self._graph_or_direct(context, run, examples, lane.stream)
        finally:
            if not drained:
                lane.stream.synchronize()
            examples, run = [], None
            device.release_scratch(scratch)

    def _lower(self, examples: Sequence[torch.Tensor], own: Stream | None) -> Kernels | Instance:
        """Have the backend make the kernels; returns what this thread may run of them.

        ``own``: a stream that nobody else has meanwhile, where there are streams.
        """
        choice, settings, program = self._choice, self._settings, self._program
        if self._lowered is not None:
            choice.kernels = self._lowered.kernels
            assert choice.kernels is not None
            return of_one(choice.kernels, own, program.values)
        if settings.require_full and choice.backend != settings.backend and not program.is_empty:
            raise BuildError(
                f"require_full=True given, and backend {settings.backend!r} does not run this model:"
                f" {choice.why_eager}. Leave require_full out to have PyTorch run it."
            )
        with self._clock.phase("lowering"):
            options = Options(settings.require_full, settings.flags.tf32)
            lowered = get_backend(choice.backend).lower(program, examples, options)
            run = of_one(lowered, own)
        choice.kernels = lowered
        if program.sizes is not None:
            program.sizes.settle()
        return run

    def _set_kernels(self) -> None:
        assert self._choice.kernels is not None
        if self._lowered is not None:
            self._calls.direct.of_range = self._lowered.instances
        self._calls.set_kernels(self._choice.kernels, self._choice.backend)
        self._choice.instances = self._calls.direct.instances

    def _warm_up(self, run: Kernels | Instance, examples: Sequence[torch.Tensor], times: int) -> None:
        """Run on made-up values: loads and tunes kernels, which no call and no capture may have to do.

        Export checks shapes; that an operator takes these dtypes shows here only.
        """
        try:
            with self._clock.phase("warm-up"):
                for _ in range(times):
                    self._unit.resetting(run)(examples)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # in torch.linalg, not in its stubs
            pass  # the values were at fault (not positive definite, say); the caller's own may do
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as e:  # Inductor asserts strides
            self._device.check_error(e)
            why = (str(e).splitlines() or [""])[0]
            raise InputError(
                f"the model does not run on inputs like these ({self._unit.signature}): {type(e).__name__}: {why}."
                " Expected inputs that model(*inputs) runs on; try that first."
            ) from e

    def _without_draws(self, inputs: Sequence[torch.Tensor]) -> Any:
        """Run the operators but for those that draw: the next draws are the user's, and other threads'."""
        return _WithoutDraws(self._program).run(*self._program.weights_for_eager(), *inputs)

    def _compare(self, run: Kernels | Instance, inputs: _Inputs) -> Kernels | Instance:
        """Have PyTorch's operators run the model where compiled kernels give other results; returns what runs."""
        choice, settings = self._choice, self._settings
        # In a forked child operators may wait for ever for OpenMP's threads, which are its parent's.
        if choice.backend == "eager" or process.generation or self._lowered:
            return run
        try:
            with self._clock.phase("warm-up"):
                inputs.renew(inputs.values)
                why = why_off(self._program, run, inputs.values, inputs.named)
        except Exception as e:  # made-up values may be at fault, or memory is short
            self._device.check_error(e)
            _log.info("%s: kernels were not compared: %s: %s", settings.name, type(e).__name__, str(e))
            return run
        if not why:
            return run
        if settings.require_full:
            raise BuildError(
                f"require_full=True given, and {why}: a fault of {choice.backend!r}. Leave require_full out to have"
                " PyTorch's operators run the model."
            )
        text = "%s(%s): %s: a fault of %r. PyTorch's operators run the model instead."
        _log.warning(text, settings.name, self._unit.signature, why, choice.backend)
        choice.backend, choice.why_eager = "eager", why
        return self._lower(inputs.values, None)

    def _why_not_captured(self) -> str:
        if self._program.is_empty:
            return "nothing is computed"
        if self._program.direct_only:
            return f"not captured: {self._program.direct_only}"
        if self._settings.cuda_graphs is False:
            return "CUDA graphs were turned off"
        if self._program.sizes is not None:
            return "not captured: for many sizes"
        return ""

    def _graph_or_direct(
        self, context: Context, run: Kernels | Instance, examples: Sequence[torch.Tensor], stream: Stream
    ) -> tuple[bool, str]:
        """Whether graphs measured faster, with the figures. The context is idle afterwards, or given up."""
        calls, pool = self._calls, self._calls.contexts.pool
        with self._device.on_stream(stream), calls.trying_graph(context, run, stream) as ways:
            rounds = {} if self._lowered is None else {"rounds": _ROUNDS_OF_SHAPE}
            ways = [self._unit.resetting(way) for way in ways]
            graph, direct = measure(ways, (examples, self._unit.examples()), stream, **rounds)
        self._choice.measured = {"graph": graph.us, "direct": direct.us}
        is_better = graph.is_better(direct)
        (pool.release if is_better else pool.discard)(context)
        return is_better, f"measured {graph} as a graph, {direct} direct"

    def _may_choose(self) -> bool:
        """Whether calls run direct by compiled kernels that nobody asked for."""
        choice = self._choice
        return (
            not (choice.uses_graphs or self._program.is_empty or self._settings.backend_is_given or self._lowered)
            and choice.backend != "eager"
            and not isinstance(choice.kernels, Stateful)
            and not self._settings.require_full
            and self._device.has_streams
            and self._device.has_time
        )

    def _choose_kernels(self) -> None:
        """Have PyTorch's operators run direct calls where they cost less than compiled kernels.

        A compiler's wrapper is Python, which costs more than a small operator, and of many threads one at a time.
        """
        device, choice, unit = self._device, self._choice, self._unit
        operators: Any = get_backend("eager").lower(self._program, [], Options(False, self._settings.flags.tf32))
        taken = False
        with neutral(device, unit.index), device.relaxed(), self._clock.phase("measuring"):
            scratch = device.scratch(unit.index)
            examples: list[Any] = []
            try:
                if unit.workspaces:
                    scratch.lane.load_workspaces()  # first of all, as in _build_on_lane
                with scratch.using(), self._calls.trying_operators(operators) as ways:
                    examples = [unit.examples(), unit.examples()]
                    compiled, eager = measure([unit.resetting(way) for way in ways], examples, scratch.stream)
                taken = eager.is_better(compiled)
                choice.measured |= {"compiled": compiled.us, "operators": eager.us}
            except torch.OutOfMemoryError:
                pass
            except Exception as e:  # made-up values may be at fault
                device.check_error(e)
                text = "%s: compiled kernels run direct calls: %s: %s"
                _log.info(text, self._settings.name, type(e).__name__, str(e))
            finally:
                scratch.stream.synchronize()
                examples = []
                device.release_scratch(scratch)
        if taken:
            choice.kernels = operators
            choice.backend = "eager"
            choice.why_eager = f"measured {eager} by PyTorch's operators, {compiled} by compiled kernels"
            self._set_kernels()


class _WithoutDraws(fx.Interpreter):
    """Has zeros in the place of what a graph draws."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self._values = program.values

    def run_node(self, n: fx.Node) -> Any:
        if not is_random(n):
            return super().run_node(n)

        def zeros(x: torch.Tensor) -> torch.Tensor:
            strides = shape_at(x.stride(), self._values)
            return torch.empty_strided(shape_at(x.shape, self._values), strides, dtype=x.dtype, device=x.device).zero_()

        return pytree.tree_map_only(torch.Tensor, zeros, n.meta["val"])
