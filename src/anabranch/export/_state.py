"""State: buffers that a model writes, which its next call finds as the last one has left them.

In the flat graph a state is an input that comes after the call's own. What is written, inputs and states, is written at
the graph's end, by one copy each: until then every operator sees what was there before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind

from anabranch.errors import UnsupportedModel
from anabranch.export._assignments import misfit
from anabranch.export._outputs import storage_of
from anabranch.export._snapshot import Fresh
from anabranch.export._writes import Writes, check_kind

_aten = torch.ops.aten
_HINT = "Call model.eval() first if that was not meant."


@dataclass(frozen=True)
class State:
    """A buffer that some program of an engine writes.

    ``initial`` is the model's own tensor, detached: who keeps state makes a copy of it, which has the same strides.
    """

    #: Of the buffer, in the user's model.
    name: str
    initial: torch.Tensor
    #: What to do if it was not meant to be state, or nothing.
    hint: str = ""
    #: What ``initial`` holds, of a single integer, if that is known.
    count: int | None = None

    @classmethod
    def of(cls, model: torch.nn.Module, name: str, initial: torch.Tensor | None, traced: torch.Tensor) -> State:
        """``initial``: what the model held at compile, before it was ever run; ``traced``: what it was traced with."""
        if initial is None:
            raise UnsupportedModel(
                f"the model writes its buffer {name!r}, which was None when it was compiled; expected state to be there"
                " from the first call on. Register a tensor, of zeros say."
            )
        if (initial.shape, initial.dtype, initial.device) != (traced.shape, traced.dtype, traced.device):
            raise UnsupportedModel(misfit(name, initial, traced))
        if initial.is_conj() or initial.is_neg() or initial.stride() != _stride_of_copy(initial):
            raise UnsupportedModel(
                f"the model writes its buffer {name!r}, which is not dense in memory (strides"
                f" {list(initial.stride())}); expected state that is. Register its .clone()"
                " (.contiguous().resolve_conj() if it is lazy)."
            )
        owner = model.get_submodule(name.rpartition(".")[0])
        trains = isinstance(owner, torch.nn.modules.batchnorm._NormBase) and owner.training
        return cls(name, initial.detach(), _HINT if trains else "")


def held_beside(traced: Fresh) -> list[torch.Tensor]:
    """Tensors that a copy of a model holds and that are neither parameters nor buffers of its modules."""
    known = {id(x) for x in (*traced.module.parameters(), *traced.module.buffers())}
    return [x for _, x in traced.tensors if type(x) is torch.Tensor and id(x) not in known]


def _stride_of_copy(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(torch.empty_like(x, device="meta").stride())


def new_values(
    graph: fx.Graph, specs: Mapping[fx.Node, InputSpec], signature: ExportGraphSignature
) -> dict[fx.Node, fx.Node]:
    """Take the new values of what is written out of a graph's results: by placeholder.

    Raises :class:`UnsupportedModel` for effects of another kind.
    """
    targets = {str(spec.target): n for n, spec in specs.items() if spec.kind is not InputKind.USER_INPUT}
    targets |= {n.name: n for n, spec in specs.items() if spec.kind is InputKind.USER_INPUT}
    output = graph.output_node()
    values: list[fx.Node] = list(output.args[0])  # type: ignore[arg-type]
    found: dict[fx.Node, fx.Node] = {}
    for value, spec in zip(values, signature.output_specs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            continue
        what = str(spec.kind).rsplit(".", 1)[-1].lower().replace("_", " ")
        if not what.endswith("mutation"):
            raise UnsupportedModel(
                f"the model has an effect beside its results ({what} {spec.target or spec.arg.name!r}); expected writes"
                " into inputs and buffers at most. Leave it out of the engine."
            )
        node = targets[str(spec.target)]
        if specs[node].kind is not InputKind.USER_INPUT:
            check_kind(specs[node].kind, str(spec.target).removeprefix("model."))
        found[node] = value
    n = len(values) - len(signature.user_outputs)
    output.args = (tuple(values[n:]),)
    return found


def check_seen(
    new: Iterable[fx.Node],
    inputs: Sequence[fx.Node],
    weights: Mapping[fx.Node, tuple[str, torch.Tensor]],
    writes: Writes | None,
) -> None:
    """Refuse a write that the recorded graph did not show: of nothing is it known whether it lies in that memory."""
    for n in new:
        name = f"input {inputs.index(n)}" if n in inputs else weights[n][0].removeprefix("model.")
        if writes is None or name not in writes.counts:
            raise UnsupportedModel(
                f"the model writes {name} within a transform of torch.func or a branch; expected writes outside of"
                " those. Return the new value from there, and use copy_() to write it."
            )


def take_states(
    weights: dict[fx.Node, tuple[str, torch.Tensor]],
    new: Mapping[fx.Node, fx.Node],
    traced: Fresh,
    others: Collection[str],
) -> dict[fx.Node, State]:
    """Take out of ``weights`` what is state: buffers with new values, and those of ``others`` that the graph reads.

    ``traced``: the copy that was traced.
    """
    model = traced.module
    first: dict[int, str] = {}
    # A buffer may have several names.
    names = {name: first.setdefault(id(x), name) for name, x in model.named_buffers(remove_duplicate=False)}
    others = {names.get(name, name) for name in others}
    found = {}
    for node, (full, tensor) in list(weights.items()):
        name = full.removeprefix("model.")
        if name not in names or (node not in new and not (names[name] in others and node.users)):
            continue
        found[node] = State.of(model, names[name], traced.buffers.get(name), tensor)
        node.meta["state"] = names[name]
        del weights[node]
    return found


def put_after(nodes: Sequence[fx.Node], states: Sequence[fx.Node]) -> None:
    """Move the placeholders of states behind these others, in their order."""
    last = nodes[-1] if nodes else None
    for node in states:
        if last is not None:
            last.append(node)
        last = node


def hand_back(graph: fx.Graph, inputs: Sequence[fx.Node], writes: Writes | None) -> dict[int, fx.GraphModule | None]:
    """Have a graph return a written input in the place of each result in its memory: the views of it, by result."""
    output = graph.output_node()
    values: list[fx.Node] = list(output.args[0])  # type: ignore[arg-type]
    views = writes.views if writes is not None else {}
    for i, (position, _) in views.items():
        values[i] = inputs[position]
    output.args = (tuple(values),)
    return {i: view for i, (_, view) in views.items()}


def drop_unused(states: Mapping[fx.Node, State]) -> dict[fx.Node, State]:
    """Erase the placeholders of states that a graph does not use; returns the others."""
    for node in states:
        if not node.users:
            node.graph.erase_node(node)
    return {n: s for n, s in states.items() if n.users}


def results_of(writes: Writes | None, states: Mapping[fx.Node, State]) -> dict[int, tuple[str, bool]]:
    """Results that are a state: as :attr:`Writes.of_buffers`."""
    names = {s.name for s in states.values()}
    found = writes.of_buffers if writes is not None else {}
    return {i: (name, whole) for i, (name, whole) in found.items() if name in names}


def notes_of(writes: Writes | None, states: Mapping[fx.Node, State]) -> tuple[str, ...]:
    """What a user should know of results that are state."""
    return tuple(
        f"output {i} is {'' if whole else 'a view of '}the state {name!r}: a copy of it is returned"
        for i, (name, whole) in results_of(writes, states).items()
    )


def write_back(graph: fx.Graph, new: Mapping[fx.Node, fx.Node]) -> None:
    """Have the graph write, at its end, each of these values into a placeholder."""
    new = {placeholder: _source(value) for placeholder, value in new.items()}
    with graph.inserting_before(graph.output_node()):
        for placeholder, value in new.items():
            if value is not placeholder:
                node = graph.call_function(_aten.copy_.default, (placeholder, value))
                node.meta = {k: v for k, v in value.meta.items() if k != "val"}
                node.meta["val"] = placeholder.meta["val"]


def _source(value: fx.Node) -> fx.Node:
    """What a value is a copy of, if it says no more than that: the copy at the graph's end does the same."""
    if value.target is not _aten.copy.default or not isinstance(value.args[1], fx.Node):
        return value
    source, x, y = value.args[1], value.meta["val"], value.args[1].meta["val"]
    if (x.dtype, x.shape, x.stride(), x.device) == (y.dtype, y.shape, y.stride(), y.device):
        value.replace_all_uses_with(source)
    elif value.users:
        return value
    value.graph.erase_node(value)
    return source


def writes_of(graph: fx.Graph) -> list[fx.Node]:
    """What :func:`write_back` has put there, in order."""
    copies = graph.find_nodes(op="call_function", target=_aten.copy_.default)
    return [n for n in copies if isinstance(n.args[0], fx.Node) and n.args[0].op == "placeholder"]


def set_apart(graph: fx.Graph, states: Iterable[fx.Node], handed: Collection[int], copied: Collection[int]) -> None:
    """Give memory of its own to what lies in memory that is about to be written, or that is a state's.

    ``handed``: results that stand for inputs that are handed back. ``copied``: those that lie in no memory that is
    there before the call, although what is written into a state may. Nodes carry fake tensors under ``meta["val"]``.
    """
    writes = writes_of(graph)
    for node in list(writes):
        placeholder, value, *_ = _nodes(node)
        if _is_same(placeholder, value):  # it writes what is there
            graph.erase_node(node)
            writes.remove(node)
    kept = {storage_of(n) for n in states} - {None}
    given = {storage_of(n) for n in graph.find_nodes(op="placeholder")} - {None}
    targets = {storage_of(_nodes(n)[0]) for n in writes} - {None}
    output = graph.output_node()
    end = writes[0] if writes else output
    copies: dict[fx.Node, fx.Node] = {}

    def apart(x: Any, places: set[int | None]) -> Any:
        if not isinstance(x, fx.Node) or storage_of(x) not in places:
            return x
        if x not in copies:
            with graph.inserting_before(end):
                copies[x] = graph.call_function(_aten.clone.default, (x,))
            value = x.meta["val"]
            with value.fake_mode:
                copies[x].meta = {**x.meta, "val": value.clone()}
        return copies[x]

    for node in writes:
        placeholder, value, *_ = _nodes(node)
        node.args = (placeholder, apart(value, targets))
    values: Any = output.args[0]

    def result(i: int, x: Any) -> Any:
        return x if i in handed else apart(x, given if i in copied else kept | targets)

    output.args = (tuple(result(i, x) for i, x in enumerate(values)),)


def _nodes(node: fx.Node) -> Any:
    return node.args


def _is_same(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values are the same elements in the same places."""
    if a is b:
        return True
    x, y = a.meta["val"], b.meta["val"]
    return (
        storage_of(a) is not None
        and storage_of(a) == storage_of(b)
        and x.dtype is y.dtype
        and (x.shape, x.stride(), x.storage_offset()) == (y.shape, y.stride(), y.storage_offset())
    )
