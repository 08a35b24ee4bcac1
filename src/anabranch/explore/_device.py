"""The device that an exploration controls, if this process has one. The device says so itself."""

from __future__ import annotations

from anabranch.explore._conductor import Core

_core: Core | None = None


def register(core: Core) -> None:
    """Control ``core``, too, in every exploration from now on."""
    global _core
    _core = core


def device() -> Core | None:
    """What was registered."""
    return _core
