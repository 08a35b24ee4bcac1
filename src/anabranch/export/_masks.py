"""Attention masks of transformers, while a model of it is exported for given sizes.

In eager the library makes no mask where PyTorch's attention knows by itself which positions are hidden
(``is_causal``), and asks the positions whether several texts are packed into one. While a model is exported it makes a
mask all the same, for those who call a program with other sizes, and takes it that texts are packed. Such masks are
slower, and others than eager's where a model has its own idea of what is hidden (PaliGemma without token types).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from anabranch.export._bystanders import replaced
from anabranch.export._random import is_random

_MODULE = "transformers.masking_utils"
_EXPORTING, _PACKED = "is_torchdynamo_exporting", "find_packed_sequence_indices"


@contextmanager
def masks_as_in_eager() -> Iterator[None]:
    """While this thread exports a model for given sizes; other threads' exports are as ever."""
    module: Any = sys.modules.get(_MODULE)
    exporting, packed = getattr(module, _EXPORTING, None), getattr(module, _PACKED, None)
    if exporting is None or packed is None:
        yield
        return
    here = threading.get_ident()

    def is_exporting() -> bool:
        return threading.get_ident() != here and bool(exporting())

    def find(positions: torch.Tensor) -> torch.Tensor | None:
        known = _value(positions) if threading.get_ident() == here else None
        if known is not None:
            with _disable_current_modes():
                indices = packed(known)
                if indices is None or not bool(indices[:, -1].any()):
                    return None  # one text
        made: torch.Tensor | None = packed(positions)
        return made

    with replaced(module, _EXPORTING, is_exporting), replaced(module, _PACKED, find):
        yield


def _value(x: torch.Tensor) -> torch.Tensor | None:
    """The elements of a tensor that depends on no input, on the CPU; None for another one."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode: Any = get_proxy_mode()
    slot: Any = get_proxy_slot(x, mode.tracer, None) if mode is not None else None
    if slot is None:
        return None
    with _disable_current_modes():
        value: torch.Tensor | None = _evaluated(slot.proxy.node, {})
        return value


def _evaluated(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What a node gives; None if that depends on an input, or on more than its arguments."""
    if node in known:
        return known[node]
    target: Any = node.target
    result = None
    if isinstance(target, torch._ops.OpOverload) and not (target._schema.is_mutable or is_random(node)):
        given = {n: _evaluated(n, known) for n in node.all_input_nodes}
        if all(v is not None for v in given.values()):
            here = {"device": torch.device("cpu")} if "device" in node.kwargs else {}
            result = target(*fx.map_arg(node.args, given.get), **{**fx.map_arg(node.kwargs, given.get), **here})
    known[node] = result
    return result
