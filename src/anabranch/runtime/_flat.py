"""A program as a flat list of operator calls, as plain data: what runs without Python is made from it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from anabranch.export import Program, source_of

#: An operator's argument: ``("slot", i)``; ``("list", [i, ...])``, -1 for none; ``("constant", value)``.
Argument = tuple[str, Any]


class Call(NamedTuple):
    """Call an operator by its schema's name. Its results go to the next slots, one each; a list is one result."""

    name: str
    overload: str
    arguments: list[Argument]
    #: For messages: the model's line.
    source: str = ""


class Pick(NamedTuple):
    """The ``position``-th of the tensors that are listed in ``slot``, into the next slot."""

    slot: int
    position: int


@dataclass
class FlatProgram:
    """Slots hold values: the first ones weights and then inputs, the further ones what the steps leave there."""

    inputs: int
    steps: list[Call | Pick] = field(default_factory=list)
    #: Slots of the results.
    results: list[int] = field(default_factory=list)


class _Untranslatable(Exception):
    pass


def flatten(program: Program) -> FlatProgram | str:
    """``program`` as a list of operator calls, or the reason why it cannot be one."""
    graph = program.module.graph
    placeholders = graph.find_nodes(op="placeholder")
    made = FlatProgram(len(placeholders))
    slots: dict[fx.Node, int] = {n: i for i, n in enumerate(placeholders)}
    #: Nodes whose value is several tensors: the slot of the first, and whether they are one list.
    several: dict[fx.Node, tuple[int, bool]] = {}
    end = len(placeholders)

    def argument(value: Any) -> Argument:
        if isinstance(value, fx.Node):
            return "slot", slots[value]
        if isinstance(value, list | tuple) and any(isinstance(v, fx.Node) for v in value):
            if not all(v is None or (isinstance(v, fx.Node) and v in slots) for v in value):
                raise _Untranslatable("a list of numbers that depend on data")
            return "list", [-1 if v is None else slots[v] for v in value]
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise _Untranslatable("a number that depends on data")
        return "constant", value

    try:
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.target is operator.getitem and node.args[0] in several:
                first, is_list = several[node.args[0]]
                if is_list:
                    made.steps.append(Pick(first, node.args[1]))
                    slots[node] = end
                    end += 1
                else:
                    slots[node] = first + node.args[1]
                continue
            if not isinstance(node.target, torch._ops.OpOverload):
                return f"{node.name} is no operator ({node.target})"
            schema = node.target._schema
            given = []
            for i, declared in enumerate(schema.arguments):
                if i < len(node.args) and not declared.kwarg_only:
                    given.append(argument(node.args[i]))
                elif declared.name in node.kwargs:
                    given.append(argument(node.kwargs[declared.name]))
                else:
                    given.append(("constant", declared.default_value))
            made.steps.append(Call(schema.name, schema.overload_name, given, source_of(node)))
            kinds = [str(r.type) for r in schema.returns]
            if kinds == ["Tensor"]:
                slots[node] = end
            elif kinds == ["List[Tensor]"]:
                several[node] = (end, True)
            elif all(k == "Tensor" for k in kinds):
                several[node] = (end, False)
            else:
                return f"{node.target} returns {', '.join(kinds)}"
            end += len(kinds)
        made.results = [slots[n] for n in graph.output_node().args[0]]  # type: ignore[union-attr, index]
    except KeyError as e:
        return f"{e} has no tensor value"
    except _Untranslatable as e:
        return f"{node.name} takes {e}"
    return made
