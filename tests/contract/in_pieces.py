"""The stream contract's clauses once more, over a model of three pieces: captured, direct, captured."""

from __future__ import annotations

from typing import Any

import pytest

from contract import clauses
from contract.clauses import *  # noqa: F403
from contract.pieces import PieceMlp
from contract.support import assert_changed_flags_queue_nothing

#: Clauses that say nothing of pieces, or that count the contexts of a call: one for each captured piece.
LEFT_OUT = {
    "test_clause1_starts_after_the_callers_queued_work": "it has a model of three pieces among its own",
    "test_clause3_only_the_held_one_waits_for_the_least_recently_used_context": "two are one call's; see below",
    "test_clause3_the_memory_limit_is_kept": "half of what two contexts take may be enough for one of them",
    "test_clause4_what_is_handed_back_is_the_callers": "it has a model of its own",
    **dict.fromkeys(
        (
            "test_clause4_a_write_into_an_input_is_ordered_as_an_operators_is",
            "test_clause4_writes_on_two_streams_share_a_context_and_no_order",
            "test_clause4_a_written_input_is_freed_right_after_the_call",
            "test_clause4_what_lies_beside_a_written_input_is_left_alone",
            "test_clause6_replays_write_into_the_callers_input_again",
        ),
        "it has a model of its own; in pieces, such models are in tests/sim/test_state_in_pieces.py",
    ),
    "test_clause6_compiling_beside_other_codes_capture_does_it_no_harm": "it calls amid the capture; see below",
    "test_clause6_what_cannot_be_captured_raises": "it has models of its own",
    "test_clause6_random_models_draw_anew_in_a_users_graph": "it has a model of its own",
    "test_clause7_flags_are_frozen_at_compile": "a direct piece looks at flags, as any direct call does; see below",
}

for _name in LEFT_OUT:
    del globals()[_name]


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clauses, "Mlp", PieceMlp)


def test_the_model_is_in_three_pieces(rig: clauses.Rig, compiled: Any, backend: str) -> None:
    engine = compiled(PieceMlp(), rig.random(4, 256), cuda_graphs=True, backend=backend)
    (signature,) = engine.summary()["signatures"]
    assert [piece["captured"] for piece in signature["pieces"]] == [True, False, True]


def test_clause3_only_the_held_one_waits_for_the_least_recently_used_contexts(rig: clauses.Rig, compiled: Any) -> None:
    x = rig.random(4, 256)
    engine = compiled(PieceMlp(), x, cuda_graphs=True, max_contexts=4)
    expected = rig.load_kernels(engine, x)
    assert engine.warm(contexts=2) == 2
    held, free, third = rig.stream(), rig.stream(), rig.stream()
    latch = rig.latch(held)
    with rig.module.stream(free):
        engine(x)
    with rig.module.stream(held):
        y = engine(x)
    with rig.module.stream(third):
        z = engine(x)  # takes the contexts of `free`, which were used longest ago
    third.synchronize()
    clauses.assert_same(z, expected)
    latch.open()
    held.synchronize()
    clauses.assert_same(y, expected)


@clauses.PATHS
def test_clause6_compiling_beside_other_codes_capture_does_it_no_harm_in_pieces(
    rig: clauses.Rig, runtime: str, graphs: bool
) -> None:
    # The direct piece draws from PyTorch's default generator, as eager would: PyTorch refuses each draw outside a
    # capture while any capture that has the same generator is under way.
    clauses.assert_a_capture_beside_is_unharmed(rig, runtime, graphs, call_amid=False)


def test_clause7_flags_that_a_direct_piece_may_read_are_looked_at_before_anything_is_queued(
    rig: clauses.Rig, compiled: Any
) -> None:
    x = rig.random(64, 256)
    rig.fast_matmul(False)
    engine = compiled(PieceMlp(), x, cuda_graphs=True)
    assert_changed_flags_queue_nothing(rig, engine, x)


__all__ = sorted(name for name in dict(globals()) if name.startswith("test_") or name == "in_pieces")
