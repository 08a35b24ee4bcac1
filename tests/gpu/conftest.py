"""Fixtures of the GPU tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

# As `anabranch check` does: a held stream must not hold others through a hardware queue that they share.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# Before anything imports them: their asserts are to explain themselves as those of test files do.
pytest.register_assert_rewrite("contract")
from contract.support import compiled, runtime  # noqa: E402, F401  # fixtures
from gpu.support import Gpu  # noqa: E402

#: A GPU has channels for 15 contexts with 32 queues, and some tests start processes of their own.
MOST_WORKERS = 10


def pytest_collection_modifyitems() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > MOST_WORKERS:
        raise pytest.UsageError(
            f"{workers} workers given; expected at most {MOST_WORKERS}: a GPU has no room for more processes with 32"
            f" queues each. Use -n {MOST_WORKERS}."
        )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    # So that a test can put something in the place of a method of the events that engines make.
    monkeypatch.setattr(type(gpu.seam), "event", lambda seam: gpu.event_class(device="cuda"))
    yield gpu
    gpu.open_all()
    gc.collect()
    # PyTorch keeps 64 MiB for each pair of a thread and a stream that a product ran on, for as long as the process
    # lives: ten workers fill a GPU with them.
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()


@pytest.fixture
def rig(gpu: Gpu) -> Gpu:
    """What the contract's tests call it."""
    return gpu
