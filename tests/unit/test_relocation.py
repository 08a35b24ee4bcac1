"""Which words of a captured graph are addresses of its inputs and outputs: the comparison, without a GPU."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.devices.cuda._relocation import (
    Capture,
    Edge,
    Empty,
    Fixed,
    Kernel,
    Node,
    Noise,
    Range,
    Relocation,
    Table,
    Transfer,
    _Places,
    compare,
    verify,
)

WEIGHT = 0x7F0000001000


def kernel(*words: int, name: str = "k", tail: bytes = b"", graph_only: str = "") -> Kernel:
    """One whose parameters are 8-byte words, and 4-byte ones behind them."""
    params = struct.pack(f"<{len(words)}Q", *words) + tail
    layout = [(8 * p, 8) for p in range(len(words))]
    layout += [(8 * len(words) + p, 4) for p in range(0, len(tail), 4)]
    return Kernel(name, 1, 0, 0, (1, 1, 1), (32, 1, 1), 0, tuple(layout), params, graph_only)


def struct_kernel(size: int, offset: int, params: bytes) -> Kernel:
    """One with a single parameter of ``size`` bytes at ``offset``."""
    return Kernel("s", 1, 0, 0, (1, 1, 1), (32, 1, 1), 0, ((offset, size),), params)


@dataclass
class World:
    """Memory of one capture: what lies where differs from world to world, and nothing else does."""

    base: int

    @property
    def x(self) -> int:
        return self.base

    @property
    def y(self) -> int:
        return self.base + 0x1000

    @property
    def temporary(self) -> int:
        return self.base + 0x2000

    @property
    def out(self) -> int:
        return self.base + 0x3000

    @property
    def hidden(self) -> int:
        return self.base + 0x8000

    def capture(self, *nodes: Node, **changes: object) -> Capture:
        """Inputs x (256 bytes) and y (100 bytes), a temporary that is freed, and an output of 300 bytes.

        In a ``log``, what has no step happens before all steps.
        """
        if "log" in changes:
            changes["log"] = tuple((*event, 0)[:3] for event in changes["log"])  # type: ignore[attr-defined]
        plain = Capture(
            nodes=nodes,
            edges=frozenset(Edge(i, i + 1) for i in range(len(nodes) - 1)),
            log=((self.temporary, 512, 0), (self.out, 512, 0), (self.temporary, -512, 0)),
            inputs=(Range(self.x, 256), Range(self.y, 100)),
            outputs=(Range(self.out, 300),),
            hidden=(Range(self.hidden, 0x1000),),
        )
        return replace(plain, **changes)  # type: ignore[arg-type]


A, B, C = World(0x700000000000), World(0x700001230000), World(0x700009990000)


def both(make: object, worlds: tuple[World, World] = (A, B)) -> Table | str:
    a, b = worlds
    return compare(make(a), make(b), is_device)  # type: ignore[operator]


def is_device(address: int) -> bool:
    return address >> 32 == WEIGHT >> 32 or any(-4096 <= address - w.base < 1 << 20 for w in (A, B, C))


def bound(make: object) -> Table:
    table = both(make)
    assert isinstance(table, Table), table
    return table


def reason(make: object) -> str:
    table = both(make)
    assert isinstance(table, str)
    return table


# -- words --------------------------------------------------------------------------------------------------------


def test_inputs_and_outputs_are_found_with_their_offsets() -> None:
    table = bound(lambda w: w.capture(kernel(w.x, w.y + 40, 7, WEIGHT, w.out + 16)))
    assert table.relocations == (
        Relocation(0, 0, 0, 0),
        Relocation(0, 8, 1, 40),
        Relocation(0, 32, 2, 16),
    )
    assert table.bound == (True,)
    assert table.fixed == ()


def test_temporaries_and_workspaces_stay_where_they_are() -> None:
    table = bound(lambda w: w.capture(kernel(w.temporary + 8, w.hidden + 0x800, w.out)))
    assert table.fixed == (Fixed(0, 0, 0, 8), Fixed(0, 8, None))
    assert table.temporaries
    assert table.workspaces
    assert table.relocations == (Relocation(0, 16, 2, 0),)


def test_the_place_is_the_node_among_all_nodes() -> None:
    table = bound(lambda w: w.capture(Empty(), kernel(5), kernel(1, w.out)))
    assert table.relocations == (Relocation(2, 8, 2, 0),)


def test_an_input_that_no_kernel_reads_is_allowed() -> None:
    assert bound(lambda w: w.capture(kernel(w.x, w.out))).relocations[0].buffer == 0


def test_an_end_of_an_input_counts_as_the_inputs() -> None:
    table = bound(lambda w: w.capture(kernel(w.x, w.x + 256, w.out)))
    assert table.relocations[1] == Relocation(0, 8, 0, 256)


def test_past_the_end_of_an_input_is_nothing() -> None:
    assert "parameter 1 is not the address of anything known" in reason(lambda w: w.capture(kernel(w.x, w.x + 257)))


def test_before_the_start_of_an_input_is_nothing() -> None:
    assert "not the address of anything known" in reason(lambda w: w.capture(kernel(w.x - 8)))
    # Far outside, where there is no memory at all.
    assert "in a way that is not known" in reason(lambda w: w.capture(kernel(w.x - (1 << 36))))


ENCODED = {
    "shifted right": lambda p: p >> 4,
    "shifted left": lambda p: p << 1,
    "of another unit": lambda p: (p + 64) >> 8,
    "a low half": lambda p: p & 0xFFFFFFFF,
    "a high part of a low half": lambda p: (p & 0xFFFFFFFF) << 32 | 7,
}


@pytest.mark.parametrize("encode", ENCODED.values(), ids=ENCODED)
@pytest.mark.parametrize("what", ["x", "out"])
def test_what_may_be_an_encoded_address_is_refused(encode: object, what: str) -> None:
    said = reason(lambda w: w.capture(kernel(w.x, encode(getattr(w, what) + 32))))  # type: ignore[operator]
    assert said == "step 0, kernel k: parameter 1 may have an address in a way that is not known"


def test_the_reason_names_kernel_step_and_parameter() -> None:
    said = reason(lambda w: w.capture(kernel(w.x), kernel(1, w.x + 300, name="gemm")))
    assert said.startswith("step 1, kernel gemm: parameter 1 ")


def test_words_inside_a_struct_are_found() -> None:
    table = bound(lambda w: w.capture(struct_kernel(40, 8, struct.pack("<6Q", 0, 9, w.x, 3, w.out, 4))))
    assert table.relocations == (Relocation(0, 16, 0, 0), Relocation(0, 32, 2, 0))


def test_a_reason_says_where_in_a_struct() -> None:
    said = reason(lambda w: w.capture(struct_kernel(16, 8, struct.pack("<3Q", 0, 9, w.x + 300))))
    assert "parameter 0, 8 bytes into it, is not" in said


@pytest.mark.parametrize("at", range(1, 8))
def test_an_address_that_is_not_aligned_is_refused(at: int) -> None:
    said = reason(lambda w: w.capture(struct_kernel(16, 0, bytes(at) + struct.pack("<Q", w.x) + bytes(8 - at))))
    assert "in a way that is not known" in said


def test_an_address_in_a_parameter_that_is_not_aligned_is_refused() -> None:
    # Bytes 4 to 12 of the buffer: no whole word of the parameter.
    said = reason(lambda w: w.capture(struct_kernel(8, 4, struct.pack("<IQI", 0, w.x, 0))))
    assert "in a way that is not known" in said


# -- noise --------------------------------------------------------------------------------------------------------


def test_what_differs_and_is_no_address_is_noise() -> None:
    """Padding in a struct, that holds what was on the host's stack: an address of host memory here."""

    def make(w: World) -> Capture:
        garbage = {A.base: 0x55A2D2E0, B.base: 0x55A2D8F0}[w.base]
        return w.capture(struct_kernel(24, 0, struct.pack("<QQI", w.x, garbage, garbage >> 4) + b"\0\0\0\0"))

    table = bound(make)
    assert table.relocations == (Relocation(0, 0, 0, 0),)
    assert table.noise == (
        Noise(0, 8, struct.pack("<Q", 0x55A2D8F0)),
        Noise(0, 16, struct.pack("<Q", 0x55A2D8F)),
    )


@pytest.mark.parametrize(
    ("u", "v"),
    [
        (0x46FD5CC0, 0x46FDCF40),
        (0x7FFE00000052, 0x7FFE00000062),
        (0x1FA45E8000000000, 0x1F9FD77000000000),
        (0x17B6927000007FFE, 0xF8EBBB000007FFE),
        (0x3FFDF3CF3BFF, 0x3FFDF3CF3C00),
        (0x7FFFD3ED8E80, 0x7FFFD3ED8EB0),
        (0xF83F060, 0x7FFED5C078E0),
        (0, 0xB8),
    ],
)
def test_garbage_that_was_seen_is_noise(u: int, v: int) -> None:
    """Captured from PyTorch's kernels on a GPU, where inputs had moved by as much."""
    other = World(A.base + 0x12400010)
    table = both(lambda w: w.capture(kernel(w.x, u if w is A else v, w.out)), (A, other))
    assert isinstance(table, Table), table
    assert len(table.noise) == 1


def test_small_parameters_that_differ_are_noise() -> None:
    table = bound(lambda w: w.capture(kernel(w.x, tail=b"\1\2\3\4" if w is A else b"\1\2\3\5")))
    assert table.noise == (Noise(0, 8, b"\1\2\3\5"),)


def test_an_address_in_one_capture_only_is_no_noise() -> None:
    said = reason(lambda w: w.capture(kernel(w.x, w.x if w is A else 5)))
    assert "not the address of anything known" in said
    assert "not the address of anything known" in reason(lambda w: w.capture(kernel(w.x, w.hidden if w is B else 5)))


def test_an_address_of_memory_that_nobody_knows_is_no_noise() -> None:
    said = reason(lambda w: w.capture(kernel(w.x, WEIGHT if w is A else 5)))
    assert "not the address of anything known" in said


def noisy(w: World) -> Capture:
    """Noise in the place of one word, which is another one in every capture."""
    return w.capture(kernel(w.x, 0x1000 + w.base // 0x1000 % 977, w.out))


def test_a_further_capture_may_have_other_noise() -> None:
    assert len(bound(noisy).noise) == 1
    (noise,) = verify(bound(noisy), noisy(C), is_device)
    assert isinstance(noise, Noise)
    assert (noise.node, noise.position) == (0, 8)


@pytest.mark.parametrize("word", [C.x, C.out, C.temporary, C.hidden, WEIGHT])
def test_a_further_capture_may_have_no_address_in_the_place_of_noise(word: int) -> None:
    assert "parameter 1 is not what it is" in verify(bound(noisy), changed(noisy(C), 0, 8, word), is_device)


# -- parameters ---------------------------------------------------------------------------------------------------


def test_bytes_between_parameters_do_not_matter() -> None:
    """Padding has no value; what a driver leaves there is no difference."""

    def make(w: World) -> Capture:
        params = struct.pack("<IIQ", 1, w.base & 0xFFFFFFFF, 2)
        layout = ((0, 4), (8, 8))
        return w.capture(replace(kernel(), params=params, layout=layout))

    assert bound(make).relocations == ()


def test_a_small_parameter_that_does_not_differ_is_a_constant() -> None:
    assert bound(lambda w: w.capture(kernel(w.x, tail=b"\1\2\3\4\5\6\7\10"))).relocations == (Relocation(0, 0, 0, 0),)


def test_a_constant_may_have_any_value() -> None:
    assert bound(lambda w: w.capture(kernel(0, 1, 2**64 - 1, WEIGHT))).relocations == ()


def test_a_constant_that_is_an_address_in_one_capture_is_refused() -> None:
    assert "is the same in two captures" in reason(lambda w: w.capture(kernel(A.x + 8)))
    assert "is the same in two captures" in reason(lambda w: w.capture(kernel(B.hidden)))
    assert "is the same in two captures" in reason(lambda w: w.capture(kernel(B.temporary)))


def test_words_that_point_into_different_tensors_are_refused() -> None:
    assert "not the address" in reason(lambda w: w.capture(kernel(w.x if w is A else w.y)))
    assert "not the address" in reason(lambda w: w.capture(kernel(w.x if w is A else w.out)))
    assert "not the address" in reason(lambda w: w.capture(kernel(w.out if w is A else w.temporary)))


def test_words_at_different_offsets_are_refused() -> None:
    assert "not the address" in reason(lambda w: w.capture(kernel(w.x + (0 if w is A else 8))))
    assert "not the address" in reason(lambda w: w.capture(kernel(w.temporary + (0 if w is A else 8))))


def test_what_one_capture_has_as_workspace_and_the_other_not_is_refused() -> None:
    assert "not the address" in reason(lambda w: w.capture(kernel(w.hidden if w is A else w.temporary)))


# -- graphs -------------------------------------------------------------------------------------------------------


def test_captures_of_different_graphs_are_refused() -> None:
    def different(x: Node, y: Node) -> str:
        return reason(lambda w: w.capture(x if w is A else y))

    k = kernel(1)
    assert "have 1 and 2 steps" in reason(lambda w: w.capture(*[k] * (1 if w is A else 2)))
    assert "the other one is other" in different(k, replace(k, name="other"))
    assert "other function" in different(k, replace(k, function=2))
    assert "other kernel" in different(k, replace(k, kernel=2))
    assert "other context" in different(k, replace(k, context=2))
    assert "other grid" in different(k, replace(k, grid=(2, 1, 1)))
    assert "other block" in different(k, replace(k, block=(64, 1, 1)))
    assert "other shared" in different(k, replace(k, shared=1))
    assert "other layout" in different(k, replace(k, layout=((0, 4),)))
    assert "other packed" in different(k, replace(k, packed=True))
    assert "other graph_only" in different(k, replace(k, graph_only="has clusters"))
    assert "the other one is an empty node" in different(k, Empty())
    assert "the other one is kernel k" in different(Transfer("a fill", (1,), ()), k)
    assert "other sizes" in different(Transfer("a fill", (1,), (1,)), Transfer("a fill", (1,), (2,)))


def test_captures_in_another_order_are_refused() -> None:
    def make(w: World) -> Capture:
        edges = {Edge(0, 1), Edge(1, 2)} if w is A else {Edge(0, 1), Edge(0, 2)}
        return w.capture(kernel(1), kernel(2), kernel(3), edges=frozenset(edges))

    assert "differ in the order of their steps" in reason(make)


def test_captures_with_other_sizes_are_refused() -> None:
    assert "sizes of their inputs" in reason(
        lambda w: w.capture(inputs=(Range(w.x, 8 if w is A else 16), Range(w.y, 8)))
    )
    assert "sizes of their outputs" in reason(lambda w: w.capture(outputs=(Range(w.out, 8 if w is A else 16),)))


def test_only_a_chain_in_order_is_linear() -> None:
    ks = [kernel(i) for i in range(3)]
    assert bound(lambda w: w.capture(*ks)).linear
    assert bound(lambda w: w.capture()).linear
    assert bound(lambda w: w.capture(ks[0])).linear
    for edges in (
        {Edge(0, 1), Edge(0, 2)},
        {Edge(0, 2), Edge(1, 2)},
        {Edge(0, 2), Edge(2, 1)},
        {Edge(0, 1)},
        set(),
        {Edge(0, 1), Edge(1, 2, 0x10000)},  # a programmatic dependency
    ):
        assert not bound(lambda w, e=frozenset(edges): w.capture(*ks, edges=e)).linear


# -- transfers ----------------------------------------------------------------------------------------------------


def test_transfers_between_temporaries_and_weights_are_fine() -> None:
    table = bound(lambda w: w.capture(Transfer("a copy", (WEIGHT, w.temporary), (512,)), kernel(w.out)))
    assert table.fixed == (Fixed(0, 1, 0, 0),)
    assert table.why_not_direct


@pytest.mark.parametrize("where", ["x", "y", "out"])
def test_transfers_that_touch_inputs_or_outputs_are_refused(where: str) -> None:
    said = reason(lambda w: w.capture(Transfer("a fill", (getattr(w, where),), ())))
    assert said == "step 0, a fill: address 0 is the address of an input or output"


def test_a_transfer_of_unknown_memory_is_refused() -> None:
    assert "not the address" in reason(lambda w: w.capture(Transfer("a fill", (w.base + 0x100000,), ())))


# -- memory -------------------------------------------------------------------------------------------------------


def trap(w: World) -> Capture:
    """A temporary of 64 KiB is freed, and an output gets the first 512 bytes of its block."""
    big = w.base + 0x10000
    return w.capture(
        kernel(w.x, big, name="writes the temporary"),
        kernel(big, w.temporary, name="reads it"),
        kernel(w.temporary, big, name="writes the output"),
        kernel(w.temporary, big + 8, name="writes the output too"),
        log=((big, 0x10000, 0), (w.temporary, 512, 1), (big, -0x10000, 2), (big, 512, 2), (w.temporary, -512, 4)),
        outputs=(Range(big, 300),),
    )


def test_the_trap_in_a_freed_temporarys_block_an_output_is_bound_from_its_own_first_step_on() -> None:
    table = bound(trap)
    assert table.bound == (True,)
    assert table.relocations == (Relocation(0, 0, 0, 0), Relocation(2, 8, 2, 0), Relocation(3, 8, 2, 8))
    assert Fixed(0, 8, 0, 0) in table.fixed
    assert Fixed(1, 0, 0, 0) in table.fixed
    assert table.temporaries
    assert verify(table, trap(C), is_device) == ()


@pytest.mark.parametrize("step", range(5))
def test_the_step_of_an_allocation_decides(step: int) -> None:
    def make(w: World) -> Capture:
        nodes = [kernel(w.out + 16) for _ in range(4)]
        return w.capture(*nodes, log=((w.out, 1024, 0), (w.out, -1024, step), (w.out, 512, step)))

    table = bound(make)
    assert [r.node for r in table.relocations] == list(range(step, 4))
    assert [f.node for f in table.fixed] == list(range(step))


def test_before_its_allocation_an_outputs_memory_is_nothing() -> None:
    """The address would be of memory that was allocated before the capture."""
    said = reason(lambda w: w.capture(kernel(w.out), log=((w.out, 512, 1),)))
    assert "not the address of anything known" in said


def test_captures_that_allocate_at_other_steps_are_not_bound() -> None:
    def make(w: World) -> Capture:
        return w.capture(kernel(1), kernel(w.out), log=((w.out, 512, 0 if w is A else 1),))

    assert bound(make).bound == (False,)


@pytest.mark.parametrize("shift", [-512, -8, 8, 256, 504])
def test_what_overlaps_an_output_later_takes_it_away(shift: int) -> None:
    """Also where it overlaps but the padding behind the output."""

    def make(w: World) -> Capture:
        other = w.out + shift
        return w.capture(kernel(w.x, other + 600), log=((w.out, 512), (other, 1024)))

    assert bound(make).bound == (False,)


@pytest.mark.parametrize("shift", [-512, -8, 8, 256, 504])
def test_what_overlapped_an_output_before_does_not(shift: int) -> None:
    def make(w: World) -> Capture:
        other = w.out + shift
        log = ((other, 1024, 0), (other, -1024, 1), (w.out, 512, 1))
        return w.capture(kernel(w.x, other), kernel(w.out + 128), log=log)

    table = bound(make)
    assert table.bound == (True,)
    assert table.relocations == (Relocation(0, 0, 0, 0), Relocation(1, 0, 2, 128))
    assert table.fixed == (Fixed(0, 8, 0, 0),)


@pytest.mark.parametrize("shift", [-1024, 512])
def test_neighbours_are_no_trap(shift: int) -> None:
    def make(w: World) -> Capture:
        other = w.out + shift
        return w.capture(kernel(w.x, w.out), log=((other, 1024), (other, -1024), (w.out, 512)))

    assert bound(make).bound == (True,)


def test_an_output_that_was_freed_is_not_bound() -> None:
    assert bound(lambda w: w.capture(kernel(w.x), log=((w.out, 512), (w.out, -512)))).bound == (False,)


def test_an_output_behind_the_start_of_its_allocation_is_not_bound() -> None:
    assert bound(lambda w: w.capture(kernel(w.x), log=((w.out - 64, 1024),))).bound == (False,)


def test_an_output_larger_than_its_allocation_is_not_bound() -> None:
    assert bound(lambda w: w.capture(kernel(w.x), log=((w.out, 256),))).bound == (False,)


def test_an_output_that_the_capture_did_not_allocate_is_not_bound() -> None:
    """A weight handed back: kernels may read it, too."""
    table = bound(lambda w: w.capture(kernel(w.x, WEIGHT), outputs=(Range(WEIGHT, 64),), log=()))
    assert table.bound == (False,)
    assert not table.temporaries
    assert "not bound" in table.why_not_direct


def test_an_output_in_an_inputs_memory_is_refused() -> None:
    assert reason(lambda w: w.capture(outputs=(Range(w.x + 64, 64),))) == "output 0 is in an input's memory"


def test_an_output_without_bytes_is_bound() -> None:
    table = bound(lambda w: w.capture(kernel(w.x), outputs=(Range(0, 0),), log=()))
    assert table.bound == (True,)
    assert not table.temporaries


def test_an_input_without_bytes_is_nowhere() -> None:
    def make(w: World) -> Capture:
        return w.capture(kernel(0, w.y, w.out), inputs=(Range(0, 0), Range(w.y, 100)))

    assert bound(make).relocations == (Relocation(0, 8, 1, 0), Relocation(0, 16, 2, 0))


def test_an_address_in_the_padding_of_an_output_is_refused() -> None:
    """It is no temporary either: the memory behind a bound output is the call's."""
    assert bound(lambda w: w.capture(kernel(w.out + 300))).relocations == (Relocation(0, 0, 2, 300),)
    assert "not the address" in reason(lambda w: w.capture(kernel(w.out + 304)))


def test_where_an_output_ends_and_the_next_block_begins_it_is_the_next_block() -> None:
    def make(w: World) -> Capture:
        log = ((w.out, 512), (w.out + 512, 512))
        return w.capture(kernel(w.out, w.out + 512), log=log, outputs=(Range(w.out, 512),))

    table = bound(make)
    assert table.relocations == (Relocation(0, 0, 2, 0),)
    assert table.fixed == (Fixed(0, 8, 1, 0),)


def test_where_two_outputs_touch_the_word_is_the_second_ones() -> None:
    def make(w: World) -> Capture:
        log = ((w.out, 512), (w.out + 512, 512))
        outputs = (Range(w.out, 512), Range(w.out + 512, 8))
        return w.capture(kernel(w.out, w.out + 512, w.out + 520), log=log, outputs=outputs)

    assert bound(make).relocations == (Relocation(0, 0, 2, 0), Relocation(0, 8, 3, 0), Relocation(0, 16, 3, 8))


def test_memory_that_was_handed_out_twice_is_a_temporary_all_the_same() -> None:
    def make(w: World) -> Capture:
        log = ((w.temporary, 512), (w.temporary, -512), (w.temporary, 1024), (w.out, 512))
        return w.capture(kernel(w.temporary + 8, w.out), log=log)

    assert bound(make).fixed == (Fixed(0, 0, 1, 8),)


def test_frees_of_other_code_do_not_matter() -> None:
    """A garbage collection in the middle of the capture frees whatever it finds."""
    assert bound(lambda w: w.capture(kernel(w.x, w.out), log=((0x5000, -512), (w.out, 512)))).bound == (True,)


def test_captures_that_share_memory_are_refused() -> None:
    assert "share memory" in str(compare(A.capture(kernel(A.x)), A.capture(kernel(A.x)), is_device))
    assert "input 0 of a capture shares" in reason(lambda w: w.capture(inputs=(Range(w.x, 256), Range(w.x + 128, 100))))
    assert "input 1 of a capture shares" in reason(lambda w: w.capture(log=((w.y, 512),)))


def test_where_the_kernels_may_run_without_a_graph() -> None:
    def why(*nodes: Node, **changes: object) -> str:
        made = {"log": lambda w: ((w.out, 512),), **changes}
        return bound(
            lambda w: w.capture(*nodes_in(w, nodes), **{k: v(w) for k, v in made.items()})  # type: ignore[operator]
        ).why_not_direct

    def nodes_in(w: World, nodes: tuple[Node, ...]) -> list[Node]:
        return [kernel(w.x, w.out), *nodes]

    assert why() == ""
    assert why(kernel(3), kernel(4)) == ""
    assert why(log=lambda w: ((w.out, 512), (w.temporary, 512))) == "it has temporaries"
    assert why(kernel(3), edges=lambda w: frozenset()) == "it is no plain chain"
    assert why(Transfer("a fill", (WEIGHT,), ())) == "not all of it are kernels"
    assert why(kernel(3, name="gemm", graph_only="has clusters")) == "kernel gemm has clusters"
    workspace = bound(lambda w: w.capture(kernel(w.hidden, w.out), log=((w.out, 512),)))
    assert workspace.why_not_direct == "it uses workspaces"


# -- further captures ---------------------------------------------------------------------------------------------


def program(w: World) -> Capture:
    return w.capture(
        kernel(w.x, WEIGHT, w.temporary, tail=b"\1\0\0\0"),
        Transfer("a fill", (w.temporary + 256,), (256,)),
        kernel(w.temporary, w.y + 4, w.hidden + 64, w.out + 8, tail=b"\2\0\0\0"),
    )


def test_a_further_capture_of_the_same_program_holds() -> None:
    assert verify(bound(program), program(C), is_device) == ()


def test_a_further_capture_may_reuse_the_first_ones_memory() -> None:
    """The first context may be gone by then."""
    assert verify(bound(program), program(A), is_device) == ()


def changed(c: Capture, node: int, position: int, word: int) -> Capture:
    nodes = list(c.nodes)
    old = nodes[node]
    if isinstance(old, Kernel):
        params = bytearray(old.params)
        struct.pack_into("<Q", params, position, word)
        nodes[node] = replace(old, params=bytes(params))
    elif isinstance(old, Transfer):
        nodes[node] = replace(old, addresses=(*old.addresses[:position], word, *old.addresses[position + 1 :]))
    return replace(c, nodes=tuple(nodes))


WORDS = [(0, 0), (0, 8), (0, 16), (1, 0), (2, 0), (2, 8), (2, 16), (2, 24)]


@pytest.mark.parametrize(("node", "position"), WORDS)
@pytest.mark.parametrize("value", ["x", "y", "temporary", "out", "hidden", "zero", "weight", "next", "first"])
def test_a_further_capture_with_another_word_does_not_hold(node: int, position: int, value: str) -> None:
    plain = program(C)
    old = plain.nodes[node]
    was = old.addresses[position] if isinstance(old, Transfer) else struct.unpack_from("<Q", old.params, position)[0]
    values = {"zero": 0, "weight": WEIGHT, "next": was + 8, "first": A.x}
    word = values[value] if value in values else getattr(C, value)
    said = verify(bound(program), changed(plain, node, position, word), is_device)
    # Elsewhere in the same workspace is no other place.
    harmless = word == was or (was == C.hidden + 64 and value in ("hidden", "next"))
    assert isinstance(said, str) != harmless


def test_what_differs_in_a_further_capture_and_is_no_address_is_noise_there() -> None:
    c = program(C)
    last = c.nodes[2]
    assert isinstance(last, Kernel)
    other = replace(c, nodes=(*c.nodes[:2], replace(last, params=last.params[:-4] + b"\3\0\0\0")))
    assert verify(bound(program), other, is_device) == (Noise(2, 32, b"\3\0\0\0"),)


def test_a_further_capture_of_another_graph_does_not_hold() -> None:
    c = program(C)
    assert verify(bound(program), replace(c, edges=frozenset()), is_device)
    assert verify(bound(program), replace(c, nodes=c.nodes[:2]), is_device)


def test_a_further_capture_that_falls_into_the_trap_does_not_hold() -> None:
    c = program(C)
    said = verify(bound(program), replace(c, log=(*c.log, (C.out, 1024, 3))), is_device)
    assert "output 0 has memory of its own in another capture" in said
    # Or where its memory was its own from another step on.
    said = verify(
        bound(program), replace(c, log=((C.temporary, 512, 0), (C.out, 512, 1), (C.temporary, -512, 2))), is_device
    )
    assert "output 0 has memory of its own in another capture" in said


def unbound(w: World) -> Capture:
    """An output that something else overlaps in the end."""
    return w.capture(kernel(w.x, w.out), log=((w.out, 512), (w.out + 8, 1024, 1)))


def test_a_further_capture_whose_output_stays_unbound_holds() -> None:
    assert verify(bound(unbound), unbound(C), is_device) == ()
    # Also where it would be its own this time: it stays where it is.
    assert verify(bound(unbound), replace(unbound(C), log=unbound(C).log[:1]), is_device) == ()


def test_a_further_capture_whose_input_shares_memory_does_not_hold() -> None:
    c = program(C)
    assert "shares memory" in verify(bound(program), replace(c, log=((C.x, 512, 0), *c.log)), is_device)


# -- all of it ----------------------------------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> tuple[int, list[int], list[int], list[int], list[list[tuple[int, int]]], list[int]]:
    """Random programs over few blocks of memory that are handed out again and again.

    Inputs' sizes; then for each allocation its size, its block (place in memory), and its first step; the words of each
    step; and which allocations are outputs.
    """
    inputs = draw(st.lists(st.integers(1, 1024), max_size=3))
    steps = draw(st.integers(0, 5))
    starts = sorted(draw(st.lists(st.integers(0, steps), max_size=8)))
    blocks = [draw(st.integers(0, 3)) for _ in starts]
    sizes = [draw(st.integers(1, 1024)) for _ in starts]
    words = draw(
        st.lists(
            st.lists(st.tuples(st.integers(-1, len(inputs) + 3), st.integers(0, 1023)), max_size=5),
            min_size=steps,
            max_size=steps,
        )
    )
    # Only what has its block last can be an output.
    last = [k for k in range(len(starts)) if blocks[k] not in blocks[k + 1 :]]
    outputs = draw(st.lists(st.sampled_from(last), unique=True)) if last else []
    return inputs, sizes, blocks, starts, words, outputs  # type: ignore[return-value]


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine the first draw takes seconds
@given(programs(), st.permutations(range(8)), st.permutations(range(8)))
def test_what_is_found_is_what_is_true(drawn: tuple, in_a: list[int], in_b: list[int]) -> None:  # type: ignore[type-arg]
    inputs, sizes, blocks, first_steps, words, outputs = drawn
    expected: list[tuple[int, int, int, int]] = []

    def make(w: World, order: list[int]) -> Capture:
        """``order``: where the blocks and the inputs lie."""
        expected.clear()
        at = [w.base + 0x1000 * order[b] for b in range(4)]
        ranges = [Range(w.base + 0x1000 * order[4 + i], n) for i, n in enumerate(inputs)]
        log: list[tuple[int, int, int]] = []
        for k, (b, first) in enumerate(zip(blocks, first_steps, strict=True)):
            before = [m for m in range(k) if blocks[m] == b]
            if before:
                log.append((at[b], -2048, first))
            log.append((at[b], 2048, first))
        nodes = []
        for step, plan in enumerate(words):
            made = []
            for p, (which, delta) in enumerate(plan):
                if which < 0:
                    made.append(delta)
                elif which < len(inputs):
                    made.append(ranges[which].start + delta % inputs[which])
                    expected.append((step, 8 * p, which, delta % inputs[which]))
                else:
                    # A block that somebody has by then, or a constant.
                    b = which - len(inputs)
                    owners = [k for k, first in enumerate(first_steps) if blocks[k] == b and first <= step]
                    if not owners:
                        made.append(7)
                        continue
                    owner = owners[-1]
                    made.append(at[b] + delta % sizes[owner])
                    if owner in outputs:
                        expected.append((step, 8 * p, len(inputs) + outputs.index(owner), delta % sizes[owner]))
            nodes.append(kernel(*made))
        results = [Range(at[blocks[k]], sizes[k]) for k in outputs]
        return w.capture(*nodes, log=tuple(log), inputs=tuple(ranges), outputs=tuple(results))

    table = compare(make(A, in_a), make(B, in_b), is_device)
    assert isinstance(table, Table), table
    assert all(table.bound)
    assert table.noise == ()
    assert [(r.node, r.position, r.buffer, r.delta) for r in table.relocations] == expected
    # Bound to other tensors, the words are what a capture there would have.
    c = make(C, in_a)
    assert verify(table, c, is_device) == ()
    starts = [r.start for r in (*c.inputs, *c.outputs)]
    for r in table.relocations:
        node = c.nodes[r.node]
        assert isinstance(node, Kernel)
        assert struct.unpack_from("<Q", node.params, r.position)[0] == starts[r.buffer] + r.delta


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_words_of_no_meaning_are_never_bound(u: int, v: int) -> None:
    table = compare(A.capture(kernel(u)), B.capture(kernel(v)), is_device)
    if u == v:
        assert isinstance(table, str) or table.relocations == ()
    elif isinstance(table, Table):
        assert len(table.relocations) + len(table.fixed) + len(table.noise) == 1
        for r in table.relocations:
            start_a = (A.x, A.y, A.out)[r.buffer]
            start_b = (B.x, B.y, B.out)[r.buffer]
            assert u - start_a == v - start_b == r.delta


RANGES = st.lists(st.builds(Range, st.integers(0, 60), st.integers(0, 9)), max_size=12)


@given(RANGES, st.integers(-2, 75), st.integers(0, 12))
def test_all_memory_of_ranges_is_that_of_each(ranges: list[Range], start: int, nbytes: int) -> None:
    places, other = _Places(ranges), Range(start, nbytes)
    assert places.hold(start) == any(r.holds(start) for r in ranges)
    if nbytes:
        assert places.overlap(other) == any(r.overlaps(other) for r in ranges if r.nbytes)
