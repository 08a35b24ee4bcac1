"""``torch.compile(model, backend="anabranch")``: Dynamo's graphs as engines, with Python between them.

PyTorch finds :func:`backend` by the entry point ``torch_dynamo_backends`` of the installed package, so nothing has to
be imported first. Where the package lies on ``PYTHONPATH`` only, ``import anabranch`` makes it known.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from anabranch.devices import get_device
from anabranch.errors import InputError
from anabranch.runtime._compile import check_options, compile_graph
from anabranch.runtime._compile import compile as compile_engine
from anabranch.runtime._fragment import Fragment
from anabranch.runtime._given import backend_for, check_gpu
from anabranch.runtime._ranges import Place
from anabranch.runtime._recompiles import keep_entries_in_place, past_limit, watch_limits

#: Options of :func:`anabranch.compile` that ``torch.compile(..., options={...})`` takes.
OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(compile_engine).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "kwargs"
)

_fragments: weakref.WeakSet[Fragment] = weakref.WeakSet()


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A graph of Dynamo's as a function, which compiles an engine at its first call.

    Called by ``torch.compile``. ``options``: as in :func:`anabranch.compile`. What the function does in a call is in
    :class:`~anabranch.runtime._fragment.Fragment`: any number of threads may call it on any streams. A graph that an
    engine cannot be for (it changes an input in place) runs by PyTorch's operators, with eager's results;
    :func:`summary` says which and why. Of one with symbols, an engine serves all their values.

    The function raises :class:`~anabranch.errors.InputError` where an option is not known, and where grad is enabled
    and a result requires it.
    """
    options = dict(options or {})
    try:
        _check(options, mode, example_inputs)
    except InputError as e:
        why = str(e)

        def refuse(*inputs: Any) -> Any:  # what is raised before is wrapped by Dynamo
            raise InputError(why)

        return refuse

    def make_engine(model: torch.nn.Module, inputs: Sequence[Any], free: frozenset[Place]) -> Any:
        return compile_graph(model, inputs, free, **options)

    keep_entries_in_place()
    watch_limits(gm)
    made = Fragment(gm, example_inputs, make_engine, dynamic=options.get("dynamic") is not False)
    _fragments.add(made)
    return made


def _check(options: Mapping[str, Any], mode: str | None, inputs: Sequence[Any]) -> None:
    """Raises :class:`~anabranch.errors.InputError` where there are no such options, or no such values, for a device."""
    unknown = [name for name in options if name not in OPTIONS]
    if unknown or mode is not None:
        given = f"options {', '.join(map(repr, unknown))}" if unknown else f"mode={mode!r}"
        raise InputError(
            f'torch.compile(backend="anabranch") was given {given}; expected options= with none but'
            f" {', '.join(OPTIONS)}, and no mode"
        )
    check_options(**options)
    check_gpu(options.get("backend"), inputs)
    for kind in {x.device.type for x in inputs if isinstance(x, torch.Tensor)}:
        backend_for(options.get("backend"), get_device(kind))


def summary() -> dict[str, Any]:
    """What ``torch.compile(..., backend="anabranch")`` consists of in this process, as plain data for tools.

    ``graphs`` has an entry for each graph: its ``operators``; ``by_operators``, why PyTorch's operators run it, or
    nothing; ``ends``, where Dynamo cut the function behind it, with ``reason`` and ``source``, the line; and summaries
    of its ``engines``. ``past_limit`` lists functions that Dynamo recompiles no more. Any thread; nothing is queued.
    """
    return {"graphs": [f.summary() for f in list(_fragments)], "past_limit": past_limit()}
