"""Hooks of a model's modules, and of every module of the process."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from anabranch.errors import UnsupportedModel

#: Hooks that run within a module's call, by the attribute that keeps them.
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
#: Attributes that every module has, and that are none of a model's own.
OF_MODULES = frozenset(torch.nn.Module().__dict__)


def hooks_of(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Each hook that the user put on a part of the model, with the part's name."""
    for name, part in module.named_modules():
        for kind in HOOKS:
            for hook in list(getattr(part, kind).values()):
                if not _of_torch(hook):
                    yield name, hook


def check_global_hooks() -> None:
    """Hooks on every module of the process would run on the copy that is traced. Raises :class:`UnsupportedModel`."""
    registry = torch.nn.modules.module
    for hook in (*registry._global_forward_pre_hooks.values(), *registry._global_forward_hooks.values()):
        raise UnsupportedModel(
            f"a hook is registered for every module of the process ({name_of(hook)}); compiling would run it on"
            " stand-ins for tensors. Remove it while a model is compiled, or register it on modules one by one."
        )


def name_of(hook: Any) -> str:
    """What to call a hook in messages."""
    return str(getattr(hook, "__qualname__", None) or getattr(type(hook), "__qualname__", repr(hook)))


def _of_torch(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    where = getattr(hook, "__module__", None) or type(hook).__module__
    return where.partition(".")[0] == "torch"


def about_hooks(module: torch.nn.Module) -> str:
    """What a user is told of the hooks that a model has; nothing if it has none."""
    found = ", ".join(f"{name_of(hook)} on {name!r}" for name, hook in hooks_of(module))
    return found and (
        f"with hooks of yours ({found}): they run while compiling, on copies of what they refer to. The values that"
        " they change are changed in calls too; nothing else of them happens in a call"
    )
