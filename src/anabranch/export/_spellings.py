"""What ``torch.export`` cannot record as it is written, in words that it can.

``x.data`` is a tensor that it does not know; ``x.detach()`` is the same memory. For ``x[:, i] = y`` with a tensor ``i``
of no dimensions it asks for the number, which depends on data; one index in a list writes the same elements.
``torch.istft`` asks for a value only to refuse it: see :mod:`anabranch.export._istft`. ``masked_select`` is taken to
have no more results than its tensor has elements, which is wrong where a larger mask is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from anabranch.export import _istft
from anabranch.export._assignments import Assignments

_DATA: Any = torch.Tensor.data
_MASKED_SELECT = (torch.masked_select, torch.Tensor.masked_select, torch.ops.aten.masked_select.default)
_NO_NUMBERS = (torch.bool, torch.uint8)


class Spellings(TorchFunctionMode):
    """While it is on, operators are called in the words that can be recorded."""

    def __init__(self, assignments: Assignments) -> None:
        """``assignments``: of the call, to which what cannot be said otherwise is told."""
        super().__init__()
        self._assignments = assignments

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DATA.__get__:
            return args[0].detach()
        if func == _DATA.__set__:
            self._assignments.refusal = (
                "the model assigns to the .data of a tensor, which no graph shows; expected writes. Call"
                " x.copy_(new) in place of x.data = new."
            )
        if func is torch.Tensor.__setitem__ and len(args) == 3:
            found = _in_a_list(args[0], args[1], args[2])
            if found is not None:
                view, index, value = found
                return func(view, index, value)
        if func in _istft.FUNCTIONS:  # Dynamo, in torch.cond, looks into no function from elsewhere
            return _istft.spelled_out(*args, **kwargs)
        if func in _MASKED_SELECT:
            return _as_large_as_mask(*args, **kwargs)
        return func(*args, **kwargs)


def _as_large_as_mask(input: torch.Tensor, mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """``torch.masked_select`` of what ``input`` is broadcast to."""
    return torch.masked_select(input.expand(torch.broadcast_shapes(input.shape, mask.shape)), mask, **kwargs)


def _in_a_list(x: torch.Tensor, given: Any, value: Any) -> tuple[torch.Tensor, Any, Any] | None:
    """``x[given] = value`` as another such statement, if ``given`` has one tensor, and that is a number."""
    items = list(given) if type(given) is tuple else [given]
    places = [i for i, item in enumerate(items) if isinstance(item, torch.Tensor)]
    if len(places) != 1 or any(isinstance(item, list | tuple | range | bool) for item in items):
        return None
    index = items[places[0]]
    if index.dim() or index.is_floating_point() or index.is_complex() or index.dtype in _NO_NUMBERS:
        return None
    taken = sum(1 for item in items if item is not None and item is not Ellipsis)
    items = [part for item in items for part in ([slice(None)] * (x.dim() - taken) if item is Ellipsis else [item])]
    place = next(i for i, item in enumerate(items) if isinstance(item, torch.Tensor))
    # Of what the other items choose, the dimension that this one is of.
    dim = sum(1 for item in items[:place] if item is None or isinstance(item, slice))
    items[place] = slice(None)
    view = x[tuple(items)]
    if isinstance(value, torch.Tensor):
        value = value.to(x.dtype)
        after = view.dim() - dim - 1
        if value.dim() > after:
            value = value.unsqueeze(value.dim() - after)
    return view, (*(slice(None) for _ in range(dim)), index.reshape(1)), value
