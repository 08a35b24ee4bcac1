"""Programs of operators, for the C++ to run one by one."""

from __future__ import annotations

from typing import Any

import torch

from anabranch.export import Program
from anabranch.runtime import _library
from anabranch.runtime._flat import Branch, Check, FlatProgram, Number, Pick, flatten


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
    made = _library.load().Program(weights, flat.inputs - len(weights))
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
