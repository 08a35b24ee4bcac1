"""The optimization profile of a range of sizes: what TensorRT has to be told of them when it builds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from anabranch.backends.tensorrt._builder import Rejected
from anabranch.export import Sizes
from anabranch.export._sizes import SPECIAL, Known, function_of, plain_size

#: Combinations of sizes that are tried to find out whether something holds for all of them.
_MOST_TRIED = 100_000


@dataclass(frozen=True)
class Profile:
    """The values of the symbols of one program for which engines are built.

    ``least``, ``best``, ``most``: of each symbol the least, the one to be fastest for, and the largest.
    """

    least: Mapping[Any, int]
    best: Mapping[Any, int]
    most: Mapping[Any, int]
    known: Known

    @classmethod
    def of(cls, sizes: Sizes | None) -> Profile | None:
        """For the sizes of a program, which is then right within the profile only; None where no size varies.

        A size that was declared has the bounds that it was declared with. Of another one nothing is known but a value:
        it gets up to the power of two from twice that on. A program for sizes beyond is another one.

        Raises :class:`Rejected` where the program is not right at the profile's corners.
        """
        if sizes is None or not sizes.free:
            return None
        known = sizes.known()
        best = dict(known.hints)
        least, most = dict(best), dict(best)
        for symbol, (low, high) in known.bounds.items():
            dim = known.declared.get(symbol)
            ends = [1 << (2 * best[symbol] - 1).bit_length()] if dim is None or dim.max is None else [dim.max]
            low = max(low, SPECIAL[-1] + 1, dim.min if dim is not None else 0)
            high = min(ends if high is None else [*ends, high])
            least[symbol] = _first(known, symbol, range(low, best[symbol]))
            most[symbol] = _first(known, symbol, range(high, best[symbol], -1))
        if not (known.allows(least) and known.allows(most)):
            raise Rejected("the smallest sizes of a range, or its largest, do not go together in this model")
        sizes.narrow({symbol: (least[symbol], most[symbol]) for symbol in best})
        return cls(least, best, most, known)

    def __str__(self) -> str:
        return ", ".join(f"{self._called(s)} {self.least[s]} to {self.most[s]}" for s in self.best)

    def _called(self, symbol: Any) -> str:
        dim = self.known.declared.get(symbol)
        return self.names[symbol] if dim is None else dim.name

    @property
    def names(self) -> dict[Any, str]:
        """Of each symbol one that is the same in every process."""
        return {symbol: f"size{i}" for i, symbol in enumerate(self.best)}

    def key(self) -> list[list[int]]:
        """For the cache."""
        return [[self.least[s], self.best[s], self.most[s]] for s in self.best]

    def shapes(self, sizes: Iterable[Any]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of a tensor with these sizes, numbers or expressions: the least shape, the best, and the largest.

        Raises :class:`Rejected` where that is not known.
        """
        from torch.utils._sympy.value_ranges import bound_sympy

        least, best, most = [], [], []
        for n in sizes:
            if isinstance(n, int):
                ends, middle = [n], n
            else:
                own = sorted(n.free_symbols, key=str)
                corners = itertools.product(*((self.least[s], self.most[s]) for s in own))
                ends = [int(n.xreplace(dict(zip(own, corner, strict=True)))) for corner in corners]
                middle = int(n.xreplace(dict(self.best)))
                bounds = bound_sympy(n, self._ranges(own))
                if bounds.lower < min(ends) or bounds.upper > max(ends):
                    ends = self._tried(n, own)
            least.append(min(ends))
            best.append(middle)
            most.append(max(ends))
        return tuple(least), tuple(best), tuple(most)

    def implies(self, expr: Any) -> bool:
        """Whether a condition on symbols holds for all values of them that the program is right for."""
        from torch.utils._sympy.value_ranges import bound_sympy

        if not expr.free_symbols:
            return bool(expr)
        if not expr.free_symbols <= self.best.keys():
            return False
        own = sorted(expr.free_symbols, key=str)
        bounds = bound_sympy(expr, self._ranges(own))
        if bounds.is_singleton():
            return bool(bounds.lower)
        values = self._values(own)
        if values is None:
            return False
        holds = function_of(expr, own)
        return not any(self._may_be(own, v) for v in values if not holds(*v))

    def describe(self, size: Any) -> str:
        """A size, for keys and messages: the same in every process."""
        n = plain_size(size) if isinstance(size, torch.SymInt) else size
        return str(n) if isinstance(n, int) else str(n.xreplace({s: type(s)(name) for s, name in self.names.items()}))

    def _tried(self, n: Any, symbols: Sequence[Any]) -> list[int]:
        """What a size is where it is not least and largest where its symbols are."""
        values = self._values(symbols)
        if values is None:
            raise Rejected(f"the size {self.describe(n)} of a tensor may be anything")
        size = function_of(n, symbols)
        return [int(size(*v)) for v in values if self._may_be(symbols, v)]

    def _values(self, symbols: Sequence[Any]) -> Iterable[tuple[int, ...]] | None:
        """All values that these may have at once; None where they are too many."""
        ranges = [range(self.least[s], self.most[s] + 1) for s in symbols]
        return None if math.prod(map(len, ranges)) > _MOST_TRIED else itertools.product(*ranges)

    def _may_be(self, symbols: Sequence[Any], values: Sequence[int]) -> bool:
        """Whether the program may be right for these, as far as these tell."""
        return len(symbols) < len(self.best) or self.known.allows(dict(zip(symbols, values, strict=True)))

    def _ranges(self, symbols: Iterable[Any]) -> dict[Any, Any]:
        from torch.utils._sympy.value_ranges import ValueRanges

        return {s: ValueRanges(self.least[s], self.most[s]) for s in symbols}


def _first(known: Known, symbol: Any, tried: Iterable[int]) -> int:
    """The first of these values that the program is right for, the other sizes being as they are; or the hint."""
    few = itertools.islice(tried, _MOST_TRIED)
    return next((n for n in few if known.allows({**known.hints, symbol: n})), known.hints[symbol])
