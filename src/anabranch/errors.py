"""Every error that anabranch raises on purpose. Each message says what was given, what was expected, what to do."""

from __future__ import annotations

__all__ = [
    "AnabranchError",
    "BuildError",
    "CannotJudge",
    "DeviceLost",
    "EngineClosed",
    "FlagsChanged",
    "InputError",
    "NeedsSession",
    "NotCapturable",
    "PlanError",
    "RecompileLimit",
    "SessionBroken",
    "SessionBusy",
    "SessionClosed",
    "SessionError",
    "SessionFull",
    "TraceError",
    "UnsupportedModel",
]


class AnabranchError(Exception):
    """Base of all errors below."""


class InputError(AnabranchError, ValueError):
    """A call's or a compile's input has the wrong structure, shape, dtype, device or layout, or requires grad.

    Raised before any device work is queued; the engine stays usable.
    """


class UnsupportedModel(AnabranchError):
    """The model does something that an engine cannot do faithfully; the message names the op and its source line."""


class BuildError(AnabranchError):
    """A backend failed to turn the graph into kernels."""


class CannotJudge(AnabranchError):
    """A result that cannot be compared with an expected one; the message names it and says what to return instead.

    Of the tools, not of calls: ``anabranch check`` and ``bench`` end with exit status 2 rather than call it right.
    """


class NotCapturable(AnabranchError):
    """A call inside the caller's own CUDA graph capture needs something that a capture forbids."""


class FlagsChanged(AnabranchError):
    """A numerics flag (TF32, determinism, ...) differs from its value at compile and would change the result."""

    def __init__(self, message: str = "", *, wrote: bool = False) -> None:
        """``wrote``: whether the call may have written into inputs or state by then."""
        AnabranchError.__init__(self, message)
        self.wrote = wrote


class EngineClosed(AnabranchError):
    """The engine was closed, or belongs to a parent process, or this process was forked in the middle of a compile."""


class DeviceLost(AnabranchError):
    """The device reported an error that lasts until the process ends; no engine on it can run again."""


class SessionError(AnabranchError):
    """Base of what only models with state raise."""


class NeedsSession(SessionError):
    """The engine of a model that keeps state was called itself; ``engine.session()`` gives what is to be called."""


class SessionBusy(SessionError):
    """Two calls of one session at once; the first goes on, the second raises this before anything is queued."""


class SessionBroken(SessionError):
    """An earlier call of the session failed in the middle; ``reset()`` or ``load()`` make it whole again."""


class SessionFull(SessionError):
    """The call would write past the end of the session's state. Raised before anything is queued."""


class SessionClosed(SessionError):
    """The session was closed."""


class PlanError(AnabranchError):
    """A plan's steps touch the same bytes without an order between them; the message lists them with a fix each."""


class TraceError(AnabranchError, ValueError):
    """A trace file is malformed; the message gives the line and what was expected there."""


class RecompileLimit(UserWarning):
    """``torch.compile`` has compiled a function as often as Dynamo's limit allows: further calls may run in eager."""
