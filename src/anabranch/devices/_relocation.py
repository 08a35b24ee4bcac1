"""Which words of a captured graph are addresses of its inputs and outputs: the comparison, over plain data.

The same program is captured twice, with everything it touches at other addresses but its weights. A word that is equal
in both captures is a constant; one that differs must be an address, and must have *one* explanation that holds in both:
so many bytes into input i, into output j, into the k-th allocation of the capture, or inside the workspace of its lane.
Anything without an explanation makes the program one that cannot be bound to its caller's tensors, with the reason.

The one trap here is memory that is used twice. A temporary may be freed during the capture and its block handed out
again for (part of) an output: the kernel that wrote the temporary then has an address that looks like the output's,
and may write far more than the output holds. So an output counts as one only if no other allocation of the capture
ever overlapped its block. (:func:`_is_clean`.)

What cannot be told apart: an address one past the end of a temporary or an output where the next block begins. It is
taken for the next block's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

WORD = 8


@dataclass(frozen=True)
class Range:
    """Addresses from ``start`` on."""

    start: int
    nbytes: int

    @property
    def stop(self) -> int:
        return self.start + self.nbytes

    def holds(self, address: int) -> bool:
        return self.start <= address < self.stop

    def overlaps(self, other: Range) -> bool:
        return self.start < other.stop and other.start < self.stop


@dataclass(frozen=True)
class Kernel:
    """A kernel of a graph. ``params`` is the parameter buffer; parameter p lies at ``layout[p]``: (offset, bytes).

    ``graph_only``: why it can run only as part of the graph, or nothing.
    """

    name: str
    function: int
    kernel: int
    context: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    layout: tuple[tuple[int, int], ...]
    params: bytes
    graph_only: str = ""


@dataclass(frozen=True)
class Transfer:
    """A node that fills or copies device memory: the ``addresses`` it has, and all the rest of it."""

    name: str
    addresses: tuple[int, ...]
    rest: tuple[int, ...]


@dataclass(frozen=True)
class Empty:
    """A node that does nothing, where lanes fork and join."""


Node = Kernel | Transfer | Empty


@dataclass(frozen=True)
class Edge:
    """Node ``source`` before node ``target``, by their places in the list. ``data``: 0 for an ordinary dependency."""

    source: int
    target: int
    data: int = 0


@dataclass(frozen=True)
class Capture:
    """A captured graph as plain data, and the memory around it.

    ``log``: (address, bytes) of each allocation during the capture, with negative bytes of each free, in order.
    ``outputs``: the storages of the results, one each. ``hidden``: what the lane's libraries have as workspaces.
    """

    nodes: tuple[Node, ...]
    edges: frozenset[Edge]
    log: tuple[tuple[int, int], ...]
    inputs: tuple[Range, ...]
    outputs: tuple[Range, ...]
    hidden: tuple[Range, ...] = ()

    @property
    def allocations(self) -> tuple[Range, ...]:
        return tuple(Range(address, nbytes) for address, nbytes in self.log if nbytes > 0)


@dataclass(frozen=True)
class Relocation:
    """The word at ``position`` in the parameters of node ``node`` is the address of ``buffer`` plus ``delta``.

    Buffers are numbered inputs first, then output storages.
    """

    node: int
    position: int
    buffer: int
    delta: int


@dataclass(frozen=True)
class Fixed:
    """A word (of a kernel's parameters, or the ``position``-th address of a transfer) that stays as it is.

    ``allocation``: it is ``delta`` bytes into that allocation of the capture; None: inside the lane's workspace.
    """

    node: int
    position: int
    allocation: int | None
    delta: int = 0


@dataclass(frozen=True)
class Table:
    """How a program's graph is bound to other tensors.

    ``bound``, for each output storage: whether a call can bind it to new memory. The others stay where the capture has
    them, and are copied out.
    """

    relocations: tuple[Relocation, ...]
    fixed: tuple[Fixed, ...]
    bound: tuple[bool, ...]
    #: The capture allocated something that is no bound output, so a call needs memory of a context.
    temporaries: bool
    #: The kernels use workspaces of the lane: they need a context too, and run nowhere else than in its graph.
    workspaces: bool
    #: The graph is one chain, in the order of its nodes.
    linear: bool
    #: The first capture: what is constant in it is so in every one.
    template: Capture = field(repr=False)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return tuple(node for node in self.template.nodes if isinstance(node, Kernel))

    @property
    def why_not_direct(self) -> str:
        """Why the kernels cannot be launched one by one on any stream, without a graph or a context; or nothing."""
        if self.temporaries:
            return "it has temporaries"
        if self.workspaces:
            return "it uses workspaces"
        if not all(self.bound):
            return "an output is not bound"
        if not self.linear:
            return "it is no plain chain"
        for node in self.template.nodes:
            if not isinstance(node, Kernel):
                return "not all of it are kernels"
            if node.graph_only:
                return f"kernel {node.name} {node.graph_only}"
        return ""


class _Unbindable(Exception):
    """Carries the reason."""


def compare(a: Capture, b: Capture) -> Table | str:
    """The table for ``a``, checked against ``b``; or why there is none. Both captures' memory must be alive still."""
    try:
        _same_graph(a, b)
        _distinct(a, b)
        return _table(a, b)
    except _Unbindable as e:
        return str(e)


def verify(table: Table, c: Capture) -> str:
    """Why ``table`` does not hold for ``c``, a later capture of the same program; nothing if it does."""
    try:
        _same_graph(table.template, c)
        _check(table, c)
    except _Unbindable as e:
        return str(e)
    return ""


# -- the shape of the graph ---------------------------------------------------------------------------------------


def _same_graph(a: Capture, b: Capture) -> None:
    if len(a.nodes) != len(b.nodes):
        raise _Unbindable(f"two captures of it have {len(a.nodes)} and {len(b.nodes)} steps")
    for what, r, s in (("inputs", a.inputs, b.inputs), ("outputs", a.outputs, b.outputs)):
        if [x.nbytes for x in r] != [x.nbytes for x in s]:
            raise _Unbindable(f"two captures of it differ in the sizes of their {what}")
    for i, (x, y) in enumerate(zip(a.nodes, b.nodes, strict=True)):
        if _skeleton(x) != _skeleton(y):
            raise _Unbindable(f"two captures of it differ in {_title(i, x)}: {_difference(x, y)}")
    if a.edges != b.edges:
        raise _Unbindable("two captures of it differ in the order of their steps")


def _skeleton(node: Node) -> Node:
    """``node`` without its words."""
    if isinstance(node, Kernel):
        return replace(node, params=bytes(len(node.params)))
    if isinstance(node, Transfer):
        return replace(node, addresses=(0,) * len(node.addresses))
    return node


def _difference(x: Node, y: Node) -> str:
    if isinstance(x, Kernel) and isinstance(y, Kernel):
        if x.name != y.name:
            return f"the other one is {y.name}"
        names = ("function", "kernel", "context", "grid", "block", "shared", "layout", "graph_only")
        return "other " + ", ".join(n for n in names if getattr(x, n) != getattr(y, n))
    if isinstance(x, Transfer) and isinstance(y, Transfer) and x.name == y.name:
        return "other sizes"
    return f"the other one is {_title(None, y)}"


def _title(index: int | None, node: Node) -> str:
    where = "" if index is None else f"step {index}, "
    if isinstance(node, Kernel):
        return f"{where}kernel {node.name}"
    return f"{where}{node.name}" if isinstance(node, Transfer) else f"{where}an empty node"


def _linear(c: Capture) -> bool:
    return c.edges == frozenset(Edge(i, i + 1) for i in range(len(c.nodes) - 1))


# -- the words ----------------------------------------------------------------------------------------------------


def _words(i: int, x: Node, y: Node) -> Iterator[tuple[int, int, int]]:
    """(position, word of x, word of y) of each whole word. Bytes that differ and belong to none are an error."""
    if isinstance(x, Transfer) and isinstance(y, Transfer):
        yield from ((p, u, v) for p, (u, v) in enumerate(zip(x.addresses, y.addresses, strict=True)))
    if not isinstance(x, Kernel) or not isinstance(y, Kernel):
        return
    covered = 0
    for p, (offset, size) in enumerate(x.layout):
        if offset < covered or offset + size > len(x.params):
            raise _Unbindable(f"{_title(i, x)}: parameter {p} lies where no parameter should")
        covered = offset + size
        first = -(-offset // WORD) * WORD
        last = max(first, (offset + size) // WORD * WORD)
        for start, stop in ((offset, min(first, offset + size)), (last, offset + size)):
            if x.params[start:stop] != y.params[start:stop]:
                raise _Unbindable(f"{_title(i, x)}: parameter {p} differs in bytes that are no address")
        for position in range(first, last, WORD):
            yield position, _word(x.params, position), _word(y.params, position)


def _word(params: bytes, position: int) -> int:
    (word,) = struct.unpack_from("<Q", params, position)
    return int(word)


def _where(i: int, node: Node, position: int) -> str:
    if isinstance(node, Kernel):
        for p, (offset, size) in enumerate(node.layout):
            if offset <= position < offset + size:
                into = f", {position - offset} bytes into it" if size > WORD else ""
                return f"{_title(i, node)}: parameter {p}{into}"
    return f"{_title(i, node)}: address {position}"


# -- the memory ---------------------------------------------------------------------------------------------------


def _is_clean(output: Range, c: Capture) -> int | None:
    """The one allocation whose memory ``output`` is, if no other one ever overlapped it and it was not freed."""
    around = [k for k, r in enumerate(c.allocations) if r.overlaps(output)]
    if len(around) != 1:
        return None
    block = c.allocations[around[0]]
    if block.start != output.start or block.nbytes < output.nbytes:
        return None
    # The padding behind the output is part of its block: what was there before may write into it.
    if sum(r.overlaps(block) for r in c.allocations) != 1:
        return None
    if any(bytes_ < 0 and block.overlaps(Range(address, -bytes_)) for address, bytes_ in c.log):
        return None
    return around[0]


@dataclass(frozen=True)
class _Memory:
    """What addresses of a capture can mean."""

    capture: Capture
    #: Of each bound output: its allocation, None for one without any bytes. Unbound outputs are absent.
    bound: dict[int, int | None]

    @property
    def buffers(self) -> list[tuple[int, Range]]:
        n = len(self.capture.inputs)
        outputs = [(n + j, r) for j, r in enumerate(self.capture.outputs) if j in self.bound]
        return [*enumerate(self.capture.inputs), *outputs]

    def buffers_at(self, address: int) -> set[tuple[int, int]]:
        """(buffer, delta) for the buffers that hold ``address``, else for those that end there."""
        inside = {(i, address - r.start) for i, r in self.buffers if r.holds(address)}
        return inside or {
            (i, address - r.start) for i, r in self.buffers if address == r.stop and not self._holds(address)
        }

    def _holds(self, address: int) -> bool:
        return bool(self.temporaries_at(address, ends=False)) or self.is_hidden(address, ends=False)

    def temporaries_at(self, address: int, ends: bool = True) -> set[tuple[int, int]]:
        """(allocation, delta) of allocations that are no bound outputs."""
        outputs = set(self.bound.values())
        return {
            (k, address - r.start)
            for k, r in enumerate(self.capture.allocations)
            if k not in outputs and (r.holds(address) or (ends and address == r.stop))
        }

    def is_hidden(self, address: int, ends: bool = True) -> bool:
        return any(r.holds(address) or (ends and address == r.stop) for r in self.capture.hidden)

    def owns(self, address: int) -> bool:
        """Whether ``address`` is in memory that other captures have elsewhere. An output may be a weight's memory."""
        c = self.capture
        return any(r.holds(address) for r in (*c.inputs, *c.allocations, *c.hidden))


def _distinct(a: Capture, b: Capture) -> None:
    """Everything must have moved between the two captures, and no two inputs may share memory."""
    for c in (a, b):
        for i, r in enumerate(c.inputs):
            others = [*c.inputs[i + 1 :], *c.allocations, *c.hidden]
            if any(r.overlaps(other) for other in others):
                raise _Unbindable(f"input {i} of a capture shares memory")
    in_a = [*a.inputs, *a.allocations, *a.hidden]
    in_b = [*b.inputs, *b.allocations, *b.hidden]
    if any(r.overlaps(other) for r in in_a for other in in_b):
        raise _Unbindable("two captures of it share memory")


def _bound(captures: Sequence[Capture]) -> list[dict[int, int | None]]:
    """The outputs that are clean in every capture, with their allocations."""
    for c in captures:
        for j, output in enumerate(c.outputs):
            if any(output.overlaps(r) for r in c.inputs):
                raise _Unbindable(f"output {j} is in an input's memory")
    clean: list[dict[int, int | None]] = []
    for c in captures:
        found: dict[int, int | None] = {}
        for j, output in enumerate(c.outputs):
            block = _is_clean(output, c)
            if output.nbytes == 0 or block is not None:
                found[j] = block
        clean.append(found)
    everywhere = set.intersection(*(set(found) for found in clean))
    return [{j: found[j] for j in sorted(everywhere)} for found in clean]


def _explain(node: int, position: int, words: tuple[int, int], memory: tuple[_Memory, _Memory]) -> Relocation | Fixed:
    """What a word that differs is. Raises where that is nothing, or may be more than one thing."""
    (u, v), (a, b) = words, memory
    buffers = a.buffers_at(u) & b.buffers_at(v)
    if len(buffers) > 1:
        raise _Unbindable("may be the address of more than one tensor")
    for buffer, delta in buffers:
        return Relocation(node, position, buffer, delta)
    # Memory that was handed out more than once has several names, each of them right.
    for allocation, delta in sorted(a.temporaries_at(u) & b.temporaries_at(v)):
        return Fixed(node, position, allocation, delta)
    if a.is_hidden(u) and b.is_hidden(v):
        return Fixed(node, position, None)
    raise _Unbindable(f"is not the address of anything known ({u:#x}, {v:#x})")


def _table(a: Capture, b: Capture) -> Table:
    in_a, in_b = _bound((a, b))
    memory = (_Memory(a, in_a), _Memory(b, in_b))
    relocations: list[Relocation] = []
    fixed: list[Fixed] = []
    for i, (x, y) in enumerate(zip(a.nodes, b.nodes, strict=True)):
        for position, u, v in _words(i, x, y):
            try:
                if u == v:
                    if memory[0].owns(u) or memory[1].owns(v):
                        raise _Unbindable("is the same in two captures, but an address in one of them")
                    continue
                place = _explain(i, position, (u, v), memory)
                if isinstance(place, Fixed):
                    fixed.append(place)
                elif isinstance(x, Kernel):
                    relocations.append(place)
                else:
                    raise _Unbindable("is the address of an input or output")
            except _Unbindable as e:
                raise _Unbindable(f"{_where(i, x, position)} {e}") from None
    return Table(
        relocations=tuple(relocations),
        fixed=tuple(fixed),
        bound=tuple(j in in_a for j in range(len(a.outputs))),
        temporaries=len(a.allocations) > sum(k is not None for k in in_a.values()),
        workspaces=any(place.allocation is None for place in fixed),
        linear=_linear(a),
        template=a,
    )


def _check(table: Table, c: Capture) -> None:
    for i, r in enumerate(c.inputs):
        if any(r.overlaps(other) for other in (*c.inputs[i + 1 :], *c.allocations, *c.hidden)):
            raise _Unbindable(f"input {i} of a capture shares memory")
    (bound,) = _bound((c,))
    missing = [j for j, was in enumerate(table.bound) if was and j not in bound]
    if missing:
        raise _Unbindable(f"output {missing[0]} had memory of its own in another capture, and has not in this one")
    memory = _Memory(c, {j: bound[j] for j, was in enumerate(table.bound) if was})
    places: list[Relocation | Fixed] = [*table.relocations, *table.fixed]
    expected = {(place.node, place.position): place for place in places}
    starts = [r.start for r in (*c.inputs, *c.outputs)]
    for i, (x, y) in enumerate(zip(table.template.nodes, c.nodes, strict=True)):
        masked = _mask(x, y, {position for node, position in expected if node == i})
        for position, u, v in _words(i, masked, y):
            known = expected.get((i, position))
            if isinstance(known, Relocation):
                right = v == starts[known.buffer] + known.delta
            elif isinstance(known, Fixed):
                right = _is_fixed(known, v, memory)
            else:
                right = u == v and not memory.owns(v)
            if not right:
                raise _Unbindable(f"{_where(i, x, position)} is not what it is in another capture ({v:#x})")


def _is_fixed(known: Fixed, word: int, memory: _Memory) -> bool:
    if memory.buffers_at(word):
        return False
    if known.allocation is None:
        return memory.is_hidden(word)
    return (known.allocation, known.delta) in memory.temporaries_at(word)


def _mask(x: Node, y: Node, positions: set[int]) -> Node:
    """``x`` with the words of ``y`` at ``positions``: what is left to differ is meant to be constant."""
    if not isinstance(x, Kernel) or not isinstance(y, Kernel):
        return x
    params = bytearray(x.params)
    for p in positions:
        params[p : p + WORD] = y.params[p : p + WORD]
    return replace(x, params=bytes(params))
