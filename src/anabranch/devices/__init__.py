"""The device seam: streams, events, memory, launches, captures. Behind it are ``cuda``, ``cpu``, and what registers
itself, as ``anabranch.sim`` does."""

from anabranch.devices._device import Device, Graph, Lane, Latch, Memory
from anabranch.devices._registry import get_device, register

__all__ = ["Device", "Graph", "Lane", "Latch", "Memory", "get_device", "register"]
