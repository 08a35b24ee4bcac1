"""The reported bug in six lines: an engine that keeps the stream which was current when it was built.

No GPU is needed: `anabranch explore examples/stale_stream.py` finds the wait that is missing.
"""

from __future__ import annotations

import torch

import anabranch.sim  # noqa: F401 - makes the device "sim" known

engine_stream = torch.accelerator.current_stream()  # kept from the build


def main() -> torch.Tensor:
    with torch.Stream("sim"):  # the caller's stream
        x = torch.ones(1, 3, 5, device="sim")
        with engine_stream:  # should be the caller's
            return torch.relu(x)
