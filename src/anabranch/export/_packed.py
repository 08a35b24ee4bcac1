"""Packed sequences: ``torch.export`` is told of sizes that depend on lengths.

The operators read lengths from memory, and there is none while a model is traced. So a trace sees stand-ins for them,
which say what is known of their results: sizes that depend on data. The graph gets the operators themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from anabranch.export import _operators
from anabranch.export._operators import NAMESPACE

_aten = torch.ops.aten
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_OPTIONS = "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, bool bidirectional"


@functools.cache
def _stand_ins() -> dict[Any, Any]:
    """By the function that Python calls: the stand-in for it. Defined once, at the first trace."""
    library = _operators.library()
    library.define("pack_padded(Tensor input, Tensor lengths, bool batch_first) -> (Tensor, Tensor)")
    library.define(
        "pad_packed(Tensor data, Tensor batch_sizes, bool batch_first, Scalar padding_value, SymInt total_length)"
        " -> (Tensor, Tensor)"
    )
    for name in _RECURRENT:
        state, states = ("Tensor[]", "Tensor, Tensor") if name == "lstm" else ("Tensor", "Tensor")
        library.define(f"{name}(Tensor data, Tensor batch_sizes, {state} hx, {_OPTIONS}) -> (Tensor, {states})")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _recurrent, lib=library)
    torch.library.register_fake(f"{NAMESPACE}::pack_padded", _pack, lib=library)
    torch.library.register_fake(f"{NAMESPACE}::pad_packed", _pad, lib=library)
    ours = torch.ops.anabranch
    return {
        torch._VF._pack_padded_sequence: ours.pack_padded.default,
        torch._VF._pad_packed_sequence: ours.pad_packed.default,
        **{getattr(torch._VF, name): getattr(ours, name).default for name in _RECURRENT},
    }


def _pack(x: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    context = torch.library.get_ctx()
    rows = context.new_dynamic_size(min=1, max=batch * steps)
    used = context.new_dynamic_size(min=1, max=steps)
    return x.new_empty(rows, *x.shape[2:]), torch.empty(used, dtype=torch.int64, device="cpu")


def _pad(
    data: torch.Tensor, batch_sizes: torch.Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch = torch.library.get_ctx().new_dynamic_size(min=1)
    shape = (batch, total_length) if batch_first else (total_length, batch)
    return data.new_empty(*shape, *data.shape[1:]), torch.empty(batch, dtype=torch.int64, device="cpu")


def _recurrent(
    data: torch.Tensor, batch_sizes: torch.Tensor, hx: Any, params: list[torch.Tensor], *options: Any
) -> tuple[torch.Tensor, ...]:
    states = hx if isinstance(hx, list | tuple) else (hx,)
    bidirectional = options[-1]
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    return data.new_empty(data.shape[0], width), *(torch.empty_like(s) for s in states)


class _Packed(TorchFunctionMode):
    """Puts the stand-ins in the place of the functions while a model is traced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stand_in = _stand_ins().get(func)
        if stand_in is not None and (func.__name__ not in _RECURRENT or isinstance(args[3], list | tuple)):
            return stand_in(*args, **(kwargs or {}))
        if func is torch.zeros and any(isinstance(n, torch.Tensor) for n in args):
            # A layer makes its first state for as many sequences as the first step has.
            args = tuple(n.item() if isinstance(n, torch.Tensor) else n for n in args)
        return func(*args, **(kwargs or {}))


@contextmanager
def traced(module: torch.nn.Module) -> Iterator[None]:
    """While ``module``, which this thread uses alone, is traced: packed sequences have sizes that depend on data."""
    layers = [m for m in module.modules() if isinstance(m, torch.nn.RNNBase)]
    if not layers:
        yield
        return
    for layer in layers:
        layer.__dict__["check_forward_args"] = functools.partial(_check, layer)
    try:
        with _Packed():
            yield
    finally:
        for layer in layers:
            del layer.__dict__["check_forward_args"]


def _check(layer: Any, x: torch.Tensor, state: Any, batch_sizes: torch.Tensor | None) -> None:
    """A layer's look at its inputs. Of packed ones it would ask for the number of sequences; the kernels look again."""
    if batch_sizes is None:
        type(layer).check_forward_args(layer, x, state, batch_sizes)


def put_back(graph: fx.Graph) -> None:
    """Put the operators in the place of their stand-ins, in place."""
    for node in graph.nodes:
        if node.op != "call_function" or getattr(node.target, "namespace", "") != NAMESPACE:
            continue
        name = node.target._schema.name.rsplit("::")[-1]
        known = {"pack_padded": _aten._pack_padded_sequence.default, "pad_packed": _aten._pad_packed_sequence.default}
        node.target = known.get(name) or getattr(_aten, name).data
