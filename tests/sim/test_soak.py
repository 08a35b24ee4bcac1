"""Eight threads that nobody controls, while queued work runs in random order."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch

from contract.support import ROUNDING, assert_same


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.relu(self.conv(x)).mean((2, 3))
        return self.linear(y), y


@pytest.mark.parametrize("seconds", [15.0, pytest.param(120.0, marks=pytest.mark.slow)])
def test_eight_threads(seconds: float) -> None:
    import anabranch.sim

    core = anabranch.sim.core
    torch.manual_seed(2991)
    model = Net().eval().requires_grad_(False)
    sources = [torch.rand(1, 3, 8, 8) - 0.5 for _ in range(16)]
    with torch.no_grad():
        expected = [model(x) for x in sources]
    model = model.to("sim")
    inputs = [x.to("sim") for x in sources]
    engines = [
        anabranch.compile(model, [inputs[0]], max_contexts=contexts, cuda_graphs=graphs)
        for contexts, graphs in ((1, True), (3, True), (1, False))
    ]
    torch.accelerator.synchronize()
    core.policy("random", 2991)
    end = time.monotonic() + seconds
    calls, errors = [0] * 8, []

    def work(thread: int) -> None:
        draw = random.Random(thread)
        streams = [torch.Stream("sim") for _ in range(3)]
        try:
            with torch.no_grad():
                while time.monotonic() < end and not errors:
                    batch = []
                    for _ in range(draw.randrange(1, 6)):
                        i, stream = draw.randrange(len(inputs)), draw.choice(streams)
                        with stream:
                            x = inputs[i] * 1
                            batch.append((i, stream, draw.choice(engines)(x)))
                            del x  # its block is anybody's from here on
                            torch.rand(1, 3, 8, 8, device="sim")
                    if draw.random() < 0.02:
                        engines[1].trim()
                    for i, stream, results in batch:
                        with stream:
                            for y, e in zip(results, expected[i], strict=True):
                                assert_same(y.cpu(), e, rounding=ROUNDING)
                                torch.testing.assert_close(y.cpu(), e, rtol=0, atol=1e-6)
                    calls[thread] += len(batch)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        core.policy("fifo", 0)
    if errors:
        raise errors[0]
    assert min(calls) > 50, calls
    torch.accelerator.synchronize()
    assert core.idle()
    assert core.lost() is None
