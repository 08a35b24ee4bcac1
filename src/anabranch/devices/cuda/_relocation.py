"""Which words of a captured graph are addresses of its inputs and outputs: the comparison, over plain data.

The same program is captured twice, with everything it touches at other addresses but its weights. A word that is equal
in both captures is a constant; one that differs and is an address must have *one* explanation that holds in both: so
many bytes into input i, into output j, into the k-th allocation of the capture, or inside the workspace of its lane.

Not all that differs is an address. PyTorch's own kernels take structs by value whose padding, and whose unused array
elements, hold whatever was on the host's stack. Such bytes are *noise* if they look like no address in any way that
we know of; and whoever asks must then show, by running the kernels with the noise of the one capture and of the other,
that it does not matter. Anything else makes the program one that cannot be bound to its caller's tensors, with the
reason.

The one trap here is memory that is used twice. A temporary may be freed during the capture and its block handed out
again for (part of) an output: the kernel that wrote the temporary then has an address that looks like the output's,
and may write far more than the output holds. So the log of allocations says, for each, how many steps had been captured
before it; and what an address means to a step is the last allocation before that step. (:meth:`_Memory.place`.)

What cannot be told apart: an address one past the end of a temporary or an output where the next block begins. It is
taken for the next block's.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

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


class _Places:
    """All memory of some ranges. A graph of a language model has thousands of words to look up among hundreds."""

    def __init__(self, ranges: Iterable[Range]) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for r in sorted((r for r in ranges if r.nbytes > 0), key=lambda r: r.start):
            if self._stops and r.start < self._stops[-1]:
                self._stops[-1] = max(self._stops[-1], r.stop)
            else:
                self._starts.append(r.start)
                self._stops.append(r.stop)

    def hold(self, address: int) -> bool:
        k = bisect_right(self._starts, address) - 1
        return k >= 0 and address < self._stops[k]

    def overlap(self, other: Range) -> bool:
        k = bisect_left(self._starts, other.stop) - 1
        return k >= 0 and other.start < self._stops[k]


@dataclass(frozen=True)
class Kernel:
    """A kernel of a graph. ``params`` is the parameter buffer; parameter p lies at ``layout[p]``: (offset, bytes).

    ``packed``: the buffer was given as a whole, not parameter by parameter. ``graph_only``: why it can run only as part
    of the graph, or nothing.
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
    packed: bool = False


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

    ``log``: (address, bytes, step) of each allocation during the capture, with negative bytes of each free, in order;
    ``step``: how many nodes there were by then, which are the first so many of ``nodes``.
    ``outputs``: the storages of the results, one each. ``hidden``: what the lane's libraries have as workspaces.
    """

    nodes: tuple[Node, ...]
    edges: frozenset[Edge]
    log: tuple[tuple[int, int, int], ...]
    inputs: tuple[Range, ...]
    outputs: tuple[Range, ...]
    hidden: tuple[Range, ...] = ()
    #: Whether the kernels' code was loaded for this capture alone, so that a kernel is another function in each one.
    own_code: bool = False

    @cached_property
    def allocations(self) -> tuple[Range, ...]:
        return tuple(Range(address, nbytes) for address, nbytes, _ in self.log if nbytes > 0)


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
class Noise:
    """Bytes of a kernel's parameters that differ and are no address. ``other``: what the second capture had there."""

    node: int
    position: int
    other: bytes

    @property
    def stop(self) -> int:
        return self.position + len(self.other)


@dataclass(frozen=True)
class Table:
    """How a program's graph is bound to other tensors.

    ``bound``, for each output storage: whether a call can bind it to new memory. The others stay where the capture has
    them, and are copied out.
    """

    relocations: tuple[Relocation, ...]
    fixed: tuple[Fixed, ...]
    noise: tuple[Noise, ...]
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


#: Whether an address is one of device memory, anybody's.
IsDevice = Callable[[int], bool]


def compare(a: Capture, b: Capture, is_device: IsDevice) -> Table | str:
    """The table for ``a``, checked against ``b``; or why there is none. Both captures' memory must be alive still."""
    try:
        _same_graph(a, b)
        _distinct(a, b)
        return _table(a, b, is_device)
    except _Unbindable as e:
        return str(e)


def verify(table: Table, c: Capture, is_device: IsDevice) -> tuple[Noise, ...] | str:
    """Why ``table`` does not hold for ``c``, a later capture of the same program; if it does, what is noise in ``c``.

    That may be more than ``table`` has as noise: the same garbage may have been in the first two captures.
    """
    try:
        _same_graph(table.template, c)
        return tuple(_check(table, c, is_device))
    except _Unbindable as e:
        return str(e)


# -- the shape of the graph ---------------------------------------------------------------------------------------


def _same_graph(a: Capture, b: Capture) -> None:
    if len(a.nodes) != len(b.nodes):
        raise _Unbindable(f"two captures of it have {len(a.nodes)} and {len(b.nodes)} steps")
    for what, r, s in (("inputs", a.inputs, b.inputs), ("outputs", a.outputs, b.outputs)):
        if [x.nbytes for x in r] != [x.nbytes for x in s]:
            raise _Unbindable(f"two captures of it differ in the sizes of their {what}")
    for i, (x, y) in enumerate(zip(a.nodes, b.nodes, strict=True)):
        if _skeleton(x, a.own_code) != _skeleton(y, b.own_code):
            raise _Unbindable(f"two captures of it differ in {_title(i, x)}: {_difference(x, y)}")
    if a.edges != b.edges:
        raise _Unbindable("two captures of it differ in the order of their steps")


def _skeleton(node: Node, own_code: bool) -> Node:
    """``node`` without its words, and without the handle of code that nobody else has."""
    if isinstance(node, Kernel):
        node = replace(node, params=bytes(len(node.params)))
        return replace(node, function=0, kernel=0) if own_code else node
    if isinstance(node, Transfer):
        return replace(node, addresses=(0,) * len(node.addresses))
    return node


def _difference(x: Node, y: Node) -> str:
    if isinstance(x, Kernel) and isinstance(y, Kernel):
        if x.name != y.name:
            return f"the other one is {y.name}"
        names = ("function", "kernel", "context", "grid", "block", "shared", "layout", "graph_only", "packed")
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


def _pieces(i: int, x: Kernel) -> Iterator[tuple[int, int]]:
    """(start, stop) of each aligned word of the parameters, and of what is left of a parameter on either side."""
    covered = 0
    for p, (offset, size) in enumerate(x.layout):
        stop = offset + size
        if offset < covered or stop > len(x.params):
            raise _Unbindable(f"{_title(i, x)}: parameter {p} lies where no parameter should")
        covered = stop
        while offset < stop:
            end = min(stop, offset - offset % WORD + WORD)
            yield offset, end
            offset = end


def _word(params: bytes, position: int) -> int:
    (word,) = struct.unpack_from("<Q", params, position)
    return int(word)


def _where(i: int, node: Node, position: int) -> str:
    if isinstance(node, Kernel):
        for p, (offset, size) in enumerate(node.layout):
            if offset <= position < offset + size:
                into = f", {position - offset} bytes into it," if size > WORD else ""
                return f"{_title(i, node)}: parameter {p}{into}"
    return f"{_title(i, node)}: address {position}"


# -- the memory ---------------------------------------------------------------------------------------------------


#: An allocation by its number, and the step from which on its memory was its own.
_Allocated = tuple[int, int]


def _allocation_of(output: Range, c: Capture) -> _Allocated | None:
    """The allocation whose memory ``output`` is, if it was neither freed nor is the memory anything else's."""
    found: tuple[_Allocated, Range] | None = None
    number = -1
    for address, nbytes, step in c.log:
        block = Range(address, abs(nbytes))
        number += nbytes > 0
        if found is not None and block.overlaps(found[1]):
            found = None
        if nbytes > 0 and block.start == output.start and block.stop >= output.stop:
            found = (number, step), block
    return found[0] if found else None


@dataclass(frozen=True)
class _Memory:
    """What addresses of a capture mean. The places of bound outputs are buffers, those of others allocations."""

    capture: Capture
    #: Of each bound output: its allocation, None for one without any bytes. Unbound outputs are absent.
    bound: dict[int, _Allocated | None]

    def place(self, address: int, node: int) -> tuple[str, int, int] | None:
        """("buffer" or "allocation", which, bytes into it) or ("hidden", 0, 0) to step ``node``; None if nothing."""
        found = self._inside(address, node)
        if found is None:
            before = self._inside(address - 1, node)
            if before is not None:  # where it ends, and nothing else begins
                found = (before[0], before[1], before[2] + (before[0] != "hidden"))
        return found if found is not None and found[1] >= 0 else None

    def _inside(self, address: int, node: int) -> tuple[str, int, int] | None:
        c = self.capture
        for i, r in enumerate(c.inputs):
            if r.holds(address):
                return "buffer", i, address - r.start
        owner = None
        number = -1
        for start, nbytes, step in c.log:
            number += nbytes > 0
            if nbytes > 0 and step <= node and start <= address < start + nbytes:
                owner = number, address - start
        if owner is not None:
            k, delta = owner
            for j, allocated in self.bound.items():
                if allocated is not None and allocated[0] == k:
                    # The padding behind an output is the call's, and nobody's.
                    return "buffer", len(c.inputs) + j if delta <= c.outputs[j].nbytes else -1, delta
            return "allocation", k, delta
        return ("hidden", 0, 0) if any(r.holds(address) for r in c.hidden) else None

    def owns(self, address: int) -> bool:
        """Whether ``address`` is in memory that other captures have elsewhere. An output may be a weight's memory."""
        return self._owned.hold(address)

    @cached_property
    def _owned(self) -> _Places:
        c = self.capture
        return _Places((*c.inputs, *c.allocations, *c.hidden))


def _distinct(a: Capture, b: Capture) -> None:
    """Everything must have moved between the two captures, and no two inputs may share memory."""
    for c in (a, b):
        for i, r in enumerate(c.inputs):
            others = [*c.inputs[i + 1 :], *c.allocations, *c.hidden]
            if any(r.overlaps(other) for other in others):
                raise _Unbindable(f"input {i} of a capture shares memory")
    in_a = [*a.inputs, *a.allocations, *a.hidden]
    in_b = _Places([*b.inputs, *b.allocations, *b.hidden])
    if any(in_b.overlap(r) for r in in_a):
        raise _Unbindable("two captures of it share memory")


def _bound(captures: Sequence[Capture]) -> dict[int, _Allocated | None]:
    """The outputs that have memory of their own, the same one in every capture."""
    everywhere: dict[int, _Allocated | None] = {}
    for j in range(len(captures[0].outputs)):
        found: set[_Allocated | None] = set()
        for c in captures:
            if any(c.outputs[j].overlaps(r) for r in c.inputs):
                raise _Unbindable(f"output {j} is in an input's memory")
            found.add(_allocation_of(c.outputs[j], c) if c.outputs[j].nbytes else None)
        one = found.pop()
        if not found and (one is not None or captures[0].outputs[j].nbytes == 0):
            everywhere[j] = one
    return everywhere


def _explain(
    node: int, position: int, words: tuple[int, int], memory: tuple[_Memory, _Memory]
) -> Relocation | Fixed | None:
    """What the address that differs is an address of; None if of nothing."""
    places = {m.place(word, node) for m, word in zip(memory, words, strict=True)}
    place = places.pop()
    if places or place is None:
        return None
    kind, which, delta = place
    if kind == "buffer":
        return Relocation(node, position, which, delta)
    return Fixed(node, position, which if kind == "allocation" else None, delta)


def _table(a: Capture, b: Capture, is_device: IsDevice) -> Table:
    bound = _bound((a, b))
    memory = (_Memory(a, bound), _Memory(b, bound))
    moves = _Moves.between(a, b)
    found: list[Relocation | Fixed | Noise] = []
    for i, (x, y) in enumerate(zip(a.nodes, b.nodes, strict=True)):
        if isinstance(x, Transfer) and isinstance(y, Transfer):
            found += _in_transfer(i, x, y, memory)
        elif isinstance(x, Kernel) and isinstance(y, Kernel):
            found += _in_kernel(i, x, y, memory, moves, is_device)
    fixed = tuple(place for place in found if isinstance(place, Fixed))
    return Table(
        relocations=tuple(place for place in found if isinstance(place, Relocation)),
        fixed=fixed,
        noise=tuple(place for place in found if isinstance(place, Noise)),
        bound=tuple(j in bound for j in range(len(a.outputs))),
        temporaries=len(a.allocations) > sum(k is not None for k in bound.values()),
        workspaces=any(place.allocation is None for place in fixed),
        linear=_linear(a),
        template=a,
    )


def _in_transfer(i: int, x: Transfer, y: Transfer, memory: tuple[_Memory, _Memory]) -> Iterator[Fixed]:
    for position, words in enumerate(zip(x.addresses, y.addresses, strict=True)):
        if words[0] == words[1]:
            _constant(words[0], memory, _where(i, x, position))
            continue
        place = _explain(i, position, words, memory)
        if place is None:
            raise _Unbindable(f"{_where(i, x, position)} {_UNKNOWN}")
        if isinstance(place, Relocation):
            raise _Unbindable(f"{_where(i, x, position)} is the address of an input or output")
        yield place


def _in_kernel(
    i: int, x: Kernel, y: Kernel, memory: tuple[_Memory, _Memory], moves: _Moves, is_device: IsDevice
) -> Iterator[Relocation | Fixed | Noise]:
    for start, stop in _pieces(i, x):
        u, v = x.params[start:stop], y.params[start:stop]
        where = _where(i, x, start)
        if u == v:
            if len(u) == WORD:
                _constant(_word(u, 0), memory, where)
            continue
        if len(u) == WORD:
            words = _word(u, 0), _word(v, 0)
            place = _explain(i, start, words, memory)
            if place is not None:
                yield place
                continue
            if any(m.owns(w) or is_device(w) for m, w in zip(memory, words, strict=True)):
                raise _Unbindable(f"{where} {_UNKNOWN} ({words[0]:#x}, {words[1]:#x})")
        if _may_be_encoded(x, y, start, stop, moves):
            raise _Unbindable(f"{where} may have an address in a way that is not known")
        yield Noise(i, start, v)


def _may_be_encoded(x: Kernel, y: Kernel, start: int, stop: int, moves: _Moves) -> bool:
    """Whether bytes that differ may be (part of) an address of an input or output that is not aligned, or shifted, or
    far outside its memory, or half of one: whether they differ as far as that memory moved.

    Of inputs and outputs only: what a temporary's address is made of stays right, as the temporary stays where it is.
    """
    (offset, size) = next((o, n) for o, n in x.layout if o <= start < o + n)

    def moved(begin: int, width: int, among: frozenset[int]) -> bool:
        if begin < offset or begin + width > offset + size:
            return False
        u, v = (int.from_bytes(p[begin : begin + width], "little") for p in (x.params, y.params))
        return u != v and (v - u) % (1 << 8 * width) in among

    # Shifts at the places only where such a value would lie: at any byte, something always differs like something.
    return (
        any(moved(begin, WORD, moves.plain) for begin in range(start - WORD + 1, stop))
        or (stop - start == WORD and moved(start, WORD, moves.shifted))
        or any(moved(begin, 4, moves.halves) for begin in range(-(-start // 4) * 4, stop, 4))
    )


@dataclass(frozen=True)
class _Moves:
    """How far inputs and outputs moved between two captures: as differences of words, of words that hold an address
    times or over a power of two, and of half words that hold (the low half of) an address over a power of two."""

    plain: frozenset[int]
    shifted: frozenset[int]
    halves: frozenset[int]

    @classmethod
    def between(cls, a: Capture, b: Capture) -> _Moves:
        pairs = [*zip(a.inputs, b.inputs, strict=True), *zip(a.outputs, b.outputs, strict=True)]
        plain = {q.start - p.start for p, q in pairs}
        lower = {(m >> shift) + carry for m in plain for shift in range(17) for carry in (0, 1)} | plain
        # Little differences mean nothing: two counts may differ by as much.
        lower = {m for m in lower if abs(m) >= 4096}
        upper = {m << shift for m in plain for shift in range(17)}
        return cls(
            frozenset(m % (1 << 64) for m in plain),
            frozenset(m % (1 << 64) for m in lower | upper),
            frozenset(m % (1 << 32) for m in lower),
        )


_UNKNOWN = "is not the address of anything known"


def _constant(word: int, memory: Sequence[_Memory], where: str) -> None:
    if any(m.owns(word) for m in memory):
        raise _Unbindable(f"{where} is the same in two captures, but an address in one of them")


def _check(table: Table, c: Capture, is_device: IsDevice) -> Iterator[Noise]:
    for i, r in enumerate(c.inputs):
        if any(r.overlaps(other) for other in (*c.inputs[i + 1 :], *c.allocations, *c.hidden)):
            raise _Unbindable(f"input {i} of a capture shares memory")
    bound, was_bound = _bound((c,)), _bound((table.template,))
    wanted = [j for j, is_bound in enumerate(table.bound) if is_bound]
    for j in wanted:
        if j not in bound or bound[j] != was_bound[j]:
            raise _Unbindable(f"output {j} has memory of its own in another capture, but not in this one")
    memory = _Memory(c, {j: bound[j] for j in wanted})
    places: list[Relocation | Fixed] = [*table.relocations, *table.fixed]
    expected = {(place.node, place.position): place for place in places}
    for i, (x, y) in enumerate(zip(table.template.nodes, c.nodes, strict=True)):
        parts: list[tuple[int, bytes, bytes]] = []
        if isinstance(x, Kernel) and isinstance(y, Kernel):
            parts = [(start, x.params[start:stop], y.params[start:stop]) for start, stop in _pieces(i, x)]
        elif isinstance(x, Transfer) and isinstance(y, Transfer):
            words = zip(x.addresses, y.addresses, strict=True)
            parts = [(p, struct.pack("<Q", u), struct.pack("<Q", v)) for p, (u, v) in enumerate(words)]
        for position, was, now in parts:
            known = expected.get((i, position))
            if known is not None:
                word = _word(now, 0)
                if _explain(i, position, (word, word), (memory, memory)) == known:
                    continue
            elif was == now and not (len(now) == WORD and memory.owns(_word(now, 0))):
                continue
            elif isinstance(x, Kernel) and not any(
                len(part) == WORD and (memory.owns(_word(part, 0)) or is_device(_word(part, 0))) for part in (was, now)
            ):
                yield Noise(i, position, now)
                continue
            raise _Unbindable(f"{_where(i, x, position)} is not what it is in another capture ({now.hex()})")
