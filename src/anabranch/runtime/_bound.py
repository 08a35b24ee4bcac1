"""Contexts whose graphs read and write their callers' own tensors: nothing is copied."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from anabranch.backends import Kernels, Stateful, of_one
from anabranch.devices import Scratch
from anabranch.runtime._context import Context, StaticOutputs
from anabranch.runtime._summary import count_operators
from anabranch.runtime._unit import Unit

#: Operators of a shape of a range, of which there are many. Where there are more, finding addresses in their kernels
#: takes the interpreter from calls for longer than copies of inputs and results, a few microseconds, are worth.
_MOST_OF_SHAPE = 32


class Bound:
    """Captures contexts of one signature for the native runtime, bound to their callers where that can be.

    Called with the build lock held.
    """

    def __init__(self, unit: Unit, core: Any, specialization: Any) -> None:
        """``specialization``: of ``core``, the runtime's C++; it is told what a recording shows of the kernels."""
        self._unit, self._core, self._specialization = unit, core, specialization
        #: Why graphs have memory of their own for inputs and results, or None where they use the caller's.
        self.copies: str | None = None if unit.device.kind == "cuda" else "not for this device"
        if unit.program.values is not None and count_operators(unit.program.module.graph) > _MOST_OF_SHAPE:
            self.copies = "one shape of many: to find the callers' addresses in so many kernels takes too long"
        #: A recording that shows which kernels take which addresses from a call.
        self.known: Any = None
        #: Whether the C++ may launch the kernels of direct calls, if a recording shows how; and whether it does.
        self.may_launch = self.launches = False

    def __call__(
        self, kernels: Kernels | Stateful, fresh: bool, forget: Callable[[], None], scratch: Scratch | None = None
    ) -> Context:
        """See :data:`~anabranch.runtime._contexts.Capture`."""
        if self.copies is None:
            context = self.capture(kernels, fresh, forget, scratch)
            if not isinstance(context, str):
                return context
            self.copies = context
        return Context.build(self._unit, kernels, fresh, forget)

    def capture(
        self,
        kernels: Kernels | Stateful,
        fresh: bool,
        forget: Callable[[], None],
        given: Scratch | None = None,
    ) -> Context | str:
        """A bound context, or why there can be none."""
        from anabranch.devices.cuda import _captured, _recorder

        device: Any = self._unit.device
        index, log = self._unit.index, self._core.AllocationLog()
        lane, memory = device.acquire_lane(index), device.memory(index, fresh)
        holding, on_lane = ExitStack(), ExitStack()  # see Context.build
        on_lane.callback(device.release_lane, lane)
        holding.callback(device.release_memory, memory)
        holding.callback(on_lane.close)
        scratch = given or device.scratch(index)
        try:
            unit = self._unit
            what = (partial(of_one, kernels, values=unit.program.values), unit.specs, unit.workspaces, log)
            if self.known is None:
                made = _recorder.record(device, lane, memory, scratch, *what)
            else:
                made = _recorder.record_again(self.known, device, lane, memory, scratch, *what)
            if isinstance(made, str):
                holding.close()
                return made
            holding.callback(made.graph.destroy)
            if self.known is None:
                self._learn(made, kernels)
            hidden = lane.hidden_nbytes()
            if not made.table.workspaces and not isinstance(kernels, Stateful):
                # Nothing of the lane is in the graph, so the next context can be captured on it.
                _captured.wait(lane)
                on_lane.close()
                hidden = 0
            results, state = made.results, made.kernels
            # The context's: what is known of the kernels shall not keep its memory.
            made.results, made.kernels = [], None
            nbytes = memory.nbytes() + hidden
            context = Context(device, index, made.graph, [], StaticOutputs(results), nbytes, forget, holding, state)
            context.recording = made
            return context
        except BaseException:
            holding.close()
            raise
        finally:
            if given is None:
                device.release_scratch(scratch)

    def _learn(self, recording: Any, kernels: Kernels | Stateful) -> None:
        """The first recording of this signature's kernels."""
        self.known = recording
        self._specialization.set_alignment(recording.alignment)
        if not recording.table.why_not_direct and self.may_launch and not isinstance(kernels, Stateful):
            self._specialization.set_kernels(recording.results, [kernel_tuple(patch) for patch in recording.patches])
            self.launches = True

    def forget(self, may_launch: bool) -> None:
        """There are other kernels now."""
        if self.known is not None:
            self._specialization.set_kernels([], [])
        self.known, self.launches, self.may_launch = None, False, may_launch


def kernel_tuple(patch: Any) -> tuple[Any, ...]:
    """A kernel of a recording, as the C++ takes it."""
    kernel = patch.kernel
    return (
        patch.handle,
        (kernel.function, kernel.kernel, kernel.context),
        kernel.grid,
        kernel.block,
        kernel.shared,
        kernel.params,
        [offset for offset, _ in kernel.layout],
        kernel.packed,
        patch.words,
    )
