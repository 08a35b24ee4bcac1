"""A model that reads pictures or sound, in two: a tower that makes features of them, and the language model.

How many patches a picture has decides how often transformers' code loops, and where features go depends on token ids.
So the whole ``forward`` becomes many graphs with Python between them. In two it is one graph each: a tower is made for
the shape of a picture, which is a few whole numbers and no tensor; positions are computed once on the host and are an
input. The layers are the model's own, and the results have its bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.vision_utils import get_vision_position_ids

Grid = tuple[int, int, int]


class GlmVision(nn.Module):
    """The vision tower of ``Glm4v`` and ``Glm4vMoe`` for pictures of one shape.

    ``grid``: frames, rows and columns of patches. ``forward(pixels)``: ``(patches, channels * frames * height * width
    of one)`` as transformers' processor makes them; gives ``(patches / 4, hidden)``.
    """

    positions: Tensor
    shape: Tensor

    def __init__(self, visual: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.visual = visual
        shape, device = torch.tensor([grid]), next(visual.parameters()).device
        self.register_buffer("positions", get_vision_position_ids(shape, visual.spatial_merge_size).to(device))
        self.register_buffer("shape", shape.to(device))
        self.frames, self.patches = grid[0], grid[1] * grid[2]

    def forward(self, pixels: Tensor) -> Tensor:
        v = self.visual
        x = v.post_conv_layernorm(v.patch_embed(pixels))
        at = self.positions
        turned = v.rotary_pos_emb(x, at)
        lengths = torch.full((self.frames,), self.patches, device=x.device)
        x = v.embeddings(x, lengths, self.shape.expand(self.frames, 3), at[:, 0], at[:, 1])
        # Numbers, not a tensor: attention splits at these places.
        ends = np.arange(self.frames + 1) * self.patches
        for block in v.blocks:
            x = block(x, cu_seqlens=ends, max_seqlen=self.patches, position_embeddings=turned)
        merge = v.spatial_merge_size
        x = v.post_layernorm(x).view(-1, merge, merge, x.shape[-1]).permute(0, 3, 1, 2)
        return v.merger(v.downsample(x).view(-1, v.config.out_hidden_size))


class HunYuanVision(nn.Module):
    """The vision tower of ``HunYuanVL`` for one picture of one shape.

    ``forward(pixels)``: ``(patches, channels * height * width of one)``; gives ``(rows * (columns + 1) + 2, hidden)``
    of the merged grid: each row ends with a feature of its own, and the picture begins and ends with one.
    """

    def __init__(self, tower: nn.Module, grid: Grid) -> None:
        super().__init__()
        if grid[0] != 1:
            raise ValueError(f"given a grid of {grid[0]} frames; expected one picture, (1, rows, columns)")
        self.tower, self.grid = tower, grid

    def forward(self, pixels: Tensor) -> Tensor:
        _, rows, columns = self.grid
        x = self.tower.embeddings(pixels, [list(self.grid)])
        ends = np.array([0, rows * columns])
        for layer in self.tower.layers:
            x = layer(x, attention_mask=None, cu_seqlens=ends, max_seqlen=rows * columns)
        return self.tower.patch_merger(x, size=(rows, columns))[0]


class Sound(nn.Module):
    """The sound tower of ``GlmAsr``. ``forward(mel)``: ``(1, bins, frames)``, all of them heard; gives ``(frames / 8,
    hidden)``. ``frames`` is a multiple of 8.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tower, self.project = model.audio_tower, model.multi_modal_projector
        self.width = model.config.audio_config.intermediate_size

    def forward(self, mel: Tensor) -> Tensor:
        heard = self.tower(mel).last_hidden_state
        return self.project(heard.reshape(-1, self.width))


class Language(nn.Module):
    """The language model of any of the seven: tokens, the features of a tower, and positions, to logits.

    It is called as causal models of transformers are, so :class:`anabranch.generation.Decoder` takes it.
    """

    def __init__(self, text: nn.Module, head: nn.Module, marker: int | None = None) -> None:
        """
        :param text: gives ``last_hidden_state``
        :param head: makes logits of that
        :param marker: the token in whose places features go
        """
        super().__init__()
        self.text, self.head, self.marker, self.config = text, head, marker, text.config

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """
        :param input_ids: int64 ``(1, n)``
        :param features: ``(m, hidden)``, where ``m`` of the tokens are the marker
        :param position_ids: int64 ``(axes, 1, n)`` or ``(1, n)``; None: one after the other
        :param logits_to_keep: of how many of the last tokens; 0: of all
        """
        x = self.text.get_input_embeddings()(input_ids)
        if features is not None:
            x = x.masked_scatter((input_ids == self.marker).unsqueeze(-1), features.to(x.dtype))
        y = self.text(inputs_embeds=x, position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache)
        logits = self.head(y.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=y.past_key_values)
