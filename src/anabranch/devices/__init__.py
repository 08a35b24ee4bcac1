"""The device seam: streams, events, memory, launches, captures. Siblings behind it: ``cuda``, ``cpu``, ``sim``."""

from anabranch.devices._device import Device, Graph, Lane, Latch, Memory, get_device

__all__ = ["Device", "Graph", "Lane", "Latch", "Memory", "get_device"]
