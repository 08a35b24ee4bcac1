"""The CPU: no streams, no captures. Work is done when the call returns, so nothing here has anything to order."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from anabranch.devices._stream import Event, Stream


def _absent(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the CPU has no streams, lanes, graphs or private memory")


class CpuDevice:
    """See :class:`anabranch.devices.Device`."""

    kind = "cpu"
    has_streams = False
    survives_fork = True
    has_time = True
    backends: tuple[str, ...] = ("inductor", "eager")
    is_profiled = False

    def index(self, device: torch.device) -> int:
        return 0

    def current_index(self) -> int:
        return 0

    def on_stream(self, stream: Stream) -> AbstractContextManager[Any]:
        return nullcontext()

    def on_device(self, index: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def is_capturing(self, stream: Stream) -> bool:
        return False

    def relaxed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare_retire(self, index: int) -> None:
        pass

    def retire(self, events: Sequence[Event], tensors: Sequence[torch.Tensor]) -> None:
        pass

    def defer_free(self, index: int, events: Sequence[Event], kept: Any, free: Callable[[], None]) -> None:
        free()

    def collect(self) -> None:
        pass

    def defer_free_code(self, index: int, free: Callable[[], None]) -> None:
        free()

    def free_code(self) -> None:
        pass

    def trim(self) -> None:
        pass

    def lost(self) -> None:
        return None

    def check_error(self, error: BaseException) -> None:
        pass

    def native_api(self, core: Any) -> int:
        return 0

    def call_error(self, call: str, code: int) -> Exception:
        return RuntimeError(f"{call} failed with code {code}")

    def range(self, name: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def describe(self, index: int) -> str:
        return platform.processor() or platform.machine()

    # What needs streams is never asked of a device without them.
    current_stream = stream = latch = event = staticmethod(_absent)
    acquire_lane = release_lane = memory = release_memory = scratch = release_scratch = staticmethod(_absent)
    capture = hand_over = join_capture = kept_by_capture = staticmethod(_absent)
