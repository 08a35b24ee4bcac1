"""A program as a flat list of operator calls, as plain data: what runs without Python is made from it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from anabranch.export import Program, source_of

_aten = torch.ops.aten

#: An operator's argument: ``("slot", i)``, a tensor; ``("number", i)``, a number in a slot; ``("constant", value)``;
#: ``("list", [argument, ...])`` where some of its items are in slots.
Argument = tuple[str, Any]


class Call(NamedTuple):
    """Call an operator by its schema's name. Its results go to the next slots, one each; a list is one result."""

    name: str
    overload: str
    arguments: list[Argument]
    #: For messages: the model's line.
    source: str = ""


class Pick(NamedTuple):
    """The ``position``-th item of the list in ``slot``, into the next slot."""

    slot: int
    position: int


class Number(NamedTuple):
    """A number that depends on data, into the next slot: ``name`` is one of Python's operations, as in :data:`NUMBERS`,
    or what is asked of a tensor (``size``)."""

    name: str
    arguments: list[Argument]


class Check(NamedTuple):
    """Raise RuntimeError with ``message`` where a number is false."""

    holds: Argument
    message: str


class Branch(NamedTuple):
    """The results of ``yes``, or of ``no`` where ``condition`` (a number, or a tensor of one element) is false."""

    condition: Argument
    yes: FlatProgram
    no: FlatProgram
    operands: list[Argument]


class Empty(NamedTuple):
    """A new tensor, into the next slot: of sizes and strides in elements, which are numbers."""

    sizes: list[Argument]
    strides: list[Argument]
    dtype: torch.dtype


class View(NamedTuple):
    """The memory of ``base``, ``offset`` elements after its beginning, into the next slot."""

    base: Argument
    sizes: list[Argument]
    strides: list[Argument]
    offset: Argument


class Expect(NamedTuple):
    """Raise RuntimeError where a tensor that ``made_by`` has made has other sizes or strides."""

    tensor: Argument
    sizes: list[Argument]
    strides: list[Argument]
    made_by: str


class Launch(NamedTuple):
    """Launch a kernel that a compiler made, on ``grid`` blocks."""

    kernel: CompiledKernel
    grid: list[Argument]
    arguments: list[Argument]


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel that is loaded: what owns it must outlive the program."""

    #: A CUfunction.
    function: int
    #: Of a block.
    threads: int
    shared_bytes: int
    #: A letter for each parameter; see ``program.h``.
    types: str


@dataclass
class FlatProgram:
    """Slots hold values: the first ones weights and then inputs, the further ones what the steps leave there."""

    inputs: int
    steps: list[Call | Pick | Number | Check | Branch | Empty | View | Expect | Launch] = field(default_factory=list)
    #: Slots of the results.
    results: list[int] = field(default_factory=list)
    #: Slots of numbers: int, float or bool.
    numbers: set[int] = field(default_factory=set)
    #: What is the first to make a number, or to choose a branch, with the model's line; empty: values are tensors.
    depends: str = ""


class _Untranslatable(Exception):
    pass


#: What export writes for arithmetic on numbers that depend on data. All as in Python: ``//`` and ``%`` round down.
NUMBERS: dict[Callable[..., Any], str] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "truediv",
    operator.floordiv: "floordiv",
    operator.mod: "mod",
    operator.pow: "pow",
    operator.neg: "neg",
    operator.pos: "pos",
    operator.abs: "abs",
    operator.eq: "eq",
    operator.ne: "ne",
    operator.lt: "lt",
    operator.le: "le",
    operator.gt: "gt",
    operator.ge: "ge",
    operator.and_: "and",
    operator.or_: "or",
    operator.xor: "xor",
    operator.not_: "not",
    math.floor: "floor",
    math.ceil: "ceil",
    math.trunc: "int",
    math.sqrt: "sqrt",
    abs: "abs",
    pow: "pow",
    torch.sym_not: "not",
    torch.sym_max: "max",
    torch.sym_min: "min",
    torch.sym_float: "float",
    torch.sym_int: "int",
    torch.sym_ite: "ite",
    torch.sym_sum: "sum",
    # Not in PyTorch's stubs, under the one name or the other.
    **{getattr(torch, name): "sqrt" for name in ("sym_sqrt", "_sym_sqrt") if hasattr(torch, name)},
}
#: Numbers that tensors have.
_OF_TENSORS = {
    _aten.sym_size.int: "size",
    _aten.sym_stride.int: "stride",
    _aten.sym_numel.default: "numel",
    _aten.sym_storage_offset.default: "offset",
}
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
#: How schemas name the types of numbers.
NUMBER_TYPES = ("int", "float", "bool", "number")


def _where(node: fx.Node) -> str:
    source = source_of(node)
    return f" ({source})" if source else ""


def flatten(program: Program) -> FlatProgram | str:
    """``program`` as a list of operator calls, or the reason why it cannot be one."""
    try:
        return _Flattening(program.in_place).made
    except _Untranslatable as e:
        return str(e)


class _Flattening:
    """Makes a list of one graph."""

    def __init__(self, module: fx.GraphModule) -> None:
        placeholders = module.graph.find_nodes(op="placeholder")
        self.made = FlatProgram(len(placeholders))
        self._module = module
        self._end = len(placeholders)
        self._slots: dict[fx.Node, int] = {n: i for i, n in enumerate(placeholders)}
        self.made.numbers |= {i for n, i in self._slots.items() if isinstance(n.meta.get("val"), _NUMBERS)}
        #: Nodes whose value is several ones: the slot of the first, and whether they are one list.
        self._several: dict[fx.Node, tuple[int, bool]] = {}
        for node in module.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            try:
                self._add(node)
            except _Untranslatable as e:
                raise _Untranslatable(f"{node.target}{_where(node)} {e}") from None
        for value in module.graph.output_node().args[0]:  # type: ignore[union-attr]
            if not isinstance(value, fx.Node) or value not in self._slots:
                raise _Untranslatable(f"result {value} is no tensor and no number that is computed")
            self.made.results.append(self._slots[value])

    def _fill(self, count: int, numbers: bool = False) -> int:
        """The next ``count`` slots."""
        first = self._end
        self._end += count
        if numbers:
            self.made.numbers.update(range(first, self._end))
        return first

    def _add(self, node: fx.Node) -> None:
        before = len(self.made.numbers)
        self._translate(node)
        if not self.made.depends:
            if node.target is torch.ops.higher_order.cond:
                self.made.depends = f"{node.target}{_where(node)} chooses a branch"
            elif len(self.made.numbers) > before:
                self.made.depends = f"{node.target}{_where(node)} makes a number that depends on data"

    def _translate(self, node: fx.Node) -> None:
        target: Any = node.target
        if node.op == "get_attr" and isinstance(getattr(self._module, str(target), None), fx.GraphModule):
            return  # a branch
        if target is operator.getitem and node.args[0] in self._several:
            self._pick(node)
        elif target in _OF_TENSORS or (target in NUMBERS and not node.kwargs):
            name = _OF_TENSORS.get(target) or NUMBERS[target]
            given: Sequence[Any] = node.args
            if len(given) == 1 and isinstance(given[0], list | tuple):
                given = given[0]
            arguments = [self._plain(x, tensor=target in _OF_TENSORS and not i) for i, x in enumerate(given)]
            self.made.steps.append(Number(name, arguments))
            self._slots[node] = self._fill(1, numbers=True)
        elif target is _aten._assert_scalar.default:
            if node.args[0] is not True:
                self.made.steps.append(Check(self._plain(node.args[0]), str(node.args[1])))
        elif target is torch.ops.higher_order.cond:
            self._branch(node)
        elif isinstance(target, torch._ops.OpOverload):
            self._call(node, target)
        else:
            raise _Untranslatable("is no operator")

    def _pick(self, node: fx.Node) -> None:
        first, is_list = self._several[node.args[0]]  # type: ignore[index]
        position: Any = node.args[1]
        if not is_list:
            self._slots[node] = first + position
            return
        if position < 0:
            raise _Untranslatable("counts from the end")
        self.made.steps.append(Pick(first, position))
        self._slots[node] = self._fill(1, numbers=first in self.made.numbers)

    def _call(self, node: fx.Node, target: torch._ops.OpOverload) -> None:
        schema = target._schema
        given = []
        for i, declared in enumerate(schema.arguments):
            if i < len(node.args) and not declared.kwarg_only:
                given.append(self._argument(node.args[i]))
            elif declared.name in node.kwargs:
                given.append(self._argument(node.kwargs[declared.name]))
            else:
                given.append(("constant", declared.default_value))
        kinds = [str(r.type) for r in schema.returns]
        lists = [k.removeprefix("List[").removesuffix("]") for k in kinds]
        if any(k != "Tensor" and k not in NUMBER_TYPES for k in (lists if len(kinds) == 1 else kinds)):
            raise _Untranslatable(f"returns {', '.join(kinds)}")
        self.made.steps.append(Call(schema.name, schema.overload_name, given, source_of(node)))
        first = self._fill(len(kinds))
        self.made.numbers.update(first + i for i, k in enumerate(lists) if k in NUMBER_TYPES)
        if len(kinds) == 1 and kinds == lists:
            self._slots[node] = first
        else:
            self._several[node] = (first, len(kinds) == 1)

    def _branch(self, node: fx.Node) -> None:
        condition, yes, no, operands = node.args
        parts = []
        for piece in (yes, no):
            part = getattr(self._module, str(piece.target), None) if isinstance(piece, fx.Node) else None
            if not isinstance(part, fx.GraphModule):
                raise _Untranslatable("has no graph for a branch")
            parts.append(_Flattening(part).made)
        kinds = [[slot in part.numbers for slot in part.results] for part in parts]
        if kinds[0] != kinds[1]:
            raise _Untranslatable("returns a number of one branch and a tensor of the other")
        given = [self._plain(x, tensor=x not in self._numbers()) for x in operands]  # type: ignore[union-attr]
        is_tensor = isinstance(condition, fx.Node) and condition not in self._numbers()
        self.made.steps.append(Branch(self._plain(condition, is_tensor), parts[0], parts[1], given))
        first = self._fill(len(kinds[0]))
        self.made.numbers.update(first + i for i, is_number in enumerate(kinds[0]) if is_number)
        self._several[node] = (first, False)

    def _numbers(self) -> set[fx.Node]:
        return {n for n, slot in self._slots.items() if slot in self.made.numbers}

    def _slot(self, node: fx.Node) -> Argument:
        if node not in self._slots:
            raise _Untranslatable(f"takes {node}, which has no value of its own")
        slot = self._slots[node]
        return "number" if slot in self.made.numbers else "slot", slot

    def _plain(self, value: Any, tensor: bool = False) -> Argument:
        """A number, or what should be a ``tensor``."""
        made = self._slot(value) if isinstance(value, fx.Node) else ("constant", value)
        if (made[0] == "slot") is not tensor or (made[0] == "constant" and not isinstance(value, int | float)):
            raise _Untranslatable(f"takes {value}, which is {'no' if tensor else 'a'} tensor")
        return made

    def _argument(self, value: Any) -> Argument:
        if isinstance(value, fx.Node):
            return self._slot(value)
        if isinstance(value, list | tuple) and any(isinstance(v, fx.Node) for v in value):
            return "list", [self._argument(v) for v in value]
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise _Untranslatable("takes a number that depends on data")
        return "constant", value
