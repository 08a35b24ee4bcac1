"""Mixed precision on a device with streams: captured and direct, in both runtimes, on many streams at once."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn


class Attention(nn.Module):
    """With scores that overflow in float16."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.query, self.key, self.value = (
            nn.Parameter(torch.randn(16, 16, generator=generator) * s) for s in (60.0, 60.0, 0.3)
        )
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (x @ self.query) @ (x @ self.key).transpose(-1, -2) * 1e-4
        y: torch.Tensor = self.norm(x + scores.softmax(-1) @ (x @ self.value))
        return y


@pytest.mark.parametrize("graphs", [True, False], ids=["captured", "direct"])
@pytest.mark.parametrize("precision", ["mixed", "mixed-bf16"])
def test_results_are_near_float32s_and_the_same_in_all_threads(precision: str, graphs: bool, runtime: str) -> None:
    import anabranch.sim  # makes the device

    model = Attention().eval()
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(2, 6, 16, generator=generator) for _ in range(6)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        query, key = (inputs[0].half() @ p.half() for p in (model.query, model.key))
        assert not torch.isfinite(query @ key.mT).all()
    there = [x.to("sim") for x in inputs]
    engine = anabranch.compile(model.to("sim"), [there[0]], precision=precision, runtime=runtime, cuda_graphs=graphs)
    assert engine.plan.captured is graphs
    serial = [engine(x).cpu() for x in there]
    for y, e in zip(serial, expected, strict=True):
        assert float((y - e).norm() / e.norm()) < (3e-3 if precision == "mixed" else 3e-2)
    wrong: list[int] = []

    def work(i: int) -> None:
        stream = torch.get_device_module("sim").Stream()
        stream.wait_stream(main)
        with stream:
            results = [engine(there[(i + k) % 6]) for k in range(12)]
            stream.synchronize()
            wrong.extend(k for k, y in enumerate(results) if not torch.equal(y.cpu(), serial[(i + k) % 6]))

    main = torch.get_device_module("sim").current_stream()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    engine.close()
