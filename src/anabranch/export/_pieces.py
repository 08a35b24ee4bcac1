"""A program in pieces: parts that can be captured, and between them what cannot.

Pieces run one after another. What passes from one to the next are newly computed tensors and the program's inputs:
views, tables and numbers are computed anew in the piece that uses them, so no piece reads memory that is another's, and
no number of a call gets into a captured piece. Random operators keep their order, so their draws are eager's.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from anabranch.export._constants import copies_from_cpu, is_on_cpu
from anabranch.export._indices import has_mask, indexed_by_floats
from anabranch.export._outputs import ComputedOutput, storage_of
from anabranch.export._program import Program
from anabranch.export._random import is_random
from anabranch.export._signature import Signature, TensorSpec
from anabranch.export._state import writes_of
from anabranch.export._uncaptured import (
    ON_CPU,
    READS_ON_HOST,
    Uncaptured,
    direct_only,
    is_unbacked,
    reads_on_host,
    source_of,
    uncapturable,
)

_aten = torch.ops.aten
#: What these make depends on their arguments alone, and costs next to nothing.
_TABLES = {
    getattr(_aten, name)
    for name in ("full", "zeros", "ones", "arange", "scalar_tensor", "eye", "linspace", "tril_indices", "triu_indices")
}
#: A captured piece of fewer operators is not worth its launch, nor is a program with fewer of them in all.
FEW, LEAST = 3, 4
#: With more pieces, small ones become direct.
MOST = 256


class _Whole(Exception):
    """Why a program stays in one piece."""


@dataclass(frozen=True)
class Piece:
    """A part of a program, as a program of its own.

    Values of a call have numbers: the program's inputs come first, then the results of each piece in turn.
    """

    program: Program
    is_captured: bool
    #: The values that are its inputs.
    takes: tuple[int, ...]
    signature: Signature
    #: Values that nothing needs after it.
    drops: tuple[int, ...] = ()
    #: For people: what its operators are, where it is direct.
    operators: int = 0


@dataclass(frozen=True)
class Cut:
    """A program's pieces, in order, and which values are its results."""

    pieces: tuple[Piece, ...]
    results: tuple[int, ...]


def cut(program: Program, specs: Sequence[TensorSpec], device: torch.device) -> Cut | str:
    """``program`` in pieces, or why it stays in one. Nothing of it is changed.

    ``specs``: of its inputs, for an engine on ``device``.
    """
    try:
        if any(spec.layout for spec in specs) and program.data_dependent:
            raise _Whole("an input is not dense")
        return _Cutter(program, specs, device).cut()
    except _Whole as e:
        return str(e)


class _Cutter:
    def __init__(self, program: Program, specs: Sequence[TensorSpec], device: torch.device) -> None:
        self._program, self._specs, self._device = program, specs, device
        graph = program.module.graph
        placeholders = graph.find_nodes(op="placeholder")
        split = len(program.weights)
        self._weights = {n: i for i, n in enumerate(placeholders[:split])}
        self._inputs = {n: i for i, n in enumerate(placeholders[split:])}
        if len(self._inputs) != len(specs):
            raise _Whole("operators take numbers of the call")
        self._results: list[fx.Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        #: The program's last steps: into an input, a new value of it.
        self._writes = writes_of(graph)
        self._nodes = [n for n in graph.nodes if n.op == "call_function" and n not in self._writes]
        #: What is computed anew wherever it is used.
        self._light: set[fx.Node] = set()
        #: Why others have to run direct, or nothing.
        self._why: dict[fx.Node, str] = {}
        for node in self._nodes:
            self._classify(node)

    def _classify(self, node: fx.Node) -> None:
        value, target = node.meta.get("val"), node.target
        is_operator = isinstance(target, torch._ops.OpOverload)
        if is_operator and target._schema.is_mutable:  # type: ignore[union-attr]
            raise _Whole(f"{target} writes to what it is given")
        tensors = [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
        numbers = any(is_unbacked(n.meta.get("val")) for n in node.all_input_nodes)
        if target is operator.getitem and node.args[0] in self._why:
            self._why[node] = self._why[node.args[0]]  # type: ignore[index]
            return
        if not tensors and value is not None:
            if not all(isinstance(x, _NUMBERS) for x in pytree.tree_leaves(value)):
                raise _Whole(f"{target} makes what is neither a tensor nor a number")
            self._light.add(node)
            return
        if not is_operator and target is not operator.getitem and not _is_higher_order(target):
            raise _Whole(f"{target} is no operator")
        is_table = is_operator and target.overloadpacket in _TABLES and not node.all_input_nodes  # type: ignore[union-attr]
        is_light = (is_table and node not in self._results) or _is_view(node)
        if is_light and not numbers and not is_unbacked(value):
            self._light.add(node)
            return
        self._why[node] = self._why_direct(node, numbers)

    def _why_direct(self, node: fx.Node, numbers: bool) -> str:
        value = node.meta.get("val")
        if value is None or numbers or is_unbacked(value) or has_mask(node.target, node.args):
            return "data-dependent"
        if _is_higher_order(node.target):
            return "data-dependent"
        if is_random(node):
            return "random"
        if reads_on_host(node):
            return READS_ON_HOST
        if self._device.type != "cpu" and (
            is_on_cpu(node)
            or any(
                is_on_cpu(n) and (n not in self._weights or copies_from_cpu(node, n))
                for n in node.all_input_nodes
                if n.op != "get_attr"
            )
        ):
            return ON_CPU
        return ""

    # -- phases -------------------------------------------------------------------------------------------------

    def _phases(self, absorbed: set[fx.Node]) -> dict[fx.Node, int]:
        """When each node runs: what can be captured in even phases, the rest in odd ones, each as early as it can."""
        phases: dict[fx.Node, int] = {}
        drawn = 1
        for node in self._nodes:
            first = max((phases.get(n, 0) for n in node.all_input_nodes), default=0)
            if node in self._light:
                # A number is read where the host may look; a view is wherever its base is.
                is_number = not isinstance(node.meta.get("val"), torch.Tensor | list | tuple)
                phases[node] = first | 1 if is_number else first
                continue
            if node.target is operator.getitem and node.args[0] not in self._light:
                phases[node] = first
                continue
            is_direct = bool(self._why[node]) or node in absorbed
            phases[node] = first | 1 if is_direct else first + first % 2
            if is_random(node) or _is_higher_order(node.target):  # a branch may draw
                phases[node] = drawn = max(phases[node], drawn)
        return phases

    def _settle(self) -> dict[fx.Node, int]:
        """Phases in which every captured piece is worth its launch."""
        absorbed: set[fx.Node] = set()
        few = FEW
        while True:
            phases = self._phases(absorbed)
            members: dict[int, list[fx.Node]] = {}
            for node in self._nodes:
                if node not in self._light and not self._why[node] and node not in absorbed and _computes(node):
                    members.setdefault(phases[node], []).append(node)
            small = [nodes for nodes in members.values() if len(nodes) < few]
            absorbed.update(n for nodes in small for n in nodes)
            if small:
                continue
            if sum(map(len, members.values())) < LEAST:
                raise _Whole("few operators could be captured")
            # Contexts are built on made-up values, and an index that is out of range costs the process its device.
            doubtful = [
                n for nodes in members.values() for n in indexed_by_floats(self._closure(nodes, phases), self._weights)
            ]
            absorbed.update(doubtful)
            if doubtful:
                continue
            if len(members) <= MOST // 2:
                return phases
            few *= 2

    # -- pieces -------------------------------------------------------------------------------------------------

    def cut(self) -> Cut:
        phases = self._settle()
        results = dict.fromkeys(self._results)
        members: dict[int, list[fx.Node]] = {}
        for node in self._nodes:
            if node not in self._light or node in results:
                members.setdefault(phases[node], []).append(node)
        if len(members) < 2:
            raise _Whole("it is of one kind throughout")
        order = sorted(members)
        inside = {p: self._closure(members[p], phases) for p in order}
        self._place_writes(members, inside, phases)
        wanted: dict[fx.Node, None] = dict.fromkeys(results)
        for nodes in inside.values():
            wanted.update((n, None) for n, is_inside in nodes.items() if not is_inside)
        values: dict[fx.Node, int] = dict(self._inputs)
        count = len(self._inputs)
        pieces: list[Piece] = []
        for p in order:
            needed = inside[p]
            given = [n for n, is_inside in needed.items() if not is_inside and n not in self._weights]
            gives = [n for n in members[p] if n in wanted and needed[n]]
            if not gives and not any(n in needed for n in self._writes):
                raise _Whole("a check would be a piece by itself")
            pieces.append(self._piece(p, needed, given, gives, values))
            values.update((n, count + i) for i, n in enumerate(gives))
            count += len(gives)
        last: dict[int, int] = {}
        for k, piece in enumerate(pieces):
            last.update(dict.fromkeys(piece.takes, k))
        kept = {values[n] for n in results}
        done = [
            replace(piece, drops=tuple(sorted(v for v, at in last.items() if at == k and v not in kept)))
            for k, piece in enumerate(pieces)
        ]
        return Cut(tuple(done), tuple(values[n] for n in self._results))

    def _place_writes(
        self, members: dict[int, list[fx.Node]], inside: dict[int, dict[fx.Node, bool]], phases: dict[fx.Node, int]
    ) -> None:
        """Have each input be written in the piece that computes its new value, or in the last one that reads it."""
        at: dict[fx.Node, int] = {}
        while True:
            moved = False
            for write in self._writes:
                target, new = write.args[:2]
                reads = [p for p, nodes in inside.items() if target in nodes and p != at.get(write)]
                first = max([*reads, phases.get(new, 0), at.get(write, 0)])  # type: ignore[arg-type]
                p = min((p for p in members if p >= first), default=max(members))
                if at.get(write) == p:
                    continue
                if write in at:
                    members[at[write]].remove(write)
                    inside[at[write]] = self._closure(members[at[write]], phases)
                at[write], moved = p, True
                members[p].append(write)
                inside[p] = self._closure(members[p], phases)
            if not moved:
                return

    def _closure(self, members: Iterable[fx.Node], phases: dict[fx.Node, int]) -> dict[fx.Node, bool]:
        """What a piece is made of: its members, what is computed anew for them, and (False) what it is given."""
        found: dict[fx.Node, bool] = {}
        stack = list(members)
        own = set(stack)
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found[node] = node in own or node in self._light or node.op == "get_attr"
            if found[node]:
                stack.extend(node.all_input_nodes)
            elif node.op == "call_function" and not isinstance(node.meta.get("val"), torch.Tensor):
                raise _Whole(f"{node.target} makes more than a tensor")
        return {n: found[n] for n in self._program.module.graph.nodes if n in found}

    def _piece(
        self,
        phase: int,
        needed: dict[fx.Node, bool],
        given: Sequence[fx.Node],
        gives: Sequence[fx.Node],
        values: dict[fx.Node, int],
    ) -> Piece:
        whole = self._program
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        weights = [n for n in needed if n in self._weights]
        for node in (*weights, *given):
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = {k: v for k, v in node.meta.items() if k != "lazy"}
        for node, is_inside in needed.items():
            if is_inside:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        end = graph.output(tuple(copies[n] for n in gives))
        end.meta = {"val": tuple(n.meta.get("val") for n in gives)}
        at = [self._weights[n] for n in weights]
        specs = tuple(self._spec(n) for n in given)
        uncaptured = self._uncaptured(needed)
        is_captured = phase % 2 == 0
        depends = any(
            is_unbacked(n.meta.get("val")) or (is_inside and self._why.get(n) == "data-dependent")
            for n, is_inside in needed.items()
        )
        written = {n.args[0] for n in self._writes if n in needed}
        program = Program(
            module=fx.GraphModule(whole.module, graph),
            written=frozenset(i for i, n in enumerate(given) if n in written),
            weights=[whole.weights[i] for i in at],
            weight_names=[whole.weight_names[i] for i in at],
            outputs=[ComputedOutput(i) for i in range(len(gives))],
            structure=pytree.tree_structure([0] * len(gives)),
            requires_grad=tuple(whole.requires_grad[i] for i in at),
            direct_only=None if is_captured else direct_only(uncaptured) or "between captured pieces",
            data_dependent=not is_captured and depends,
            on_cpu=any(spec.on_cpu for spec in specs),
            uncaptured=uncaptured,
            asks_default_dtype=whole.asks_default_dtype,
        )
        structure = pytree.tree_structure(((0,) * len(specs), {}))
        operators = sum(1 for n, is_inside in needed.items() if is_inside and n.op == "call_function" and _computes(n))
        takes = tuple(values[n] for n in given)
        return Piece(program, is_captured, takes, Signature(structure, specs), operators=operators)

    def _uncaptured(self, needed: dict[fx.Node, bool]) -> tuple[Uncaptured, ...]:
        inside = [n for n, is_inside in needed.items() if is_inside]
        found = list(uncapturable(inside))
        at_cpu = [n for n in inside if self._why.get(n) == ON_CPU and n.target is not operator.getitem]
        return (*found, *(Uncaptured(ON_CPU, str(n.target), source_of(n)) for n in at_cpu))

    def _spec(self, node: fx.Node) -> TensorSpec:
        """Of a value that a piece is given."""
        if node in self._inputs:
            return replace(self._specs[self._inputs[node]], layout=None, conj=False, neg=False)
        value = node.meta["val"]
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            raise _Whole(f"{node.target} makes no dense tensor")
        if is_unbacked(value):
            on_cpu = value.device.type == "cpu" != self._device.type
            shape = tuple(n if isinstance(n, int) else 0 for n in value.shape)
            return TensorSpec(shape, (1,) * len(shape), value.dtype, on_cpu=on_cpu, is_open=True)
        spec = TensorSpec.of(value, self._device)
        if spec.layout is not None or spec.is_lazy or node.meta["val"].storage_offset():
            raise _Whole(f"{node.target} makes a tensor that is not dense")
        return spec


_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


def _is_higher_order(target: Any) -> bool:
    return isinstance(target, torch._ops.HigherOrderOperator)


def _computes(node: fx.Node) -> bool:
    return node.target is not operator.getitem and not _is_view(node)


def _is_view(node: fx.Node) -> bool:
    """Whether its values lie in memory of what it is given."""
    if node.target is operator.getitem:
        return isinstance(base := node.args[0], fx.Node) and _is_view(base)
    given = {storage_of(n) for n in node.all_input_nodes} - {None}
    values = [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)]
    if any(x.layout is torch.strided and x.untyped_storage()._cdata in given for x in values):
        if "as_strided" in str(node.target):
            raise _Whole("a view goes past its base's shape")
        return True
    return False
