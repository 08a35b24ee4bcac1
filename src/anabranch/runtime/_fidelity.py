"""Whether a program computes what its model does when PyTorch runs it as it is: looked at once, when it is built.

A trace may be of another computation than a call. Code may look whether it is traced, or what type its tensors have
then; the tracer has faults, and so may have what is done to its graph. Nothing raises, and all calls are wrong alike.
So the model and the program's operators run once on the same inputs. They are the same operators, and nearly always
give the same bits; a difference has to be larger than rounding explains, and to show on other values too.

The host waits for the current stream. What one call cannot tell passes: of what is random, of models that write what
they hold, of memory that nobody wrote.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from anabranch import _judge
from anabranch.backends import Options, get_backend
from anabranch.export import Program
from anabranch.runtime._comparison import BOUNDS, SEEDS, telling_writes

#: Of what kernels of other making may be off by, so much is left to the operators themselves.
_SHARE = 0.25
#: In mixed precision the model computes in float32 and the program does not.
_SHARE_MIXED = 2.0
#: So many of the integers and booleans may be others: near ties fall either way.
_FEW = 0.01

COMPUTES_ELSE = "traced, the model computes something else than in eager"
#: What to do about a model that cannot be had as it is in eager.
COMPUTE_THE_SAME = (
    "Does it look whether it is traced (torch.compiler.is_compiling()), or at the type of its tensors? Have it compute"
    " the same then."
)
#: Of a model that can.
ASKS = "the model asks whether it is traced, and computes something else if it is: it was told no, as in eager"

_Tensors = Sequence[torch.Tensor]


def why_unlike(program: Program, inputs: _Tensors, others: Callable[[int], _Tensors | None]) -> str:
    """Why ``program`` does not compute what its model does, or nothing.

    ``inputs``: left as they are. ``others``: of a seed, inputs with other values, on which a difference has to show,
    too; None where no others are known to do.
    """
    if program.in_eager is None or program.is_random or program.state or program.numbers is not None:
        return ""
    if program.reads_layout or program.absolute:
        return ""  # these inputs lie in memory as kernels read them, not as the caller's do
    why = _unlike(program, inputs)
    for seed in SEEDS if why else ():
        redrawn = others(seed)
        if redrawn is not None:
            with contextlib.suppress(RuntimeError, ValueError, IndexError):  # they may not do
                why = why and _unlike(program, redrawn)
    return why and f"{COMPUTES_ELSE} ({why})"


def _unlike(program: Program, inputs: _Tensors) -> str:
    assert program.in_eager is not None
    expected = program.in_eager.results(program.outputs, inputs, program.written)
    if expected is None or isinstance(expected, str):
        return expected or ""
    operators: Any = get_backend("eager").lower(program, [], Options())
    actual = telling_writes(program, operators)(inputs)
    why = unlike(actual, expected, of_mixed(program))
    if not why:
        return ""
    again = program.in_eager.results(program.outputs, inputs, program.written)
    # Where it is unlike itself, nobody can tell.
    return "" if not isinstance(again, list) or unlike(again, expected, of_mixed(program)) else why


def of_mixed(program: Program) -> torch.dtype | None:
    """The half precision that a program in mixed precision has."""
    return program.choices.dtype if program.choices is not None else None


def unlike(actual: Sequence[Any], expected: Sequence[Any], mixed: torch.dtype | None = None) -> str:
    """How tensors and numbers are unlike those that are expected, or nothing. ``mixed``: a half precision that they
    may be off by."""
    for a, e in zip(actual, expected, strict=True):
        if not (isinstance(a, torch.Tensor) and isinstance(e, torch.Tensor)):
            if type(a) is not type(e):
                return f"a {type(a).__name__} where eager has a {type(e).__name__}"
            a, e = torch.tensor(a), torch.tensor(e)
        if a.shape != e.shape or a.dtype is not e.dtype:
            return f"{_kind(a)} where eager has {_kind(e)}"
        if not a.numel() or a.layout is not torch.strided:
            continue
        if e.dtype.is_floating_point and e.dtype not in BOUNDS:
            a, e = a.bfloat16(), e.bfloat16()  # of eight bits
        bound = BOUNDS.get(e.dtype)
        if bound is None:
            others = float((a != e).double().mean())
            if others > _FEW:
                return f"{others:.0%} of a result's {str(e.dtype).removeprefix('torch.')} are others than in eager"
            continue
        bound *= _SHARE
        if mixed is not None:
            bound = max(bound, _SHARE_MIXED * BOUNDS[mixed])
        if bool((lost := e.isnan()).any()):  # layers have other ways to them
            a, e = a.masked_fill(lost, 0), e.masked_fill(lost, 0)
        off = _judge.error(a, e, least=torch.finfo(e.dtype).eps)
        if not off <= bound:
            return f"a result is off by {off:.1e} of its largest value"
    return ""


def _kind(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def results_unlike(results: Any, expected: Any) -> str:
    """How results are unlike those in eager, or nothing; nothing where there are none."""
    if results is None or expected is None:
        return ""
    actual, wanted = ([x for x in pytree.tree_leaves(r) if isinstance(x, torch.Tensor)] for r in (results, expected))
    if len(actual) != len(wanted):
        return f"{len(actual)} tensors where eager has {len(wanted)}"
    return unlike(actual, wanted)
