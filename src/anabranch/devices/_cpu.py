"""The CPU: no streams, no captures. Work is done when the call returns, so nothing here has anything to order."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch

from anabranch.devices._device import Graph, Lane, Latch, Memory, Scratch
from anabranch.devices._stream import Event, Stream


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

    def building(self) -> AbstractContextManager[None]:
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
    def current_stream(self, index: int) -> NoReturn:
        raise NotImplementedError("the CPU has no streams")

    def stream(self, index: int) -> NoReturn:
        raise NotImplementedError("the CPU has no streams")

    def latch(self) -> Latch:
        raise NotImplementedError("the CPU has no streams")

    def event(self) -> NoReturn:
        raise NotImplementedError("the CPU has no events")

    def acquire_lane(self, index: int) -> Lane:
        raise NotImplementedError("the CPU has no lanes")

    def release_lane(self, lane: Lane) -> None:
        raise NotImplementedError("the CPU has no lanes")

    def memory(self, index: int, fresh: bool = False) -> Memory:
        raise NotImplementedError("the CPU has no private memory pools")

    def release_memory(self, memory: Memory) -> None:
        raise NotImplementedError("the CPU has no private memory pools")

    def scratch(self, index: int) -> Scratch:
        raise NotImplementedError("the CPU has no lanes")

    def release_scratch(self, scratch: Scratch) -> None:
        raise NotImplementedError("the CPU has no lanes")

    def capture(self, lane: Lane, memory: Memory, fn: Callable[[], Any]) -> tuple[Graph, Any]:
        raise NotImplementedError("the CPU has no captures")

    def hand_over(self, tensors: Sequence[torch.Tensor], stream: Stream) -> None:
        raise NotImplementedError("the CPU has no captures")

    def join_capture(self, stream: Stream, index: int, keep: Any) -> Lane:
        raise NotImplementedError("the CPU has no captures")

    def kept_by_capture(self, stream: Stream) -> list[Any]:
        raise NotImplementedError("the CPU has no captures")
