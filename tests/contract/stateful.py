"""A backend for tests whose kernels have state, as TensorRT's execution contexts do, and which needs no GPU.

PyTorch's operators, but some results pass through a *scratch tensor* that belongs to the instance: they are written
there and read again by what follows. Two runs of one instance that overlap on the device mix up their values, and the
race checker sees the two accesses.
"""

from __future__ import annotations

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
from anabranch.export import Program

NAME = "stateful"


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

    def __init__(self, owner: ScratchKernels, own: Any) -> None:
        self._owner, self._own = owner, own
        # One piece for all held results: they follow each other in the graph, and each is read before the next.
        self.scratch = torch.empty(owner.nbytes, dtype=torch.uint8, device=owner.device) if owner.nbytes else None
        self.nbytes = owner.nbytes
        holds = {name: _Hold(self.scratch, like, own) for name, like in owner.held.items()}
        # What the graph's code calls by name.
        self._holds = SimpleNamespace(**holds)
        self.alive.add(self)
        code = [Code(owner.device.index)]
        weakref.finalize(self, owner.seam.defer_free_code, owner.device.index, code.clear).atexit = False

    def __del__(self) -> None:
        # Ends a capture that somebody has under way, unless who frees it allows for that.
        self._own.query()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
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

    def __init__(self, scratch: Any, like: torch.Tensor, own: Any) -> None:
        nbytes = like.numel() * like.element_size()
        self._slot = scratch[:nbytes].view(like.dtype).as_strided(like.size(), like.stride())
        self._device, self._own = scratch.device, own
        self._fork, self._join = torch.Event(scratch.device.type), torch.Event(scratch.device.type)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        seam = get_device(self._device.type)
        stream = seam.current_stream(self._device.index)
        if stream.stream_id:
            self._slot.copy_(x)
        else:
            # As TensorRT, which must not run on the default stream: on the instance's own, between fork and join.
            self._fork.record(stream)
            self._own.wait_event(self._fork)
            try:
                with seam.on_stream(self._own):
                    self._slot.copy_(x)
            finally:
                self._join.record(self._own)
                stream.wait_event(self._join)
        return self._slot.clone()


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
        self.nbytes = max((x.numel() * x.element_size() for x in self.held.values()), default=0)
        self.forward: Any = type(fx.GraphModule(root, self.graph)).forward

    def instance(self, own: Any) -> ScratchInstance:
        return ScratchInstance(self, own)

    def describe(self) -> list[str]:
        return [f"{len(self.held)} results pass through a scratch tensor of {self.nbytes} bytes"]


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
