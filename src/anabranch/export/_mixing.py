"""Mixed precision of a graph: each operator is put into half precision or left as it is, and casts are put between.

Decided per operator, in this order: what the user lists stays in float32; what came near the range's ends on the inputs
that ``compile`` was given does; what the user wants in half precision is; the rest by what the operator is
(:mod:`anabranch.export._narrow`). Results keep the model's types, and so does what the model writes.
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from anabranch.export import _narrow
from anabranch.export._cast_tensors import CastTensors
from anabranch.export._generators import generators_kept
from anabranch.export._mixed import Mixed, Place, places
from anabranch.export._modes import is_autocast_off
from anabranch.export._narrow import ATTENTION, Followers, packet
from anabranch.export._precision import Cast, unfit
from anabranch.export._ranges import largest_values
from anabranch.export._snapshot import Fresh, Snapshot

_aten = torch.ops.aten
_WIDE = torch.float32
#: So far from the range's end results must stay: other inputs give other values.
_HEADROOM = 4
#: Places that a line of ``explain()`` names.
_MOST_NAMED = 6


@dataclass(frozen=True)
class Choices:
    """Of one graph: the operators in half precision, and those in float32 with the reasons, by their places."""

    dtype: torch.dtype
    half: tuple[str, ...]
    wide: tuple[tuple[str, str], ...]
    #: Of those in float32: products, which are worth being named one by one.
    products: frozenset[str]
    #: What the user lists and no operator of the graph is.
    unmatched: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people: how many of which operators are where, and why."""
        counts = Counter(_operator(p) for p in self.half)
        lines = [f"{_name(self.dtype)}: {', '.join(f'{n} {name}' for name, n in counts.items()) or 'nothing'}"]
        groups: dict[str, list[str]] = {}
        for place, why in self.wide:
            groups.setdefault(why, []).append(place)
        for why, found in groups.items():
            named = [p for p in found if p in self.products]
            others = Counter(_operator(p) for p in found if p not in self.products)
            more = [f"{len(named) - _MOST_NAMED} more products"] if len(named) > _MOST_NAMED else []
            what = [*named[:_MOST_NAMED], *more, *(f"{n} {name}" for name, n in others.items())]
            lines.append(f"float32, {why}: {', '.join(what)}")
        if self.unmatched:
            lines.append(f"listed, and no operator of this graph: {', '.join(self.unmatched)}")
        return lines


class Mixing:
    """A model in mixed precision, for all signatures. Its methods are called with the build lock held."""

    def __init__(self, snapshot: Snapshot, mixed: Mixed) -> None:
        self.snapshot, self.mixed, self.precision = snapshot, mixed, mixed.dtype
        self._casts = CastTensors()
        self._unfit: dict[int, tuple[torch.Tensor, str]] = {}
        #: By place: why what was measured there leaves it in float32.
        self.measured: dict[str, str] = {}
        self._sample: list[torch.Tensor] | None = None

    def measure_on(self, inputs: Sequence[torch.Tensor]) -> None:
        """Have the next graph run on ``inputs``, its tensors, to see how large the values in it are."""
        self._sample = list(inputs)

    def explain(self) -> list[str]:
        """What was asked for."""
        asked = [f"{name}: {', '.join(v)}" for name in ("keep", "half") if (v := getattr(self.mixed, name))]
        return [f"precision mixed, of float32 and {_name(self.precision)}{''.join(f'; {a}' for a in asked)}"]

    def fold(
        self,
        gm: fx.GraphModule,
        weights: dict[fx.Node, tuple[str, torch.Tensor]],
        fresh: Fresh,
        aside: Callable[..., Any],
        inputs: Sequence[fx.Node],
        states: Mapping[fx.Node, torch.Tensor],
    ) -> Choices:
        """Put what gains by it into half precision. ``weights`` get another where one is cast: calls cast none.

        ``weights``, ``inputs``, ``states``: placeholders of ``gm``, of weights with their names and tensors of
        ``fresh``, a copy of ``snapshot``. ``aside``: see :meth:`CastTensors.get`.
        """
        named = places(gm.graph)
        if self._sample is not None:
            sample = dict(zip(inputs, self._sample, strict=True)) | dict(states)
            sample |= {n: t for n, (_, t) in weights.items()}
            self._sample = None
            self._measure(gm, sample, named, fresh, aside)
        sources = {n: fresh.source(t) for n, (_, t) in weights.items()}

        def fits(node: fx.Node) -> bool:
            return not self._why_unfit(sources[_base(node)], aside)

        graph = _Graph(gm.graph, self.precision, weights, lambda n: self._casts.get(sources[n], self.precision, aside))
        followers = Followers(graph.is_weight, fits)
        half: list[str] = []
        wide: list[tuple[str, str]] = []
        products: set[str] = set()
        for node in list(gm.graph.nodes):
            place = named.get(node)
            why: str | None = None
            if place is not None and packet(node) is not operator.getitem:
                why = self._why_wide(node, place, graph, followers, fits)
                if why == "":
                    half += [str(place)] if packet(node) not in _narrow.VIEWS else []
                elif why and graph.kind_of(node) is _WIDE:
                    wide.append((str(place), why))
                    products |= {str(place)} if packet(node) in _narrow.PRODUCTS else set()
            graph.rewrite(node, why == "")
        graph.sort_weights()
        listed = (*self.mixed.keep, *self.mixed.half)
        unmatched = tuple(entry for entry in listed if not any(p.matches([entry]) for p in named.values()))
        return Choices(self.precision, tuple(half), tuple(wide), frozenset(products), unmatched)

    def _why_wide(
        self, node: fx.Node, place: Place, graph: _Graph, followers: Followers, fits: Callable[[fx.Node], bool]
    ) -> str | None:
        """Why it is left as it is; nothing: it is not. None: nobody would ask."""
        data = graph.data_of(node)
        if not data or graph.kind_of(node) is not _WIDE:
            return None
        if place.matches(self.mixed.keep):
            return "listed in keep"
        kind = packet(node)
        asked = place.matches(self.mixed.half)
        if is_autocast_off(node) and not asked:
            return "the model turns autocast off there"
        if kind in _narrow.PRODUCTS or asked:
            if (why := self.measured.get(str(place))) is not None:
                return why
            if asked and kind not in _narrow.FOLLOWERS:
                return ""
        if kind in _narrow.PRODUCTS:
            if graph.has_other_types(node):
                return "takes operands of other types"
            if any(map(_narrow.are_whole_numbers, _operands(node))):
                return "takes whole numbers, such as positions: half precision has few of them"
            if not all(fits(n) for n in _operands(node) if n in data and graph.is_weight(n)):
                return f"{_name(self.precision)} cannot hold its weights"
            if _narrow.are_scores(node, graph.is_weight):
                return "a softmax is taken of it: large values would overflow, or lose their digits"
            return ""
        if kind not in _narrow.FOLLOWERS:
            return _narrow.why_wide(node)
        computed = [n for n in data if not graph.is_weight(n)]
        if not computed or (kind in _narrow.BATCH_NORMS and not graph.is_half(data[0])):
            return None
        if kind in _narrow.BATCH_NORMS:
            computed = data[:1]
        if not all(map(graph.is_half, computed)):
            return "adds to a stream in float32" if any(map(graph.is_half, computed)) and not asked else None
        if graph.is_returned(node):
            return None
        return self.measured.get(str(place)) or followers.follows(node, data, asked)

    def _measure(
        self,
        gm: fx.GraphModule,
        sample: Mapping[fx.Node, torch.Tensor],
        named: Mapping[fx.Node, Place],
        fresh: Fresh,
        aside: Callable[..., Any],
    ) -> None:
        found: dict[fx.Node, float] = {}
        with generators_kept(fresh.module, list(sample.values())):
            aside(lambda: found.update(largest_values(gm, sample)))
        limits = torch.finfo(self.precision)
        for node, place in named.items():
            if node not in found or packet(node) not in _narrow.PRODUCTS | _narrow.FOLLOWERS:
                continue
            near = [node, *(_operands(node) if packet(node) in _narrow.PRODUCTS else ())]
            top = max(found.get(n, 0.0) for n in near)
            if top > limits.max / _HEADROOM:
                ends = f"{_name(self.precision)} ends at {limits.max:.5g}"
                self.measured[str(place)] = f"values of {top:.2g} on the inputs of compile, and {ends}"
            elif packet(node) in _narrow.PRODUCTS and 0 < found[node] < limits.tiny:
                self.measured[str(place)] = f"values below {found[node]:.1e} on the inputs of compile: subnormal"

    def _why_unfit(self, tensor: torch.Tensor, aside: Callable[..., Any]) -> str:
        if id(tensor) not in self._unfit:
            aside(lambda: self._unfit.update({id(tensor): (tensor, unfit(tensor, self.precision))}))
        return self._unfit[id(tensor)][1]


def cast_of(snapshot: Snapshot, precision: torch.dtype | Mixed | None) -> Cast | Mixing | None:
    """What puts the graphs of a model into a precision; None: they are left as they are."""
    if isinstance(precision, Mixed):
        return Mixing(snapshot, precision)
    return Cast(snapshot, precision) if precision is not None else None


class _Graph:
    """A graph whose operators get half precision one after another."""

    def __init__(
        self,
        graph: fx.Graph,
        dtype: torch.dtype,
        weights: dict[fx.Node, tuple[str, torch.Tensor]],
        cast: Callable[[fx.Node], torch.Tensor],
    ) -> None:
        """``cast``: gives the tensor of a weight in ``dtype``."""
        self._graph, self._dtype, self._weights, self._cast = graph, dtype, weights, cast
        self._given = set(weights)
        self._kinds = {n: _dtype_of(n.meta.get("val")) for n in graph.nodes}
        self._narrow: dict[fx.Node, fx.Node] = {}
        self._wide: dict[fx.Node, fx.Node] = {}
        self._last_placeholder = graph.find_nodes(op="placeholder")[-1:]
        self._returned: set[fx.Node] = set()
        # What is returned is cast before views are taken of it: two results that share memory go on sharing it.
        ahead = list(graph.output_node().all_input_nodes)
        while ahead:
            node = ahead.pop()
            part = packet(node) is operator.getitem and packet(node.args[0]) in _narrow.VIEWS  # type: ignore[arg-type]
            if (packet(node) in _narrow.VIEWS or part) and node not in self._returned:
                self._returned.add(node)
                ahead += node.all_input_nodes[:1]

    def kind_of(self, node: fx.Node) -> torch.dtype | None:
        """The model's own type of a value."""
        return self._kinds.get(node)

    def is_half(self, node: fx.Node) -> bool:
        return self.kind_of(node) is _WIDE and _dtype_of(node.meta.get("val")) is self._dtype

    def is_returned(self, node: fx.Node) -> bool:
        """Whether it is a result, or one is a view of it."""
        return node in self._returned

    def is_weight(self, node: fx.Node) -> bool:
        """Whether it is one, or a view of one."""
        while packet(node) in _narrow.VIEWS and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node in self._given

    def data_of(self, node: fx.Node) -> list[fx.Node]:
        """The operands that are float32 in the model."""
        return [n for n in node.all_input_nodes if self.kind_of(n) is _WIDE]

    def has_other_types(self, node: fx.Node) -> bool:
        kinds = {self.kind_of(n) for n in node.all_input_nodes} - {_WIDE, None}
        return any(k.is_floating_point or k.is_complex for k in kinds if k is not None)

    def rewrite(self, node: fx.Node, half: bool) -> None:
        """Give it operands for being computed in half precision, or as it is."""
        if half:
            only = node.all_input_nodes[:1] if packet(node) in _narrow.BATCH_NORMS else None

            def change(n: fx.Node) -> fx.Node:
                return self._narrowed(n, node) if self.kind_of(n) is _WIDE and (only is None or n in only) else n

            if packet(node) in ATTENTION:
                self._narrow_mask(node)
        elif "sym_" in str(node.target):
            return  # only the shape is read
        elif packet(node) is operator.getitem:

            def change(n: fx.Node) -> fx.Node:
                return n  # several tensors

        else:

            def change(n: fx.Node) -> fx.Node:
                return self._widened(n) if self.is_half(n) else n

        node.args, node.kwargs = fx.map_arg(node.args, change), fx.map_arg(node.kwargs, change)
        if half or (packet(node) is operator.getitem and self.kind_of(node) is _WIDE):
            self._evaluate(node)

    def _narrowed(self, node: fx.Node, user: fx.Node) -> fx.Node:
        if self.is_half(node):
            return node
        if node in self._narrow:
            return self._narrow[node]
        if node in self._given:
            with self._graph.inserting_after(node):
                new = self._graph.placeholder(f"{node.name}_{_name(self._dtype)}")
            self._weights[new] = (self._weights[node][0], self._cast(node))
            new.meta = {**node.meta, "val": _as(node.meta["val"], self._dtype)}
        elif self.is_weight(node):
            below = self._narrowed(node.all_input_nodes[0], user)
            with self._graph.inserting_before(node):
                new = self._graph.node_copy(node, lambda n: below if n is node.all_input_nodes[0] else n)
            self._evaluate(new)
        else:
            new = self._convert(node, self._dtype)
        self._narrow[node] = new
        return new

    def _widened(self, node: fx.Node) -> fx.Node:
        if node not in self._wide:
            self._wide[node] = self._convert(node, _WIDE)
        return self._wide[node]

    def _convert(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        new = self._after(node, _aten._to_copy.default, (node,), {"dtype": dtype})
        new.meta["val"] = _as(node.meta["val"], dtype)
        return new

    def _after(self, node: fx.Node, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        at = self._last_placeholder[0] if node.op == "placeholder" else node
        with self._graph.inserting_after(at):
            new = self._graph.call_function(target, args, kwargs)
        new.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace", "val")}
        return new

    def _narrow_mask(self, node: fx.Node) -> None:
        """Large negative numbers of a mask stay finite: a row of nothing but infinities has no softmax."""
        mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if not isinstance(mask, fx.Node) or self.kind_of(mask) is not _WIDE or mask in self._narrow:
            return
        limits = torch.finfo(self._dtype)
        wide = self._widened(mask) if self.is_half(mask) else mask
        finite = self._after(wide, _aten.clamp.default, (wide, limits.min, limits.max))
        infinite = self._after(finite, _aten.isinf.default, (wide,))
        chosen = self._after(infinite, _aten.where.self, (infinite, wide, finite))
        for new in (finite, infinite, chosen):
            self._evaluate(new)
            self._kinds[new] = _dtype_of(new.meta["val"])
        self._narrow[mask] = self._convert(chosen, self._dtype)

    def _evaluate(self, node: fx.Node) -> None:
        """Note what comes of its operands as they are now."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        target: Any = node.target
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        with _fake(tensors):
            node.meta["val"] = target(*args, **kwargs)

    def sort_weights(self) -> None:
        """Put ``weights`` into the order of their placeholders."""
        ordered = {n: self._weights[n] for n in self._graph.find_nodes(op="placeholder") if n in self._weights}
        self._weights.clear()
        self._weights.update(ordered)


@contextlib.contextmanager
def _fake(tensors: Sequence[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        mode = next((x.fake_mode for x in tensors if hasattr(x, "fake_mode")), None)
        stack.enter_context(torch.no_grad())
        if mode is not None:
            stack.enter_context(mode)
        # What PyTorch has for symbols in sizes is in Python.
        if any(isinstance(n, torch.SymInt) for x in tensors for n in x.shape):
            stack.enter_context(enable_python_dispatcher())
        yield


def _as(value: Any, dtype: torch.dtype) -> Any:
    with _fake([value]):
        return value.to(dtype)


def _operands(node: fx.Node) -> list[fx.Node]:
    """Without masks of attention, which are narrowed as far as they have to be."""
    return [n for n in node.args[:3] if isinstance(n, fx.Node)] if packet(node) in ATTENTION else node.all_input_nodes


def _base(node: fx.Node) -> fx.Node:
    while packet(node) in _narrow.VIEWS:
        node = node.all_input_nodes[0]
    return node


def _dtype_of(value: Any) -> torch.dtype | None:
    return next((x.dtype for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _operator(place: str) -> str:
    return place.rpartition(":")[2].partition("#")[0].removeprefix("aten.")
