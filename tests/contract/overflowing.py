"""Networks that overflow in plain half precision, each at an operator that is known: for mixed precision, ``calibrate``
and their tests.

``NETWORKS`` has a builder for each. Weights are random, of the seed that is set; they are large where it matters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class Network(NamedTuple):
    """A model in eval mode, float32 on the CPU; ``draw`` makes an input of other values each time."""

    model: nn.Module
    draw: Callable[[], torch.Tensor]


class _SpatialAttention(nn.Module):
    """Of visformer: queries, keys and values of 1x1 convolutions, with scores that are scaled after the product."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm = nn.BatchNorm2d(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.proj = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, -1, h * w).permute(1, 0, 2, 4, 3).unbind(0)
        scores = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)
        return x + self.proj((scores @ v).permute(0, 1, 3, 2).reshape(b, c, h, w))


class _ConvBlock(nn.Module):
    """Of visformer: a grouped convolution between two of 1x1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.layers = nn.Sequential(
            *(nn.Conv2d(width, 2 * width, 1, bias=False), nn.GELU()),
            *(nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=4, bias=False), nn.GELU()),
            nn.Conv2d(2 * width, width, 1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(self.norm(x))


def visformer() -> Network:
    """Batch norms that have seen no data normalize nothing: values grow until the scores overflow."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
        *(nn.BatchNorm2d(32), nn.ReLU(), _ConvBlock(32), _SpatialAttention(32, 4), _ConvBlock(32)),
        *(nn.BatchNorm2d(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    with torch.no_grad():
        model[4].qkv.weight[:64].mul_(300.0)
    return Network(model.eval(), lambda: torch.randn(2, 3, 16, 16))


def swin() -> Network:
    """transformers' Swin; queries and keys of the second stage have large weights."""
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    config._attn_implementation = "eager"  # products and a softmax, as in torchvision's
    model = SwinModel(config)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.swin = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            pooled: torch.Tensor = self.swin(pixels, return_dict=False)[1]
            return pooled

    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5.0)
        attention = model.encoder.layers[1].blocks[0].attention
        for part in (attention.q_proj, attention.k_proj):
            part.weight.mul_(400.0)
    return Network(Pooled().eval(), lambda: torch.randn(2, 3, 32, 32))


class _SumNorm(nn.Module):
    """Normalizes by sums of all elements, as they are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[-1]
        centred = x - x.sum(-1, keepdim=True) / n
        return centred / ((centred * centred).sum(-1, keepdim=True) / n + 1e-5).sqrt()


def norm_of_sums() -> Network:
    """A normalization after a large reduction: the sum of 2048 values near 50 is beyond 65504."""
    first = nn.Linear(32, 2048)
    with torch.no_grad():
        first.bias.add_(50.0)
    return Network(nn.Sequential(first, _SumNorm(), nn.Linear(2048, 8)).eval(), lambda: 4 * torch.randn(6, 32))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(self.query(x), self.key(x).transpose(-1, -2)) * 1e-5
        return self.out(torch.matmul(scores.softmax(-1), self.value(x)))


def large_logits() -> Network:
    """Attention whose scores overflow before they are scaled."""
    model = _Attention(128)
    with torch.no_grad():
        model.query.weight.mul_(250.0)
        model.key.weight.mul_(250.0)
    return Network(model.eval(), lambda: torch.randn(3, 10, 128))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def growing_stream() -> Network:
    """A residual stream that grows beyond the range, by branches that do not leave it."""
    model = nn.Sequential(nn.Linear(64, 64), *(_Residual(64) for _ in range(12)), nn.LayerNorm(64), nn.Linear(64, 8))
    with torch.no_grad():
        for part in model:
            if isinstance(part, _Residual):
                part.down.weight.mul_(100.0)
                part.down.bias.add_(8000.0 * torch.randn(64).sign())
        signs = model[1].down.bias.sign()
        for part in model:
            if isinstance(part, _Residual):
                part.down.bias.abs_().mul_(signs)
    return Network(model.eval(), lambda: torch.randn(5, 64))


NETWORKS: dict[str, Callable[[], Network]] = {
    f.__name__: f for f in (visformer, swin, norm_of_sums, large_logits, growing_stream)
}
#: The operator at which each overflows first.
GUILTY = {
    "visformer": "aten.matmul",
    "swin": "aten.matmul",
    "norm_of_sums": "aten.sum",
    "large_logits": "aten.matmul",
    "growing_stream": "aten.add",
}
