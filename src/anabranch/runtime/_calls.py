"""How calls of one specialization run: what a builder and an engine ask of either runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from anabranch.backends import Instance, Kernels, Stateful
from anabranch.devices import Stream
from anabranch.runtime._context import Context
from anabranch.runtime._contexts import Contexts
from anabranch.runtime._cost import Way
from anabranch.runtime._direct import Direct
from anabranch.runtime._phases import Clock
from anabranch.runtime._unit import Unit


class Calls(Protocol):
    """Two implementations: :class:`~anabranch.runtime._python.PythonCalls`, the reference that one reads, and
    :class:`~anabranch.runtime._native.NativeCalls`. Both keep ``docs/contract.md``.

    Threads: any may call it once it is :meth:`ready`; the other methods are its builder's, before any call.
    """

    contexts: Contexts
    #: What runs where no graph does.
    direct: Direct

    def __call__(self, leaves: Sequence[Any], state: Sequence[torch.Tensor] = ()) -> Any:
        """Run one call on the calling thread's current stream. ``leaves`` have passed validation. ``state``: a
        session's tensors, in the program's order, which nobody else uses meanwhile."""

    def take_uses(self) -> int:
        """How many calls have come since this was asked last, about."""

    def set_kernels(self, kernels: Kernels | Stateful, backend: str) -> None:
        """What calls run from now on, captured or one by one."""

    def trying_graph(
        self, context: Context, direct: Kernels | Instance, stream: Stream
    ) -> AbstractContextManager[Sequence[Way]]:
        """Two ways to run a call on ``stream``: by the context's graph, and by ``direct``. Leaves no trace."""

    def trying_operators(self, operators: Kernels) -> AbstractContextManager[Sequence[Way]]:
        """Two ways to run a direct call: by the kernels, and by PyTorch's ``operators``. Leaves no trace."""

    def trying_direct(self) -> AbstractContextManager[Way]:
        """A way to run a direct call, once it is :meth:`ready`. Leaves no trace."""

    def ready(self, uses_graphs: bool, clock: Clock) -> None:
        """The last step of a build: it is known whether calls use graphs."""

    def explain(self) -> list[str]:
        """What is this runtime's own, a line each."""


@dataclass(frozen=True)
class Runtime:
    """What an engine takes from its runtime."""

    name: str
    #: ``(max_contexts, memory_limit)``: see :class:`~anabranch.runtime._pool.Limits`.
    make_limits: Callable[[int, int | None], Any]
    #: See :class:`~anabranch.runtime._stats.Counters`.
    make_counters: Callable[[], Any]
    make_calls: Callable[[Unit], Calls]
