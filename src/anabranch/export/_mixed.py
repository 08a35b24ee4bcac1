"""What a user asks of mixed precision: the narrow type, and what is to stay out of it, or in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from anabranch.errors import InputError

_HALVES = (torch.float16, torch.bfloat16)
_NAMES = {"mixed": torch.float16, "mixed-bf16": torch.bfloat16}
EXPECTED = (
    "expected None, torch.float16, torch.bfloat16, 'mixed', 'mixed-bf16', an anabranch.Mixed, or the path of a .json"
    " file that `anabranch calibrate` has written"
)


@dataclass(frozen=True)
class Mixed:
    """Mixed precision: products and convolutions in ``dtype``, in float32 what would overflow or lose by it.

    ``dtype``: ``torch.float16`` or ``torch.bfloat16``. ``keep``: what stays in float32 whatever else is said; ``half``:
    what is computed in ``dtype`` although the graph alone would leave it in float32. An entry of these is

    - a module of the model with all that is in it: ``"layers.3"``;
    - an operator wherever it is: ``"aten.softmax"``;
    - an operator within a module: ``"layers.3:aten.matmul"``;
    - one of several of that module's own, from 0: ``"layers.3:aten.matmul#1"``.

    Operators of exported programs, and of models that ``torch.export`` refuses, are in no module.
    :meth:`Engine.explain` names operators so, and what is listed and matches none. ``Engine.summary`` has, for each
    signature, as ``precision`` the ``dtype``; ``share_half``, the part of the floating-point operations in it, from 0
    to 1 (None where nobody can tell); the operators in ``half``; and those in ``float32``, each with ``operator`` and
    ``why``.

    Immutable; threads: any. Raises :class:`~anabranch.errors.InputError` for another dtype, and for entries that are
    no such texts.
    """

    dtype: torch.dtype = torch.float16
    keep: Sequence[str] = ()
    half: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.dtype not in _HALVES:
            raise InputError(f"Mixed of dtype={self.dtype} given; expected torch.float16 or torch.bfloat16")
        for name in ("keep", "half"):
            given = getattr(self, name)
            if isinstance(given, str) or not all(isinstance(x, str) for x in given):
                raise InputError(
                    f"Mixed with {name}={given!r} given; expected a list of modules and operators, such as"
                    " ['layers.3', 'aten.softmax']"
                )
            object.__setattr__(self, name, tuple(given))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mixed:
        """What ``anabranch calibrate`` has written to ``path``.

        Raises :class:`~anabranch.errors.InputError` where it cannot be read, or is another file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(getattr(torch, content["dtype"]), content["keep"], content["half"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(
                f"{path}: no mixed precision can be read from it ({type(e).__name__}: {e}). Expected a file that"
                " `anabranch calibrate` has written."
            ) from e

    def check(self, model: torch.nn.Module) -> None:
        """Raise :class:`~anabranch.errors.InputError` where an entry names no module of ``model`` and no operator."""
        modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
        for entry in (*self.keep, *self.half):
            module, operator = _parts(entry)[:2]
            if module not in modules or (operator and not _exists(operator)):
                raise InputError(
                    f"Mixed with {entry!r} given, and the model has no such module, or PyTorch no such operator;"
                    " expected a name of model.named_modules(), an operator such as 'aten.softmax', or both, such as"
                    " 'layers.3:aten.matmul'"
                )


def precision_of(given: Any) -> torch.dtype | Mixed | None:
    """What ``precision=`` of :func:`anabranch.compile` stands for. Raises :class:`~anabranch.errors.InputError`."""
    if given is None or given in _HALVES or isinstance(given, Mixed):
        precision: torch.dtype | Mixed | None = given
        return precision
    if isinstance(given, str) and given in _NAMES:
        return Mixed(_NAMES[given])
    if isinstance(given, str | os.PathLike) and str(given).endswith(".json"):
        return Mixed.load(given)
    raise InputError(f"precision={given} given; {EXPECTED}")


class Place:
    """Where an operator is in a model: by its module's path, its name, and its number among those that share both."""

    def __init__(self, module: str, operator: str, number: int) -> None:
        self.module, self.operator, self.number = module, operator, number

    def __str__(self) -> str:
        return f"{self.module}:{self.operator}#{self.number}"

    def matches(self, entries: Iterable[str]) -> bool:
        """Whether one of ``entries`` (of :class:`Mixed`) stands for it, too."""
        return any(self._matches(*_parts(entry)) for entry in entries)

    def _matches(self, module: str, operator: str, number: int | None) -> bool:
        if operator and operator not in (self.operator, self.operator.replace("._", ".")):
            return False
        if number is not None:
            return (self.module, self.number) == (module, number)
        return not module or f"{self.module}.".startswith(f"{module}.")


def places(graph: fx.Graph) -> dict[fx.Node, Place]:
    """Of each operator of a graph."""
    found: dict[fx.Node, Place] = {}
    seen: dict[tuple[str, str], int] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        key = _module_of(node), operator_of(node)
        found[node] = Place(*key, seen.get(key, 0))
        seen[key] = seen.get(key, 0) + 1
    return found


def operator_of(node: fx.Node) -> str:
    """Its name, without the overload: ``"aten.softmax"``."""
    target: Any = node.target
    return str(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else str(target)


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("",))[0] if stack else ""
    # It is traced as the part `model` of a module of ours.
    return str(path).removeprefix("model").removeprefix(".")


def _parts(entry: str) -> tuple[str, str, int | None]:
    module, colon, operator = entry.partition(":")
    if not colon and entry.startswith(("aten.", "anabranch.")):
        module, operator = "", entry
    operator, sharp, number = operator.partition("#")
    return module, operator, int(number) if sharp and number.isdigit() else None


def _exists(operator: str) -> bool:
    space, _, name = operator.partition(".")
    space_of: Any = getattr(torch.ops, space)
    return hasattr(space_of, name) or hasattr(space_of, f"_{name}")
