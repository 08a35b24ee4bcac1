"""Dynamo's settings, of this thread or of the process, while a model in fragments is called."""

from __future__ import annotations

import contextvars
import importlib
import threading
from typing import Any, ClassVar

from anabranch import _sync

#: So many graphs a function may have, where PyTorch lets one say so.
MOST_GRAPHS = 64


class _Patches(threading.local):
    """Of the calling thread: the settings that it has entered, the last one last."""

    entered: tuple[Any, ...] = ()


class _DynamoSettings:
    """A context manager: Dynamo's settings while a model in fragments is called, and may be traced.

    A float that varies from call to call is a part of what a graph is for. Dynamo would make a symbol of it, which many
    operators do not take, so that it cuts there. An integer may be a size that the model has kept over a cut.

    Where PyTorch keeps settings by thread, they are this thread's. Where it keeps them by process, they hold from the
    first of the calls under way until the last one's end.
    """

    _WANTED: ClassVar[dict[str, Any]] = {
        "specialize_int": False,
        "specialize_float": True,
        "recompile_limit": MOST_GRAPHS,
        "accumulated_recompile_limit": 8 * MOST_GRAPHS,
    }

    def __init__(self) -> None:
        self._lock = _sync.lock("dynamo settings")
        self._inside = 0
        self._patch: Any = None
        self._own = _Patches()

    def __enter__(self) -> None:
        config: Any = importlib.import_module("torch._dynamo.config")
        entry = config._config["specialize_int"].user_override
        if isinstance(entry, contextvars.ContextVar):
            patch = config.patch(self._WANTED)
            patch.__enter__()
            self._own.entered = (*self._own.entered, patch)
            return
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._patch = config.patch(self._WANTED)
                self._patch.__enter__()

    def __exit__(self, *exc: Any) -> None:
        if self._own.entered:
            *before, patch = self._own.entered
            self._own.entered = tuple(before)
            patch.__exit__(*exc)
            return
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._patch.__exit__(*exc)
                self._patch = None


dynamo_settings = _DynamoSettings()
