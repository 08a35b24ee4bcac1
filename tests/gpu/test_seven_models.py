"""The seven models of ``examples/models.py``, small and in float32, from four threads on four streams of a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers")

NAMES = (
    "autoglm-phone-9b",
    "glm-4.6v-fp8",
    "kimi-k2-thinking",
    "hunyuanocr",
    "glm-asr-nano-2512",
    "glm-tts",
    "spark-formalizer-x1-7b",
)


@pytest.fixture(scope="module")
def models() -> Iterator[Any]:
    """The example, which imports what is beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
        import models

        yield models
        for name in [name for name in sys.modules if name == "models" or name.split(".")[0] == "seven"]:
            del sys.modules[name]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_four_streams_get_what_one_gets_alone(
    models: Any, name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and as near eager as sums in another order are."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # each convolution may round its own way there
    with torch.no_grad():
        run = models.Run(name, "cuda", torch.float32, {"backend": backend}, small=True)
        row = run.check(sessions=4, count=8, rounds=2)
    assert row["wrong"] == 0, row
    assert row["right"], row
    assert row["answers"] == 12
    assert row["answers_differ"]
