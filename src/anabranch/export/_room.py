"""How far the counters among a model's state may have got when a call comes, for its writes to stay within bounds.

A cache that is written at a position which the model itself counts is full at some time. The next write is past its
end, which on a GPU costs the process its device. Where a counter grows by the same number in each call, and positions
are computed of it and of nothing else, the largest value for which all of them are valid is found here, on the CPU,
and whoever calls can count along.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from anabranch.export._sizes import shape_at, size_at
from anabranch.export._state import writes_of

_aten = torch.ops.aten
#: Past this a counter is taken to have no end: one that is a position in a ring, say.
_ENDLESS = 1 << 40
#: Operators that take positions along one dimension: ``op(x, dim, positions, ...)``.
_ALONG = frozenset(
    ("index_copy", "index_add", "index_fill", "index_select", "gather", "scatter", "scatter_add", "scatter_reduce")
)
#: Those that take positions for several: ``op(x, [positions, ...], ...)``.
_AMONG = frozenset(("index", "index_put", "_unsafe_index", "_unsafe_index_put"))
#: Elements of a position's tensor, and of what it is computed of.
_LARGEST = 1 << 20


@dataclass(frozen=True)
class Room:
    """Of one counter. ``limit``: the largest value that it may have when a call comes; None: there is no end.

    ``step``: what a call adds to it; None: something that is not known ahead.
    """

    name: str
    step: int | None
    limit: int | None


class _Unknown(Exception):
    """It depends on more than the counter."""


def rooms(
    graph: fx.Graph, states: Mapping[str, fx.Node], initial: Mapping[str, int], values: Mapping[Any, int] | None = None
) -> list[Room]:
    """Of each counter: ``initial`` has the values that they begin with.

    ``states``: placeholders by name. ``values``: of symbols in sizes.
    """
    writes = {n.args[0]: n.args[1] for n in writes_of(graph)}
    found = []
    for name, begin in initial.items():
        if name not in states:
            continue
        node = states[name]
        step = _step(node, writes[node], values) if node in writes else 0
        found.append(Room(name, step, _limit(graph, node, begin, values)))
    return found


def _step(counter: fx.Node, new: Any, values: Mapping[Any, int] | None) -> int | None:
    """What is added to it, where that is the same in all calls."""
    if not isinstance(new, fx.Node):
        return None
    try:
        steps = {_Evaluation(counter, n, values).number(new) - n for n in (3, 1000, 77_777)}
    except _Unknown:
        return None
    return steps.pop() if len(steps) == 1 else None


def _limit(graph: fx.Graph, counter: fx.Node, begin: int, values: Mapping[Any, int] | None) -> int | None:
    checks = [(at, size) for node in graph.nodes for at, size in _positions(node, values) if _depends(at, counter)]

    def is_valid(value: int) -> bool:
        evaluation = _Evaluation(counter, value, values)
        for at, size in checks:
            try:
                x = evaluation.tensor(at)
            except _Unknown:
                continue
            if x.numel() and not -size <= int(x.min()) <= int(x.max()) < size:
                return False
        return True

    if not checks or not is_valid(begin):
        return None  # nothing is known of it, or what is wrong is not that it grew
    last = min(torch.iinfo(counter.meta["val"].dtype).max, begin + _ENDLESS)
    low, high = begin, begin + 1
    while high <= last and is_valid(high):
        low, high = high, begin + 2 * (high - begin)
    if high > last:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_valid(middle) else (low, middle)
    return low


def _positions(node: fx.Node, values: Mapping[Any, int] | None) -> Iterator[tuple[fx.Node, int]]:
    """What an operator takes for positions, each with the size that it must stay below."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not node.args:
        return
    name = node.target._schema.name.rsplit("::")[-1].rstrip("_")
    x: Any = node.args[0]
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return
    try:
        shape = shape_at(value.shape, values)
    except (RuntimeError, TypeError):
        return  # it depends on data
    if name in _ALONG and len(node.args) > 2 and isinstance(node.args[1], int) and shape:
        pairs: Sequence[tuple[Any, int]] = [(node.args[2], shape[node.args[1]])]
    elif name in _AMONG and len(node.args) > 1:
        pairs = list(zip(node.args[1], shape, strict=False))  # type: ignore[arg-type]
    elif name == "embedding" and len(node.args) > 1:
        pairs = [(node.args[1], shape[0])]
    else:
        return
    for at, size in pairs:
        if isinstance(at, fx.Node) and isinstance(at.meta.get("val"), torch.Tensor):
            is_mask = at.meta["val"].dtype in (torch.bool, torch.uint8)
            if not is_mask and not at.meta["val"].is_floating_point():
                yield at, size


def _depends(node: fx.Node, on: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n is on:
            return True
        if n not in seen:
            seen.add(n)
            stack += n.all_input_nodes
    return False


class _Evaluation:
    """Values of nodes that are computed of one counter, which has ``value``, and of constants."""

    def __init__(self, counter: fx.Node, value: int, values: Mapping[Any, int] | None) -> None:
        fake = counter.meta["val"]
        if value > torch.iinfo(fake.dtype).max:
            raise _Unknown
        self._values = values
        self._known: dict[fx.Node, Any] = {counter: torch.full(tuple(fake.shape), value, dtype=fake.dtype)}

    def number(self, node: fx.Node) -> int:
        x = self.tensor(node)
        if x.numel() != 1 or x.is_floating_point():
            raise _Unknown
        return int(x)

    def tensor(self, node: fx.Node) -> torch.Tensor:
        x = self._of(node)
        if not isinstance(x, torch.Tensor):
            raise _Unknown
        return x

    def _of(self, node: fx.Node) -> Any:
        order = [node]
        while order:
            n = order[-1]
            if n in self._known:
                order.pop()
                continue
            if self._is_size(n):
                self._known[n] = self._size(n)
                continue
            missing = [m for m in n.all_input_nodes if m not in self._known]
            if missing:
                order += missing
                continue
            self._known[n] = self._run(n)
        return self._known[node]

    def _is_size(self, node: fx.Node) -> bool:
        return node.target is _aten.sym_size.int or isinstance(node.meta.get("val"), torch.SymInt)

    def _size(self, node: fx.Node) -> int:
        if node.target is _aten.sym_size.int:
            x: Any = node.args[0]
            found = size_at(x.meta["val"].shape[node.args[1]], self._values)
        else:
            found = size_at(node.meta["val"], self._values)
        if found is None:
            raise _Unknown
        return found

    def _run(self, node: fx.Node) -> Any:
        target: Any = node.target
        fake = node.meta.get("val")
        is_small = isinstance(fake, torch.Tensor) and _elements(fake, self._values) <= _LARGEST
        if node.op != "call_function" or not (is_small or target is operator.getitem):
            raise _Unknown
        is_plain = isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable
        if not is_plain or (isinstance(fake, torch.Tensor) and fake.is_floating_point()):
            raise _Unknown
        try:
            args: Any = fx.node.map_aggregate(node.args, self._argument)
            kwargs: Any = fx.node.map_aggregate(node.kwargs, self._argument)
            with torch.no_grad():
                return target(*args, **kwargs)
        except Exception as e:
            raise _Unknown from e

    def _argument(self, x: Any) -> Any:
        if isinstance(x, fx.Node):
            return self._known[x]
        return torch.device("cpu") if isinstance(x, torch.device) else x


def _elements(x: torch.Tensor, values: Mapping[Any, int] | None) -> int:
    n = 1
    for size in shape_at(x.shape, values):
        n *= size
    return n
