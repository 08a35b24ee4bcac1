"""What a model returns: its structure, and what each part of it really is."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from anabranch.errors import UnsupportedModel
from anabranch.export._assignments import storage
from anabranch.export._containers import register_containers
from anabranch.export._diagnosis import NotExported
from anabranch.export._numbers import Expression
from anabranch.export._sizes import integer_of, is_of_data, plain_size

_aten = torch.ops.aten


@dataclass(frozen=True)
class ComputedOutput:
    """The graph computes it: result ``index`` of the module. ``conj``, ``neg``: it is a lazy conjugate or negative of
    that result."""

    index: int
    conj: bool = False
    neg: bool = False

    @property
    def is_lazy(self) -> bool:
        return self.conj or self.neg

    def of(self, result: torch.Tensor) -> torch.Tensor:
        """``result`` with the bits that it has in eager."""
        if self.conj:
            result = torch._conj(result)
        return torch._neg_view(result) if self.neg else result


@dataclass(frozen=True)
class AliasOutput:
    """An input or a parameter of the model, or a view of one: handed back as eager would.

    ``position`` counts inputs (``weight is None``) ; ``weight`` is the engine's tensor over a parameter's memory.
    ``view`` recomputes the view from it; None means the tensor itself.
    """

    position: int
    weight: torch.Tensor | None
    view: fx.GraphModule | None
    #: The user's own parameter, if it is still there.
    original: Callable[[], torch.Tensor | None] | None = None

    def of(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """What is handed back of a call. The user's own parameter, unless ``half()``, say, has made another of it."""
        base = inputs[self.position] if self.weight is None else self.weight
        own = self.original() if self.original is not None else None
        if own is not None and own.is_set_to(base):
            base = own
        result: torch.Tensor = base if self.view is None else self.view(base)
        return result


@dataclass(frozen=True)
class ConstantOutput:
    """A number, a string, a dtype, None: the same at each call."""

    value: Any


@dataclass(frozen=True)
class NumberOutput:
    """A number that is computed of sizes of the inputs, by Python as in eager. Kernels have no part in it."""

    expression: Expression
    #: Input and dimension of each size that it is computed of.
    places: tuple[tuple[int, int], ...]

    def of(self, inputs: Sequence[torch.Tensor]) -> Any:
        """Its value in a call."""
        return self.expression.of([inputs[i].shape[d] for i, d in self.places])


@dataclass(frozen=True)
class SizeOutput:
    """A ``torch.Size`` of numbers of which some vary."""

    parts: tuple[ComputedOutput | NumberOutput | ConstantOutput, ...]


Output = ComputedOutput | AliasOutput | NumberOutput | ConstantOutput | SizeOutput

#: What nobody can change, so that all calls may return the same object.
_CONSTANTS: tuple[type, ...] = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), type, slice, range, enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.finfo, torch.iinfo),
)
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass
class Returned:
    """What the model returned while it was exported, but for the values: tensors, and numbers that depend on data.

    Export itself sees the values, and no more of it.
    """

    structure: pytree.TreeSpec
    #: A leaf each: a constant, or where among the values it is; of a torch.Size, its parts.
    leaves: list[Any] = field(default_factory=list)
    #: What cannot be returned, if anything.
    refusal: str | None = None

    @classmethod
    def of(cls, result: Any) -> tuple[Returned, list[Any]]:
        """And the values, in order."""
        register_containers(result)
        leaves, structure = pytree.tree_flatten(result, is_leaf=_is_size)
        made = cls(structure)
        values: list[Any] = []

        def of(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
                values.append(leaf)
                return _At(len(values) - 1)
            if not isinstance(leaf, _CONSTANTS) and made.refusal is None:
                kind = type(leaf)
                made.refusal = (
                    f"the model returns a {kind.__module__}.{kind.__qualname__}{_place(result, leaf)}, which an engine"
                    f" cannot make anew at each call.{_hint(kind)}"
                )
            return ConstantOutput(leaf)

        for leaf in leaves:
            depends = isinstance(leaf, torch.Size) and any(isinstance(n, _SYMBOLS) for n in leaf)
            made.leaves.append(tuple(map(of, leaf)) if depends else of(leaf))
        return made, values

    def whole(self, values: Sequence[Any]) -> list[Any]:
        """A value for each leaf. Of a torch.Size that depends on data: itself no more."""
        return [values[x.index] if isinstance(x, _At) else getattr(x, "value", None) for x in self.leaves]

    def outputs(self, made: Sequence[Output]) -> list[Output]:
        """An output for each leaf; ``made``: one for each of the values."""

        def of(leaf: Any) -> Any:
            if isinstance(leaf, tuple):
                return SizeOutput(tuple(of(part) for part in leaf))
            return made[leaf.index] if isinstance(leaf, _At) else leaf

        return [of(leaf) for leaf in self.leaves]


def _is_size(x: Any) -> bool:
    return isinstance(x, torch.Size)


def _place(result: Any, leaf: Any) -> str:
    """Where in ``result`` it is, if its containers tell."""
    try:
        pairs, _ = pytree.tree_flatten_with_path(result, is_leaf=_is_size)
    except ValueError:
        return ""
    return next((f" (output{pytree.keystr(path)})" for path, x in pairs if x is leaf and path), "")


@dataclass(frozen=True)
class _At:
    """Which of the values a leaf is."""

    index: int


def _hint(kind: type) -> str:
    if "cache" in kind.__name__.lower():
        return (
            " Ask the model not to return its cache (use_cache=False, or model.config.use_cache = False), or return the"
            " cache's tensors."
        )
    return (
        " Return tensors, numbers, strings, None, or containers of them; register other containers with"
        " torch.utils._pytree.register_pytree_node."
    )


def storage_of(node: fx.Node) -> int | None:
    """Identity of the memory that a node's value lies in."""
    value = node.meta.get("val")
    return storage(value) if isinstance(value, torch.Tensor) else None


def classify(
    gm: fx.GraphModule,
    inputs: Sequence[fx.Node],
    weights: Mapping[fx.Node, tuple[str, torch.Tensor]],
    where: Any,
    original: Callable[[torch.Tensor], Callable[[], torch.Tensor | None] | None] = lambda weight: None,
) -> list[Output]:
    """Say what each value that the graph returns is, and leave only computed ones, each once, in the graph.

    ``where``: node -> the model's line, for messages. ``original``: for a weight, what returns the user's own tensor.
    """
    output = gm.graph.output_node()
    roots: dict[int | None, list[fx.Node]] = {}
    for n in (*inputs, *weights):
        roots.setdefault(storage_of(n), []).append(n)
    computed: dict[fx.Node, int] = {}
    result: list[Output] = []
    for value in output.args[0]:  # type: ignore[union-attr]
        if not isinstance(value, fx.Node):
            result.append(ConstantOutput(value))
            continue
        _check_plain(value, where(value))
        number = _number(value, inputs)
        if number is not None:
            result.append(number)
            continue
        root = value if value in weights or value in inputs else _root(value, roots.get(storage_of(value), []))
        if root is None:
            node, conj, neg = _in_memory(gm.graph, value)
            result.append(ComputedOutput(computed.setdefault(node, len(computed)), conj, neg))
            continue
        entry = _entry(root)
        view = None if value is entry else _view_chain(value, entry)
        if root in weights:
            weight = weights[root][1]
            result.append(AliasOutput(-1, weight, view, original(weight)))
        else:
            result.append(AliasOutput(inputs.index(root), None, view))
    output.args = (tuple(computed),)
    return result


def _number(value: fx.Node, inputs: Sequence[fx.Node]) -> NumberOutput | None:
    """A result as what Python computes of the inputs' sizes; None where it is no such number."""
    if not isinstance(value.meta.get("val"), _SYMBOLS) or is_of_data(value.meta["val"]):
        return None
    where: dict[Any, tuple[int, int]] = {}
    for i, node in enumerate(inputs):
        for d, n in enumerate(getattr(node.meta.get("val"), "shape", ())):
            where.setdefault(plain_size(n), (i, d))
    used: dict[Any, int] = {}
    found = _of_sizes(value, where, used)
    return NumberOutput(found, tuple(where[symbol] for symbol in used)) if isinstance(found, Expression) else None


def _of_sizes(value: Any, where: Mapping[Any, tuple[int, int]], used: dict[Any, int]) -> Any:
    """``value`` as an expression of sizes, or the number that it is; None: it is neither. ``used``: their order."""
    if not isinstance(value, fx.Node):
        return value
    number = value.meta.get("val")
    if isinstance(number, torch.SymInt):
        size = plain_size(number)
        if isinstance(size, int):
            return Expression(int, (size,), int)
        symbols = sorted(size.free_symbols, key=str)
        if any(symbol not in where for symbol in symbols):
            return None
        places = [Expression(None, (used.setdefault(symbol, len(used)),), int) for symbol in symbols]
        return Expression(integer_of(size, symbols), tuple(places), int)
    if not isinstance(number, _SYMBOLS) or value.op != "call_function" or value.kwargs:
        return None
    parts = [_of_sizes(x, where, used) for x in value.args]
    kind = float if isinstance(number, torch.SymFloat) else bool
    return None if any(x is None for x in parts) else Expression(value.target, tuple(parts), kind)  # type: ignore[arg-type]


def _root(value: fx.Node, candidates: Sequence[fx.Node]) -> fx.Node | None:
    """The input or weight that a view is taken of: parameters may be views of one another."""
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    ancestors = _ancestors(value)
    return next((n for n in candidates if n in ancestors), candidates[0])


def _check_plain(node: fx.Node, line: str) -> None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return
    quantized = value.is_quantized or str(value.dtype).startswith(("torch.quint", "torch.qint"))
    if value.layout is not torch.strided or quantized or value.is_nested:
        kind = "quantized" if quantized else "nested" if value.is_nested else f"of layout {value.layout}"
        instead = ".dequantize()" if quantized else ".to_dense()"
        raise UnsupportedModel(
            f"the model returns a tensor that is {kind} ({line or node.target}); engines return dense ones. Return"
            f" {instead} of it."
        )


def _in_memory(graph: fx.Graph, value: fx.Node) -> tuple[fx.Node, bool, bool]:
    """What lies in memory of a value, and which lazy bits it has on top. Only that is copied, captured and written."""
    fake = value.meta.get("val")
    if not isinstance(fake, torch.Tensor):
        return value, False, False
    conj, neg = fake.is_conj(), fake.is_neg()
    for held, op, undone in ((conj, _aten._conj.default, torch._conj), (neg, _aten._neg_view.default, torch._neg_view)):
        if not held:
            continue
        if value.target is op:
            value = value.args[0]  # type: ignore[assignment]
            continue
        with graph.inserting_after(value):
            plain = graph.call_function(op, (value,))
        fake = value.meta["val"]
        with fake.fake_mode:
            plain.meta = {**value.meta, "val": undone(fake)}
        value = plain
    return value, conj, neg


def _entry(root: fx.Node) -> fx.Node:
    """The input as the model sees it: with its lazy bits, which are put on first of all."""
    for op in (_aten._conj.default, _aten._neg_view.default):
        if root.meta.get("lazy", {}).get(op):
            root = next(n for n in root.users if n.target is op)
    return root


def _view_chain(value: fx.Node, root: fx.Node) -> fx.GraphModule:
    """The views that lead from ``root`` to ``value``, as a module of one input."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {root: graph.placeholder("base")}

    def clone(node: fx.Node) -> fx.Node:
        if node not in copied:
            for n in node.all_input_nodes:
                clone(n)
            copied[node] = graph.node_copy(node, lambda n: copied[n])
        return copied[node]

    if any(n.op == "placeholder" and n is not root for n in _ancestors(value, root)):
        raise NotExported(
            f"output {value.name!r} is a view of {root.name!r} whose shape depends on another tensor; return a copy"
        )
    graph.output(clone(value))
    return fx.GraphModule(torch.nn.Module(), graph)


def _ancestors(node: fx.Node, root: fx.Node | None = None) -> set[fx.Node]:
    """Every node that leads to ``node``, but what leads to ``root``."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            if n is not root:
                stack.extend(n.all_input_nodes)
    return seen


def finisher(outputs: Sequence[Output], structure: pytree.TreeSpec) -> Any:
    """``finish(inputs, results)``: how results become what the model returns; the common shapes without pytree."""
    if all(isinstance(o, ComputedOutput) and not o.is_lazy for o in outputs):
        order = [o.index for o in outputs if isinstance(o, ComputedOutput)]
        if structure.is_leaf():
            return lambda inputs, results: results[0]
        if structure.type in (tuple, list) and all(s.is_leaf() for s in structure.children()):
            container = structure.type
            return lambda inputs, results: container([results[i] for i in order])

    def leaf(output: Output, inputs: Sequence[Any], results: Sequence[Any], lazy: dict[Output, Any]) -> Any:
        if isinstance(output, ComputedOutput):
            if not output.is_lazy:
                return results[output.index]
            if output not in lazy:  # one that is returned twice is one object
                lazy[output] = output.of(results[output.index])
            return lazy[output]
        if isinstance(output, AliasOutput | NumberOutput):
            return output.of(inputs)
        if isinstance(output, SizeOutput):
            return torch.Size([int(leaf(part, inputs, results, lazy)) for part in output.parts])
        return output.value

    def finish(inputs: Sequence[Any], results: Sequence[Any]) -> Any:
        lazy: dict[Output, Any] = {}
        return pytree.tree_unflatten([leaf(o, inputs, results, lazy) for o in outputs], structure)

    return finish
