"""The device seam: streams, events, memory, launches and captures. Siblings behind it: ``cuda`` and ``cpu``."""

from anabranch.devices._device import Device, Graph, Lane, Latch, Memory, get_device

__all__ = ["Device", "Graph", "Lane", "Latch", "Memory", "get_device"]
