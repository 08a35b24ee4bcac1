"""Runs samples through a model in float32, or float64, and beside it in half precision, and proposes which operators
stay out of it.

Errors are relative to the norm of each result. Effects of operators are taken to be independent: their squares add up.
What is proposed is run, and tightened until it keeps the budget, so that this is a guess about the order only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from anabranch._version import __version__
from anabranch.calibrate._operator import Finding, InHalf, Progress, relative_error
from anabranch.calibrate._reference import Reference, Values
from anabranch.calibrate._samples import Sample
from anabranch.errors import InputError
from anabranch.export import (
    EXACT,
    PRODUCTS,
    Mixed,
    Mixing,
    Program,
    Run,
    Snapshot,
    TensorSpec,
    export_program,
    packet,
    places,
    source_of,
)
from anabranch.runtime import flops_of

#: A guess that did not keep the budget is made again for so much of it.
_TIGHTER = 0.7
_MOST_GUESSES = 16


@dataclass
class Calibration:
    """What was found. ``operators``: worst first; ``error``: of the proposal, relative, on the worst sample.
    ``reference``: what errors are of, ``"float32"`` or ``"float64"``.

    ``plain``, ``proposed``: the error at each operator's result, by its place, where everything is in half precision,
    and as proposed.
    """

    mixed: Mixed
    budget: float
    error: float
    #: The part of the floating-point operations in half precision, from 0 to 1.
    share_half: float
    samples: int
    reference: str
    operators: list[Finding]
    plain: dict[str, float] = field(default_factory=dict)
    proposed: dict[str, float] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """For ``json.dumps``; :meth:`anabranch.Mixed.load` reads it. What is not finite is None."""

        def plain(x: Any) -> Any:
            return None if isinstance(x, float) and not math.isfinite(x) else x

        return {
            "anabranch": __version__,
            "dtype": str(self.mixed.dtype).removeprefix("torch."),
            "keep": list(self.mixed.keep),
            "half": list(self.mixed.half),
            "budget": self.budget,
            "error": plain(self.error),
            "share_half": self.share_half,
            "samples": self.samples,
            "reference": self.reference,
            "operators": [{k: plain(v) for k, v in asdict(f).items()} for f in self.operators],
        }


def calibrate(
    model: torch.nn.Module | ExportedProgram,
    samples: Sequence[Sample],
    *,
    dtype: torch.dtype = torch.float16,
    budget: float = 1e-3,
    reference: torch.dtype = torch.float32,
    progress: Progress = lambda done, total: None,
) -> Calibration:
    """Measure ``model``, in float32, on samples of one shape, and propose a :class:`~anabranch.Mixed` of ``dtype``.

    ``reference``: ``torch.float32``, or ``torch.float64``: then errors are those beside the same model with all that is
    float32 in float64, and float32's own rounding counts, too. (An operator that knows no float64 is in float32.)
    The proposal has the most floating-point operations in ``dtype`` that keep the relative error of every floating
    result within ``budget``, on the worst sample. Raises :class:`~anabranch.errors.InputError` where there is nothing
    to measure, and what :func:`anabranch.compile` raises of a model that cannot be exported.
    """
    if reference not in (torch.float32, torch.float64):
        raise InputError(f"reference={reference} given; expected torch.float32 or torch.float64")
    return _Calibrator(model, samples, dtype, budget, Reference(reference)).run(progress)


class _Calibrator:
    def __init__(
        self, model: Any, samples: Sequence[Sample], dtype: torch.dtype, budget: float, reference: Reference
    ) -> None:
        self._samples, self._dtype, self._budget, self._reference = samples, dtype, budget, reference
        with torch.no_grad():
            self._snapshot = Snapshot.of(model)
            self._program = self._export(None)
            self._expected = [_floats(self._values(s).kept[self._program.module.graph.output_node()]) for s in samples]
        if not any(self._expected):
            raise InputError("the model returns no floating-point tensors; expected some whose error can be measured")
        if any(not bool(x.isfinite().any()) for results in self._expected for x in results if x.numel()):
            raise InputError(
                f"a result of the model has no finite element in {reference.name}; give samples on which it is right"
            )
        self._half = InHalf(dtype, reference)
        graph = self._program.module.graph
        self._places = {n: str(p) for n, p in places(graph).items()}
        self._flops = {n: count or 0 for n in graph.nodes if (count := flops_of(graph).get(n.name)) is not None}

    def run(self, progress: Progress) -> Calibration:
        with torch.no_grad():
            findings = self._measure(progress)
            mixed, program, error = self._propose(findings)
            plain, proposed = self._depths(None), self._depths(program)
        total = sum(f.flops for f in findings.values())
        assert program.choices is not None
        in_half = set(program.choices.half)
        for f in findings.values():
            f.half = f.place in in_half
        share = sum(f.flops for f in findings.values() if f.half) / total if total else 0.0
        operators = sorted(findings.values(), key=lambda f: f.rank)
        return Calibration(
            mixed, self._budget, error, share, len(self._samples), self._reference.name, operators, plain, proposed
        )

    # -- running ------------------------------------------------------------------------------------------------

    def _export(self, mixed: Mixed | None) -> Program:
        args, kwargs = self._samples[0]
        cast = Mixing(self._snapshot, mixed) if mixed is not None else None
        return export_program(self._snapshot, args, kwargs, cast)

    def _given(self, program: Program, sample: Sample) -> dict[fx.Node, Any]:
        tensors = [TensorSpec.of(x).in_memory(x) for x in pytree.tree_leaves(sample) if isinstance(x, torch.Tensor)]
        values = [*program.weights, *tensors, *(s.initial for s in program.state)]
        return dict(zip(program.module.graph.find_nodes(op="placeholder"), values, strict=True))

    def _values(self, sample: Sample) -> Values:
        """Of every node, as the reference has them."""
        values = Values(self._program.module, self._reference)
        values.on(self._reference.given(self._given(self._program, sample)))
        return values

    def _results(self, program: Program, sample: Sample) -> list[torch.Tensor]:
        return _floats(Run(program.module).on(self._given(program, sample)))

    # -- one by one ---------------------------------------------------------------------------------------------

    def _measure(self, progress: Progress) -> dict[fx.Node, Finding]:
        nodes = [n for n in self._places if _is_measured(n)]
        findings = {n: Finding(self._places[n], i, source_of(n), self._flops.get(n, 0)) for i, n in enumerate(nodes)}
        for turn, sample in enumerate(self._samples):
            values = self._values(sample)
            for i, node in enumerate(nodes):
                self._measure_one(findings[node], node, values, self._expected[turn])
                progress(turn * len(nodes) + i + 1, len(nodes) * len(self._samples))
        squares = sum(f.effect**2 for f in findings.values() if math.isfinite(f.effect))
        for f in findings.values():
            f.share = f.effect**2 / squares if math.isfinite(f.effect) and squares else float(f.effect > 0)
        return findings

    def _measure_one(self, finding: Finding, node: fx.Node, values: Values, expected: list[torch.Tensor]) -> None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values.kept[n])
        try:
            actual = self._half.compute(node, args, kwargs)
        except (RuntimeError, TypeError) as e:
            finding.refused = (str(e).splitlines() or [""])[0]
            return
        operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self._half.compare(finding, operands, actual, values.kept[node])
        try:
            results = _floats(values.behind(node, actual))
            finding.effect = max(finding.effect, relative_error(results, expected))
        except RuntimeError:  # what follows cannot bear such values
            finding.effect = math.inf

    # -- together -----------------------------------------------------------------------------------------------

    def _propose(self, findings: Mapping[fx.Node, Finding]) -> tuple[Mixed, Program, float]:
        products = [f for n, f in findings.items() if packet(n) in PRODUCTS]
        out = [f for f in products if f.refused or f.leaves_the_range or not math.isfinite(f.effect)]
        rest = sorted((f for f in products if f not in out), key=lambda f: f.effect**2 / max(f.flops, 1))
        target = self._budget
        for guess in range(_MOST_GUESSES):
            # Those with the least error for their work go first.
            taken, spent = 0, 0.0
            while taken < len(rest) and spent + rest[taken].effect ** 2 <= target**2:
                spent += rest[taken].effect ** 2
                taken += 1
            if guess == _MOST_GUESSES - 1:
                taken = 0
            keep = sorted((*out, *rest[taken:]), key=lambda f: f.depth)
            half = sorted(rest[:taken], key=lambda f: f.depth)
            mixed = Mixed(self._dtype, [f.place for f in keep], [f.place for f in half])
            program = self._export(mixed)
            pairs = zip(self._samples, self._expected, strict=True)
            error = max(relative_error(self._results(program, s), e) for s, e in pairs)
            if error <= self._budget or not taken:
                break
            target *= _TIGHTER
        return mixed, program, error

    def _depths(self, program: Program | None) -> dict[str, float]:
        """The error at each operator's result, on the first sample: all in half precision, or as ``program`` is."""
        sample = self._samples[0]
        values = self._values(sample)
        if program is None:
            run: Values = _AllInHalf(self._program.module, self._reference, self._half)
            found = self._places
            run.on(self._reference.given(self._given(self._program, sample)))
        else:
            run = Values(program.module, Reference(torch.float32))
            found = {n: str(p) for n, p in places(program.module.graph).items()}
            run.on(self._given(program, sample))
        actual = {place: run.kept[n] for n, place in found.items() if n in run.kept}
        return {
            place: relative_error(_floats(actual[place]), _floats(values.kept[n]))
            for n, place in self._places.items()
            if _is_measured(n) and place in actual
        }


class _AllInHalf(Values):
    """Everything in half precision; in the reference's only what half precision cannot compute."""

    def __init__(self, gm: fx.GraphModule, reference: Reference, half: InHalf) -> None:
        super().__init__(gm, reference)
        self._half = half

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        try:
            return self._half.compute(self._node, args, kwargs)
        except (RuntimeError, TypeError):
            return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)


def _is_measured(node: fx.Node) -> bool:
    """Operators that compute float32 numbers; the others only move them."""
    if packet(node) in EXACT or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is torch.ops.aten.copy_.default or not node.all_input_nodes:
        return False
    return any(x.dtype is torch.float32 for x in _floats(node.meta.get("val"))) and any(
        x.dtype is torch.float32 for n in node.all_input_nodes for x in _floats(n.meta.get("val"))
    )


def _floats(values: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor) and x.is_floating_point()]
