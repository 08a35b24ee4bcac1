"""How ``torch.compile(model, backend="anabranch")`` finds us. Imports no PyTorch before it has to.

PyTorch looks for entry points of installed packages. Where this one lies on ``PYTHONPATH`` only, ``import anabranch``
makes Python's package metadata say what an installation would (:func:`register`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anabranch._version import __version__

NAME = "anabranch"
_GROUP = "torch_dynamo_backends"
#: Not the package's own name: an older one that is installed would hide this.
_DISTRIBUTION = "anabranch-on-path"
_lock = threading.Lock()


class _Distribution(importlib.metadata.Distribution):
    """The package as it would be if it were installed, as far as entry points go."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {_DISTRIBUTION}\nVersion: {__version__}\n",
            "entry_points.txt": f"[{_GROUP}]\n{NAME} = {__name__}:backend\n",
        }.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        return Path(__file__).parents[1] / path


class _Finder(importlib.metadata.DistributionFinder):
    """Finds the package itself. Beside an installation it says the same once more, and PyTorch takes the first."""

    def find_spec(self, *args: Any, **kwargs: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        if getattr(context, "name", None) in (None, _DISTRIBUTION):
            yield _Distribution()


def register() -> None:
    """Make the backend known to PyTorch, now or once it looks. May be repeated; any thread."""
    with _lock:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.append(_Finder())
        registry: Any = sys.modules.get("torch._dynamo.backends.registry")
        # It looks at entry points once, and that may have been before.
        known = getattr(registry, "_BACKENDS", None)
        if known is not None and NAME not in known:
            known[NAME] = importlib.metadata.EntryPoint(NAME, f"{__name__}:backend", _GROUP)


def _allow_repeats(registry: Any) -> None:
    """Let a backend be registered again as what it is.

    PyTorch loads an entry point, and then registers what it loaded, with no lock around both: of threads that look the
    backend up at once, all but one would fail with "duplicate name". They have the function in hand already when they
    get here, so it is its code that changes.
    """
    function: types.FunctionType = registry.register_backend
    if function.__code__ is _register_backend.__code__:
        return
    registry.register_backend_once = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    function.__code__ = _register_backend.__code__


def _register_backend(  # type: ignore[no-untyped-def]  # its code runs among PyTorch's names
    compiler_fn=None, name=None, tags=()
):
    if compiler_fn is not None and _COMPILER_FNS.get(name) is compiler_fn:  # type: ignore[name-defined]  # noqa: F821
        return compiler_fn
    return register_backend_once(compiler_fn, name, tags)  # type: ignore[name-defined]  # noqa: F821


def _load() -> Callable[..., Any]:
    registry = importlib.import_module("torch._dynamo.backends.registry")
    found: Callable[..., Any] = importlib.import_module("anabranch.dynamo").backend
    with _lock:
        _allow_repeats(registry)
        if NAME not in registry._COMPILER_FNS:
            registry.register_backend(compiler_fn=found, name=NAME)
    return found


def __getattr__(name: str) -> Any:
    if name == "backend":
        return _load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
