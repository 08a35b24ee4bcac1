"""The seven models with random weights, made where they are used, and what they are asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seven import configurations, quantized
from seven.flow import Flow
from seven.towers import GlmVision, Grid, HunYuanVision, Language, Sound


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, on its device."""

    #: int64 ``(1, n)``
    ids: Tensor
    #: What the tower takes; None: text alone.
    media: Tensor | None
    #: Of the tokens, int64 ``(axes, 1, n)``, and how far the next one's is from the number of tokens; None: none.
    positions: Tensor | None
    shift: int
    #: What the model's own ``forward`` in transformers takes.
    whole: dict[str, Any]


@dataclass
class Model:
    """One of the seven, in eval mode: the model of transformers, and the parts that become engines."""

    name: str
    whole: nn.Module
    tower: nn.Module | None
    language: Language
    flow: Flow | None
    #: By a seed; ``text=``: with so many tokens beside the picture or the sound.
    prompt: Callable[..., Prompt]


class Given(NamedTuple):
    """As which a model is made: see :func:`make`."""

    small: bool
    device: torch.device
    dtype: torch.dtype
    layers: int | None


def make(
    name: str,
    *,
    small: bool = True,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
) -> Model:
    """The model of this name; the same weights each time. Raises ``LookupError`` for another name.

    At true size the weights are made on the device, quantized ones as such.

    :param small: for a CPU
    :param device: ``meta`` gives a model without weights, which tells sizes
    :param layers: so many of the language model's layers in the place of all
    """
    if name not in MAKERS:
        raise LookupError(f"no model {name!r}; there are {', '.join(MAKERS)}")
    with torch.no_grad():
        return MAKERS[name](name, Given(small, torch.device(device), dtype, layers))


# -- weights -----------------------------------------------------------------------------------------------------------


def _filled(kind: str, config: Any, given: Given, change: Callable[[nn.Module], Any] | None = None) -> nn.Module:
    """A class of transformers by name. ``change``: what is done to it before it has memory."""
    import transformers

    if given.layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = given.layers
        if kinds := getattr(text, "layer_types", None):
            text.layer_types = [kinds[i % len(kinds)] for i in range(given.layers)]
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, kind)(config).to(given.dtype)
        if change is not None:
            change(model)
    return fill(model, given.device)


def fill(model: nn.Module, device: torch.device) -> nn.Module:
    """Gives a module on ``meta`` memory, and random weights of which no layer makes numbers much larger or smaller."""
    if device.type == "meta":
        return model
    generator = torch.Generator(device=device).manual_seed(0)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            # None of them is all zeros or all ones, in which no error could show.
            parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1, generator=generator)
        else:
            fan = parameter.shape[-1] if parameter.ndim < 4 else parameter[0].numel()
            parameter.normal_(0.0, fan**-0.5, generator=generator)
    for module in model.modules():
        if isinstance(module, quantized.Weight):
            module.randomize(generator)
        elif hasattr(module, "inv_freq"):
            made = type(module)(module.config).to(device)
            module.inv_freq, module.original_inv_freq = made.inv_freq, made.original_inv_freq
        elif hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.normal_(0.0, 0.1, generator=generator)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


# -- prompts -----------------------------------------------------------------------------------------------------------


def _ids(generator: torch.Generator, before: int, features: int, after: int, top: int, marker: int) -> Tensor:
    """Text, so many places for features, and text."""
    ids = torch.randint(3, top, (1, before + features + after), generator=generator)
    ids[:, before : before + features] = marker
    return ids


def _to(device: torch.device, dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(device, dtype if x.is_floating_point() else None)


def _text(vocabulary: int, device: torch.device, seed: int, *, text: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary - 1, (1, text), generator=generator).to(device)
    return Prompt(ids, None, None, 0, {"input_ids": ids, "use_cache": False})


def _picture(
    whole: Any, grid: Grid, width: int, features: int, device: torch.device, dtype: torch.dtype, seed: int, *, text: int
) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    marker = whole.config.image_token_id
    ids = _ids(generator, text // 3, features, text - text // 3, min(marker, 100_000) - 1, marker)
    patches = torch.randn(grid[0] * grid[1] * grid[2], width, generator=generator)
    of, kinds = torch.tensor([grid]), (ids == marker).int()
    # A loop over what is in the text, on the host: an engine has no use for it.
    positions, shift = whole.model.get_rope_index(ids, kinds, image_grid_thw=of)
    inputs = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": of, "mm_token_type_ids": kinds}
    inputs = {k: _to(device, dtype, v) for k, v in inputs.items()}
    return Prompt(
        inputs["input_ids"],
        inputs["pixel_values"],
        positions.to(device),
        int(shift),
        {**inputs, "use_cache": False},
    )


def _sound(whole: Any, frames: int, device: torch.device, dtype: torch.dtype, seed: int, *, text: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    config = whole.config
    marker = config.audio_token_id
    ids = _ids(generator, text // 3, frames // 8, text - text // 3, min(marker, 50_000) - 1, marker).to(device)
    mel = torch.randn(1, config.audio_config.num_mel_bins, frames, generator=generator)
    mel = _to(device, dtype, mel)
    heard = torch.ones(1, frames, dtype=torch.int64, device=device)
    inputs = {"input_ids": ids, "input_features": mel, "input_features_mask": heard, "use_cache": False}
    return Prompt(ids, mel, None, 0, inputs)


# -- the seven ---------------------------------------------------------------------------------------------------------


def _fp8(model: nn.Module) -> nn.Module:
    """The language model's layers without its head and its routers, in blocks that fit a small model, too."""
    block = 128 if model.config.text_config.hidden_size % 128 == 0 else 16
    make = functools.partial(quantized.Fp8Weight.of, block=(block, block))
    return quantized.quantize(model, make, lambda n: "language_model.layers" in n)


def _int4(model: nn.Module) -> nn.Module:
    """The experts, as in the published checkpoint; other layers stay as they are."""
    return quantized.quantize(model, functools.partial(quantized.Int4Weight.of, group=32), lambda name: False)


def _glm4v(name: str, given: Given) -> Model:
    small, device, dtype, _ = given
    moe = name == "glm-4.6v-fp8"
    config = configurations.glm4v_moe(small) if moe else configurations.glm4v(small)
    kind = "Glm4vMoeForConditionalGeneration" if moe else "Glm4vForConditionalGeneration"
    whole: Any = _filled(kind, config, given, _fp8 if moe else None)
    grid, text = ((1, 4, 6), 12) if small else ((1, 24, 24), 32)
    width, features = 3 * 2 * 14 * 14, grid[1] * grid[2] // 4
    return Model(
        name,
        whole,
        GlmVision(whole.model.visual, grid).eval(),
        Language(whole.model.language_model, whole.lm_head, config.image_token_id).eval(),
        None,
        functools.partial(_picture, whole, grid, width, features, device, dtype, text=text),
    )


def _hunyuan(name: str, given: Given) -> Model:
    small, device, dtype, _ = given
    config = configurations.hunyuan_vl(small)
    whole: Any = _filled("HunYuanVLForConditionalGeneration", config, given)
    grid, text = ((1, 4, 6), 12) if small else ((1, 32, 32), 32)
    features = grid[1] // 2 * (grid[2] // 2 + 1) + 2
    return Model(
        name,
        whole,
        HunYuanVision(whole.model.vision_tower, grid).eval(),
        Language(whole.model.language_model, whole.lm_head, config.image_token_id).eval(),
        None,
        functools.partial(_picture, whole, grid, 3 * 16 * 16, features, device, dtype, text=text),
    )


def _glmasr(name: str, given: Given) -> Model:
    small, device, dtype, _ = given
    config = configurations.glmasr(small)
    whole: Any = _filled("GlmAsrForConditionalGeneration", config, given)
    frames, text = (64, 12) if small else (3000, 32)
    return Model(
        name,
        whole,
        Sound(whole.model).eval(),
        Language(whole.model.language_model, whole.lm_head, config.audio_token_id).eval(),
        None,
        functools.partial(_sound, whole, frames, device, dtype, text=text),
    )


#: How many of Kimi-K2's 61 layers stand for it at true size: about 9.5 GB each.
KIMI_LAYERS = 8


def _written(name: str, given: Given) -> Model:
    """Those that read text alone."""
    small, device, dtype, _ = given
    flow = None
    if name == "kimi-k2-thinking":
        config = configurations.deepseek_v3(small, KIMI_LAYERS)
        whole: Any = _filled("DeepseekV3ForCausalLM", config, given, _int4)
    elif name == "glm-tts":
        config = configurations.llama(small)
        whole = _filled("LlamaForCausalLM", config, given)
        with torch.device("meta"):
            sizes = {"bins": 16, "hidden": 32, "layers": 2, "heads": 2} if small else {}
            flow = Flow(config.vocab_size, **sizes).to(dtype)
        fill(flow, device)
    else:
        config = configurations.qwen2(small)
        whole = _filled("Qwen2ForCausalLM", config, given)
    prompt = functools.partial(_text, config.vocab_size, device, text=12 if small else 128)
    return Model(name, whole, None, Language(whole.model, whole.lm_head).eval(), flow, prompt)


MAKERS: dict[str, Callable[[str, Given], Model]] = {
    "autoglm-phone-9b": _glm4v,
    "glm-4.6v-fp8": _glm4v,
    "kimi-k2-thinking": _written,
    "hunyuanocr": _hunyuan,
    "glm-asr-nano-2512": _glmasr,
    "glm-tts": _written,
    "spark-formalizer-x1-7b": _written,
}
