"""Graphs that are bound to their caller's tensors: no copies into static inputs, none out of static outputs.

A launch writes the new addresses into the words of kernels' parameters that a recording knows as addresses of inputs
and outputs (:mod:`anabranch.devices.cuda._relocation`), and queues the executable; a short chain without temporaries
needs no graph at all.

This is the build-time half, in Python, where speed does not matter. :meth:`Recording.launch` and
:meth:`Recording.launch_kernels` are the slow reference of what the native runtime does for each call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from anabranch.devices._stream import Stream
from anabranch.devices.cuda._driver import call, handle
from anabranch.devices.cuda._graph import CudaGraph
from anabranch.devices.cuda._nodes import Arguments, KernelNodeParams, Patch
from anabranch.devices.cuda._relocation import Capture, Kernel, Noise, Relocation, Table

Computation = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class View:
    """A result tensor: ``offset`` elements into output storage ``storage``."""

    storage: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def on(self, storage: torch.Tensor, start: int = 0) -> torch.Tensor:
        """It in the memory of ``storage``, whose output storage begins at byte ``start``."""
        new = torch.empty(0, dtype=self.dtype, device=storage.device)
        offset = self.offset + start // self.dtype.itemsize
        return new.set_(storage.untyped_storage(), offset, self.size, self.stride)


class Recording:
    """A captured graph with what it takes to bind it to other tensors. Not thread-safe: one launch at a time.

    Buffers are numbered inputs first, then output storages. ``storages``: bytes of each output storage, which a call
    has to allocate whole where ``table.bound`` says that it is bound. ``results``: the result tensors of the capture;
    those in a storage that is not bound are copied out of there. ``alignment``: bytes, of each input that is bound.
    """

    def __init__(
        self,
        graph: CudaGraph,
        table: Table,
        capture: Capture,
        handles: Sequence[int],
        kernels: Computation,
        results: Sequence[torch.Tensor],
        views: Sequence[View],
        noise: Sequence[Noise],
        alignment: int,
    ) -> None:
        self.graph = graph
        self.table = table
        self.capture = capture
        self.handles = tuple(handles)
        #: What the graph was captured from, with the state that it uses.
        self.kernels: Any = kernels
        self.results = list(results)
        self.views = tuple(views)
        self.noise = tuple(noise)
        self.alignment = alignment
        self.storages = tuple(r.nbytes for r in capture.outputs)
        by_node: dict[int, list[Relocation]] = {}
        for relocation in table.relocations:
            by_node.setdefault(relocation.node, []).append(relocation)
        self.patches = tuple(
            Patch(self.handles[i], kernel, tuple((r.position, r.buffer, r.delta) for r in by_node.get(i, ())))
            for i, kernel in enumerate(capture.nodes)
            if isinstance(kernel, Kernel)
        )

    @property
    def patched(self) -> tuple[Patch, ...]:
        """The kernels that a launch has to patch."""
        return tuple(p for p in self.patches if p.words)

    def launch(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[int], stream: Stream, patches: Sequence[Patch] = ()
    ) -> None:
        """Queue the graph. ``outputs``: an address for each output storage (of those that are not bound: any)."""
        addresses = [*(x.data_ptr() for x in inputs), *outputs]
        for patch in patches or self.patched:
            arguments = Arguments(patch, addresses)
            params = KernelNodeParams.of(patch.kernel, arguments)
            call("cuGraphExecKernelNodeSetParams_v2", self.graph.executable, patch.handle, ctypes.byref(params))
        self.graph.launch(stream)

    def launch_kernels(
        self, inputs: Sequence[torch.Tensor], outputs: Sequence[int], stream: Stream, patches: Sequence[Patch] = ()
    ) -> None:
        """Queue the kernels one by one, without the graph. Only where ``table.why_not_direct`` is empty."""
        assert not self.table.why_not_direct
        addresses = [*(x.data_ptr() for x in inputs), *outputs]
        for patch in patches or self.patches:
            kernel, arguments = patch.kernel, Arguments(patch, addresses)
            shape = (*kernel.grid, *kernel.block, kernel.shared)
            # cuLaunchKernel takes a CUkernel in the place of a CUfunction.
            function = ctypes.c_void_p(kernel.function or kernel.kernel)
            call(
                "cuLaunchKernel",
                function,
                *map(ctypes.c_uint, shape),
                ctypes.c_void_p(handle(stream)),
                arguments.pointers,
                arguments.extra,
            )

    def with_other_noise(self) -> tuple[Patch, ...]:
        """All patches, with the noise of the other capture: not the one that this recording has."""
        patches = list(self.patches)
        places = {p.handle: k for k, p in enumerate(patches)}
        for noise in self.noise:
            k = places[self.handles[noise.node]]
            params = bytearray(patches[k].kernel.params)
            params[noise.position : noise.stop] = noise.other
            patches[k] = replace(patches[k], kernel=replace(patches[k].kernel, params=bytes(params)))
        return tuple(patches)

    def destroy(self) -> None:
        """Free the graph. Only after everything that was launched has finished."""
        self.graph.destroy()
