"""Methods with code of their own, for modules that Dynamo traces."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch


class OwnCode:
    """Gives modules methods with code of their own.

    Dynamo keeps graphs with code, and lets each code have so many. The code of a class is that of all its instances:
    of the user's own model, which may be compiled otherwise, and of other engines.

    Dynamo makes no graph of code that lies in PyTorch's files, but as a part of one of the code that calls it. Where
    that one is none, since it is cut inside of a loop, a ``Sequential`` would run operator by operator. So the modules
    of PyTorch's that consist of others have code of their own, too, in no file of PyTorch's.
    """

    def __init__(self) -> None:
        self._classes: dict[type, type] = {}

    def give(self, module: torch.nn.Module) -> None:
        kind = type(module)
        if kind.__module__.startswith("torch.") and not _consists_of_others(module):
            return
        if kind not in self._classes:
            methods = _methods_of(kind)
            named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            self._classes[kind] = type(kind.__name__, (kind,), {**methods, **named})
        with contextlib.suppress(TypeError):  # a class whose instances lie otherwise in memory
            module.__class__ = self._classes[kind]


def _consists_of_others(module: torch.nn.Module) -> bool:
    """Whether a module of PyTorch's calls others in a ``forward`` of its class."""
    kind = type(module)
    has_forward = isinstance(vars(kind).get("forward"), types.FunctionType)
    return has_forward and kind.__module__.startswith("torch.nn.modules.") and any(True for _ in module.children())


def _methods_of(kind: type) -> dict[str, Any]:
    """What a class, and those that it is derived from, have of their own, with own code; of PyTorch's: ``forward``."""
    if kind.__module__.startswith("torch."):
        return {"forward": _with_own_code(vars(kind)["forward"], f"<{kind.__name__}>")}
    methods: dict[str, Any] = {}
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.", "builtins")):
            break
        for name, method in vars(base).items():
            if isinstance(method, types.FunctionType) and not name.startswith("__"):
                methods.setdefault(name, _with_own_code(method))
    return methods


def _with_own_code(method: types.FunctionType, file: str | None = None) -> types.FunctionType:
    """``file``: where it is to lie; None: where it does."""
    code = method.__code__.replace(co_filename=file or method.__code__.co_filename)
    made = types.FunctionType(code, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
    made.__kwdefaults__, made.__qualname__ = method.__kwdefaults__, method.__qualname__
    made.__dict__.update(method.__dict__)
    made.__module__, made.__doc__, made.__annotations__ = method.__module__, method.__doc__, method.__annotations__
    return made
