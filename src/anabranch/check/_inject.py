"""Known bugs, put back on purpose: what the check must find."""

from __future__ import annotations

from typing import Any

from anabranch.runtime import Engine

INJECTIONS = ("stale-stream",)


class StaleStream:
    """The engine as it was before the fix: it keeps the stream that was current when it was compiled.

    Nothing else differs: the same engine runs, only not on the caller's stream, and nothing orders the two.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._device = engine.seam
        self._stream = self._device.current_stream(self._device.index(engine.device))

    def __call__(self, x: Any) -> Any:
        with self._device.on_stream(self._stream):
            return self._engine(x)
