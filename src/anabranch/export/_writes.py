"""What a traced model writes that is there before the call and after it: inputs and buffers.

It is read off the graph as it was recorded, where tensors' memory is still known: ``torch.export`` then turns writes
into new values, and a result that equals the new value of an input no longer tells whether it lies in its memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from anabranch.errors import UnsupportedModel
from anabranch.export._assignments import Assignments, storage
from anabranch.export._constants import is_literal
from anabranch.export._functional import RESHAPES
from anabranch.export._numbers import NotCarried
from anabranch.export._signature import TensorSpec
from anabranch.export._snapshot import Fresh
from anabranch.export._trial import written

_aten = torch.ops.aten
#: These change what a tensor looks like, not what is in its memory.
_RESHAPES = (*RESHAPES, "set_data")
_NO_WRITES = (*_RESHAPES, "detach_", "requires_grad_")


@dataclass
class Writes:
    """What one recorded graph writes, and which of its results lie in memory that is the caller's or the model's."""

    #: How often each is written, by the names of inputs (``"input 0"``) and buffers.
    counts: dict[str, int] = field(default_factory=dict)
    #: Of each result: the name of the placeholder in whose memory it lies, or None.
    roots: list[str | None] = field(default_factory=list)
    #: Of results in the memory of a written input: its position, and the views that lead there; None: it is the input.
    views: dict[int, tuple[int, fx.GraphModule | None]] = field(default_factory=dict)
    #: Of results that are a buffer, lie in it, or were assigned to it: its name, and whether they are all of it.
    of_buffers: dict[int, tuple[str, bool]] = field(default_factory=dict)


class Recorded:
    """A recorded graph that was not yet functionalized. Nodes carry fake tensors under ``meta["val"]``."""

    def __init__(self, exported: ExportedProgram, module: torch.nn.Module, assignments: Assignments | None) -> None:
        """``module``: what was traced; the model is its ``model``."""
        self._exported, self._module, self._assignments = exported, module, assignments
        graph = exported.graph_module.graph
        specs = exported.graph_signature.input_specs
        self._specs = dict(zip(graph.find_nodes(op="placeholder"), specs, strict=True))
        tensors = (n for n, spec in self._specs.items() if spec.kind is InputKind.USER_INPUT and _is_tensor(spec))
        self._inputs = {n: i for i, n in enumerate(tensors)}
        self._tensors: dict[str, torch.Tensor] = {**exported.state_dict, **exported.constants}
        for named in (module.named_parameters, module.named_buffers):
            self._tensors.update(named(remove_duplicate=False))
        self._join_names()

    def _join_names(self) -> None:
        """Of a tensor that is a buffer and that something beside the modules holds, too, keep the buffer: a cache whose
        tensors are registered, or a list of them. Functionalization would take the other for one that overlaps."""
        buffers: dict[int | None, list[tuple[fx.Node, torch.Tensor]]] = {}
        for n, spec in self._specs.items():
            if spec.kind is InputKind.BUFFER:
                tensor = self._tensors[str(spec.target)]
                buffers.setdefault(storage(tensor), []).append((n, tensor))
        buffers.pop(None, None)
        for n, spec in list(self._specs.items()):
            if spec.kind is not InputKind.CONSTANT_TENSOR or not isinstance(n.meta.get("val"), torch.Tensor):
                continue
            held = self._tensors[str(spec.target)]
            same = next((b for b, tensor in buffers.get(storage(held), ()) if held.is_set_to(tensor)), None)
            if same is not None:
                n.replace_all_uses_with(same)
                self._exported.graph_signature.input_specs.remove(self._specs.pop(n))
                n.graph.erase_node(n)
        self._exported.graph_module.recompile()

    def writes(self, specs: Sequence[TensorSpec], traced: Fresh) -> Writes:
        """What it writes. ``specs``: of the inputs. ``traced``: the model's copy.

        Raises :class:`UnsupportedModel` for what an engine cannot write. Nodes of a buffer's other names go.
        """
        self._check_replaced()
        places: dict[int | None, list[fx.Node]] = {}
        for n, spec in self._specs.items():
            # What the model's code makes of numbers is made anew in each call, which a recorded graph does not show.
            literal = spec.kind is InputKind.CONSTANT_TENSOR and is_literal(str(spec.target))
            if isinstance(n.meta.get("val"), torch.Tensor) and not literal:
                places.setdefault(storage(n.meta["val"]), []).append(n)
        places.pop(None, None)
        made = Writes()
        hit: dict[fx.Node, None] = {}
        for node in self._exported.graph_module.graph.nodes:
            for x in _written(node):
                n = _root(x, places)
                if n is not None:
                    hit[n] = None
                    made.counts[self._name(n)] = made.counts.get(self._name(n), 0) + 1
        for node in self._exported.graph_module.graph.nodes:
            self._check_shape(node)
        for n in hit:
            self._check(n, specs)
            if n not in self._inputs:
                self._check_alone(n, traced)
        self._check_assigned(made)
        self._drop_other_names(hit, places)
        assigned = self._assigned()
        results: Any = self._exported.graph_module.graph.output_node().args[0]
        for i, x in enumerate(results):
            root, place = _root(x, places), _place(x)
            made.roots.append(root.name if root is not None else None)
            if root is not None and self._specs[root].kind is InputKind.BUFFER:
                made.of_buffers[i] = self._name(root), _through(x) is root
            elif root is None and place in assigned:
                made.of_buffers[i] = assigned[place]
        return made

    def note_views(self, made: Writes, recorder: Any, source_of: Callable[[fx.Node], str]) -> None:
        """Note in ``made`` how results come of inputs that are written. Called when no views are hidden any more.

        ``recorder``: of the call's numbers, or None. ``source_of``: the model's line of a node, for messages.
        """
        results: Any = self._exported.graph_module.graph.output_node().args[0]
        by_name = {n.name: n for n in self._inputs}
        for i, (x, root) in enumerate(zip(results, made.roots, strict=True)):
            if root not in by_name or self._name(by_name[root]) not in made.counts:
                continue
            try:
                made.views[i] = self._inputs[by_name[root]], _chain(x, by_name[root])
            except _NoView as e:
                if recorder is not None:
                    raise NotCarried(dict.fromkeys(recorder.positions, "a view that is returned takes it")) from e
                where = f" ({source_of(x)})" if source_of(x) else ""
                raise UnsupportedModel(
                    f"the model writes {self._name(by_name[root])} and returns a part of it{where} that cannot be"
                    f" taken of the caller's tensor: {e}. Expected views whose shapes depend on that input alone."
                    " Return a copy (.clone()), or take the view outside of the model."
                ) from e

    def _name(self, n: fx.Node) -> str:
        if n in self._inputs:
            return f"input {self._inputs[n]}"
        return str(self._specs[n].target).removeprefix("model.")

    def _check(self, n: fx.Node, specs: Sequence[TensorSpec]) -> None:
        if n not in self._inputs:
            check_kind(self._specs[n].kind, self._name(n))
            return
        spec = specs[self._inputs[n]]
        if spec.is_lazy:
            kind, how = ("conjugate", "resolve_conj") if spec.conj else ("negative", "resolve_neg")
            raise UnsupportedModel(
                f"the model writes {self._name(n)}, which is a lazy {kind}; an engine writes what lies in memory. Call"
                f" {how}() first, and pass what that returns."
            )
        if spec.layout is not None and _overlaps(spec.shape, spec.layout):
            raise UnsupportedModel(
                f"the model writes {self._name(n)}, of which one place in memory stands for several elements (strides"
                f" {list(spec.layout)}); expected each to have its own. Pass x.clone()."
            )

    def _check_shape(self, node: fx.Node) -> None:
        """Refuse an operator that changes what an input or a buffer itself looks like."""
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return
        if node.target._schema.name.rsplit("::")[-1] not in _RESHAPES:
            return
        x = next(iter(node.all_input_nodes), node)
        if _through(x) in self._specs:
            what = self._name(_through(x))
            what = what if what.startswith("input ") else f"its {what!r}"
            raise UnsupportedModel(
                f"the model changes the shape or the memory of {what} in place ({node.target}); expected inputs and"
                " buffers to keep theirs. Take a view, or use copy_() to write values."
            )

    def _check_alone(self, n: fx.Node, traced: Fresh) -> None:
        """Refuse a written buffer that shares memory with another tensor of the model: state gets memory of its own."""
        name = str(self._specs[n].target)
        tensor = self._tensors[name]
        sources = traced.sources
        source = traced.buffers.get(name.removeprefix("model."), tensor)
        # What a call before the trace has put in the buffer's place may be a view of it.
        own = {id(source), id(sources.get(id(tensor), tensor))}
        # What is no part of the model, an attribute may have been filled with at the first call.
        others = [sources.get(id(x), x) for x in self._exported.constants.values() if isinstance(x, torch.Tensor)]
        others = [x for x in others if x is not tensor and not x.is_set_to(source)] + list(sources.values())
        for x in others:
            if id(x) not in own and storage(source) is not None and storage(x) == storage(source):
                found = next((k for k, t in self._tensors.items() if sources.get(id(t), t) is x), "")
                what = repr(found.removeprefix("model.")) if found else "another tensor that it holds"
                raise UnsupportedModel(
                    f"the model writes its buffer {name.removeprefix('model.')!r}, which shares memory with {what}; an"
                    " engine keeps state in memory of its own. Register buffers that are .clone()s, and take views in"
                    " forward()."
                )

    def _drop_other_names(self, hit: Mapping[fx.Node, None], places: Mapping[int | None, list[fx.Node]]) -> None:
        """Of a written buffer that has several names, keep the one that the graph uses: functionalization takes the
        others for tensors that overlap."""
        signature = self._exported.graph_signature
        for n in hit:
            for other in places[storage(n.meta["val"])]:
                if other is not n and not other.users and other not in hit:
                    signature.input_specs.remove(self._specs.pop(other))
                    other.graph.erase_node(other)
        self._exported.graph_module.recompile()

    def _check_replaced(self) -> None:
        """Refuse a plain tensor attribute that the graph reads and the model replaces."""
        if self._assignments is None:
            return
        read = {
            n: self._tensors[str(spec.target)]
            for n, spec in self._specs.items()
            if spec.kind is InputKind.CONSTANT_TENSOR and n.users and str(spec.target) in self._tensors
        }
        for path, old, place in self._assignments.replaced:
            for n, x in read.items():
                same = x is old or (storage(x) is not None and storage(x) == storage(old) and x.is_set_to(old))
                if same and storage(n.meta["val"]) != place:
                    raise UnsupportedModel(_no_buffer(path))

    def _check_assigned(self, made: Writes) -> None:
        """Refuse what eager would write into something else as well, from the second call on."""
        for name, what in self._assignments.shared.items() if self._assignments is not None else ():
            plain = name.removeprefix("model.")
            if made.counts.get(plain, 0) > 1:
                raise UnsupportedModel(
                    f"the model assigns {what} to its buffer {plain!r} and also writes into that buffer, which would"
                    " change both; state of an engine has memory of its own. Assign a .clone(), or use copy_()."
                )

    def _assigned(self) -> dict[int | None, tuple[str, bool]]:
        """By the memory of what is assigned to buffers: their names."""
        names = set(self._assignments.names) if self._assignments is not None else set()
        found: dict[int | None, tuple[str, bool]] = {}
        for node in self._exported.graph_module.graph.find_nodes(op="call_function", target=_aten.copy_.default):
            spec = self._specs.get(node.args[0])
            if spec is not None and spec.kind is InputKind.BUFFER and str(spec.target).removeprefix("model.") in names:
                found[storage(node.args[1].meta["val"])] = self._name(node.args[0]), True
        found.pop(None, None)
        return found


def check_kind(kind: InputKind, name: str) -> None:
    """Refuse what a model may not write: all but its inputs and its buffers."""
    if kind is InputKind.PARAMETER:
        raise UnsupportedModel(
            f"the model writes its parameter {name!r}; an engine writes inputs and buffers only. Register it with"
            " register_buffer() if it is state, or train outside of the engine."
        )
    if kind is not InputKind.BUFFER:
        raise UnsupportedModel(_no_buffer(name))


def check_cast(plain: Writes | None, cast: Writes | None, precision: torch.dtype) -> None:
    """Refuse a model in half precision that writes into a copy of another type, and so not into what it should."""
    a, b = (made.counts if made is not None else {} for made in (plain, cast))
    name = next((n for n in (*a, *b) if a.get(n) != b.get(n)), None)
    if name is not None:
        what = name if name.startswith("input ") else f"its buffer {name!r}"
        raise UnsupportedModel(
            f"precision={precision} given, and the model writes {what}, of which it is given a copy in that precision;"
            " the write would be lost. Give it that type outside of the model, or leave precision out."
        )


def _no_buffer(name: str) -> str:
    return (
        f"the model changes {name!r} from call to call, a tensor that it holds and that is no buffer; expected state in"
        f" buffers. Register it with register_buffer({name.rsplit('.', 1)[-1]!r}, ...)."
    )


def _place(x: Any) -> int | None:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    return storage(value) if isinstance(value, torch.Tensor) else None


def _root(x: Any, places: Mapping[int | None, list[fx.Node]]) -> fx.Node | None:
    """The placeholder in whose memory a value lies."""
    owners = places.get(_place(x), [])
    if len(owners) < 2:
        return owners[0] if owners else None
    ancestors = _ancestors(x)
    return next((n for n in owners if n in ancestors), owners[0])


def _is_tensor(spec: Any) -> bool:
    return isinstance(spec.arg, TensorArgument)


def _written(node: fx.Node) -> list[Any]:
    """The values that an operator of a recorded graph writes into."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return []
    name = target._schema.name.rsplit("::")[-1]
    return [] if name in _NO_WRITES else list(written(target, node.args, node.kwargs))


def _through(x: fx.Node) -> fx.Node:
    """The value that an operator hands back because it has written into it, or ``x``."""
    while True:
        targets = [t for t in _written(x) if isinstance(t, fx.Node)]
        if len(targets) != 1 or isinstance(x.meta.get("val"), list | tuple):
            return x
        x = targets[0]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, stack = set[fx.Node](), [node]
    while stack:
        n = stack.pop()
        if n not in found:
            found.add(n)
            stack.extend(n.all_input_nodes)
    return found


def _overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether some elements may lie in one place."""
    reach = 0
    for size, stride in sorted(zip(shape, strides, strict=True), key=lambda pair: pair[1]):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


class _NoView(Exception):
    """Why a result is no view that can be taken of an input again."""


def _chain(value: fx.Node, root: fx.Node) -> fx.GraphModule | None:
    """The views that lead from ``root`` to ``value``, as a module of one input; None where they are the same."""
    graph = fx.Graph()
    base = graph.placeholder("base")
    copied: dict[fx.Node, Any] = {root: base}
    place = storage(root.meta["val"])

    def size(node: fx.Node) -> Any:
        """A number as the size of ``base`` that it is, if it is one."""
        for d, n in enumerate(root.meta["val"].shape):
            if isinstance(n, torch.SymInt) and n.node.expr == node.meta["val"].node.expr:
                return graph.call_function(_aten.sym_size.int, (base, d))
        return None

    def copy(node: fx.Node) -> Any:
        node = _through(node)
        if node in copied:
            return copied[node]
        found = node.meta.get("val")
        is_number = isinstance(found, torch.SymInt)
        made = size(node) if is_number else None
        if made is None:
            parts = found if isinstance(found, list | tuple) else [found]
            if node.op != "call_function":
                raise _NoView(f"it depends on {node.name!r}")
            if not is_number and not all(isinstance(x, torch.Tensor) and storage(x) == place for x in parts):
                raise _NoView(f"it depends on the values of {node.name!r}")
            known = node.target is operator.getitem or not getattr(node.target, "_schema", None) or not _written(node)
            if not known:
                raise _NoView(f"{node.target} returns it")
            for n in node.all_input_nodes:
                copy(n)
            made = graph.node_copy(node, lambda n: copied[_through(n)])
        copied[node] = made
        return made

    result = copy(value)
    if result is base:
        return None
    graph.output(result)
    return fx.GraphModule(torch.nn.Module(), graph)
