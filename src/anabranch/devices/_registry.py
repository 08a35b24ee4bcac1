"""Which devices there are. A device that is no part of this folder registers itself."""

from __future__ import annotations

import functools
from collections.abc import Callable

from anabranch.devices._device import Device
from anabranch.errors import InputError


def _cpu() -> Device:
    from anabranch.devices._cpu import CpuDevice

    return CpuDevice()


def _cuda() -> Device:
    from anabranch.devices.cuda._device import CudaDevice

    return CudaDevice()


_makers: dict[str, Callable[[], Device]] = {"cuda": _cuda, "cpu": _cpu}


def register(kind: str, make: Callable[[], Device]) -> None:
    """From now on ``make()`` is the implementation for tensors whose ``device.type`` is ``kind``; called once."""
    _makers[kind] = make


@functools.cache
def get_device(kind: str) -> Device:
    """The device implementation for a ``torch.device.type``; the same one each time."""
    if kind in _makers:
        return _makers[kind]()
    if kind == "sim":
        raise InputError("device 'sim' given, which needs the module anabranch.sim. Do: import anabranch.sim")
    raise InputError(
        f"device {kind!r} given; engines run on 'cuda', 'cpu' or 'sim'. Move the model and its inputs there."
    )
