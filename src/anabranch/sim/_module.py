"""``torch.sim``: what PyTorch and device-generic programs expect of a device's module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from anabranch.devices import _turns
from anabranch.sim import _build

core = _build.load()

__all__ = [
    "Event",
    "Stream",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "empty_cache",
    "get_amp_supported_dtype",
    "is_available",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "memory_allocated",
    "memory_reserved",
    "set_device",
    "set_stream",
    "stream",
    "synchronize",
]


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _lazy_init() -> None:
    """Nothing to do; but only where a module has it does PyTorch 2.11 take the device for initialized, and wait for it
    in ``torch.accelerator.synchronize``."""


def _is_in_bad_fork() -> bool:
    # Its memory is the host's: a forked child has a copy of everything.
    return False


def device_count() -> int:
    return int(core.devices)


def current_device() -> int:
    return int(core.current_device())


def set_device(index: Any) -> None:
    core.exchange_device(_index(index))


def _exchange_device(index: int) -> int:
    return int(core.exchange_device(index)) if index >= 0 else current_device()


_maybe_exchange_device = _exchange_device


class device:
    """Context manager: makes a device current in this thread."""

    def __init__(self, index: Any) -> None:
        self._wanted = _index(index)

    def __enter__(self) -> None:
        self._before = core.exchange_device(self._wanted)

    def __exit__(self, *exc: object) -> None:
        core.exchange_device(self._before)


def _index(given: Any) -> int:
    """The index of a device given as a number, a string, a ``torch.device`` or None."""
    if given is None:
        return current_device()
    if isinstance(given, int):
        return given if given >= 0 else current_device()
    found = torch.device(given)
    return current_device() if found.index is None else found.index


def Stream(device: Any = None, priority: int = 0, *, blocking: bool = False) -> torch.Stream:
    """A new stream. ``blocking``: one that the legacy default stream synchronizes with, as a plain
    ``cudaStreamCreate`` makes; otherwise a non-blocking one, as PyTorch makes on CUDA. Priorities are not modelled."""
    index = _index(device)
    return _wrap(core.new_stream(index, blocking), index)


def _wrap(stream_id: int, index: int) -> torch.Stream:
    return torch.Stream(stream_id=stream_id, device_index=index, device_type=_PRIVATE_USE_1)


#: ``c10::DeviceType::PrivateUse1``
_PRIVATE_USE_1 = 20


def Event(*args: Any, **kwargs: Any) -> torch.Event:
    return torch.Event("sim", *args, **kwargs)


def current_stream(device: Any = None) -> torch.Stream:
    index = _index(device)
    return _wrap(core.current_stream(index), index)


def default_stream(device: Any = None) -> torch.Stream:
    """The legacy default stream."""
    return _wrap(0, _index(device))


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


@contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Makes a stream, and its device, current in this thread."""
    if stream is None:
        yield
        return
    with stream:
        yield


def synchronize(device: Any = None) -> None:
    with _turns.turns.waiting():
        core.synchronize(_index(device))


def manual_seed_all(seed: int) -> None:
    core.seed_all(int(seed) & (2**64 - 1))


manual_seed = manual_seed_all


def memory_allocated(device: Any = None) -> int:
    """Bytes of blocks in use."""
    return int(core.memory(_index(device))[0])


def memory_reserved(device: Any = None) -> int:
    """Bytes of blocks in use or kept for re-use."""
    return int(core.memory(_index(device))[1])


def empty_cache() -> None:
    """Return kept blocks to the host. Does nothing while work is queued, which might still touch them."""
    core.pool_trim(0)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]
