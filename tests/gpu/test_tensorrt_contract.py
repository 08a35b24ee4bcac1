"""The stream contract's clauses on CUDA once more, with TensorRT: its execution contexts are for one run at a time.

Left out of ``test_contract.py``'s, with the reason: see ``LEFT_OUT``.
"""

from __future__ import annotations

import pytest

from anabranch.backends.tensorrt import library
from anabranch.errors import BuildError
from contract import clauses
from contract.clauses import *  # noqa: F403  # pytest collects them here
from gpu.support import Gpu

#: Clauses that say nothing of TensorRT, or nothing that TensorRT promises.
LEFT_OUT = {
    "test_clause6_compiling_beside_other_codes_capture_does_it_no_harm": (
        "where TensorRT makes execution contexts it ends captures of other threads in the mode global;"
        " `test_calls_beside_other_codes_captures_do_them_no_harm` says what holds"
    ),
    "test_clause6_random_models_draw_anew_in_a_users_graph": (
        "its random operator runs in PyTorch; of its sum with the input TensorRT does not promise PyTorch's bits"
    ),
    "test_clause8_bad_input_raises_before_device_work_and_the_engine_stays_usable": (
        "of one of its bad inputs only a first run shows that the model does not take it; TensorRT may build an engine"
        " by then, and the memory that PyTorch has in use need not come back to the byte"
    ),
}

for _name in LEFT_OUT:
    del globals()[_name]


@pytest.fixture
def backend() -> str:
    return "tensorrt"


@pytest.fixture(autouse=True)
def with_tensorrt(gpu_probe: str | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests compile for TensorRT, and build execution contexts ahead."""
    if gpu_probe is not None:
        return  # tests/conftest.py skips, or fails
    try:
        found = library()
    except BuildError as e:
        pytest.skip(f"TensorRT cannot be imported: {e}")
    # The clauses' models have float32 products. These are to be in engines here, in TF32 or not.
    monkeypatch.setattr(type(found), "keeps_float32", True)
    rig: Gpu = request.getfixturevalue("rig")
    rig.defaults = {"backend": "tensorrt"}
    # An execution context loads its kernels' code when it is made, and that waits for streams that a latch holds.
    rig.builds_ahead = True


def test_no_clause_is_left_out_without_a_reason() -> None:
    assert set(LEFT_OUT) <= set(clauses.__all__)
    assert set(clauses.__all__) == {name for name in globals() if name in clauses.__all__} | set(LEFT_OUT)
