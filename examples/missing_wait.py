"""Two streams and a wait that is missing: `anabranch explore examples/missing_wait.py` finds it, without a GPU.

With ``repaired`` in place of ``main`` there is nothing to find: `anabranch explore examples/missing_wait.py:repaired`.
"""

from __future__ import annotations

import torch

import anabranch.sim  # noqa: F401 - makes the device known

a, b = torch.Stream("sim"), torch.Stream("sim")


def main(wait: bool = False) -> None:
    with a:
        x = torch.ones(4, device="sim") * 2
    if wait:
        b.wait_stream(a)
    with b:
        y = x + 1
    b.synchronize()
    assert y.tolist() == [3.0] * 4


def repaired() -> None:
    main(wait=True)
