"""A functional graph that ends by copying new values into what it was given writes there in place instead.

A model that writes ``cache.index_copy_(0, at, k)`` is exported as ``v = index_copy(cache, 0, at, k)``, with
``copy_(cache, v)`` at the end. Run operator by operator, that copies the whole cache twice. :func:`reinplace` has the
operators between the placeholder and the last copy, the *chain*, write the placeholder's memory, and drops the copy.

**Why the results stay the same.** The chain's writes are numbered. A node whose value lies in the placeholder's memory
has a *version*: how many of the writes that value includes. The placeholder has version 0, what the third write makes
has version 3, and a view has the version of what it is a view of. A read of version k is right if it runs after write
k and before write k+1, wherever in the memory it reads. So each read is two edges between nodes. If the graph has an
order that keeps them all, beside the edges that it has, every read sees what it saw; the graph is put in such an order.
If it has none, the placeholder keeps its copy.

What is written through a view comes out of functionalization as ``select_scatter(x, f(select(x)), ...)``. If ``f`` is
done in place, on memory that held ``x``, then that memory holds the result, and nothing is left to be scattered.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import operator
from collections import Counter
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from anabranch.export import _places

_aten = torch.ops.aten
#: Not done in place, since they go by where in which storage something lies.
_COPYING = (_aten.as_strided_scatter.default,)


def reinplace(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``module`` that writes in place what it wrote by a ``copy_`` at its end, where that is provably right.

    ``module``: flat and functional, up to a last row of ``aten.copy_.default(placeholder, value)`` before its output.
    Nodes carry fake tensors under ``meta["val"]``; other placeholders than one lie in other memory. The copy computes
    the same values, bit for bit, in outputs and in placeholders; copies that cannot be avoided are still at its end.
    Nodes may be in another order, except for those that draw random numbers or have other effects.
    """
    rewrite = _Rewrite(module.graph)
    for epilogue in rewrite.epilogues:
        rewrite.attempt(epilogue)
    return rewrite.apply(module)


def copied_bytes(module: fx.GraphModule) -> int:
    """How many bytes a call moves because a written placeholder is not written in place: of each last ``copy_``, and
    of each result of the placeholder's size that is computed of it on the way there. Sizes that vary count as traced.
    """
    total, counted = 0, set[fx.Node]()
    for epilogue in _epilogues(module.graph):
        p, node = epilogue.args[:2]
        whole = _size_in_bytes(p)
        total += whole
        results = []
        while isinstance(node, fx.Node) and node is not p:
            base = node.args[0] if node.target in _COPYING else _places.base_of(node, clones=True)
            if base is not None and not _places.is_view(node) and _size_in_bytes(node) >= whole:
                results.append(node)
            node = base
        if node is p:
            total += sum(_size_in_bytes(n) for n in results if n not in counted)
            counted.update(results)
    return total


class _Rewrite:
    """What is to become of a graph: the chains that are right in place, and the order of its nodes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.epilogues = _epilogues(graph)
        self._index = {n: i for i, n in enumerate(graph.nodes)}
        self._body = list(graph.nodes)[: len(self._index) - len(self.epilogues) - 1]
        self._order = {n: i for n, i in self._index.items() if i < len(self._body)}
        self._edges = _edges_of_effects(self._body)
        self._chains: dict[fx.Node, _Chain] = {}

    def attempt(self, epilogue: fx.Node) -> None:
        """Find the chain of an epilogue, and keep it if it is right."""
        p, value = epilogue.args[:2]
        if not isinstance(p, fx.Node) or not isinstance(value, fx.Node) or not self._is_alone(p):
            return
        # The more of it in place, the more reads have to come at the right time.
        for nested, clones in (True, True), (True, False), (False, False):
            chain = _Chain(p, nested, clones)
            if not chain.leads_to(value):
                continue
            reads = chain.reads(self._index, epilogue)
            if reads is None:
                continue
            last = len(chain.writes)
            if not _last_read_is_of(last, [k for n, k in reads if n not in self._order]):
                continue
            if self._accept(_edges_of(chain.writes, [(n, k) for n, k in reads if n in self._order])):
                self._chains[epilogue] = chain
                return

    def _is_alone(self, p: fx.Node) -> bool:
        value = _places.value_of(p)
        if value is None or sum(e.args[0] is p for e in self.epilogues) != 1:
            return False
        if any(n != 1 and isinstance(s, int) and not s for n, s in zip(value.shape, value.stride(), strict=True)):
            return False
        others = [*self.graph.find_nodes(op="placeholder"), *self.graph.find_nodes(op="get_attr")]
        return not any(q is not p and _places.share_memory(p, q) for q in others)

    def _accept(self, edges: list[tuple[fx.Node, fx.Node]]) -> bool:
        """Whether there is an order that keeps these edges, too. If so, it is the graph's from now on."""
        order: dict[fx.Node, int] | None = self._order
        if any(self._order[a] >= self._order[b] for a, b in edges):
            order = _sorted(self._body, self._order, [*self._edges, *edges])
        if order is None:
            return False
        self._order = order
        self._edges += edges
        return True

    def apply(self, module: fx.GraphModule) -> fx.GraphModule:
        """The module with this graph, rewritten."""
        graph = fx.Graph()
        graph._codegen = copy.deepcopy(self.graph._codegen)
        chains = {n: chain for chain in self._chains.values() for n in chain.version}
        writes = {n: chain for chain in self._chains.values() for n in chain.writes}
        dropped = {n: kept for chain in self._chains.values() for n, kept in chain.dropped.items()}
        values: dict[fx.Node, fx.Node] = {}
        for node in sorted(self._body, key=self._order.__getitem__):
            if node in dropped:
                values[node] = values[dropped[node]]
            elif node in writes:
                values[node] = _written(graph, node, writes[node], values)
            else:
                values[node] = graph.node_copy(node, values.__getitem__)
                if node in chains and node.op != "placeholder":
                    values[node].meta["val"] = chains[node].meta_of(node)
        for node in [*self.epilogues, self.graph.output_node()]:
            if node not in self._chains:
                values[node] = graph.node_copy(node, values.__getitem__)
        # Views that only led to what is no longer scattered.
        for node in sorted(chains, key=self._index.__getitem__, reverse=True):
            new = values[node]
            if node in writes or node in dropped or node.op == "placeholder" or not node.users:
                continue
            if not new.users:
                graph.erase_node(new)
        result = fx.GraphModule(module, graph, type(module).__name__)
        result.meta = dict(module.meta)
        return result


class _Chain:
    """The values from a placeholder to its epilogue, and all else that lies in the placeholder's memory with them."""

    def __init__(self, placeholder: fx.Node, nested: bool, clones: bool) -> None:
        """``nested``: what is scattered may be computed in its place. ``clones``: copies in the chain are left out."""
        self._nested, self._clones = nested, clones
        self._place = placeholder.meta["val"]
        #: Where a node's value lies, as a fake tensor, or several.
        self.memory: dict[fx.Node, Any] = {placeholder: self._place}
        self.version = {placeholder: 0}
        self.writes: list[fx.Node] = []
        #: Nodes that need no operator, with the node that lies where their value is.
        self.dropped: dict[fx.Node, fx.Node] = {}
        self._views: dict[Any, tuple[Any, Any]] = {}

    def leads_to(self, value: fx.Node) -> bool:
        """Find the writes after which the placeholder holds ``value``. Whether there are any such."""
        return self._follow(value, self._place, 0) and _places.same_place(self.memory[value], self._place)

    def _follow(self, node: fx.Node, place: Any, version: int) -> bool:
        """Find writes inside ``place`` that lead to ``node`` from what lies there in ``version``."""
        path = []
        while not self._is_at(node, place, version):
            base = _places.base_of(node, self._clones)
            if base is None or (node in self.version and not _places.is_view(node)):
                return False
            path.append(node)
            node = base
        return all(self._put_in_place(n) for n in reversed(path))

    def _is_at(self, node: fx.Node, place: Any, version: int) -> bool:
        path, base = [], node
        while base not in self.version:
            below = _places.base_of(base, False)
            if below is None or not _places.is_view(base):
                return False
            path.append(base)
            base = below
        if not all(self._put_in_place(n) for n in reversed(path)):
            return False
        return self.version[node] == version and _places.same_place(self.memory[node], place)

    def _put_in_place(self, node: fx.Node) -> bool:
        if node in self.version:
            return True
        base = _places.base_of(node, self._clones)
        assert base is not None
        latest, target = len(self.writes), node.target
        if _places.is_view(node):
            return self._put(node, self._view(node, base), self.version[base])
        if target is _aten.clone.default:
            self.dropped[node] = base
            return self._put(node, self.memory[base], self.version[base])
        assert self.version[base] == latest, node  # the path began at the latest one
        if target in _places.SCATTERS or target is _aten.copy.default:
            if len(node.args) < 2 or not isinstance(node.args[1], fx.Node):
                return False
            region = self.region(node)
            if region is None:
                return False
            if self._nested and self._lies_in(node.args[1], region):
                # What depends on the writes should show it, where it can.
                self.dropped[node] = node.args[1] if target is _aten.copy.default else base
                return self._put(node, self.memory[base], len(self.writes))
        self.writes.append(node)
        return self._put(node, self.memory[base], latest + 1)

    def _put(self, node: fx.Node, memory: Any, version: int) -> bool:
        if memory is None or not _places.fits(memory, node.meta.get("val")):
            return False
        self.memory[node], self.version[node] = memory, version
        return True

    def _lies_in(self, source: fx.Node, region: Any) -> bool:
        """Whether what is scattered into a region can be computed there, of what is there. If not, nothing changed."""
        states: tuple[dict[fx.Node, Any], ...] = self.memory, self.version, self.dropped
        before, latest = [len(x) for x in states], len(self.writes)
        if self._follow(source, region, latest) and _places.same_place(self.memory[source], region):
            return True
        for state, length in zip(states, before, strict=True):
            while len(state) > length:
                state.popitem()
        del self.writes[latest:]
        return False

    def region(self, node: fx.Node) -> Any:
        """Where a scatter or a copy writes; None if that cannot be said."""
        base = node.args[0]
        assert isinstance(base, fx.Node)
        if node.target is _aten.copy.default:
            return self.memory[base]
        return self._run(_places.SCATTERS[node.target], self.memory[base], node.args[2:], node.kwargs)  # type: ignore[index]

    def _view(self, node: fx.Node, base: fx.Node) -> Any:
        value = self.memory[base]
        if node.target is operator.getitem:
            maker, index = node.args
            assert isinstance(maker, fx.Node)
            whole = value if maker is base else self._run(maker.target, value, maker.args[1:], maker.kwargs)
            return None if whole is None else whole[index]
        known = node.meta.get("val") if value is base.meta.get("val") and _places.share_memory(node, base) else None
        return self._run(node.target, value, node.args[1:], node.kwargs, known)

    def _run(self, target: Any, value: Any, args: Any, kwargs: Any, known: Any = None) -> Any:
        """A view of ``value``, the same for the same arguments. None if it cannot be had."""
        key = target, id(value), repr(args), repr(kwargs)
        if key not in self._views:
            self._views[key] = value, _places.run(target, value, args, kwargs) if known is None else known
        return self._views[key][1]

    def reads(self, index: dict[fx.Node, int], epilogue: fx.Node) -> list[tuple[fx.Node, int]] | None:
        """Every node that reads the placeholder's memory, with the version that it reads, once this chain is in place.

        None if a read would be of something else whenever it ran, or if what is read there would be handed out.
        """
        found: dict[tuple[fx.Node, int], None] = {}
        todo = sorted({index[user]: user for node in self.version for user in node.users}.items())
        seen, writes = {node for _, node in todo}, set(self.writes)
        while todo:
            _, node = heapq.heappop(todo)
            given = [x for x in node.all_input_nodes if x in self.version]
            if node is epilogue:
                continue
            if _hands_out(node) or not _places.written_by(node).isdisjoint(given):
                return None
            if node not in self.version and any(_places.may_alias(node, x) for x in given):
                if not self._add_alias(node, given):
                    return None
                if not _places.only_views(node):
                    found.update(((node, self.version[x]), None) for x in given)
            elif node in writes:
                whole = self._place.numel()
                for x in _places.others(node):
                    if x in self.version:
                        found[node, self.version[x]] = None
                        # It would be copied first.
                        if statically_known_true(self.memory[x].numel() >= whole):
                            return None
            elif node not in self.version:
                if not all(self._reads_alike(node, x) for x in given):
                    return None
                found.update(((node, self.version[x]), None) for x in given)
            if node in self.version:
                for user in node.users:
                    if user not in seen:
                        seen.add(user)
                        heapq.heappush(todo, (index[user], user))
        return list(found)

    def _reads_alike(self, node: fx.Node, given: fx.Node) -> bool:
        """Whether an operator computes the same of a value where it lies now. Sums depend on the order in memory."""
        return not _places.depends_on_storage(node) and _places.same_layout(self.memory[given], given.meta["val"])

    def _add_alias(self, node: fx.Node, given: list[fx.Node]) -> bool:
        base, *more = given
        if any(self.version[x] != self.version[base] for x in more):
            return False
        if _places.depends_on_storage(node):
            # Of the placeholder itself, or a view of it, it is what it was.
            memory = node.meta["val"] if self.memory[base] is base.meta["val"] and not self.version[base] else None
        elif node.target is operator.getitem or (node.args[0] is base and _places.declares_alias(node.target)):
            memory = self._view(node, base)
        else:
            unchanged = all(_places.same_layout(self.memory[x], x.meta["val"]) for x in given)
            memory = node.meta["val"] if unchanged else None
        return self._put(node, memory, self.version[base])

    def holds(self, node: fx.Node) -> bool:
        """Whether a node lies in the memory that is written, so that a write has to be given a copy of it."""
        return node in self.version

    def meta_of(self, node: fx.Node) -> Any:
        """The fake tensor of a node that lies in the placeholder's memory now."""
        return self.memory[node]


def _written(graph: fx.Graph, node: fx.Node, chain: _Chain, values: dict[fx.Node, fx.Node]) -> fx.Node:
    """Put ``node`` into ``graph``, in place. Returns what lies where its value is then."""

    def call(target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        made.meta = {**node.meta, "val": value}
        return made

    def other(x: fx.Node) -> fx.Node:
        if not chain.holds(x):
            return values[x]
        return call(_aten.clone.default, (values[x],), {}, _places.run(_aten.clone.default, chain.memory[x], (), {}))

    base = node.args[0]
    assert isinstance(base, fx.Node)
    view = _places.SCATTERS.get(node.target)  # type: ignore[call-overload]
    if view is None:
        rest, kwargs = fx.map_arg((node.args[1:], node.kwargs), other)
        return call(_places.in_place(node.target), (values[base], *rest), kwargs, chain.memory[node])
    source = other(node.args[1])  # type: ignore[arg-type]
    rest, kwargs = fx.map_arg((node.args[2:], node.kwargs), values.__getitem__)
    region = call(view, (values[base], *rest), kwargs, chain.region(node))
    call(_aten.copy_.default, (region, source), {}, region.meta["val"])
    return values[base]


def _hands_out(node: fx.Node) -> bool:
    """Whether what a node is given is a result of the graph, which must not change with the next call's writes."""
    return node.op == "output"


def _last_read_is_of(last: int, versions: list[int]) -> bool:
    """Whether the other epilogues, which are behind all writes, read what is there then."""
    return all(version == last for version in versions)


def _edges_of(writes: list[fx.Node], reads: list[tuple[fx.Node, int]]) -> list[tuple[fx.Node, fx.Node]]:
    """What must run before what, so that each read of a version sees that version."""
    edges = list(itertools.pairwise(writes))
    for node, version in reads:
        if version:
            edges.append((writes[version - 1], node))
        if version < len(writes) and writes[version] is not node:
            edges.append((node, writes[version]))
    return edges


def _edges_of_effects(body: list[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Operators that draw random numbers or check something stay in order; past what else writes, nothing moves."""
    edges: list[tuple[fx.Node, fx.Node]] = []
    last: fx.Node | None = None
    for i, node in enumerate(body):
        if not _places.has_effects(node):
            continue
        if last is not None:
            edges.append((last, node))
        last = node
        if _places.written_by(node):
            edges += [(other, node) for other in body[:i]] + [(node, other) for other in body[i + 1 :]]
    return edges


def _sorted(
    body: list[fx.Node], order: dict[fx.Node, int], edges: list[tuple[fx.Node, fx.Node]]
) -> dict[fx.Node, int] | None:
    """An order that keeps ``edges`` and those of the graph, and else ``order``. None if there is none."""
    after: dict[fx.Node, list[fx.Node]] = {n: [user for user in n.users if user in order] for n in body}
    for a, b in edges:
        after[a].append(b)
    waits_for = Counter(b for following in after.values() for b in following)
    ready = [(order[n], n) for n in body if not waits_for[n]]
    heapq.heapify(ready)
    found: dict[fx.Node, int] = {}
    while ready:
        _, node = heapq.heappop(ready)
        found[node] = len(found)
        for other in after[node]:
            waits_for[other] -= 1
            if not waits_for[other]:
                heapq.heappush(ready, (order[other], other))
    return found if len(found) == len(body) else None


def _epilogues(graph: fx.Graph) -> list[fx.Node]:
    """The last row of copies into placeholders. One that writes in place may copy before, too, unlike ``writes_of``."""
    found: list[fx.Node] = []
    node = graph.output_node().prev
    while node.target is _aten.copy_.default and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder":
        found.insert(0, node)
        node = node.prev
    return found


def _size_in_bytes(node: Any) -> int:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    count = value.element_size()
    for n in value.shape:
        hint = n if isinstance(n, int) else n.node.hint
        count *= 0 if hint is None else int(hint)
    return count
