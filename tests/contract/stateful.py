"""A backend for tests whose kernels have state, as TensorRT's execution contexts do, and which needs no GPU.

PyTorch's operators, but some results pass through a *scratch tensor* that belongs to the instance: they are written
there and read again by what follows. Two runs of one instance that overlap on the device mix up their values, and the
race checker sees the two accesses.

Of a program for many sizes, the scratch tensor is as large as the largest of them need, or those that an instance is
for; and an instance cannot be captured on other shapes than those of its last run.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import fx
from torch._prims_common import is_non_overlapping_and_dense_or_false as is_dense

import anabranch.sim
from anabranch import backends
from anabranch.backends import Options, Stateful
from anabranch.devices import Device, get_device
from anabranch.export import Program, shape_at

NAME = "stateful"
#: Of a size that varies and was not declared.
LARGEST = 64


class Code:
    """What an instance has loaded for itself. It is gone as a library's code is: the host waits for the whole device,
    and the device that it was on is left current."""

    #: What is loaded.
    alive: ClassVar[weakref.WeakSet[Code]] = weakref.WeakSet()

    def __init__(self, index: int) -> None:
        self._index = index
        self.alive.add(self)

    def __del__(self) -> None:
        anabranch.sim.core.wait_as_free_does(self._index)
        torch.accelerator.set_device_index(self._index)


class ScratchInstance:
    """See :class:`anabranch.backends.Instance`."""

    loads_own_code = False
    #: Those that somebody still has.
    alive: ClassVar[weakref.WeakSet[ScratchInstance]] = weakref.WeakSet()

    def __init__(self, owner: ScratchKernels, own: Any, values: Any = None) -> None:
        self._owner, self._own = owner, own
        self._shapes: list[torch.Size] | None = None
        # One piece for all held results: they follow each other in the graph, and each is read before the next.
        self.nbytes = owner.nbytes_at(values)
        self.scratch = torch.empty(self.nbytes, dtype=torch.uint8, device=owner.device) if self.nbytes else None
        holds = {name: _Hold(self.scratch, own) for name in owner.held}
        # What the graph's code calls by name.
        self._holds = SimpleNamespace(**holds)
        self.alive.add(self)
        code = [Code(owner.device.index)]
        weakref.finalize(self, owner.seam.defer_free_code, owner.device.index, code.clear).atexit = False

    def __del__(self) -> None:
        # Ends a capture that somebody has under way, unless who frees it allows for that.
        self._own.query()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        seam, shapes = self._owner.seam, [x.shape for x in inputs]
        if seam.is_capturing(seam.current_stream(self._owner.device.index)):
            assert shapes == self._shapes, "captured on shapes that it was not run on"
        self._shapes = shapes
        results: Sequence[torch.Tensor] = self._owner.forward(self._holds, *self._owner.weights, *inputs)
        return results

    def prepare_direct(self) -> None:
        pass

    def why_not_captured(self, stream: Any) -> str:
        return ""

    def private_memory(self) -> list[torch.Tensor]:
        return [] if self.scratch is None else [self.scratch]


class _Hold:
    """Writes a result to the scratch tensor and reads it back."""

    def __init__(self, scratch: Any, own: Any) -> None:
        self._scratch = scratch
        self._device, self._own = scratch.device, own
        self._fork, self._join = torch.Event(scratch.device.type), torch.Event(scratch.device.type)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        seam = get_device(self._device.type)
        stream = seam.current_stream(self._device.index)
        slot = self._scratch[: x.numel() * x.element_size()].view(x.dtype).as_strided(x.size(), x.stride())
        if stream.stream_id:
            slot.copy_(x)
        else:
            # As TensorRT, which must not run on the default stream: on the instance's own, between fork and join.
            self._fork.record(stream)
            self._own.wait_event(self._fork)
            try:
                with seam.on_stream(self._own):
                    slot.copy_(x)
            finally:
                self._join.record(self._own)
                stream.wait_event(self._join)
        return slot.clone()


class ScratchKernels(Stateful):
    """See :class:`anabranch.backends.Stateful`. The first and the last result that can be held is."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self.device, self.seam = device, get_device(device.type)
        self.weights = tuple(program.weights)
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(program.module.graph, {}))
        self.held: dict[str, torch.Tensor] = {}
        root = torch.nn.Module()
        nodes = [n for n in self.graph.nodes if _can_be_held(n)]
        for node in dict.fromkeys([*nodes[:1], *nodes[-1:]]):
            name = f"hold_{len(self.held)}"
            self.held[name] = node.meta["val"]
            root.add_module(name, torch.nn.Identity())
            with self.graph.inserting_after(node):
                read = self.graph.call_module(name, (node,))
            read.meta = dict(node.meta)
            node.replace_all_uses_with(read, delete_user_cb=lambda user, read=read: user is not read)
        self._largest: dict[Any, int] = {}
        if program.sizes is not None and program.sizes.free:
            known = program.sizes.known()
            self._largest = {s: LARGEST if s not in known.declared else known.declared[s].max for s in known.bounds}
            program.sizes.narrow({s: (low, self._largest[s]) for s, (low, _) in known.bounds.items()})
        self.forward: Any = type(fx.GraphModule(root, self.graph)).forward

    def nbytes_at(self, values: Any) -> int:
        """Of the scratch tensor; ``values``: of the symbols in sizes, where it is for these alone."""
        at = self._largest if values is None else values
        return max((math.prod(shape_at(x.shape, at)) * x.element_size() for x in self.held.values()), default=0)

    def instance(self, own: Any, values: Any = None) -> ScratchInstance:
        return ScratchInstance(self, own, values)

    def describe(self) -> list[str]:
        return [f"{len(self.held)} results pass through a scratch tensor of {self.nbytes_at(None)} bytes"]


def _can_be_held(node: fx.Node) -> bool:
    """Whether a node makes one new tensor, which nothing else refers to."""
    x = node.meta.get("val")
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if not isinstance(x, torch.Tensor) or not x.numel() or not is_dense(x):
        return False
    schema = node.target._schema
    return not any(a.alias_info for a in (*schema.arguments, *schema.returns))


class _Backend:
    name = NAME

    def lower(self, program: Program, examples: Sequence[torch.Tensor], options: Options) -> ScratchKernels:
        made = ScratchKernels(program, examples[0].device if examples else program.weights[0].device)
        made.seam.free_code()  # not at each instance, as TensorRT: to make one of these waits for nothing
        return made


def install(device: Device) -> None:
    """Let ``anabranch.compile`` take ``backend="stateful"`` on ``device``, for as long as the process lives."""
    from anabranch.runtime import _builder, _compile

    if NAME in device.backends:
        return
    table, backend = backends.get_backend, _Backend()
    _builder.get_backend = lambda name: backend if name == NAME else table(name)
    _compile.BACKENDS = (*_compile.BACKENDS, NAME)
    device.backends = (*device.backends, NAME)
