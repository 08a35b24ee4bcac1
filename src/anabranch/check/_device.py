"""The device that a check was asked for."""

from __future__ import annotations

from anabranch import devices


def find_device(kind: str) -> devices.Device:
    """As :func:`anabranch.devices.get_device`; makes the simulated device where that is asked for."""
    if kind == "sim":
        import anabranch.sim  # noqa: F401  # registers it
    return devices.get_device(kind)
