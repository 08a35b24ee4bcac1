"""Calls of a model in pieces that are made again by PyTorch's operators: a model may catch what an operator raises.

Dynamo traces ``try`` as if nothing were raised, or not at all, so that the error leaves the graph instead. In eager
nobody sees it. What such a call has queued so far is of no use, and of no harm as long as nothing of the caller's is
changed.

On the CPU alone. A device with streams has errors of its own, which are no operator's, and bad inputs are to be refused
there before anything is queued.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from anabranch import _activity, _sync
from anabranch.errors import AnabranchError
from anabranch.export import Snapshot, copy_of, describe, first_line, generators_kept, map_tensors, rehearse
from anabranch.runtime._fragment import NotAccepted
from anabranch.runtime._process import process

_log = logging.getLogger("anabranch")
#: What operators raise, also those of engines.
_OF_OPERATORS = (NotAccepted, RuntimeError, TypeError, ValueError, IndexError)


class Inputs(NamedTuple):
    """What a call was given, as it was before."""

    structure: Any
    leaves: list[Any]
    #: Of the tensors; None where nobody counts them.
    versions: list[int | None]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any]) -> Inputs:
        leaves, structure = pytree.tree_flatten((tuple(args), kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        return cls(structure, leaves, [None if x.is_inference() else x._version for x in tensors])

    @property
    def key(self) -> Any:
        """Equal for calls of the same sizes."""
        return str(self.structure), tuple(x.shape if isinstance(x, torch.Tensor) else type(x) for x in self.leaves)

    def are_unchanged(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether all of it is known to be what it was."""
        now = Inputs.of(args, kwargs)
        if None in self.versions or now.versions != self.versions or now.structure != self.structure:
            return False
        return all(a is b for a, b in zip(now.leaves, self.leaves, strict=True))


def kinds_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Of each leaf of a call, what it is, whatever its value and sizes."""
    leaves, structure = pytree.tree_flatten((tuple(args), kwargs))
    return structure, tuple((type(x), x.dtype, x.ndim) if isinstance(x, torch.Tensor) else type(x) for x in leaves)


class Repeats:
    """Which calls of a model are made again. Threads: any number may ask at once."""

    def __init__(self, snapshot: Snapshot, device: torch.device) -> None:
        self._snapshot, self._device = snapshot, device
        #: Of calls that Dynamo fails to trace: it would try each time.
        self._untraced: set[Any] = _sync.set_("calls without graphs")

    def inputs(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Inputs | None:
        """What a call is given, to be asked about; None on devices whose calls are never made again."""
        return Inputs.of(args, kwargs) if self._device.type == "cpu" else None

    def has(self, given: Inputs | None) -> bool:
        """Whether calls with such inputs are made by PyTorch's operators at once."""
        return bool(self._untraced) and given is not None and given.key in self._untraced

    def takes(self, error: Exception, given: Inputs | None, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether a call that ended with ``error`` can be made again: in eager the model runs on these inputs, writes
        nothing that it holds, and the call has changed nothing that it was given. Blocks while something is built."""
        from torch._dynamo.exc import TorchRuntimeError

        if given is None or not isinstance(error, _OF_OPERATORS):
            return False
        if isinstance(error, AnabranchError | torch.OutOfMemoryError):
            return False
        if not given.are_unchanged(args, kwargs) or not self._runs_in_eager(args, kwargs):
            return False
        if isinstance(error, TorchRuntimeError):
            self._untraced.add(given.key)
            text = "calls with such inputs (%s) run by PyTorch's operators, without graphs: %s"
            _log.warning(text, describe(args, kwargs), first_line(error.__cause__ or error))
        return True

    def _runs_in_eager(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        with process.alone(), _activity.building():
            copy = self._snapshot.fresh()
            own, named = map_tensors(copy_of, (tuple(args), kwargs))
            with generators_kept(copy.module, (own, named), self._device):
                trial = rehearse(partial(copy.module, *own, **named), copy)
        return trial.finished and not trial.written
