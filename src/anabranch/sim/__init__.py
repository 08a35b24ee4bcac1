"""A simulated accelerator: the PyTorch device ``sim``, with streams on which nothing runs before it has to.

Importing this module builds a C++ backend at first use and registers the devices ``sim:0`` and ``sim:1``. See
``docs/sim.md`` for what is modelled and what is not. A process has one kind of accelerator: import it before anything
uses CUDA, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend, rename_privateuse1_backend

import anabranch.runtime  # noqa: F401  # loaded here once, and not in the process of each schedule
from anabranch import _sync, devices
from anabranch.explore import Verdict, exhaustive, explore, fifo, lazy, pct, random, replay
from anabranch.explore import _device as explored
from anabranch.explore._shared import Factories
from anabranch.sim import _module
from anabranch.sim._device import SimDevice
from anabranch.sim._graph import Graph, graph
from anabranch.sim._module import Event, Stream

core = _module.core

rename_privateuse1_backend("sim")
torch._register_device_module("sim", _module)
generate_methods_for_privateuse1_backend()
devices.register("sim", SimDevice)
explored.register(core)
# What the runtime's threads share is observable in this process from here on; in threads that no explorer controls it
# behaves as ever.
_sync.install(Factories())
_sync.renew()
os.register_at_fork(before=core.before_fork, after_in_parent=core.after_fork)


def launch(
    name: str, kernel: Callable[..., Any], *, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()
) -> None:
    """Queue a kernel that is not an ATen operator on the current stream of its tensors' device.

    When its turn comes, ``kernel`` is called with CPU tensors over the same memory, first those of ``reads``, then
    those of ``writes``; it must touch nothing else. An exception in it is a device error: it lasts, and shows at the
    next synchronization.
    """
    core.launch(name, kernel, list(reads), list(writes))


def reset() -> None:
    """Forget a device error, and with it all work that is queued and all captures under way."""
    core.reset()


__all__ = [
    "Event",
    "Graph",
    "Stream",
    "Verdict",
    "core",
    "exhaustive",
    "explore",
    "fifo",
    "graph",
    "launch",
    "lazy",
    "pct",
    "random",
    "replay",
    "reset",
]
