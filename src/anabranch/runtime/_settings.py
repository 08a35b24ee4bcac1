"""What an engine was compiled with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anabranch.devices import Device
from anabranch.runtime._flags import Flags

DEFAULT_MAX_CONTEXTS = 16


@dataclass(frozen=True)
class Settings:
    """What an engine was compiled with, shared by all its specializations."""

    name: str
    device: Device
    index: int
    backend: str
    cuda_graphs: bool | None
    #: Those that operators read when they are queued.
    flags: Flags
    #: Those and what exporting reads.
    compile_flags: Flags
    require_full: bool = False
    #: Whether the user has named the backend.
    backend_is_given: bool = False

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu") if self.device.kind == "cpu" else torch.device(self.device.kind, self.index)

    @property
    def is_free_to_choose(self) -> bool:
        """Whether calls may run in whichever way measures faster: the device can tell, and nobody asked for one."""
        asked = self.backend_is_given or self.require_full or self.cuda_graphs is not None
        return not asked and self.device.has_streams and self.device.has_time
