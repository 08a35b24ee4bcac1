"""The oracle "host-wait": a call of an engine must not wait for the device, except while something is being built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.explore._run import Failure
from anabranch.runtime import _library

if TYPE_CHECKING:
    from anabranch.explore._conductor import Conductor

_RUNTIME = str(Path(__file__).parent.parent / "runtime") + "/"
#: Functions of the runtime in which waiting is allowed: they build, warm or close.
_BUILDING = frozenset({"build", "warm", "close", "trim", "_specialization"})


class HostWaits:
    """Looks at the stack of a thread that syncs or queries; only then, so that it costs nothing elsewhere."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def __call__(self, kind: str, label: str) -> None:
        frame = sys._getframe(2)
        called, where = False, ""
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(_RUNTIME):
                if code.co_name in _BUILDING or code.co_name.startswith("_build"):
                    return
                where = where or f"{Path(code.co_filename).name}:{frame.f_lineno}"
                called = called or code.co_name == "__call__"
            frame = frame.f_back  # type: ignore[assignment]
        called = called or (_library.load.cache_info().currsize > 0 and _library.load().in_call())
        if called:
            word = "queries" if kind == "query" else "waits for"
            self._conductor.failures.append(
                Failure("host-wait", f"a call {word} the device on the host ({label}, at {where})")
            )
