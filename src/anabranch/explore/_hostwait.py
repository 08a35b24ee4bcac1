"""The oracle "host-wait": a call of an engine must not wait for the device, except while something is being built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch import _activity
from anabranch.explore._run import Failure

if TYPE_CHECKING:
    from anabranch.explore._conductor import Conductor

#: Of this package's code, a report names the runtime's; the rest waits on its behalf, as PyTorch does.
_NAMED = "anabranch.runtime"
_SKIPPED = ("anabranch", "torch", "contextlib")


class HostWaits:
    """Asks what a thread is doing that syncs or queries; only then, so that it costs nothing elsewhere."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def __call__(self, kind: str, label: str) -> None:
        if not _activity.in_call() or _activity.is_building():
            return
        word = "queries" if kind == "query" else "waits for"
        self._conductor.failures.append(
            Failure("host-wait", f"a call {word} the device on the host ({label}, at {_where()})")
        )


def _where() -> str:
    """File and line of the innermost code that is the runtime's or its user's."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(_NAMED) or module.partition(".")[0] not in _SKIPPED:
            break
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
