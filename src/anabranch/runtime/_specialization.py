"""An engine for one input signature: what it is made of, and what it says of itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from anabranch import _activity
from anabranch.backends import Stateful
from anabranch.export import AliasOutput, Program, Signature
from anabranch.plan import Plan
from anabranch.plan._planner import build_plan
from anabranch.race import check_plan
from anabranch.runtime import _summary
from anabranch.runtime._builder import Builder
from anabranch.runtime._calls import Calls
from anabranch.runtime._flops import flops_of
from anabranch.runtime._phases import Clock
from anabranch.runtime._process import process
from anabranch.runtime._unit import Unit


class Specialization:
    """The calls of one signature, built and proved. Threads: any; immutable, but for the contexts that calls have."""

    def __init__(
        self,
        unit: Unit,
        make_calls: Callable[[Unit], Calls],
        given: Sequence[torch.Tensor],
        clock: Clock,
    ) -> None:
        """Compile. Called with the build lock held; blocks until everything that was queued here is done.

        ``make_calls``: of the engine's runtime. ``given``: see :meth:`Builder.build`. ``clock``: of the build that this
        is the end of.
        """
        self.unit = unit
        self.calls = make_calls(unit)
        self.choice = Builder(unit, self.calls, clock).build(given)
        #: That no two steps of the plan can race. Raises PlanError before anything could run.
        self.proof = check_plan(self.plan()).raise_if_unordered()
        unit.counters.add("specializations")
        #: Of the build, by phase.
        self.seconds = clock.read()

    @property
    def program(self) -> Program:
        return self.unit.program

    @property
    def signature(self) -> Signature:
        return self.unit.signature

    @property
    def loads_code(self) -> bool:
        """Whether its backend loads code for each context, so that the host has to wait where one is freed."""
        return isinstance(self.choice.kernels, Stateful)

    def warm(self, contexts: int, captures: int) -> int:
        """Build until there are ``contexts`` of them or a limit is reached; returns how many there are.

        Of kernels with state: instances for as many direct calls, where calls run direct, and ``captures`` of them for
        callers' graphs.
        """
        instances = self.calls.direct.instances
        if instances is not None:
            with process.build_lock, _activity.building():
                instances.prepare_spare(captures)
                if not self.choice.uses_graphs:
                    return instances.prepare(contexts)
        return self.calls.contexts.warm(contexts) if self.choice.uses_graphs else 0

    def trim(self) -> None:
        """Give up the contexts that are idle; calls in flight keep theirs, and later calls build new ones."""
        self.calls.contexts.trim()
        if self.calls.direct.instances is not None:
            self.calls.direct.instances.trim()

    # -- looking ------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """What a call does, as plain data."""
        choice, unit = self.choice, self.unit
        return build_plan(
            unit.program,
            unit.specs,
            name=f"{unit.settings.name}({unit.signature})",
            device=unit.torch_device,
            backend=choice.backend,
            captured=choice.uses_graphs,
            reason=choice.reason,
            graph=choice.kernels.graph if isinstance(choice.kernels, Stateful) else None,
            notes={f"{how} path, us a call": f"{us:.1f}" for how, us in choice.measured.items()},
        )

    def summary(self) -> _summary.SignatureSummary:
        """What it consists of, as plain data. Floating-point operations are counted at the first time."""
        choice, program, pool = self.choice, self.program, self.calls.contexts.pool
        instances = self.calls.direct.instances
        return _summary.SignatureSummary(
            signature=str(self.signature),
            captured=choice.uses_graphs,
            backend=choice.backend,
            reason=choice.reason,
            uncaptured=program.uncaptured,
            operators=_summary.Shared(_summary.count_operators(program.module.graph), choice.uses_graphs),
            flops=_summary.Shared(self._flops, choice.uses_graphs),
            seconds=self.seconds,
            contexts=len(pool),
            bytes_per_context=pool.estimate if choice.uses_graphs else 0,
            bytes=pool.nbytes + (instances.nbytes if instances is not None else 0),
            measured_us=choice.measured,
        )

    @functools.cached_property
    def _flops(self) -> int | None:
        counts = flops_of(self.program.module.graph).values()
        return None if None in counts else sum(n for n in counts if n)

    def explain(self) -> list[str]:
        """Why it runs as it does, a line each."""
        choice, program, settings = self.choice, self.program, self.unit.settings
        device, reads_flags = settings.device, self.unit.watch.reads_any
        way = "captured: one CUDA graph launch a call" if choice.uses_graphs else "direct"
        lines = [f"{self.signature}: {way} ({choice.reason})"]
        lines += [f"  {line}" for line in self.summary().lines()]
        lines.append(f"  plan: {self.proof.pairs} conflicting pairs of accesses, all ordered")
        if isinstance(choice.kernels, Stateful):
            lines += [f"  {line}" for line in choice.kernels.describe()]
        instances = self.calls.direct.instances
        if instances is not None:
            if len(instances):
                lines.append(f"  instances of direct calls: {len(instances)}, {instances.nbytes} bytes")
            lines.append(f"  instances for callers' graphs: {instances.spare} left")
        if choice.backend != settings.backend and not program.is_empty:
            lines.append(f"  backend eager instead of {settings.backend}: {choice.why_eager}")
        if choice.uses_graphs:
            pool = self.calls.contexts.pool
            lines.append(f"  contexts: {len(pool)}, {pool.estimate} bytes each")
            lines.append(
                "  direct while a context is being built, and inside a caller's own capture (on a forked lane)"
            )
        elif device.has_streams and program.data_dependent:
            lines.append("  the host waits in each call, as eager does for these operators")
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
        if reads_flags and device.kind != "cuda":
            lines.append("  CPU reductions give the same bits only under the same torch.get_num_threads()")
        return lines + [f"  {line}" for line in self.calls.explain()]
