"""The stream contract's clauses once more, with a backend whose runs need state of their own, as TensorRT's do."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import anabranch
from contract import stateful
from contract.clauses import (  # noqa: F401  # pytest collects them here
    same_bits,
    test_clause1_starts_after_the_callers_queued_work,
    test_clause1_the_engines_device_decides_not_the_threads,
    test_clause1_the_stream_is_looked_up_at_every_call,
    test_clause2_leaves_stream_and_device_as_they_were,
    test_clause3_a_held_stream_holds_no_other_call,
    test_clause3_only_the_held_one_waits_for_the_least_recently_used_context,
    test_clause3_sharing_a_context_waits_on_the_device_and_asks_no_event,
    test_clause3_sixty_four_threads_share_one_context,
    test_clause3_the_memory_limit_is_kept,
    test_clause4_inputs_are_freed_right_after_the_call,
    test_clause4_outputs_are_ordinary_and_their_own,
    test_clause4_the_engine_is_dropped_with_work_in_flight,
    test_clause4_what_is_handed_back_is_the_callers,
    test_clause6_an_engine_that_goes_inside_a_capture_does_it_no_harm,
    test_clause6_compiling_beside_a_strangers_capture_does_it_no_harm,
    test_clause6_random_models_draw_anew_in_a_users_graph,
    test_clause6_two_user_graphs_replay_beside_direct_calls_after_the_engine_is_gone,
    test_clause6_what_a_graph_has_baked_in_is_freed_with_it,
    test_clause6_what_cannot_be_captured_raises,
    test_clause7_autocast_and_inference_mode_of_the_caller_change_nothing,
    test_clause7_flags_are_frozen_at_compile,
    test_clause8_an_error_inside_a_call_leaves_no_half_used_context,
    test_clause8_bad_input_raises_before_device_work_and_the_engine_stays_usable,
    test_clause8_closed_engines_say_so,
)
from contract.support import PATHS, Make, Mlp, Rig

# The schedule that finds missing waits; the other one is for the backends of `test_device_contract.py`.
pytestmark = pytest.mark.parametrize("rig", ["lazy"], indirect=True)


@pytest.fixture(autouse=True)
def with_state(rig: Rig) -> None:
    stateful.install(rig.seam)
    rig.defaults = {"backend": stateful.NAME}


@PATHS
def test_code_goes_where_the_host_may_wait(rig: Rig, runtime: str, graphs: bool) -> None:
    def use() -> anabranch.Engine:
        model = Mlp().eval().requires_grad_(False).to(rig.device())
        engine = anabranch.compile(model, [x], runtime=runtime, cuda_graphs=graphs, **rig.defaults)
        engine(x)
        rig.module.synchronize()
        return engine

    def loaded() -> list[int]:
        return sorted(id(code) for code in stateful.Code.alive if code not in others)

    x = rig.random(4, 256)
    others = weakref.WeakSet(stateful.Code.alive)  # of tests before this one
    engine = use()
    before = loaded()
    assert before
    del engine
    gc.collect()
    rig.seam.reap()
    assert loaded() == before  # nobody waited
    engine = use()
    assert len(loaded()) == len(before)  # to load more is to wait anyway
    rig.module.synchronize()
    engine.close()
    gc.collect()
    rig.seam.free_code()
    assert not loaded()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_clause7_the_same_bits_on_every_path_stream_thread_and_context(
    rig: Rig, compiled: Make, dtype: torch.dtype
) -> None:
    same_bits(rig, compiled, stateful.NAME, dtype)
