"""Sound from speech tokens by flow matching: a diffusion transformer of our own, in the place of GLM-TTS's.

Sources of the method: flow matching (Lipman et al. 2023), diffusion transformers with adaptive norms (Peebles and Xie
2023), rotary positions (Su et al. 2021).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Attention and a perceptron, each shifted, scaled and gated by what the time says."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.modulate = nn.Linear(hidden, 6 * hidden)

    def forward(self, x: Tensor, time: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(functional.silu(time)).unsqueeze(1).chunk(6, -1)
        y = self.norm(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(_turned(q, *turn), _turned(k, *turn), v)
        x = x + gate1 * self.out(y.transpose(1, 2).flatten(2))
        y = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(functional.gelu(self.up(y), approximate="tanh"))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Flow(nn.Module):
    """One step from noise towards sound.

    ``forward(x, tokens, time, step)``: ``x`` ``(1, 2 * n, bins)``; speech tokens, int64 ``(1, n)``; ``time``, 0 to 1,
    and ``step``, float32 ``(1,)`` each. Gives the next ``x``, the first of which is noise.
    """

    def __init__(self, tokens: int, bins: int = 80, hidden: int = 1024, layers: int = 22, heads: int = 16) -> None:
        super().__init__()
        self.hidden, self.size, self.bins = hidden, hidden // heads, bins
        self.embed = nn.Embedding(tokens, hidden)
        self.enter, self.leave = nn.Linear(bins + hidden, hidden), nn.Linear(hidden, bins)
        self.time = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor, tokens: Tensor, time: Tensor, step: Tensor) -> Tensor:
        y = self.enter(torch.cat([x, self.embed(tokens).repeat_interleave(2, 1)], -1))
        t = self.time(torch.cat(_waves(time * 1000, 128), -1).to(x.dtype))
        turn = _waves(torch.arange(x.shape[1], device=x.device), self.size // 2)
        cos, sin = (torch.cat([w, w], -1).to(x.dtype) for w in turn)
        for block in self.blocks:
            y = block(y, t, (cos, sin))
        return x + step.to(x.dtype) * self.leave(self.norm(y))


def _waves(at: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of so many frequencies, ``(len(at), count)`` each."""
    frequencies = torch.exp(-math.log(10_000) / count * torch.arange(count, device=at.device))
    angles = at[:, None].float() * frequencies
    return angles.cos(), angles.sin()
