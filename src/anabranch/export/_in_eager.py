"""The model itself beside its program: what PyTorch makes of it when it runs it as it is.

A trace may be of another computation than a call: code that looks whether it is traced, faults of the tracer's, faults
of what is done to its graph. Nothing raises then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree

from anabranch._judge import identical
from anabranch.export._fast_paths import padded_as_on_fast_paths
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

    def results(
        self, outputs: Sequence[Output], inputs: Sequence[torch.Tensor], written: Collection[int]
    ) -> list[Any] | str | None:
        """The tensors and numbers that the graph of a program with these outputs is to compute of ``inputs``, and then
        what it is to leave in those that are ``written``; on the current stream. ``inputs``: tensors in memory, which
        stay as they are. Or how the model does something else; None where a call does not tell: it raises, or writes
        what the model holds.
        """
        copy = self._snapshot.fresh()
        forward = Forward(copy.module, self._specs, *self._options)

        def call(run: Callable[..., Any]) -> tuple[list[torch.Tensor], Any]:
            own = [x.clone() for x in inputs]
            tensors = iter(own)
            args, kwargs = unflatten([next(tensors) if x is TENSOR else x for x in self._leaves], self._structure)
            return own, run(*args, **kwargs)

        trial = rehearse(lambda: call(forward), copy)
        if not trial.finished or trial.written:
            return None
        try:
            # In half precision it is called under a mode, as forward() is.
            padded = padded_as_on_fast_paths(copy.module) if self._options else nullcontext()
            with torch.no_grad(), padded:
                own, returned = call(forward.in_eager)  # nothing is written
        except RuntimeError:
            return None
        for i, (x, after) in enumerate(zip(inputs, own, strict=True)):
            if i not in written and after._version and not identical(x, after):
                return f"in eager it writes into input {i}"
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
        return [found[i] for i in sorted(found)] + [own[i] for i in sorted(written)]


def _differ(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, bool | int | str) and a != b
