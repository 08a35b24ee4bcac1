"""The device seam: streams, events, memory, launches, captures. Behind it are ``cuda``, ``cpu``, and what registers
itself, as ``anabranch.sim`` does."""

from anabranch.devices._device import Device, Graph, Lane, Latch, Memory, Scratch
from anabranch.devices._registry import get_device, register

__all__ = ["Device", "Graph", "Lane", "Latch", "Memory", "Scratch", "get_device", "register"]
