"""Sizes that vary: which inputs of a program have them, and for which sizes the program is right.

``torch.export`` gives each such size a symbol, and notes what it had to assume of the symbols in the shape environment
of the program's fake tensors. A compiler asks and notes there too. Nobody checks these assumptions at a call but us.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anabranch.errors import InputError
from anabranch.export._bystanders import replaced
from anabranch.export._diagnosis import line_on

#: Sizes that mean more than a number: what has none, and what broadcasts. Compilers take a symbol for neither.
SPECIAL = (0, 1)


@dataclass(frozen=True)
class Dim:
    """A size that varies from call to call, in the shape of an :class:`~anabranch.Input`.

    :param name: of the size; two inputs' sizes of one name are equal in every call.
    :param min: the least size, 0 or more.
    :param max: the largest; None: there is no bound.
    :param pad_to: sizes to round up to: calls are given more rows, of zeros, up to the next of these, and results are
        cut back. Compile shows that rows do not mix, or raises :class:`~anabranch.errors.UnsupportedModel`.
    """

    name: str
    min: int = 0
    max: int | None = None
    pad_to: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise InputError(f"Dim name {self.name!r} given; expected a name like 'batch'")
        if self.min < 0 or (self.max is not None and self.max < self.min):
            raise InputError(f"{self} given; expected 0 <= min <= max")
        object.__setattr__(self, "pad_to", tuple(sorted(set(self.pad_to))))
        if any(type(n) is not int or n in SPECIAL or not self.takes(n) for n in self.pad_to):
            raise InputError(
                f"pad_to={list(self.pad_to)} given for {self}; expected sizes of 2 or more, within its bounds"
            )

    def __str__(self) -> str:
        return f"Dim({self.name!r}, {self.min}, {self.max})"

    @property
    def bounds(self) -> str:
        """For messages."""
        return f"{self.min} or more" if self.max is None else f"{self.min} to {self.max}"

    def padded(self, size: int) -> int:
        """The size that a call's is rounded up to: the next in ``pad_to``, or itself where there is none."""
        return next((n for n in self.pad_to if n >= size), size)

    def takes(self, size: int) -> bool:
        return self.min <= size and (self.max is None or size <= self.max)

    def example(self, taken: Iterable[int] = ()) -> int:
        """A size to compile on: within the bounds, and if it can be neither special nor in ``taken``."""
        largest = self.max if self.max is not None else max(self.min, 2) + 64
        found = [n for n in range(max(self.min, 2), largest + 1) if n not in taken][:8]
        return found[len(found) // 2] if found else largest

    @classmethod
    def of(cls, given: Any) -> Dim | None:
        """``given`` as one of ours, if it is one: of ours, or of ``torch.export``."""
        if isinstance(given, Dim):
            return given
        named = getattr(given, "__name__", None)
        if named is None or not hasattr(given, "min") or not hasattr(given, "max"):
            return None
        most = given.max
        return cls(named, int(given.min), None if most is None or most >= 2**62 else int(most))


@dataclass(frozen=True)
class _Assumed:
    """What has to hold of the shapes of a call."""

    #: By input, of each dimension: a number, or an expression of symbols.
    shapes: tuple[tuple[Any, ...], ...]
    #: Of each symbol, the least value and the largest, or None.
    bounds: Mapping[Any, tuple[int, int | None]]
    #: Functions of the symbols' values, as they come in ``bounds``, with what to say where they are false.
    guards: tuple[tuple[Callable[..., Any], str], ...]


@dataclass(frozen=True)
class Known:
    """What is known of the symbols of a program while it is being compiled."""

    #: Of each symbol, the least value and the largest, or None.
    bounds: Mapping[Any, tuple[int, int | None]]
    #: The values that they have in the call that the program was exported for.
    hints: Mapping[Any, int]
    #: What the user has said of them.
    declared: Mapping[Any, Dim]
    guards: tuple[tuple[Callable[..., Any], str], ...]

    def allows(self, values: Mapping[Any, int]) -> bool:
        """Whether the program is right for these values, as far as is known."""
        ordered = [values[symbol] for symbol in self.bounds]
        bounds = zip(ordered, self.bounds.values(), strict=True)
        within = all(low <= n and (high is None or n <= high) for n, (low, high) in bounds)
        return within and all(bool(holds(*ordered)) for holds, _ in self.guards)


class Sizes:
    """The sizes of a program's inputs, numbers or symbols, and what was assumed of the symbols.

    Threads: any may ask :meth:`refuses` once :meth:`settle` has run; before, only who builds.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], lines: Mapping[Any, str]) -> None:
        """``inputs``: fake tensors of one shape environment. ``lines``: as :func:`noting_lines` has left them."""
        self._inputs, self._lines = [tuple(x.shape) for x in inputs], dict(lines)
        symbols: list[Any] = [n for shape in self._inputs for n in shape if isinstance(n, torch.SymInt)]
        self._env: Any = symbols[0].node.shape_env if symbols else None
        self._assumed: _Assumed | None = None
        #: What a compiler makes kernels for, of each symbol, where that is less than what the program is right for.
        self._narrowed: dict[Any, tuple[int, int]] = {}
        #: Bounds that the user has given: of input and dimension.
        self.declared: Mapping[tuple[int, int], Dim] = {}

    @property
    def free(self) -> frozenset[tuple[int, int]]:
        """Input and dimension of each size that is no number."""
        places = ((i, d, n) for i, shape in enumerate(self._inputs) for d, n in enumerate(shape))
        return frozenset((i, d) for i, d, n in places if not isinstance(plain_size(n), int))

    def why_fixed(self, wanted: Iterable[tuple[int, int]]) -> str:
        """Which sizes were to vary and cannot, with the model's line that made it so where that is known."""
        found = []
        for i, d in sorted(set(wanted) - self.free):
            n: Any = self._inputs[i][d]
            line = self._lines.get(n.node._expr, "") if isinstance(n, torch.SymInt) else ""
            found.append(f"size {d} of input {i} has to be {n}" + f" ({line})" * bool(line))
        return "; ".join(found)

    def settle(self) -> None:
        """All kernels are made: nothing more is going to be assumed. Nothing here changes any more. May be repeated."""
        if self._assumed is None:
            self._assumed = self._assumptions()
            self._env = None

    def narrow(self, bounds: Mapping[Any, tuple[int, int]]) -> None:
        """Kernels are made for these values of symbols only, bounds included. Before :meth:`settle`."""
        self._narrowed.update(bounds)

    def known(self) -> Known:
        """What is assumed of the symbols so far. Before :meth:`settle`."""
        assumed = self._assumptions()
        hints: dict[Any, int] = {}
        declared: dict[Any, Dim] = {}
        for i, shape in enumerate(self._inputs):
            for d, n in enumerate(shape):
                symbol = plain_size(n)
                if isinstance(n, torch.SymInt) and symbol in assumed.bounds:
                    hints[symbol] = int(n.node.hint)
                    if (i, d) in self.declared:
                        declared[symbol] = self.declared[i, d]
        return Known(assumed.bounds, hints, declared, assumed.guards)

    def _assumptions(self) -> _Assumed:
        shapes = tuple(tuple(map(plain_size, shape)) for shape in self._inputs)
        used = list(dict.fromkeys(s for shape in shapes for n in shape if not isinstance(n, int) for s in _symbols(n)))
        bounds: dict[Any, tuple[int, int | None]] = {}
        guards = []
        for s in used:
            r = self._env.var_to_range[s]
            bounds[s] = self._narrowed.get(s, (int(r.lower), int(r.upper) if r.upper.is_Integer else None))
        names = {str(s): f"size {d} of input {i}" for i, shape in enumerate(shapes) for d, s in enumerate(shape)}
        for expr in dict.fromkeys(guard.expr for guard in self._env.guards) if used else ():
            expr = self._env.replace(expr)
            if not expr.free_symbols or any(map(self._env.is_unbacked_symint, expr.free_symbols)):
                continue  # what concerns sizes that depend on data is checked while the program runs
            text = re.sub(r"\bs\d+\b", lambda found: names.get(found[0], found[0]), str(expr))
            guards.append((function_of(expr, used), f"{text} does not hold"))
        return _Assumed(shapes, bounds, tuple(guards))

    def values(self, shapes: Sequence[Sequence[int]]) -> dict[Any, int]:
        """Of the symbols, where the inputs have these shapes, which must not be refused."""
        assert self._assumed is not None, "not settled"
        pairs = (
            (n, size) for a, b in zip(self._assumed.shapes, shapes, strict=True) for n, size in zip(a, b, strict=True)
        )
        return {n: size for n, size in pairs if not isinstance(n, int) and n.is_Symbol}

    def others(self, shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]] | None:
        """Shapes with other sizes than these, for which the program is right, too; None where none are found."""
        assert self._assumed is not None, "not settled"
        values = self.values(shapes)
        for change in (lambda n: n + 1, lambda n: n - 1, lambda n: 2 * n, lambda n: n // 2):
            changed = {symbol: change(n) for symbol, n in values.items()}
            made = [tuple(size_of(n, changed) for n in shape) for shape in self._assumed.shapes]
            if min((n for shape in made for n in shape), default=0) > 1 and not self.refuses(made):
                return made
        return None

    def refuses(self, shapes: Sequence[Sequence[int]]) -> str:
        """Why the program is not right for inputs of these shapes, or nothing."""
        assumed = self._assumed
        assert assumed is not None, "not settled"
        values: dict[Any, int] = {}
        derived: list[tuple[str, Any, int]] = []
        for i, (shape, given) in enumerate(zip(assumed.shapes, shapes, strict=True)):
            for d, (n, size) in enumerate(zip(shape, given, strict=True)):
                if isinstance(n, int):
                    if n != size:
                        return f"size {d} of input {i} is {size}; {n} was expected"
                elif not n.is_Symbol:
                    derived.append((f"size {d} of input {i}", n, size))
                elif values.setdefault(n, size) != size:
                    return f"size {d} of input {i} is {size}; {values[n]} was expected, as another size is"
        if len(values) < len(assumed.bounds):
            return "a size is known by others only"
        for symbol, (low, high) in assumed.bounds.items():
            if values[symbol] < low or (high is not None and values[symbol] > high):
                return f"a size is {values[symbol]}; {low} to {'any' if high is None else high} were expected"
        for what, n, size in derived:
            if int(n.xreplace(values)) != size:
                return f"{what} is {size}; {n} was expected"
        ordered = [values[symbol] for symbol in assumed.bounds]
        return next((text for holds, text in assumed.guards if not holds(*ordered)), "")


def size_of(n: Any, values: Mapping[Any, int]) -> int:
    """A size that is a number, or an expression of symbols that have these values."""
    return n if isinstance(n, int) else int(n.xreplace(values))


def _symbols(expr: Any) -> list[Any]:
    return sorted(expr.free_symbols, key=str)


def function_of(expr: Any, symbols: Sequence[Any]) -> Callable[..., Any]:
    """A condition that is ``expr`` as a function of the values of ``symbols``."""
    # One that has other symbols never holds.
    return _printed(expr, symbols) or (
        lambda *values: expr.xreplace(dict(zip(symbols, values, strict=True))) == True  # noqa: E712
    )


def integer_of(expr: Any, symbols: Sequence[Any]) -> Callable[..., int]:
    """An integer that is ``expr`` as a function of the values of ``symbols``, which are all that it has."""
    return _printed(expr, symbols) or (lambda *values: int(expr.xreplace(dict(zip(symbols, values, strict=True)))))


def _printed(expr: Any, symbols: Sequence[Any]) -> Callable[..., Any] | None:
    """A function of ours of what a compiler's printer makes of ``expr``, of arithmetic alone; None where that fails."""
    from torch.utils._sympy.printers import PythonPrinter

    try:
        code = f"lambda {', '.join(map(str, symbols))}: {PythonPrinter().doprint(expr)}"
        made: Callable[..., Any] = eval(code, {"math": math, "torch": torch, "abs": abs, "max": max, "min": min})
        made(*(7 for _ in symbols))
    except Exception:
        return None
    return made


@contextlib.contextmanager
def noting_lines(lines: dict[Any, str]) -> Iterator[None]:
    """Note, while this thread exports, at which of the model's lines a symbol became a number or another symbol."""
    shapes: Any = importlib.import_module("torch.fx.experimental.symbolic_shapes")
    here, before = threading.get_ident(), shapes.ShapeEnv._set_replacement
    others = str(Path(str(importlib.import_module("sympy").__file__)).parent), contextlib.__file__

    def noting(env: Any, symbol: Any, *args: Any) -> Any:
        if threading.get_ident() == here:
            lines.setdefault(symbol, line_on(sys._getframe(1), others))
        return before(env, symbol, *args)

    with replaced(shapes.ShapeEnv, "_set_replacement", noting):
        yield


def size_at(n: Any, values: Mapping[Any, int] | None) -> int | None:
    """A size of a fake tensor where symbols have these values (None: those that they had at export); None where it
    depends on data. Asks nothing of symbols."""
    if isinstance(n, int):
        return n
    if values is None:
        return n.node.hint
    found = n.node.expr.xreplace(values)
    return int(found) if isinstance(found, int) or found.is_number else None


def is_of_data(n: Any) -> bool:
    """Whether a number in a traced graph depends on the values of tensors, and not on their sizes alone."""
    if not isinstance(n, torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    expr = getattr(n.node, "expr", None)  # a ragged size has none
    unknown = SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT
    return expr is None or any(symbol_is_type(s, unknown) for s in expr.free_symbols)


def shape_at(sizes: Iterable[Any], values: Mapping[Any, int] | None = None) -> tuple[int, ...]:
    """Sizes, or strides, of a fake tensor, as :func:`size_at`. Raises TypeError where one depends on data."""
    return tuple(int(size_at(n, values)) for n in sizes)  # type: ignore[arg-type]


def plain_size(n: Any) -> Any:
    """A size as a number, or as an expression of symbols."""
    if isinstance(n, int):
        return n
    expr = n.node.expr
    return int(expr) if expr.is_number else expr
