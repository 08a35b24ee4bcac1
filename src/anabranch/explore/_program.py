"""Where a program is, in both directions: a name to a function, and a function to the command that runs it again."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anabranch.explore._errors import ExploreError


def load(target: str) -> Callable[..., Any]:
    """``program.py``, ``program.py:function`` or ``module:function``; without a function, ``main``.

    Raises :class:`ExploreError` if there is no such thing.
    """
    module_name, colon, qualname = target.rpartition(":")
    if not colon:
        module_name, qualname = target, ""
    found = _module(module_name)
    for part in (qualname or "main").split("."):
        if not hasattr(found, part):
            raise ExploreError(f"{module_name} has no function {qualname or 'main'!r}; give PROGRAM:FUNCTION")
        found = getattr(found, part)
    if not callable(found):
        raise ExploreError(f"{target} is {type(found).__name__}; expected a function")
    return found


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and name.startswith(error.name):
                raise ExploreError(f"there is no module {name!r}; expected program.py or module:function") from error
            raise
    path = Path(name).resolve()
    if not path.is_file():
        raise ExploreError(f"{name}: no such file; expected program.py or module:function")
    # As when Python runs a script: what lies beside it can be imported.
    root, dotted = path.parent, path.stem
    while (root / "__init__.py").exists():
        root, dotted = root.parent, f"{root.name}.{dotted}"
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if dotted in sys.modules and getattr(sys.modules[dotted], "__file__", None) == str(path):
        return sys.modules[dotted]
    spec = importlib.util.spec_from_file_location(dotted, path)
    assert spec is not None
    assert spec.loader is not None
    if "." in dotted:
        importlib.import_module(dotted.rpartition(".")[0])
    module = importlib.util.module_from_spec(spec)
    sys.modules[dotted] = module
    spec.loader.exec_module(module)
    return module


def locate(value: object) -> str | None:
    """The target under which a fresh process finds this function; None where there is none (a closure, a lambda)."""
    qualname, module_name = getattr(value, "__qualname__", ""), getattr(value, "__module__", "")
    module = sys.modules.get(module_name)
    if module is None or not qualname or "<" in qualname:
        return None
    found: object = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if found is not value:
        return None
    file = getattr(module, "__file__", None)
    # An installed package is found by its name; a file of the user's own by its path, wherever its root is.
    if file and "site-packages" not in file:
        return f"{_short(Path(file))}:{qualname}"
    return f"{module_name}:{qualname}" if module_name != "__main__" else None


def _short(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def literal(value: object) -> str | None:
    """``value`` as text that :func:`parse` gives back; None if there is none."""
    text = repr(value)
    try:
        return text if ast.literal_eval(text) == value else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def parse(text: str) -> Any:
    """Raises :class:`ExploreError` if ``text`` is not a Python literal."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ExploreError(f"{text!r} is not a Python literal; expected one such as (3,)") from error


def replay_command(
    fn: object,
    args: tuple[Any, ...],
    reference: object,
    oracles: frozenset[str] | None,
    steps: int | None,
    schedule: str,
) -> str | None:
    """The command that runs ``schedule`` in a fresh process; None if it cannot name the function or its arguments.

    ``oracles`` and ``steps`` are None where they are the command's defaults.
    """
    target = locate(fn)
    if target is None:
        return None
    words = ["anabranch", "explore", target]
    if args:
        text = literal(args)
        if text is None:
            return None
        words += ["--args", text]
    if reference is not None:
        text = locate(reference) or literal(reference)
        if text is None:
            return None
        words += ["--reference", text]
    for oracle in sorted(oracles or ()):
        words += ["--oracle", oracle]
    if steps is not None:
        words += ["--steps", str(steps)]
    return shlex.join([*words, "--replay", schedule])
