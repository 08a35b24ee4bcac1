"""Programs of operators, for the C++ to run one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from anabranch._judge import differences
from anabranch.backends import Wrapped
from anabranch.export import Program
from anabranch.runtime import _library
from anabranch.runtime._flat import (
    Branch,
    Check,
    Empty,
    Expect,
    FlatProgram,
    Launch,
    Number,
    Pick,
    View,
    flatten,
)
from anabranch.runtime._unit import Unit
from anabranch.runtime._wrapper import follow


def translate(program: Program) -> Any:
    """``program`` for the C++ to run operator by operator, or the reason why it cannot."""
    flat = flatten(program)
    if isinstance(flat, str):
        return flat
    try:
        return translate_flat(flat, program.weights_for_eager())
    except (RuntimeError, TypeError) as e:
        return (str(e).splitlines() or [""])[0]


def translate_wrapper(kernels: Wrapped, unit: Unit) -> Any:
    """What launches compiled ``kernels`` for many sizes, for the C++, or the reason why it cannot do it.

    Compared with what Python launches, at two sizes. Called once they have run, on a stream that nobody else has.
    """
    program, device = unit.program, unit.torch_device
    if program.is_random:
        return "it draws"
    shapes = [spec.shape for spec in unit.specs]
    count = len(unit.signature.given)
    flat = follow(kernels.wrapper, len(kernels.weights) + len(shapes), device)
    if isinstance(flat, str):
        return flat
    try:
        made = translate_flat(flat, kernels.weights)
        api = unit.device.native_api(_library.load())
        for at in (shapes[:count], program.sizes.others(shapes[:count]) if program.sizes is not None else None):
            if at is None:
                continue
            specs = [
                replace(spec, shape=tuple(shape), strides=spec.strides_for(shape))
                for spec, shape in zip(unit.specs, (*at, *shapes[count:]), strict=True)
            ]
            ours, theirs = ([spec.synthesize(device, seed) for seed, spec in enumerate(specs)] for _ in range(2))
            found = differences([made.run(ours, device, api), ours], [list(kernels(theirs)), theirs])
            if found:
                return f"its results differ: {found[0]}"
    except (RuntimeError, TypeError) as e:
        unit.device.check_error(e)
        return (str(e).splitlines() or [""])[0]
    return made


def translate_flat(flat: FlatProgram, weights: Sequence[torch.Tensor]) -> Any:
    """``flat`` for the C++. Raises RuntimeError or TypeError where that cannot run it."""
    made = _library.load().Program(list(weights), flat.inputs - len(weights))
    for step in flat.steps:
        if isinstance(step, Pick):
            made.pick(step.slot, step.position)
        elif isinstance(step, Number):
            made.number(step.name, step.arguments)
        elif isinstance(step, Check):
            made.check(step.holds, step.message)
        elif isinstance(step, Branch):
            yes, no = translate_flat(step.yes, []), translate_flat(step.no, [])
            made.branch(step.condition, yes, no, step.operands, len(step.yes.results))
        elif isinstance(step, Empty):
            made.empty(*step)
        elif isinstance(step, View):
            made.view(*step)
        elif isinstance(step, Expect):
            made.expect(*step)
        elif isinstance(step, Launch):
            kernel = step.kernel
            made.launch(kernel.function, kernel.threads, kernel.shared_bytes, kernel.types, step.grid, step.arguments)
        else:
            try:
                made.call(step.name, step.overload, step.arguments)
            except (RuntimeError, TypeError) as e:
                raise RuntimeError(f"{step.name}: {(str(e).splitlines() or [''])[0]}") from e
    made.finish(flat.results)
    return made
