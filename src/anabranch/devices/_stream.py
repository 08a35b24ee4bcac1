"""Streams and events, whatever the device: PyTorch's own types, of which each device has its kind.

A stream is a queue of work that is done in order; any thread may queue on it. ``stream_id`` names it among those alive:
the id of a stream that is gone may come back. An event stands for what was queued on a stream when it was recorded
last; one that was never recorded counts as reached. Neither ``Stream.wait_event`` nor ``Event.record`` makes the host
wait; ``synchronize`` and ``Event.query`` ask the device.
"""

from __future__ import annotations

import torch

Stream = torch.Stream
Event = torch.Event
