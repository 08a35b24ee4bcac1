"""Architectures of the library transformers at a size for tests: random weights, a few dozen hidden units, two layers.

``MODELS`` has a builder for each. transformers is imported by the first of them that is called, because that takes
seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

Inputs = dict[str, Any]

VOCABULARY, HIDDEN, LAYERS, HEADS = 99, 32, 2, 4
BATCH, LENGTH, PIXELS = 2, 12, 32
#: Of decoders that make texts.
DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # so that texts differ, and do not end in one word again and again
}


class Tiny(NamedTuple):
    """A model in eval mode, float32 on the CPU, and what makes its keyword arguments.

    Two generators of other seeds give inputs of the same shapes and dtypes with other values.
    """

    model: nn.Module
    inputs: Callable[[torch.Generator], Inputs]


def ids(generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    """int64 ``(BATCH, length)``; none is the padding's."""
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=generator)


def pixels(generator: torch.Generator) -> torch.Tensor:
    """float32 ``(BATCH, 3, PIXELS, PIXELS)``."""
    return torch.randn(BATCH, 3, PIXELS, PIXELS, generator=generator)


def masked(generator: torch.Generator) -> Inputs:
    """Sequences, the second of which ends in padding; how much, varies."""
    length = torch.randint(LENGTH // 2, LENGTH, (1,), generator=generator)
    mask = torch.arange(LENGTH) < torch.stack([torch.tensor([LENGTH]), length])
    return {"input_ids": ids(generator), "attention_mask": mask.long()}


def sequences(generator: torch.Generator) -> Inputs:
    return {"input_ids": ids(generator), "use_cache": False}


def pairs(generator: torch.Generator) -> Inputs:
    """What is read, and the beginning of what is written."""
    return {**masked(generator), "decoder_input_ids": ids(generator, 5), "use_cache": False}


def images(generator: torch.Generator) -> Inputs:
    return {"pixel_values": pixels(generator)}


#: What most configurations call the sizes.
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, **SPECIAL, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {**SIZES, "image_size": PIXELS, "patch_size": 8}
PAIRED = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "max_position_embeddings": 64,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def build(kind: str, configuration: str, inputs: Callable[[torch.Generator], Inputs], **sizes: Any) -> Tiny:
    """``kind`` and ``configuration``: classes of transformers, by name."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, configuration)(**sizes)).eval()
        # Biases and the weights of norms begin as zeros and ones, which no error could show in.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return Tiny(model, inputs)


def text(kind: str, configuration: str, **sizes: Any) -> Callable[[], Tiny]:
    """A model that goes on with a text."""
    return functools.partial(build, kind, configuration, sequences, **sizes)


def encoder(name: str, **sizes: Any) -> Callable[[], Tiny]:
    return functools.partial(build, f"{name}Model", f"{name}Config", masked, **sizes)


def clip() -> Tiny:
    written = {**TEXT, **SPECIAL}
    inputs = lambda generator: {**masked(generator), **images(generator)}  # noqa: E731
    return build("CLIPModel", "CLIPConfig", inputs, text_config=written, vision_config=IMAGE, projection_dim=16)


def whisper() -> Tiny:
    def inputs(generator: torch.Generator) -> Inputs:
        sound = torch.randn(BATCH, 8, 40, generator=generator)
        return {"input_features": sound, "decoder_input_ids": ids(generator, 5), "use_cache": False}

    sizes = {key: value for key, value in PAIRED.items() if key != "max_position_embeddings"}
    sizes |= {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16, "decoder_start_token_id": 1}
    return build("WhisperForConditionalGeneration", "WhisperConfig", inputs, **sizes)


def wav2vec2() -> Tiny:
    def inputs(generator: torch.Generator) -> Inputs:
        return {"input_values": torch.randn(BATCH, 400, generator=generator)}

    convolutions = {"conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 2)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return build("Wav2Vec2ForCTC", "Wav2Vec2Config", inputs, **SIZES, vocab_size=20, **convolutions, **positions)


MODELS: dict[str, Callable[[], Tiny]] = {
    # Encoders, with attention masks.
    "bert": encoder("Bert", **TEXT),
    "distilbert": encoder(
        "DistilBert", vocab_size=VOCABULARY, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=48
    ),
    "mpnet": encoder("MPNet", **TEXT),
    "deberta_v2": encoder(
        "DebertaV2", **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
    ),
    "modernbert": encoder(
        "ModernBert", **TEXT, **SPECIAL, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2
    ),
    # Models that go on with a text.
    "gpt2": text(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, **SPECIAL
    ),
    "opt": text("OPTForCausalLM", "OPTConfig", **{**TEXT, **SPECIAL}, ffn_dim=48, word_embed_proj_dim=HIDDEN),
    "falcon": text("FalconForCausalLM", "FalconConfig", **TEXT, **SPECIAL),
    "llama": text("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "qwen2": text("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    "qwen3": text("Qwen3ForCausalLM", "Qwen3Config", **GROUPED),
    "gemma": text("GemmaForCausalLM", "GemmaConfig", **GROUPED),
    "phi3": text("Phi3ForCausalLM", "Phi3Config", **GROUPED),
    # Mixtures of experts.
    "mixtral": text("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": text("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **GROUPED, **EXPERTS, num_experts=4),
    "deepseek_v3": text(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        **{**TEXT, **SPECIAL, **EXPERTS},
        n_group=2,
        topk_group=1,
        n_routed_experts=4,
        first_k_dense_replace=1,
        num_key_value_heads=HEADS,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    # A state space.
    "mamba": text(
        "MambaForCausalLM",
        "MambaConfig",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        state_size=4,
        **SPECIAL,
    ),
    # From one sequence to another.
    "t5": functools.partial(
        build,
        *("T5ForConditionalGeneration", "T5Config", pairs),
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=48,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
    ),
    "bart": functools.partial(build, "BartForConditionalGeneration", "BartConfig", pairs, **PAIRED),
    # Pictures.
    "vit": functools.partial(build, "ViTForImageClassification", "ViTConfig", images, **IMAGE),
    "siglip": functools.partial(build, "SiglipVisionModel", "SiglipVisionConfig", images, **IMAGE),
    "dinov2": functools.partial(build, "Dinov2Model", "Dinov2Config", images, **IMAGE),
    "clip": clip,
    # Sound.
    "whisper": whisper,
    "wav2vec2": wav2vec2,
}
