"""Dynamo's settings, of this thread or of the process, while a model in fragments is called."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from typing import Any, ClassVar

from anabranch import _sync

#: So many graphs a function may have, where PyTorch lets one say so.
MOST_GRAPHS = 64


class _DynamoSettings:
    """Dynamo's settings while a model in fragments is called, and may be traced.

    A float that varies from call to call is a part of what a graph is for. Dynamo would make a symbol of it, which many
    operators do not take, so that it cuts there. An integer may be a size that the model has kept over a cut.

    Where PyTorch keeps settings by thread, they are this thread's. Where it keeps them by process, they hold from the
    first of the calls under way until the last one's end, and integers are symbols as long as one of these asks for it.
    """

    _WANTED: ClassVar[dict[str, Any]] = {
        "specialize_float": True,
        "recompile_limit": MOST_GRAPHS,
        "accumulated_recompile_limit": 8 * MOST_GRAPHS,
    }

    def __init__(self) -> None:
        self._lock = _sync.lock("dynamo settings")
        #: Of the calls under way, how many ask for integers that are symbols, and how many for others.
        self._inside = {False: 0, True: 0}
        self._config: Any = None
        self._patch: Any = None
        #: What calls enter. To make one takes a class, which is garbage in cycles afterwards: they are made once.
        self._used: dict[bool, contextlib.AbstractContextManager[Any]] = {}

    def used(self, fixed: bool) -> contextlib.AbstractContextManager[Any]:
        """What to call in. ``fixed``: whether integers that vary are a part of what a graph is for, too."""
        if not self._used:
            with self._lock:
                if not self._used:
                    self._make()
        return self._used[fixed]

    def _make(self) -> None:
        config = self._config = importlib.import_module("torch._dynamo.config")
        patches = {fixed: config.patch(specialize_int=fixed, **self._WANTED) for fixed in (False, True)}
        self._patch = patches[False]
        by_thread = isinstance(config._config["specialize_int"].user_override, contextvars.ContextVar)
        self._used = patches if by_thread else {fixed: _Counted(self, fixed) for fixed in patches}

    def count(self, fixed: bool, by: int) -> None:
        """A call that asks for this has begun, or is over."""
        with self._lock:
            if not any(self._inside.values()):
                self._patch.__enter__()
            self._inside[fixed] += by
            if any(self._inside.values()):
                self._config.specialize_int = not self._inside[False]
            else:
                self._patch.__exit__(None, None, None)


class _Counted:
    """A context manager, of any number of threads at once."""

    def __init__(self, settings: _DynamoSettings, fixed: bool) -> None:
        self._settings, self._fixed = settings, fixed

    def __enter__(self) -> None:
        self._settings.count(self._fixed, 1)

    def __exit__(self, *exc: object) -> None:
        self._settings.count(self._fixed, -1)


dynamo_settings = _DynamoSettings()
