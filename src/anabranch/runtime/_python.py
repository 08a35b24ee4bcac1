"""The Python runtime: the reference of what a call does, and what runs where there is no compiler for the other one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from anabranch.backends import Instance, Kernels, Stateful
from anabranch.devices import Stream
from anabranch.runtime._context import Context
from anabranch.runtime._contexts import Contexts
from anabranch.runtime._cost import Way
from anabranch.runtime._direct import Direct
from anabranch.runtime._phases import Clock
from anabranch.runtime._pool import ContextPool, Reservation
from anabranch.runtime._unit import Unit


class PythonCalls:
    """See :class:`anabranch.runtime._calls.Calls`.

    Streams: a call that uses a graph queues everything on the caller's stream ``s``, in this order: ``s`` waits for the
    context's last use; inputs are copied in; the graph is launched; outputs are copied out, and so are inputs that it
    has written; the context's event is recorded. Others: see :class:`~anabranch.runtime._direct.Direct`.
    """

    def __init__(self, unit: Unit) -> None:
        self._unit, self._device = unit, unit.device
        self.direct = Direct(unit)
        self._pool: ContextPool[Context] = ContextPool(unit.limits)
        self.contexts = Contexts(unit, self._pool, partial(Context.build, unit), self.direct.last_uses)
        self._uses_graphs = False
        self._uses = 0

    def __call__(self, leaves: Sequence[Any], state: Sequence[torch.Tensor] = ()) -> Any:
        self._uses += 1
        given, inputs = self._unit.inputs(leaves, state)
        try:
            results = self._by_graph(inputs) if self._uses_graphs else None
            if results is None:
                results = self.direct(inputs)
        except Exception as e:
            self._device.check_error(e)
            raise
        return self._unit.finish(given, results)

    def _by_graph(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor] | None:
        """None: this call runs direct."""
        stream = self._device.current_stream(self._unit.index)
        if self._device.is_capturing(stream):
            return None
        with self._device.relaxed():
            context = self._acquire(stream)
            if context is None:
                return None
            results = self._run_graph(context, inputs, stream)
        self._unit.counters.add("calls", "graph_calls")
        return results

    def _acquire(self, stream: Stream) -> Context | None:
        contexts = self.contexts
        choice = self._pool.acquire(stream.stream_id, contexts.may_build)
        if isinstance(choice, Reservation):
            context = contexts.one_more(choice)
            if context is not None:
                self._pool.add(context)
            if context is not None or not contexts.are_shared:
                return context
            choice = self._pool.acquire(stream.stream_id, lambda: False)
            assert not isinstance(choice, Reservation)
        if choice is not None and choice.used_on is not None and choice.used_on != stream.stream_id:
            self._unit.counters.add("waits")
        return choice

    def _run_graph(self, context: Context, inputs: Sequence[torch.Tensor], stream: Stream) -> list[torch.Tensor]:
        try:
            results = self._launch(context, inputs, stream)
        except BaseException:
            self._pool.discard_used(context, stream)
            raise
        self._pool.release(context)
        return results

    def _launch(self, context: Context, inputs: Sequence[torch.Tensor], stream: Stream) -> list[torch.Tensor]:
        # Why no two calls can disturb each other here: the context is this thread's alone from acquire to release.
        # Whatever an earlier call queued that touches the context's memory was queued before that call recorded
        # `done`; everything that this call queues comes after the wait for it, on one stream; and the next call's
        # wait binds to the record that this call makes last, because it can take the context only after that.
        #
        #     call A on stream 1                       call B on stream 2 (after A's release, on the host)
        #     wait done; copy in; launch; copy out
        #     record done  ------------------------->  wait done; copy in; launch; copy out; record done
        #
        # The wait is made on the same stream too: a stream's handle may have died and been given to a new stream.
        results, copies = context.outputs.allocate()
        stream.wait_event(context.done)
        for static, x in zip(context.inputs, inputs, strict=True):
            static.copy_(x)
        context.graph.launch(stream)
        for new, static in copies:
            new.copy_(static)
        for i in self._unit.written:
            inputs[i].copy_(context.inputs[i])
        context.done.record(stream)
        context.used_on = stream.stream_id
        return results

    def take_uses(self) -> int:
        uses, self._uses = self._uses, 0
        return uses

    # -- building -----------------------------------------------------------------------------------------------

    def set_kernels(self, kernels: Kernels | Stateful, backend: str) -> None:
        self.contexts.kernels = kernels
        self.direct.set_kernels(kernels, backend)

    @contextmanager
    def trying_graph(self, context: Context, direct: Kernels | Instance, stream: Stream) -> Iterator[Sequence[Way]]:
        yield [lambda inputs: self._launch(context, inputs, stream), direct]
        # It has run on a stream that no caller will ever have: the first caller need not count as waiting for it.
        context.used_on = None

    @contextmanager
    def trying_operators(self, operators: Kernels) -> Iterator[Sequence[Way]]:
        yield [self.direct.kernels, operators]

    @contextmanager
    def trying_direct(self) -> Iterator[Way]:
        yield self.direct.run

    def ready(self, uses_graphs: bool, clock: Clock) -> None:
        self._uses_graphs = uses_graphs

    def explain(self) -> list[str]:
        return []
