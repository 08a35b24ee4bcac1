"""Fixtures of the GPU tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import anabranch

# As `anabranch check` does: a held stream must not hold others through a hardware queue that they share.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# Before anything imports them: their asserts are to explain themselves as those of test files do.
pytest.register_assert_rewrite("contract")
from gpu.support import Gpu, Make  # noqa: E402


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    gpu = Gpu()
    yield gpu
    gpu.open_all()
    gc.collect()


@pytest.fixture
def rig(gpu: Gpu) -> Gpu:
    """What the contract's tests call it."""
    return gpu


@pytest.fixture
def compiled() -> Iterator[Make]:
    """Compile an eager-backend engine; closed at the end of the test."""
    engines: list[Any] = []

    def make(model: torch.nn.Module, *inputs: torch.Tensor, **options: Any) -> Any:
        options.setdefault("backend", "eager")
        model = model.eval().requires_grad_(False).to("cuda", inputs[0].dtype)
        engine = anabranch.compile(model, list(inputs), **options)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
