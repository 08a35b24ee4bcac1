"""Dynamo's settings, of this thread or of the process, while a model in fragments is called."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Iterator
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
        self._patch: Any = None

    @contextlib.contextmanager
    def used(self, fixed: bool) -> Iterator[None]:
        """Have them. ``fixed``: whether integers that vary are a part of what a graph is for, too."""
        config: Any = importlib.import_module("torch._dynamo.config")
        entry = config._config["specialize_int"].user_override
        if isinstance(entry, contextvars.ContextVar):
            with config.patch(specialize_int=fixed, **self._WANTED):
                yield
            return
        with self._lock:
            if not any(self._inside.values()):
                self._patch = config.patch(specialize_int=fixed, **self._WANTED)
                self._patch.__enter__()
            self._count(config, fixed, 1)
        try:
            yield
        finally:
            with self._lock:
                self._count(config, fixed, -1)
                if not any(self._inside.values()):
                    self._patch.__exit__(None, None, None)
                    self._patch = None

    def _count(self, config: Any, fixed: bool, by: int) -> None:
        self._inside[fixed] += by
        config.specialize_int = not self._inside[False]


dynamo_settings = _DynamoSettings()
