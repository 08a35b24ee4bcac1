"""Architectures of the library transformers, as people call them: right, of eager's class, from two threads at once."""

from __future__ import annotations

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny_transformers
import torch

import anabranch
from anabranch._judge import Rounding, differences

# Looked up, not imported: that takes seconds, which a run of other tests need not pay.
if importlib.util.find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "transformers is not installed; run `make install`, or pip install -r requirements/dev.txt"
    )

#: On Inductor a push runs one of each kind: an encoder, a text's continuation, a mixture of experts, a vision model.
PUSH = ("bert", "llama", "mixtral", "vit")
CASES = [
    *(pytest.param(name, "eager", id=f"{name}-eager") for name in tiny_transformers.MODELS),
    *(
        pytest.param(name, "inductor", id=f"{name}-inductor", marks=() if name in PUSH else pytest.mark.slow)
        for name in tiny_transformers.MODELS
    ),
]


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_right_of_the_same_class_and_from_two_threads(name: str, backend: str) -> None:
    model, inputs = tiny_transformers.MODELS[name]()
    # Inductor orders sums in its own way.
    rounding = Rounding() if backend == "inductor" else None
    calls = [inputs(torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    with torch.no_grad():
        expected = [model(**call) for call in calls]
    assert differences(*expected), "the outputs do not depend on the inputs"

    with anabranch.compile(model, kwargs=calls[0], backend=backend) as engine:
        serial = [engine(**call) for call in calls]
        for result, wanted in zip(serial, expected, strict=True):
            assert type(result) is type(wanted)
            assert differences(result, wanted, rounding=rounding) == []

        barrier = threading.Barrier(2, timeout=60)

        def work(call: dict[str, Any]) -> list[Any]:
            barrier.wait()
            return [engine(**call) for _ in range(4)]

        with ThreadPoolExecutor(2) as threads:
            for results, wanted in zip(threads.map(work, calls), serial, strict=True):
                for result in results:
                    assert differences(result, wanted) == []


@pytest.mark.parametrize("name", ["llama", "mamba", "t5"])
def test_a_cache_is_refused_with_what_to_do(name: str) -> None:
    model, inputs = tiny_transformers.MODELS[name]()
    call = inputs(torch.Generator().manual_seed(1))
    del call["use_cache"]
    with pytest.raises(anabranch.UnsupportedModel, match=r"returns a transformers\..*Cache.*use_cache=False"):
        anabranch.compile(model, kwargs=call, backend="eager")
