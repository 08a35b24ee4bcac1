"""anabranch: PyTorch inference engines that any thread may call on any CUDA stream."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from anabranch import _entry_point
from anabranch._version import __version__
from anabranch.errors import (
    AnabranchError,
    BuildError,
    DeviceLost,
    EngineClosed,
    FlagsChanged,
    InputError,
    NeedsSession,
    NotCapturable,
    PlanError,
    RecompileLimit,
    SessionBroken,
    SessionBusy,
    SessionClosed,
    SessionError,
    SessionFull,
    TraceError,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from anabranch.ahead import Build, build
    from anabranch.export import Dim, Input, Mixed
    from anabranch.plan import Plan
    from anabranch.runtime import Engine, Session, Stats, compile

__all__ = [
    "AnabranchError",
    "Build",
    "BuildError",
    "DeviceLost",
    "Dim",
    "Engine",
    "EngineClosed",
    "FlagsChanged",
    "Input",
    "InputError",
    "Mixed",
    "NeedsSession",
    "NotCapturable",
    "Plan",
    "PlanError",
    "RecompileLimit",
    "Session",
    "SessionBroken",
    "SessionBusy",
    "SessionClosed",
    "SessionError",
    "SessionFull",
    "Stats",
    "TraceError",
    "UnsupportedModel",
    "__version__",
    "build",
    "compile",
]

#: Loaded when first used, so that tools which need no PyTorch (the race checker) do not load it.
_LAZY = {
    "Build": "anabranch.ahead",
    "Dim": "anabranch.export",
    "Engine": "anabranch.runtime",
    "Input": "anabranch.export",
    "Mixed": "anabranch.export",
    "Plan": "anabranch.plan",
    "Session": "anabranch.runtime",
    "Stats": "anabranch.runtime",
    "build": "anabranch.ahead",
    "compile": "anabranch.runtime",
}


_entry_point.register()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'anabranch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
