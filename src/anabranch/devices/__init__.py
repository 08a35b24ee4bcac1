"""The device seam: streams, events, memory, launches, captures. Behind it are ``cuda``, ``cpu``, and what registers
itself, as ``anabranch.sim`` does."""

from anabranch.devices._device import Device, Graph, Lane, Latch, Memory, Scratch
from anabranch.devices._registry import get_device, register
from anabranch.devices._stream import Event, Stream

__all__ = ["Device", "Event", "Graph", "Lane", "Latch", "Memory", "Scratch", "Stream", "get_device", "register"]
