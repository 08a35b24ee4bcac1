"""The model itself beside its program: what PyTorch makes of it when it runs it as it is.

A trace may be of another computation than a call: code that looks whether it is traced, faults of the tracer's, faults
of what is done to its graph. Nothing raises then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from anabranch.export._forward import TENSOR, Forward
from anabranch.export._outputs import ComputedOutput, ConstantOutput, Output
from anabranch.export._signature import TensorSpec
from anabranch.export._snapshot import Snapshot
from anabranch.export._tree import unflatten
from anabranch.export._trial import rehearse


class ModelInEager:
    """A model as it was exported, to be called. Threads: one at a time, with the build lock held."""

    def __init__(
        self,
        snapshot: Snapshot,
        specs: Sequence[TensorSpec],
        options: Sequence[Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        """``specs``, ``options``: of the :class:`Forward` that was traced, on these arguments."""
        self._snapshot, self._specs, self._options = snapshot, specs, tuple(options)
        leaves, self._structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        self._leaves = [TENSOR if isinstance(x, torch.Tensor) else x for x in leaves]  # which would keep their memory

    def results(self, outputs: Sequence[Output], inputs: Sequence[torch.Tensor]) -> list[Any] | str | None:
        """The tensors and numbers that the graph of a program with these outputs is to compute of ``inputs``, tensors
        in memory, which may be written; on the current stream. Or how the model returns something else; None where one
        call does not tell: it raises, or writes what the model holds."""
        copy = self._snapshot.fresh()
        forward = Forward(copy.module, self._specs, *self._options)
        tensors = iter(inputs)
        args, kwargs = unflatten([next(tensors) if x is TENSOR else x for x in self._leaves], self._structure)
        returned: list[Any] = []
        trial = rehearse(lambda: returned.extend(forward(*args, **kwargs)), copy)
        if not trial.finished or trial.written:
            return None
        values = forward.seen.returned.whole(returned)
        if len(values) != len(outputs):
            return f"{len(outputs)} results where eager has {len(values)}"
        found: dict[int, Any] = {}
        for output, value in zip(outputs, values, strict=True):
            if isinstance(output, ComputedOutput):
                if isinstance(value, torch.Tensor):
                    value = output.of(value)  # its own reverse
                elif not isinstance(value, int | float | complex):
                    return f"a result where eager has {value!r}"
                found[output.index] = value
            elif isinstance(output, ConstantOutput) and _differ(output.value, value):
                return f"{output.value!r} where eager has {value!r}"
        return [found[i] for i in sorted(found)]


def _differ(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, bool | int | str) and a != b
