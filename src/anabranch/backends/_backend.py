"""The interface of a backend, and the table of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from anabranch.devices import Stream
from anabranch.export import Program

#: ``kernels(inputs) -> computed tensors``: queues its work on the calling thread's current stream and allocates from
#: that stream's memory. Holds the weights. Any number of threads may call it once it has run a first time.
Kernels = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]

#: Why TensorRT runs no program that writes. Where its partitioner sorts a graph, it knows nothing of a write that has
#: to come after all reads.
RESULTS_ONLY = "it writes into inputs or state, and TensorRT's engines write results only"


class Wrapped:
    """Kernels, and the function that launches them: for who can do without Python what it does."""

    def __init__(self, run: Kernels, wrapper: Callable[[list[Any]], Any], weights: tuple[torch.Tensor, ...]) -> None:
        """``wrapper``: takes a list of ``weights`` and inputs, which lie in memory as the kernels want them."""
        self._run, self.wrapper, self.weights = run, wrapper, weights

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return self._run(inputs)


class Instance(Protocol):
    """Kernels together with the state of one run. One run at a time: the next one is ordered after it on the device."""

    #: Bytes of device memory that it holds.
    nbytes: int
    #: Whether its kernels' code is loaded for it alone: the same kernel is another function in each instance.
    loads_own_code: bool

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Queue the run on the current stream, as :data:`Kernels` do."""

    def prepare_direct(self) -> None:
        """After a first run: get ready for runs outside captures, on that run's stream and in its memory.

        Results of runs outside captures are good from then on only.
        """

    def why_not_captured(self, stream: Stream) -> str:
        """After a first run: why runs on ``stream`` cannot be captured into a graph, or nothing."""

    def private_memory(self) -> Sequence[torch.Tensor]:
        """Device memory that runs write to, besides what they allocate."""


class Stateful(ABC):
    """Kernels whose runs need state (workspaces, execution contexts), which no two runs in flight may share.

    Each captured graph gets an instance of its own for good, each direct call in flight one that no other has.
    """

    #: The program's graph as it runs: what became one piece is a ``call_module`` in it.
    graph: fx.Graph

    @abstractmethod
    def instance(self, own: Stream | None, values: Mapping[Any, int] | None = None) -> Instance:
        """New state, allocated on the current stream from the current memory pool. May be slow. Any thread.

        ``own``: a stream that nobody else has while the instance lives, for what must not run on the caller's.
        ``values``: of a program for many sizes, what its symbols stand for in all runs that this one is for.
        """

    @abstractmethod
    def describe(self) -> list[str]:
        """What runs where, a line each, for ``explain()``."""


@dataclass(frozen=True)
class TF32:
    """Which operators of float32 may be computed in TF32 on a GPU, by PyTorch's flags."""

    products: bool = False
    convolutions: bool = False
    recurrent: bool = False


@dataclass(frozen=True)
class Options:
    """What :func:`~anabranch.compile` was asked for."""

    require_full: bool = False
    tf32: TF32 = TF32()


class Backend(Protocol):
    """Turns a program into kernels. Called with the build lock held."""

    name: str

    def lower(self, program: Program, examples: Sequence[torch.Tensor], options: Options) -> Kernels | Stateful:
        """Compile ``program``; ``examples`` are inputs of its shapes, strides and dtypes.

        Raises :class:`~anabranch.errors.BuildError` with the compiler's message.
        """


def of_one(
    kernels: Kernels | Stateful, own: Stream | None, values: Mapping[Any, int] | None = None
) -> Kernels | Instance:
    """What one graph, or one thread by itself, may run: an instance of its own where there is state.

    ``values``: see :meth:`Stateful.instance`.
    """
    return kernels.instance(own, values) if isinstance(kernels, Stateful) else kernels
