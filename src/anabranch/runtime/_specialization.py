"""An engine for one input signature: what it is made of, and what it says of itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from anabranch import _activity, _sync
from anabranch.backends import Stateful, exceptions
from anabranch.export import AliasOutput, Program, Room, Signature, quantized_lines, rooms
from anabranch.plan import Plan
from anabranch.plan._join import join_plans
from anabranch.plan._planner import Planned, called, plan_program
from anabranch.plan._sessions import two_calls
from anabranch.race import PlanProof, check_plan
from anabranch.runtime import _summary
from anabranch.runtime._builder import Builder, Choice
from anabranch.runtime._calls import Calls
from anabranch.runtime._flops import flops_of, result_type
from anabranch.runtime._phases import Clock
from anabranch.runtime._pieces import Pieces, build_pieces
from anabranch.runtime._process import process
from anabranch.runtime._unit import Unit

#: Of which is remembered how far counters may get.
_MOST_SHAPES = 1024


class Specialization:
    """The calls of one signature, built and proved. Threads: any; immutable, but for the contexts that calls have."""

    def __init__(
        self,
        unit: Unit,
        make_calls: Callable[[Unit], Calls],
        given: Sequence[torch.Tensor],
        clock: Clock,
        of_range: Specialization | None = None,
    ) -> None:
        """Compile. Called with the build lock held; blocks until everything that was queued here is done.

        ``make_calls``: of the engine's runtime. ``given``: see :meth:`Builder.build`. ``clock``: of the build that this
        is the end of. ``of_range``: one for many sizes that has the kernels for these.
        """
        self.unit = unit
        self.calls: Any = make_calls(unit)
        #: Whether it serves many sizes.
        self.is_range = unit.signature.is_range
        lowered = of_range.choice if of_range is not None else None
        self.choice: Choice = Builder(unit, self.calls, clock, lowered).build(given)
        built = "" if self.is_range else build_pieces(unit, self.calls, self.choice, make_calls, clock)
        #: What runs calls, where that is several pieces.
        self.pieces: Pieces | None = None
        self._why_whole = ""
        if isinstance(built, str):
            self._why_whole = built
        else:
            self.calls = self.pieces = built
        self._rooms = self._rooms_for(unit.program.values) if unit.program.sizes is None else []
        self._rooms_of_shapes: dict[Any, list[Room]] = _sync.dict_("rooms")
        #: Proofs of plans for single shapes of this range, by whether they are captured. With the build lock held.
        self._proofs: dict[bool, PlanProof] = {}
        #: That no two steps of the plan can race. Raises PlanError before anything could run.
        self.proof = self._prove(of_range)
        if of_range is None:
            unit.counters.add("specializations")
        #: Of the build, by phase.
        self.seconds = clock.read()

    def _prove(self, of_range: Specialization | None) -> PlanProof:
        # The steps of a shape are those of any other shape in the range, whose buffers have other sizes; which of them
        # are one buffer, and which steps use it, is the same.
        proofs = of_range._proofs if of_range is not None else {}
        if self.is_captured not in proofs:
            plan = self.plan()
            proofs[self.is_captured] = check_plan(plan).raise_if_unordered()
            if self.program.state:
                for same_session in (True, False):
                    check_plan(two_calls(plan, same_session)).raise_if_unordered()
        return proofs[self.is_captured]

    @property
    def program(self) -> Program:
        return self.unit.program

    @property
    def signature(self) -> Signature:
        return self.unit.signature

    @functools.cached_property
    def why_no_graphs(self) -> str:
        """Of one for many sizes: why none of them is captured, or nothing."""
        settings = self.unit.settings
        if not settings.device.has_streams:
            return "the CPU has no graphs to capture"
        if settings.cuda_graphs is False:
            return "CUDA graphs were turned off"
        return "nothing is computed" if self.program.is_empty else self.program.why_not_by_shape

    @property
    def is_captured(self) -> bool:
        """Whether calls use a CUDA graph, in one of their pieces at least."""
        return self.choice.uses_graphs or self.pieces is not None

    @property
    def loads_code(self) -> bool:
        """Whether its backend loads code for each context, so that the host has to wait where one is freed."""
        return isinstance(self.choice.kernels, Stateful)

    def warm(self, contexts: int, captures: int) -> int:
        """Build until there are ``contexts`` of them or a limit is reached; returns how many there are.

        Of kernels with state: instances for as many direct calls, where calls run direct, and ``captures`` of them for
        callers' graphs.
        """
        if self.pieces is not None:
            return self.pieces.warm(contexts)
        instances = self.calls.direct.instances
        if instances is not None:
            with process.build_lock, _activity.building():
                instances.prepare_spare(captures)
                if not self.choice.uses_graphs:
                    return instances.prepare(contexts)
        return self.calls.contexts.warm(contexts) if self.choice.uses_graphs else 0

    def rooms(self, leaves: Sequence[Any]) -> list[Room]:
        """How far the counters among its state may have got in a call with these leaves. Computed once for each
        shape."""
        sizes = self.program.sizes
        if sizes is None:
            return self._rooms
        shapes = tuple(tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor))
        found = self._rooms_of_shapes.get(shapes)
        if found is None:
            if len(self._rooms_of_shapes) >= _MOST_SHAPES:
                self._rooms_of_shapes.clear()
            found = self._rooms_of_shapes[shapes] = self._rooms_for(sizes.values(shapes))
        return found

    def _rooms_for(self, values: Mapping[Any, int] | None) -> list[Room]:
        graph, state = self.program.module.graph, self.program.state
        nodes = {n.meta["state"]: n for n in graph.find_nodes(op="placeholder") if "state" in n.meta}
        with _disable_current_modes():
            return rooms(graph, nodes, {s.name: s.count for s in state if s.count is not None}, values)

    def retire(self) -> None:
        """Give up all contexts as they become idle; calls that come here nevertheless run direct."""
        contexts = self.calls.contexts
        contexts.pool.may_grow = False
        contexts.pool.drain()

    def trim(self) -> None:
        """Give up the contexts that are idle; calls in flight keep theirs, and later calls build new ones."""
        if self.pieces is not None:
            self.pieces.trim()
            return
        self.calls.contexts.trim()
        if self.calls.direct.instances is not None:
            self.calls.direct.instances.trim()

    # -- looking ------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """What a call does, as plain data."""
        choice, unit = self.choice, self.unit
        name = f"{unit.settings.name}({unit.signature})"
        notes = {f"{how} path, us a call": f"{us:.1f}" for how, us in choice.measured.items()}
        if self.pieces is not None:
            planned = [(_plan_of(p.unit, p.choice, name, {}), p.piece.takes) for p in self.pieces.parts]
            given = len(unit.signature.given)
            inputs = [called(i, given, unit.states) for i in range(len(unit.specs))]
            return join_plans(planned, self.pieces.results, inputs, unit.settings.backend, notes)
        return _plan_of(unit, choice, name, notes).plan

    def summary(self) -> _summary.SignatureSummary:
        """What it consists of, as plain data. Floating-point operations are counted at the first time."""
        choice, program, pieces = self.choice, self.program, self.pieces
        instances = None if pieces is not None else self.calls.direct.instances
        total = _summary.count_operators(program.module.graph)
        captured, flops = (total, self._flops) if choice.uses_graphs else (0, 0)
        backend, reason = choice.backend, choice.reason
        described: tuple[_summary.PieceSummary, ...] = ()
        pools = [self.calls.contexts.pool] if choice.uses_graphs else []
        if pieces is not None:
            pools = [part.calls.contexts.pool for part in pieces.captured]
            # What is computed anew in several pieces counts once, as direct.
            counted = sum(part.piece.operators for part in pieces.captured)
            captured, flops = min(counted, total), self._captured_flops
            backend = pieces.captured[0].choice.backend
            reason = f"in pieces: {len(pools)} of {len(pieces.parts)} captured; {program.direct_only}"
            described = tuple(
                _summary.PieceSummary(p.choice.uses_graphs, p.choice.backend, p.piece.operators, p.why_direct)
                for p in pieces.parts
            )
        return _summary.SignatureSummary(
            signature=str(self.signature),
            captured=bool(pools),
            backend=backend,
            reason=reason,
            uncaptured=program.uncaptured,
            operators=_summary.Shared(total, captured),
            flops=_summary.Shared(self._flops, flops),
            seconds=self.seconds,
            contexts=sum(map(len, pools)),
            bytes_per_context=sum(pool.estimate for pool in pools),
            bytes=sum(pool.nbytes for pool in pools) + (instances.nbytes if instances is not None else 0),
            measured_us=choice.measured,
            state=_summary.described(program.state),
            writes=self._inputs_written,
            pieces=described,
            choices=program.choices,
            share_in_half=self._share_in_half,
        )

    @property
    def _inputs_written(self) -> list[str]:
        given = len(self.signature.given)
        return [self.unit.name_of(i) for i in self.unit.written if i < given]

    @functools.cached_property
    def _flops(self) -> int | None:
        return _sum(self.program)

    @functools.cached_property
    def _share_in_half(self) -> float | None:
        """In mixed precision: the part of the floating-point operations in half precision, where both are known."""
        choices, total = self.program.choices, self._flops
        if choices is None or not total:
            return None
        counts = flops_of(self.program.module.graph)
        nodes = (n for n in self.program.module.graph.nodes if n.name in counts)
        return sum(counts[n.name] or 0 for n in nodes if result_type(n) is choices.dtype) / total

    @functools.cached_property
    def _captured_flops(self) -> int | None:
        assert self.pieces is not None
        counts = [_sum(part.piece.program) for part in self.pieces.captured]
        return None if None in counts else sum(n for n in counts if n)

    def explain(self) -> list[str]:
        """Why it runs as it does, a line each."""
        choice, program, settings, pieces = self.choice, self.program, self.unit.settings, self.pieces
        device, reads_flags = settings.device, self.unit.watch.reads_any
        way = "captured: one CUDA graph launch a call" if choice.uses_graphs else "direct"
        way = way if pieces is None else f"in {len(pieces.parts)} pieces, {len(pieces.captured)} of them captured"
        lines = [f"{self.signature}: {way} ({choice.reason})"]
        lines += [f"  {line}" for line in self.summary().lines()]
        lines.append(f"  plan: {self.proof.pairs} conflicting pairs of accesses, all ordered")
        if isinstance(choice.kernels, Stateful):
            lines += [f"  {line}" for line in choice.kernels.describe()]
        if self._why_whole:
            lines.append(f"  {self._why_whole}")
        instances = None if pieces is not None else self.calls.direct.instances
        if instances is not None:
            if len(instances):
                lines.append(f"  instances of direct calls: {len(instances)}, {instances.nbytes} bytes")
            lines.append(f"  instances for callers' graphs: {instances.spare} left")
        if pieces is not None:
            n, size = sum(len(p.calls.contexts.pool) for p in pieces.captured), self.summary().bytes_per_context
            lines.append(f"  contexts: {n}, each of one piece; {size} bytes for one of each")
            lines.append("  in one piece inside a caller's own capture, if it can be captured at all")
        elif choice.backend != settings.backend and not program.is_empty:
            lines.append(f"  backend eager instead of {settings.backend}: {choice.why_eager}")
        if choice.uses_graphs:
            pool = self.calls.contexts.pool
            lines.append(f"  contexts: {len(pool)}, {pool.estimate} bytes each")
            lines.append(
                "  direct while a context is being built, and inside a caller's own capture (on a forked lane)"
            )
        elif device.has_streams and program.data_dependent:
            lines.append("  the host waits in each call, as eager does for these operators")
        if program.state:
            names = ", ".join(s.name for s in program.state)
            size = sum(s.initial.nbytes for s in program.state)
            lines.append(f"  state of a session: {names}; {size} bytes")
        if self._inputs_written:
            lines.append(f"  writes into what it is given: {', '.join(self._inputs_written)}")
        if choice.backend == "eager" and pieces is None and program.copied_bytes:
            what = "state" if program.state else "what it writes"
            lines.append(
                f"  copies {program.copied_bytes} bytes of {what} a call: it is not all computed where it lies"
            )
        handed_back = sum(isinstance(o, AliasOutput) for o in program.outputs)
        if handed_back:
            lines.append(f"  {handed_back} output(s) are inputs or parameters (or views of them), handed back as such")
        if reads_flags and device.kind == "cuda" and settings.flags["torch.backends.cudnn.benchmark"]:
            lines.append("  not deterministic across threads: torch.backends.cudnn.benchmark was on at compile")
        if program.numbers is not None:
            lines.append(f"  {program.numbers.explain()}")
        if program.is_random:
            lines.append("  results differ from call to call: the model draws random numbers")
        lines += [f"  {note}" for note in program.notes]
        if choice.backend in ("inductor", "tensorrt"):
            lines += [
                f"  at the ends of the range, other than eager: {text}"
                for text in exceptions(program.module.graph, device.kind)
            ]
        lines += [f"  {line}" for line in quantized_lines(program.module.graph, choice.backend)]
        if program.choices is not None:
            share = self._share_in_half
            told = f"  {share:.1%} of floating-point operations in half precision" if share is not None else ""
            lines += [*filter(None, [told]), *(f"  {line}" for line in program.choices.lines())]
        if reads_flags and device.kind != "cuda":
            lines.append("  CPU reductions give the same bits only under the same torch.get_num_threads()")
        return lines + [f"  {line}" for line in self.calls.explain()]


def _plan_of(unit: Unit, choice: Choice, name: str, notes: Mapping[str, str]) -> Planned:
    return plan_program(
        unit.program,
        unit.specs,
        name=name,
        device=unit.torch_device,
        backend=choice.backend,
        captured=choice.uses_graphs,
        reason=choice.reason,
        graph=choice.kernels.graph if isinstance(choice.kernels, Stateful) else None,
        notes=notes,
    )


def _sum(program: Program) -> int | None:
    counts = flops_of(program.module.graph).values()
    return None if None in counts else sum(n for n in counts if n)
