"""An execution context: the mutable state of one call in flight."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from anabranch.backends import Kernels, Stateful, of_one
from anabranch.devices import Device, Event, Graph, Scratch
from anabranch.runtime._unit import Unit


class Context:
    """A captured graph with the memory it has baked in.

    Owner: the thread that took it from the pool, until it gives it back; the pool in between. No lock of its own.
    Streams: ``done`` is recorded after the last use, on the stream of that use; the next use makes its own stream wait
    for ``done`` before anything else.

    When the last reference goes, wherever that happens, the graph and its memory are kept until ``done`` is reached.
    """

    __slots__ = ("__weakref__", "done", "graph", "inputs", "nbytes", "outputs", "recording", "slot", "used_on")

    def __init__(
        self,
        device: Device,
        index: int,
        graph: Graph,
        inputs: Sequence[torch.Tensor],
        outputs: StaticOutputs,
        nbytes: int,
        forget: Callable[[], None],
        holding: ExitStack,
        kernels: Any = None,
    ) -> None:
        """``holding``: closed, it gives back what the context is made of. May be closed already, by its builder.

        ``forget``: called when the context goes. ``kernels``: what the graph was captured from, if that has state
        which the graph uses.
        """
        self.graph = graph
        self.inputs = inputs
        self.outputs = outputs
        self.nbytes = nbytes
        #: Where the native runtime's pool has it.
        self.slot: Any = None
        #: What the graph takes from its caller instead of from ``inputs`` and ``outputs``; of the native runtime.
        self.recording: Any = None
        self.done = device.event()
        #: Identity of the stream of the last use, None before the first.
        self.used_on: int | None = None
        free_after(device, index, self, [inputs, outputs, graph, self.done, kernels], forget, holding)

    @classmethod
    def build(
        cls,
        unit: Unit,
        kernels: Kernels | Stateful,
        fresh: bool,
        forget: Callable[[], None],
        scratch: Scratch | None = None,
    ) -> Context:
        """Capture ``kernels`` into a graph. The host waits for this context's own lane only.

        ``fresh``: in a memory pool that nothing used before, so that its size is what this context needs.

        The kernels must have run before. Called with the build lock held, in a neutral thread state.
        """
        device, index = unit.device, unit.index
        lane, memory = device.acquire_lane(index), device.memory(index, fresh)
        # An interrupt may strike when the context is made and has a finalizer, and still leave this by an exception:
        # both close it, and who comes second finds nothing in it.
        holding = ExitStack()
        holding.callback(device.release_memory, memory)
        holding.callback(device.release_lane, lane)
        try:
            if unit.workspaces:
                lane.load_workspaces()
            with device.on_stream(lane.stream), memory.using():
                inputs = unit.examples()
                run = of_one(kernels, lane.stream, unit.program.values)
                # Per-thread and per-stream set-up of libraries is not allowed to happen inside the capture.
                run(inputs)
            graph, results = device.capture(lane, memory, lambda: run(inputs))
            holding.callback(graph.destroy)
            lane.stream.synchronize()
            outputs = StaticOutputs(results)
            nbytes = memory.nbytes() + lane.hidden_nbytes()
            return cls(device, index, graph, inputs, outputs, nbytes, forget, holding, run)
        except BaseException:
            lane.stream.synchronize()  # if this fails too, the device is lost, and nothing is to be used again
            holding.close()
            raise


def free_after(
    device: Device, index: int, owner: Any, parts: list[Any], forget: Callable[[], None], holding: ExitStack
) -> None:
    """When ``owner`` goes, wherever that happens: ``forget``, and once ``owner.done`` is reached let go of ``parts``
    and close ``holding``.

    ``parts`` is the only place that refers to them: owner and callbacks do not.
    """
    holding.callback(parts.clear)

    def free() -> None:
        holding.close()
        parts.clear()

    def gone(done: Event) -> None:
        forget()
        device.defer_free(index, [done], parts, free)

    weakref.finalize(owner, gone, owner.done).atexit = False


class StaticOutputs:
    """The result tensors that a graph writes, and how a call copies them out.

    Tensors that share a storage in the context share one in the copy too, as eager's results would.
    """

    def __init__(self, results: Sequence[torch.Tensor]) -> None:
        self.results = list(results)
        self._plain: list[tuple[int, torch.Tensor]] = []
        self._shared: list[list[tuple[int, torch.Tensor]]] = []
        self._count = len(results)
        by_storage: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for i, y in enumerate(results):
            by_storage.setdefault(y.untyped_storage()._cdata, []).append((i, y))
        for group in by_storage.values():
            y = group[0][1]
            if len(group) == 1 and _is_dense(y):
                self._plain.append((group[0][0], y))
            else:
                self._shared.append(group)

    def allocate(self) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        """New result tensors on the current stream, and (destination, source) pairs that fill them."""
        results: list[Any] = [None] * self._count
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for i, y in self._plain:
            results[i] = new = torch.empty_strided(y.size(), y.stride(), dtype=y.dtype, device=y.device)
            copies.append((new, y))
        for group in self._shared:
            start = min(_extent(y)[0] for _, y in group)
            stop = max(_extent(y)[1] for _, y in group)
            # Sizes of every dtype divide 16, so rounding down keeps each tensor's offset a whole number of elements.
            start -= start % 16
            region = torch.empty(stop - start, dtype=torch.uint8, device=group[0][1].device)
            source = torch.empty(0, dtype=torch.uint8, device=region.device)
            source.set_(group[0][1].untyped_storage(), start, (stop - start,), (1,))
            copies.append((region, source))
            for i, y in group:
                offset = (y.storage_offset() * y.element_size() - start) // y.element_size()
                new = torch.empty(0, dtype=y.dtype, device=region.device)
                results[i] = new.set_(region.untyped_storage(), offset, y.size(), y.stride())
        return results, copies


def _is_dense(y: torch.Tensor) -> bool:
    """Each element in a place of its own, and no gaps: what ``copy_`` can write as a whole."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(y.size(), y.stride(), strict=True) if n != 1):
        if stride != expected and y.numel():
            return False
        expected *= size
    return True


def _extent(y: torch.Tensor) -> tuple[int, int]:
    """Byte range of ``y`` in its storage."""
    start = int(y.storage_offset()) * y.element_size()
    if not y.numel():
        return start, start
    last = sum((n - 1) * s for n, s in zip(y.size(), y.stride(), strict=True))
    return start, start + int(last + 1) * y.element_size()
