"""The models of ``benchmarks/zoo.py``: random weights and inputs for any name of torchvision, timm and transformers.

A name is ``family/name``. The families are

- ``tv``: what ``torchvision.models.get_model`` knows: classification, segmentation, detection, video, optical flow;
- ``timm``: what ``timm.create_model`` knows;
- ``hf``: a ``model_type`` of transformers, made very small;
- ``real``: transformers at the sizes that people run.

Nothing is downloaded. The libraries are imported when a model of theirs is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_LISTS = {
    "tv": (
        "resnet18 vgg11_bn squeezenet1_1 mobilenet_v2 mobilenet_v3_small efficientnet_b0 convnext_tiny swin_t vit_b_16"
        " googlenet inception_v3 shufflenet_v2_x1_0 alexnet resnext50_32x4d densenet121 mnasnet1_0 regnet_y_400mf"
        " maxvit_t deeplabv3_resnet50 lraspp_mobilenet_v3_large fasterrcnn_resnet50_fpn ssdlite320_mobilenet_v3_large"
        " r3d_18 s3d mvit_v2_s raft_small"
    ),
    "timm": (
        "vit_tiny_patch16_224 deit3_small_patch16_224 cait_xxs24_224 poolformer_s12 mixer_s16_224 resmlp_12_224"
        " coatnet_nano_rw_224 convnextv2_atto edgenext_xx_small efficientformer_l1 fastvit_t8 hiera_tiny_224"
        " mobilenetv4_conv_small dm_nfnet_f0 repvgg_a0 tiny_vit_5m_224 twins_pcpvt_small ghostnet_100 hrnet_w18_small"
        " cspresnet50 ese_vovnet19b_dw skresnet18 xception41 nasnetalarge crossvit_tiny_240 sequencer2d_s"
        " visformer_tiny nextvit_small beit_base_patch16_224 levit_128 mobilevit_xxs"
    ),
    "hf": (
        "bert distilbert mpnet deberta-v2 roberta electra albert gpt2 opt falcon llama qwen2 qwen3 mistral mixtral phi"
        " gemma3_text t5 bart clip siglip vit dinov2 beit mamba deepseek_v3 glm4 glm4v glmasr hunyuan_vl qwen2_vl"
        " gpt_oss cohere2 granite smollm3 modernbert"
    ),
    "real": "bert-base vit-b16 llama-1b",
}
#: Each family's default list.
NAMES: dict[str, list[str]] = {family: names.split() for family, names in _LISTS.items()}


@dataclass
class Inputs:
    """Of one call; tensors are on the CPU and in float32 where they are made."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Sizes:
    """Of the inputs of one call; 0: as the model's own inputs have it.

    ``batch``: samples. ``length``: tokens of a text that is read. ``target``: tokens that are written so far, by models
    from one sequence to another.
    """

    batch: int = 0
    length: int = 0
    target: int = 0


def default_names(families: list[str]) -> list[str]:
    """``family/name`` of all models in the default lists of these families."""
    return [f"{family}/{name}" for family in families for name in NAMES[family]]


def make(name: str, sizes: Sequence[Sizes] = (Sizes(),) * 4) -> tuple[nn.Module, list[Inputs]]:
    """A model in eval mode on the CPU in float32, and different inputs, of each of these sizes.

    Raises ``LookupError`` for a family or a name that is not known, and what the library raises.
    """
    family, _, rest = name.partition("/")
    if family not in _MAKERS or not rest:
        raise LookupError(f"no model {name!r}; a name is one of {', '.join(f'{f}/NAME' for f in _MAKERS)}")
    torch.manual_seed(0)
    model, inputs = _MAKERS[family](rest, sizes, torch.Generator().manual_seed(1))
    return model.eval().requires_grad_(False), inputs


def _pictures(sizes: Sequence[Sizes], generator: torch.Generator, *shape: int) -> list[Inputs]:
    """``shape``: of one picture."""
    return [Inputs((torch.randn(s.batch or 1, *shape, generator=generator),)) for s in sizes]


# -- torchvision ------------------------------------------------------------------------------------------------------


def _torchvision(name: str, sizes: Sequence[Sizes], generator: torch.Generator) -> tuple[nn.Module, list[Inputs]]:
    import torchvision

    build = torchvision.models.get_model_builder(name)
    kind = build.__module__.removeprefix("torchvision.models.").split(".")[0]
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(build).parameters:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    if kind == "detection":
        if "320" not in name:
            options |= {"min_size": 320, "max_size": 320}
        # A list of pictures, of which a batch is no size of a tensor.
        pictures = [[torch.rand(3, 320, 320, generator=generator) for _ in range(s.batch or 1)] for s in sizes]
        return build(**options), [Inputs((p,)) for p in pictures]
    if kind == "optical_flow":
        frames = [[torch.rand(s.batch or 1, 3, 128, 160, generator=generator) for _ in range(2)] for s in sizes]
        return build(**options), [Inputs(tuple(pair)) for pair in frames]
    if kind == "video":
        size = 112 if name in ("r3d_18", "mc3_18", "r2plus1d_18") else 224
        return build(**options), _pictures(sizes, generator, 3, 16, size, size)
    size = 299 if name == "inception_v3" else 224
    return build(**options), _pictures(sizes, generator, 3, size, size)


def _timm(name: str, sizes: Sequence[Sizes], generator: torch.Generator) -> tuple[nn.Module, list[Inputs]]:
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, _pictures(sizes, generator, *model.pretrained_cfg.get("input_size", (3, 224, 224)))


# -- transformers -----------------------------------------------------------------------------------------------------

_VOCABULARY = 200
#: What a configuration gets of these, where it has them.
_SMALL: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "embedding_size": 64,
    "embed_dim": 64,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "d_ff": 128,
    "ffn_dim": 128,
    "intermediate_size": 128,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 256,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Token ids that a configuration's own default puts outside the small vocabulary.
_TOKENS = ("decoder_start_token_id", "cls_token_id", "sep_token_id", "forced_eos_token_id")


def _rotary(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sections)}}


#: What a model needs beyond that; a dot leads into a part of the configuration, and None leaves a value at its default.
_SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"head_dim": None, "num_key_value_heads": 4},
    "falcon": {"new_decoder_architecture": False},
    "glm4v": {
        "text_config": _rotary(2, 3, 3),
        "vision_config": {"out_hidden_size": 64, "image_size": 56, "patch_size": 14, "temporal_patch_size": 2},
        "image_token_id": 150,
        "image_start_token_id": 151,
        "image_end_token_id": 152,
        "video_token_id": 153,
        "video_start_token_id": 154,
        "video_end_token_id": 155,
    },
    "glmasr": {"text_config": {"model_type": "llama"}, "audio_token_id": 150},
    "hunyuan_vl": {"text_config": _rotary(2, 2, 2, 2), "vision_config": {"out_hidden_size": 64}},
    "qwen2_vl": {"text_config": _rotary(2, 3, 3), "vision_config": {"hidden_size": 64, "embed_dim": 64}},
    "clip": {"vision_config": {"image_size": 64, "patch_size": 16}},
    "siglip": {"vision_config": {"image_size": 64, "patch_size": 16}},
}
#: Classes to try, in order: the first whose table has the kind of configuration.
_CLASSES = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForImageClassification",
    "AutoModel",
)
_ENCODERS = ("bert", "roberta", "electra", "albert", "distilbert", "mpnet", "deberta", "modernbert", "camembert")


def _small(kind: type, special: dict[str, Any]) -> Any:
    """A configuration of this class with small sizes, parts included."""
    default = kind()
    names = getattr(kind, "attribute_map", {})
    fixed = {k for k, v in inspect.getmembers(kind, lambda v: isinstance(v, property)) if v.fset is None}
    values = {names.get(k, k): v for k, v in _SMALL.items() if hasattr(default, k) and k not in fixed}
    values |= {k: 0 for k in _TOKENS if isinstance(getattr(default, k, None), int)}
    for part, of in getattr(kind, "sub_configs", {}).items():
        chosen = dict(special.get(part, {}))
        own = type(getattr(default, part, None))
        if "model_type" in chosen:
            import transformers

            own = type(transformers.AutoConfig.for_model(chosen["model_type"]))
        elif own is type(None):
            own = of
        if own.__name__.endswith("Config") and not own.__name__.startswith("Auto"):
            values[part] = _small(own, chosen).to_dict()
    values |= {k: v for k, v in special.items() if k not in getattr(kind, "sub_configs", {})}
    return kind(**{k: v for k, v in values.items() if v is not None or k not in special})


def _transformers(name: str, sizes: Sequence[Sizes], generator: torch.Generator) -> tuple[nn.Module, list[Inputs]]:
    import transformers

    config = _small(type(transformers.AutoConfig.for_model(name)), _SPECIAL.get(name, {}))
    classes = ["AutoModel"] if name.startswith(_ENCODERS) or name in ("clip", "siglip") else list(_CLASSES)
    auto = next(c for c in (getattr(transformers, n) for n in classes) if type(config) in c._model_mapping)
    model = auto.from_config(config)
    return model, [_call(model, config, i, s, generator) for i, s in enumerate(sizes)]


def _call(model: nn.Module, config: Any, number: int, sizes: Sizes, generator: torch.Generator) -> Inputs:
    """What a model's ``forward`` asks for: pictures, tokens, padding of a batch of two for encoders."""
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    kwargs: dict[str, Any] = {}

    def tokens(rows: int, length: int) -> torch.Tensor:
        return torch.randint(3, 140, (rows, length), generator=generator)

    both = "input_ids" in parameters and config.model_type in ("clip", "siglip")
    if main == "pixel_values" or both:
        of = getattr(config, "vision_config", config)
        size = of.image_size if isinstance(of.image_size, int) else of.image_size[0]
        kwargs["pixel_values"] = torch.randn(sizes.batch or (2 if both else 1), 3, size, size, generator=generator)
    if main == "input_ids" or both:
        encoder = config.model_type.startswith(_ENCODERS)
        rows, length = sizes.batch or (2 if both or encoder else 1), sizes.length or (12 if both else 32)
        kwargs["input_ids"] = tokens(rows, length)
        if encoder:
            lengths = [length, *(max(1, length * (20 + number + row) // 32) for row in range(rows - 1))]
            kwargs["attention_mask"] = (torch.arange(length) < torch.tensor(lengths).unsqueeze(1)).long()
    if "decoder_input_ids" in parameters:
        kwargs["decoder_input_ids"] = tokens(sizes.batch or 1, sizes.target or 8)
    if "use_cache" in parameters or getattr(config.get_text_config(), "use_cache", None) is not None:
        kwargs["use_cache"] = False
    return Inputs((), kwargs)


def _real(name: str, sizes: Sequence[Sizes], generator: torch.Generator) -> tuple[nn.Module, list[Inputs]]:
    import transformers

    if name == "vit-b16":
        model: nn.Module = transformers.ViTForImageClassification(transformers.ViTConfig())
        return model, _pictures(sizes, generator, 3, 224, 224)
    options: dict[str, Any] = {}
    if name == "bert-base":
        model = transformers.BertModel(transformers.BertConfig())
    elif name == "llama-1b":
        config = transformers.LlamaConfig(
            vocab_size=32_000,
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=8192,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        model, options = transformers.LlamaForCausalLM(config), {"use_cache": False}
    else:
        raise LookupError(f"no model real/{name}; there are {', '.join(NAMES['real'])}")
    ids = [torch.randint(3, 30_000, (s.batch or 1, s.length or 128), generator=generator) for s in sizes]
    return model, [Inputs((), {"input_ids": x, **options}) for x in ids]


_MAKERS = {"tv": _torchvision, "timm": _timm, "hf": _transformers, "real": _real}
