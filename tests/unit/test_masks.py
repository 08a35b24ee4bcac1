"""Attention masks of transformers: as in eager, which asks the positions and leaves masks out where it can."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers as t
from tiny_transformers import DECODER
from torch import nn
from transformers import masking_utils

import anabranch
from anabranch import Dim, Input
from anabranch.export import export_program
from anabranch.export._masks import masks_as_in_eager
from contract.support import assert_same

pytestmark = pytest.mark.usefixtures("seeded")

SIZES: dict[str, Any] = {**DECODER, "max_position_embeddings": 64}
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class Logits(nn.Module):
    """``positions``: computes them of the ids' shape; None: the library does."""

    def __init__(self, model: nn.Module, positions: Any = None) -> None:
        super().__init__()
        self.model, self.positions = model, positions

    def forward(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        if self.positions is not None:
            positions = self.positions(ids.shape[1])[None]
        logits: torch.Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits


def llama(positions: Any = None) -> Logits:
    return Logits(t.LlamaForCausalLM(t.LlamaConfig(**SIZES)), positions).eval().requires_grad_(False)


def paligemma() -> Logits:
    """Without token types it hides nothing in eager; the mask that is made while it is exported is causal."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = t.PaliGemmaConfig(
        text_config={"model_type": "gemma", **SIZES, "head_dim": 8},
        vision_config={"model_type": "siglip_vision_model", **vision, "image_size": 16, "patch_size": 8},
        image_token_index=90,
        projection_dim=32,
    )
    return Logits(t.PaliGemmaForConditionalGeneration(config)).eval().requires_grad_(False)


def ids(length: int = 12) -> torch.Tensor:
    return torch.randint(3, 80, (1, length))


@pytest.mark.parametrize("make", [llama, paligemma])
def test_no_mask_is_made_where_eager_makes_none(make: Any) -> None:
    model = make()
    program = export_program(model, (ids(),), {})
    attentions = program.module.graph.find_nodes(op="call_function", target=_ATTENTION)
    assert len(attentions) == 2
    assert not any(mask is not None for n in attentions for mask in (*n.args[3:4], n.kwargs.get("attn_mask")))
    with anabranch.compile(model, [ids()], backend="eager") as engine:
        for _ in range(2):
            x = ids()
            assert_same(engine(x), model(x))


def test_texts_that_are_packed_do_not_see_each_other() -> None:
    packed = lambda n: torch.arange(n) % 5  # noqa: E731
    model = llama(packed)
    x = ids()
    with anabranch.compile(model, [ids()], backend="eager") as engine:
        torch.testing.assert_close(engine(x), model(x))
    assert not torch.allclose(model(x), model.model(input_ids=x, use_cache=False).logits)


def test_positions_that_are_inputs_may_be_of_packed_texts_or_of_one() -> None:
    model, one = llama(), torch.arange(12)[None]
    with anabranch.compile(model, [ids(), one], backend="eager") as engine:
        for positions in (one, torch.cat([one[:, :7], one[:, :5]], 1), one + 3):
            x = ids()
            torch.testing.assert_close(engine(x, positions), model(x, positions))


def test_lengths_that_vary_have_masks_for_each() -> None:
    model = llama()
    with anabranch.compile(model, [Input((1, Dim("length", 1, 32)), torch.int64)], backend="eager") as engine:
        for length in (1, 2, 12, 32):
            x = ids(length)
            torch.testing.assert_close(engine(x), model(x))


def test_other_threads_exports_are_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking_utils, "is_torchdynamo_exporting", lambda: True)
    before = masking_utils.is_torchdynamo_exporting, masking_utils.find_packed_sequence_indices
    seen: list[bool] = []

    def ask() -> None:
        seen.append(masking_utils.is_torchdynamo_exporting())

    with masks_as_in_eager():
        other = threading.Thread(target=ask)
        other.start()
        other.join()
        ask()
    ask()
    assert seen == [True, False, True]
    assert (masking_utils.is_torchdynamo_exporting, masking_utils.find_packed_sequence_indices) == before
