"""Many threads on one engine: all get their turn, and the right answer."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import anabranch

pytestmark = pytest.mark.usefixtures("seeded", "runtime")


def test_of_sixty_four_threads_none_starves_on_the_cpu() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    engine = anabranch.compile(model, [torch.randn(4, 32)], backend="eager", max_contexts=1)
    inputs = [torch.randn(4, 32) for _ in range(64)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    calls = 50
    finished, wrong, errors = [0] * 64, [0] * 64, []
    start = threading.Barrier(64)

    def work(i: int) -> None:
        try:
            start.wait()
            for k in range(calls):
                j = (i + k) % 64
                wrong[i] += not torch.allclose(engine(inputs[j]), expected[j], atol=1e-6)
                finished[i] += 1
        except BaseException as e:
            errors.append(e)

    threads: list[Any] = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(64)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not errors, errors[0]
    assert finished == [calls] * 64
    assert wrong == [0] * 64
    assert engine.stats().calls == 64 * calls
