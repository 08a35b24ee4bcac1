"""What the classes and the functions of a model hold: variables of a class, and those around its methods."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch

#: Of Python's own classes, those that hold a program's data. All others are taken for handles.
_STANDARD_DATA = frozenset(
    {"collections", "itertools", "array", "types", "argparse", "dataclasses", "enum", "builtins"}
)
#: Modules of Python's whose objects are of several threads or processes at once. Locks are elsewhere: many objects that
#: nobody else works with have one.
_CONCURRENT = frozenset(
    {"threading", "queue", "_queue", "concurrent", "multiprocessing", "asyncio", "subprocess", "socket"}
)
#: So much of a container is looked at.
_MOST = 1000
_DEPTH = 3
#: So many objects, all together.
_MOST_IN_ALL = 20_000


def derived(kind: type) -> type:
    """A class of its own in the place of a module's, or that itself, where none can be made."""
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    try:
        return type(kind)(kind.__name__, (kind,), named)
    except TypeError:
        return kind


def variables_with_tensors(kind: type) -> dict[str, Any]:
    """Of a module's class: methods, of which a variable around them holds tensors, and class variables that are some.

    Containers of a class are caches, as those in global variables are: all instances have them in common.
    """
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.", "builtins", "typing")):
            break
        for name, value in list(vars(base).items()):
            if name not in found and isinstance(value, types.FunctionType | torch.Tensor):
                found[name] = value
    return {name: value for name, value in found.items() if _reaches_tensors(value)}


def _reaches_tensors(x: Any) -> bool:
    """Whether it is a tensor or a module, or leads to one in a few steps."""
    seen: dict[int, Any] = {}
    found = [x]
    for _ in range(_DEPTH + 1):
        reached: list[Any] = []
        for value in found:
            if _is_sought(value):
                return True
            if id(value) not in seen:
                seen[id(value)] = value
                reached += _inside(value)
        if len(seen) > _MOST_IN_ALL:
            return True  # nobody knows, and to copy it is right in any case
        found = reached
    return any(map(_is_sought, found))


def _is_sought(x: Any) -> bool:
    try:
        return isinstance(x, torch.Tensor | torch.nn.Module)
    except Exception:  # an object that does not let itself be looked at
        return False


def _inside(x: Any) -> list[Any]:
    """What an object holds, as far as it is looked at."""
    inside: Iterable[Any] = ()
    try:
        if isinstance(x, type | types.ModuleType | property | staticmethod | classmethod) or works_with_threads(x):
            return []
        if isinstance(x, types.FunctionType):
            inside = (*_contents(x), *(x.__defaults__ or ()))
        elif isinstance(x, Mapping):
            inside = x.values()
        elif isinstance(x, list | tuple | set | frozenset):
            inside = x
        elif isinstance(getattr(x, "__dict__", None), dict):
            inside = vars(x).values()
        return list(itertools.islice(inside, _MOST))
    except Exception:
        return []


def _contents(function: types.FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # still empty
            continue
    return found


def is_handle(kind: type) -> bool:
    """Whether its objects stand for something outside: a file, a thread, a device, a logger, an engine."""
    root = (kind.__module__ or "").partition(".")[0]
    if root == "torch":
        return (
            not isinstance(kind, type) or kind.__module__ in ("torch", "torch._C") or "distributed" in kind.__module__
        )
    if root == "anabranch":
        return True
    return root in sys.stdlib_module_names and root not in _STANDARD_DATA and root != "__main__"


def works_with_threads(x: Any) -> bool:
    """Whether an object has threads, events or queues of its own: others work with it, and who waits for them on a copy
    of it waits for ever."""
    space = getattr(x, "__dict__", None)
    if not isinstance(space, dict):
        return False
    held = list(space.values())
    held += [inside for v in held if type(v) in (list, tuple, set, dict) for inside in _inside(v)]
    return any((type(v).__module__ or "").partition(".")[0] in _CONCURRENT for v in held)


def global_names(code: types.CodeType) -> set[str]:
    """Names that a function's code, and the functions within it, look up in the global variables."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= global_names(constant)
    return names
