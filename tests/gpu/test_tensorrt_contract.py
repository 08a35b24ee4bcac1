"""The stream contract's clauses on CUDA once more, with TensorRT: its execution contexts are for one run at a time.

Left out of ``test_contract.py``'s, with the reason: see ``LEFT_OUT``.
"""

from __future__ import annotations

import pytest
import torch

from anabranch.backends.tensorrt import library
from anabranch.errors import BuildError
from contract import clauses
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
    test_clause6_two_user_graphs_replay_beside_direct_calls_after_the_engine_is_gone,
    test_clause6_what_a_graph_has_baked_in_is_freed_with_it,
    test_clause6_what_cannot_be_captured_raises,
    test_clause7_autocast_and_inference_mode_of_the_caller_change_nothing,
    test_clause7_flags_are_frozen_at_compile,
    test_clause8_an_error_inside_a_call_leaves_no_half_used_context,
    test_clause8_closed_engines_say_so,
)
from gpu.support import Gpu, Make

#: Clauses that say nothing of TensorRT, or nothing that TensorRT promises.
LEFT_OUT = {
    "test_clause6_compiling_beside_a_strangers_capture_does_it_no_harm": (
        "where TensorRT makes execution contexts it ends captures of other threads in the mode global;"
        " `test_calls_beside_strangers_captures_do_them_no_harm` says what holds"
    ),
    "test_clause6_random_models_draw_anew_in_a_users_graph": (
        "its random operator runs in PyTorch; of its sum with the input TensorRT does not promise PyTorch's bits"
    ),
    "test_clause8_bad_input_raises_before_device_work_and_the_engine_stays_usable": (
        "of one of its bad inputs only a first run shows that the model does not take it; TensorRT may build an engine"
        " by then, and the memory that PyTorch has in use need not come back to the byte"
    ),
}


@pytest.fixture(autouse=True)
def with_tensorrt(gpu_probe: str | None, request: pytest.FixtureRequest) -> None:
    """These tests compile for TensorRT, and build execution contexts ahead."""
    if gpu_probe is not None:
        return  # tests/conftest.py skips, or fails
    try:
        library()
    except BuildError as e:
        pytest.skip(f"TensorRT cannot be imported: {e}")
    rig: Gpu = request.getfixturevalue("rig")
    rig.defaults = {"backend": "tensorrt"}
    # An execution context loads its kernels' code when it is made, and that waits for streams that a latch holds.
    rig.builds_ahead = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_clause7_the_same_bits_on_every_path_stream_thread_and_context(
    rig: Gpu, compiled: Make, dtype: torch.dtype
) -> None:
    same_bits(rig, compiled, "tensorrt", dtype)


def test_no_clause_is_left_out_without_a_reason() -> None:
    every = {name for name in dir(clauses) if name.startswith("test_")}
    assert every == {name for name in globals() if name in every} | set(LEFT_OUT)
    assert not set(LEFT_OUT) & set(globals())
