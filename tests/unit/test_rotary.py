"""Rotary embeddings whose frequencies depend on positions: in one graph, each call like a model's first one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t

import anabranch
from anabranch.export import _rotary
from anabranch.generation import Decoder, tokens
from contract.support import assert_same

#: How many tokens the frequencies are for that a model begins with.
NEAR = 16
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": NEAR,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 4.0, 6.0, 8.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}


def _llama() -> Any:
    return t.LlamaForCausalLM(t.LlamaConfig(**SIZES, max_position_embeddings=NEAR, rope_parameters=dict(DYNAMIC)))


def _phi3() -> Any:
    return t.Phi3ForCausalLM(
        t.Phi3Config(
            **SIZES, max_position_embeddings=8 * NEAR, original_max_position_embeddings=NEAR, rope_parameters=dict(LONG)
        )
    )


def _gemma(kind: dict[str, Any], most: int) -> Any:
    """One type of its layers has positions of which nobody asks anything."""
    parameters = {"full_attention": dict(kind), "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
    config = t.Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=8,
        max_position_embeddings=most,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=parameters,
        tie_word_embeddings=False,
    )
    return t.Gemma3ForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama-dynamic": _llama,
    "phi3-longrope": _phi3,
    "gemma-dynamic": lambda: _gemma(DYNAMIC, NEAR),
    "gemma-longrope": lambda: _gemma(LONG, 8 * NEAR),
}


def made(name: str) -> Any:
    torch.manual_seed(3)
    model = MODELS[name]().eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(autouse=True)
def always_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eager, transformers leaves the causal mask out where it can, which takes a kernel that rounds otherwise."""
    import transformers.masking_utils

    monkeypatch.setattr(transformers.masking_utils, "_ignore_causal_mask_sdpa", lambda *args, **kwargs: False)


def engine_of(model: Any, *args: Any, **options: Any) -> anabranch.Engine:
    return anabranch.compile(model, *args, backend="eager", require_full=True, dynamic=False, **options)


@pytest.mark.parametrize("name", MODELS)
def test_each_call_has_the_frequencies_of_its_own_positions(name: str) -> None:
    """Near and far in any order, by one graph; what eager gives that has not been called before."""
    model = made(name)
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))

    def inputs(last: int) -> dict[str, Any]:
        positions = torch.arange(last - 11, last + 1).repeat(2, 1)
        return {"input_ids": ids, "position_ids": positions, "use_cache": False}

    engine = engine_of(model, [], kwargs=inputs(11))
    near, far = 0, 0
    for last in (NEAR - 2, 40, NEAR - 1, NEAR, 25, 11):
        expected = copy.deepcopy(model)(**inputs(last)).logits
        assert_same(engine(**inputs(last)).logits, expected)
        # And the case is none without a question: the other frequencies give something else.
        always_near = copy.deepcopy(model)
        for layer in always_near.modules():
            if hasattr(layer, "rope_type"):
                layer.rope_type = dict.fromkeys(layer.rope_type, "default") if name.startswith("gemma") else "default"
        if torch.equal(always_near(**inputs(last)).logits, expected):
            near += 1
        else:
            far += 1
    assert (near, far) == (3, 3)
    assert len(engine.summary()["signatures"]) == 1


@pytest.mark.parametrize("name", [n for n in MODELS if n != "gemma-longrope"])  # which eager calls far only once
def test_a_text_that_grows_beyond(name: str) -> None:
    """Sessions write what eager writes with the same cache, from near to far."""
    model = made(name)
    prompt = torch.randint(3, 96, (1, 5), generator=torch.Generator().manual_seed(2))
    # Not ``generate``: of Phi-3 it reads the whole text again when that has grown too long.
    expected = list(map(int, itertools.islice(tokens(Decoder(copy.deepcopy(model), 32), prompt), 24)))
    assert len(set(expected)) > 4
    engine = engine_of(Decoder(model, 32), [prompt])
    engine.warm([prompt[:, :1]])
    sessions = [engine.session(), engine.session()]
    texts = [tokens(s, prompt) for s in sessions]
    found = [list(map(int, pair)) for pair in itertools.islice(zip(*texts, strict=True), 24)]
    assert found == [[token, token] for token in expected]


def test_nothing_is_kept_of_a_call() -> None:
    model = made("llama-dynamic")
    before = copy.deepcopy(dict(model.model.rotary_emb.named_buffers()))
    ids = torch.randint(3, 96, (1, 30), generator=torch.Generator().manual_seed(1))
    engine_of(model, [ids], kwargs={"use_cache": False})
    rotary = model.model.rotary_emb
    assert "forward" not in rotary.__dict__
    assert rotary.max_seq_len_cached == NEAR
    for name, x in rotary.named_buffers():
        assert_same(x, before[name])


def test_a_model_that_has_been_far_goes_back() -> None:
    """What eager has kept of a far call is given up by its next near one, and by an engine's."""
    model = made("llama-dynamic")
    ids = torch.randint(3, 96, (1, 30), generator=torch.Generator().manual_seed(1))
    near = {"input_ids": ids[:, :12], "use_cache": False}
    expected = model(**near).logits
    model(input_ids=ids, use_cache=False)
    assert model.model.rotary_emb.max_seq_len_cached == 30
    assert_same(engine_of(model, [], kwargs=near)(**near).logits, expected)


def test_only_what_asks_is_changed() -> None:
    plain = t.LlamaForCausalLM(t.LlamaConfig(**SIZES, max_position_embeddings=NEAR)).eval()
    own = made("llama-dynamic")
    own.model.rotary_emb.forward = lambda x, positions: (x, x)
    for model in (plain, own):
        forward = model.model.rotary_emb.forward
        with _rotary.without_questions(model):
            assert model.model.rotary_emb.forward == forward
        assert model.model.rotary_emb.forward == forward
    assert "forward" not in plain.model.rotary_emb.__dict__
