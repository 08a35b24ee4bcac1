"""The cure for `examples/stale_stream.py`: an engine of anabranch, called by two threads on streams of their own.

`anabranch explore examples/any_stream.py` runs it under every order of its threads and streams.
"""

from __future__ import annotations

import threading

import torch

import anabranch
import anabranch.sim

engine = anabranch.compile(torch.nn.ReLU(), [anabranch.Input((1, 3, 5), device="sim")], runtime="python")


def call(value: float) -> None:
    with torch.Stream("sim"):
        x = torch.full((1, 3, 5), value, device="sim")
        assert engine(x).cpu().unique().tolist() == [value]


def main() -> None:
    threads = [threading.Thread(target=call, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
