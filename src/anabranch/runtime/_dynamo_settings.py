"""Dynamo's settings, of this thread or of the process, while a model in fragments is called."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from typing import Any

from anabranch import _sync

#: So many graphs a function may have for one model.
MOST_GRAPHS = 64


class _DynamoSettings:
    """Dynamo's settings while a model in fragments is called, and may be traced.

    A float that varies from call to call is a part of what a graph is for. Dynamo would make a symbol of it, which many
    operators do not take, so that it cuts there. An integer may be a size that the model has kept over a cut. Of a
    function that many models call Dynamo counts the graphs together. (``isolate_recompiles`` would keep them apart; in
    PyTorch 2.13 it is a setting of the process, so that calls on two threads end up among each other's graphs.)

    Where PyTorch keeps settings by thread, they are this thread's. Where it keeps them by process, they hold from the
    first of the calls under way until the last one's end, and integers are symbols as long as one of these asks for it.
    """

    def __init__(self) -> None:
        self._lock = _sync.lock("dynamo settings")
        #: Of the calls under way, how many ask for integers that are symbols, and how many for others.
        self._inside = {False: 0, True: 0}
        self._config: Any = None
        #: How many models in fragments there were so far.
        self._models = 1
        self._patch: Any = None
        #: The patch that holds by process.
        self._entered: Any = None
        #: What calls enter. To make one takes a class, which is garbage in cycles afterwards: they are made once.
        self._used: dict[bool, contextlib.AbstractContextManager[Any]] = {}

    def add_model(self) -> None:
        """Another one is about to be traced."""
        with self._lock:
            self._models += 1
            self._used = {}

    def used(self, fixed: bool) -> contextlib.AbstractContextManager[Any]:
        """What to call in. ``fixed``: whether integers that vary are a part of what a graph is for, too."""
        used = self._used
        if not used:
            with self._lock:
                used = self._used = self._used or self._make()
        return used[fixed]

    def _make(self) -> dict[bool, contextlib.AbstractContextManager[Any]]:
        config = self._config = importlib.import_module("torch._dynamo.config")
        most = self._models * MOST_GRAPHS
        wanted = {"specialize_float": True, "recompile_limit": most, "accumulated_recompile_limit": 8 * most}
        patches = {fixed: config.patch(specialize_int=fixed, **wanted) for fixed in (False, True)}
        self._patch = patches[False]
        by_thread = isinstance(config._config["specialize_int"].user_override, contextvars.ContextVar)
        return patches if by_thread else {fixed: _Counted(self, fixed) for fixed in patches}

    def count(self, fixed: bool, by: int) -> None:
        """A call that asks for this has begun, or is over."""
        with self._lock:
            if not any(self._inside.values()):
                self._entered = self._patch
                self._entered.__enter__()
            self._inside[fixed] += by
            if any(self._inside.values()):
                self._config.specialize_int = not self._inside[False]
            else:
                self._entered.__exit__(None, None, None)


class _Counted:
    """A context manager, of any number of threads at once."""

    def __init__(self, settings: _DynamoSettings, fixed: bool) -> None:
        self._settings, self._fixed = settings, fixed

    def __enter__(self) -> None:
        self._settings.count(self._fixed, 1)

    def __exit__(self, *exc: object) -> None:
        self._settings.count(self._fixed, -1)


dynamo_settings = _DynamoSettings()
