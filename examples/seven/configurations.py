"""Configurations of transformers for the seven models: at true size as published, and small for a CPU.

Nothing is downloaded. Where a size is not published, or a part has no class in transformers, ``docs/models.md`` says
what stands in. transformers is imported by the first call, because that takes seconds.
"""

from __future__ import annotations

from typing import Any


def _rotary(*sections: int, theta: float = 10_000.0, **more: Any) -> dict[str, Any]:
    kind = {"rope_type": "default", "rope_theta": theta, **more}
    return kind | ({"mrope_section": list(sections)} if sections else {})


#: Ids of a small vocabulary for what stands around and in the place of a picture or a sound.
_SMALL_VOCABULARY = 160
_SMALL_IMAGE = {
    "image_token_id": 150,
    "image_start_token_id": 151,
    "image_end_token_id": 152,
    "video_token_id": 153,
    "video_start_token_id": 154,
    "video_end_token_id": 155,
}
_SMALL_TEXT: dict[str, Any] = {
    "vocab_size": _SMALL_VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SMALL_GLM_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "image_size": 56,
    "out_hidden_size": 64,
    "intermediate_size": 96,
}


def glm4v(small: bool) -> Any:
    """Of AutoGLM-Phone-9B, by the published sizes of GLM-4.1V-9B."""
    import transformers

    if not small:
        text = {"rope_parameters": _rotary(8, 12, 12, partial_rotary_factor=0.5), "max_position_embeddings": 65_536}
        return transformers.Glm4vConfig(text_config=text)
    text = {**_SMALL_TEXT, "rope_parameters": _rotary(1, 1, 2, partial_rotary_factor=0.5)}
    return transformers.Glm4vConfig(text_config=text, vision_config=_SMALL_GLM_VISION, **_SMALL_IMAGE)


def glm4v_moe(small: bool) -> Any:
    """Of GLM-4.6V, by the published sizes of the 106 B class (128 experts, 8 of them for a token)."""
    import transformers

    if not small:
        text = {
            "rope_parameters": _rotary(8, 12, 12, partial_rotary_factor=0.5),
            "vocab_size": 151_552,
            "head_dim": 128,
            "max_position_embeddings": 131_072,
        }
        return transformers.Glm4vMoeConfig(text_config=text)
    text = {
        **_SMALL_TEXT,
        "rope_parameters": _rotary(1, 1, 2, partial_rotary_factor=0.5),
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    return transformers.Glm4vMoeConfig(text_config=text, vision_config=_SMALL_GLM_VISION, **_SMALL_IMAGE)


def deepseek_v3(small: bool, layers: int = 61) -> Any:
    """Of Kimi-K2-Thinking. ``layers``: how many of its 61, at true size."""
    import transformers

    if not small:
        return transformers.DeepseekV3Config(
            vocab_size=163_840,
            hidden_size=7168,
            intermediate_size=18_432,
            moe_intermediate_size=2048,
            num_hidden_layers=layers,
            num_attention_heads=64,
            num_key_value_heads=64,
            n_shared_experts=1,
            n_routed_experts=384,
            num_experts_per_tok=8,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            routed_scaling_factor=2.827,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
            rms_norm_eps=1e-5,
            max_position_embeddings=131_072,
            num_nextn_predict_layers=0,
            rope_parameters=_rotary(theta=50_000.0),
        )
    sizes = {k: v for k, v in _SMALL_TEXT.items() if k != "head_dim"}
    return transformers.DeepseekV3Config(
        **{**sizes, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.0,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_nextn_predict_layers=0,
        rope_parameters=_rotary(),
    )


def hunyuan_vl(small: bool) -> Any:
    """Of HunyuanOCR (about one billion parameters)."""
    import transformers

    if not small:
        text = {
            "vocab_size": 120_818,
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "rope_parameters": {**_rotary(16, 16, 16, 16, alpha=1000.0), "rope_type": "dynamic", "factor": 1.0},
        }
        return transformers.HunYuanVLConfig(
            text_config=text, vision_config={"out_hidden_size": 1024, "text_hidden_size": 1024}
        )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "out_hidden_size": 64,
        "text_hidden_size": 64,
        "max_image_size": 128,
    }
    special = {"image_token_id": 150, "im_start_id": 151, "im_end_id": 152, "im_newline_id": 153}
    stretched = {**_rotary(2, 2, 2, 2, alpha=1000.0), "rope_type": "dynamic", "factor": 1.0}
    text = {**_SMALL_TEXT, "rope_parameters": stretched}
    return transformers.HunYuanVLConfig(text_config=text, vision_config=vision, **special)


def glmasr(small: bool) -> Any:
    """Of GLM-ASR-Nano-2512, whose sizes are the defaults of its class."""
    import transformers

    if not small:
        return transformers.GlmAsrConfig()
    sound = {
        "hidden_size": 32,
        "intermediate_size": 128,  # four of the encoder's frames become one token
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 16,
        "max_position_embeddings": 128,
    }
    text = {**_SMALL_TEXT, "model_type": "llama", "rope_parameters": _rotary()}
    return transformers.GlmAsrConfig(audio_config=sound, text_config=text, audio_token_id=150)


def llama(small: bool) -> Any:
    """Stands in for the speech-token model of GLM-TTS: its class is public, its sizes are ours."""
    import transformers

    if not small:
        return transformers.LlamaConfig(
            vocab_size=98_304,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=4,
            max_position_embeddings=8192,
            rope_parameters=_rotary(),
        )
    return transformers.LlamaConfig(**_SMALL_TEXT, rope_parameters=_rotary())


def qwen2(small: bool) -> Any:
    """Stands in for Spark-Formalizer-X1-7B, at the sizes of Qwen2-7B."""
    import transformers

    if not small:
        return transformers.Qwen2Config(
            vocab_size=152_064,
            hidden_size=3584,
            intermediate_size=18_944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=32_768,
            rope_parameters=_rotary(theta=1_000_000.0),
        )
    return transformers.Qwen2Config(**_SMALL_TEXT, rope_parameters=_rotary())
