"""Built-in models that need no download: what ``anabranch check`` and the examples run.

Each factory returns an ``nn.Module`` in ``eval()`` mode, float32, on the CPU, with parameters that require no gradient;
``.half()``, ``.bfloat16()`` and ``.to(device)`` work as on any module. Two calls of a factory give the same bits in any
process: weights come from a private seeded generator, and PyTorch's global random state is neither read nor moved.

>>> from anabranch.models import BUILTIN
>>> model = BUILTIN["upscaler"].make()
>>> x = torch.rand(BUILTIN["upscaler"].benchmark[0])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BUILTIN", "Builtin", "Shape", "branches", "relu", "upscaler"]

Shape = tuple[int, ...]

#: How many channels of the upscaler carry the picture itself: red, green, blue.
_RGB = 3


class _Relu(nn.Module):
    """One ReLU, written as a module so that it exports and serializes like any other network."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x)


def relu() -> nn.Module:
    """The network of the report: one ReLU.

    Input: any shape, any floating dtype. Output: the same shape and dtype, every element ``max(x, 0)``.
    """
    return _Relu().eval()


class _Upscaler(nn.Module):
    """The layers of ``upscaler``; see there for what they compute."""

    def __init__(self, channels: int, convs: int, scale: int) -> None:
        super().__init__()
        body: list[nn.Module] = [nn.Conv2d(_RGB, channels, 3, padding=1), nn.PReLU(channels)]
        for _ in range(convs):
            body += [nn.Conv2d(channels, channels, 3, padding=1), nn.PReLU(channels)]
        self.body = nn.Sequential(*body)
        # No padding here: forward() adds one pixel all round at the very start, where it costs 3 channels and not 64.
        self.to_phases = nn.Conv2d(channels, _RGB * scale * scale, 3)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        # Repeat the border: zeros would leave a bright or dark rim in the picture after the sharpening last layer.
        padded = functional.pad(x, (1, 1, 1, 1), mode="replicate")
        return self.shuffle(self.to_phases(self.body(padded)))


def upscaler(channels: int = 64, convs: int = 16, scale: int = 2) -> nn.Module:
    """A compact video upscaler: 3x3 convolutions and PReLUs at the low resolution, then one pixel shuffle.

    Input: ``(N, 3, H, W)``, RGB in [0, 1]; N may be 0, H and W are at least 1. Output: ``(N, 3, scale*H, scale*W)`` of
    the same dtype; about [0, 1], with overshoot of about a tenth at sharp edges, so clamp before storing it as pixels.

    The layers and their cost are those of a trained network; the weights are made here, so that the picture is good
    without any file to download. Three channels carry red, green and blue unchanged through every layer (a PReLU lets
    what is not negative pass), the last layer interpolates between their pixels, and the other channels compute seeded
    random features of order 1 that move the result by well under one level of 255.

    ``channels`` is at least 4; ``convs`` counts the middle layers; ``scale`` is 2 or more.
    """
    if channels <= _RGB or convs < 0 or scale < 2:
        raise ValueError(
            f"upscaler(channels={channels}, convs={convs}, scale={scale}): "
            f"channels must exceed {_RGB}, convs must not be negative, and scale must be at least 2"
        )
    generator = torch.Generator(device="cpu").manual_seed(2991)
    model = _blank(lambda: _Upscaler(channels, convs, scale))
    for layer in model.body:
        if isinstance(layer, nn.Conv2d):
            _kaiming(layer.weight, generator, slope=0.25)
            _uniform(layer.bias, -0.05, 0.05, generator)
            layer.weight[:_RGB] = 0.0
            layer.weight[range(_RGB), range(_RGB), 1, 1] = 1.0
            assert layer.bias is not None
            layer.bias[:_RGB] = 0.0
        elif isinstance(layer, nn.PReLU):
            _uniform(layer.weight, 0.2, 0.3, generator)

    last = model.to_phases
    # Features have a second moment of about 1, so their sum over fan-in has a standard deviation of about this much:
    # a third of one level of 255, enough that a wrong feature shows and too little to see.
    feature_share = 1.0 / (3 * 255)
    fan_in = (channels - _RGB) * 9
    _normal(last.weight, feature_share / math.sqrt(fan_in), generator)
    assert last.bias is not None
    last.bias.zero_()
    last.weight[:, :_RGB] = 0.0
    taps = _phase_taps(scale)
    for color in range(_RGB):
        for row in range(scale):
            for column in range(scale):
                # PixelShuffle reads channel (color, row, column) for the output pixel at that place in the block.
                phase = (color * scale + row) * scale + column
                last.weight[phase, color] = torch.outer(taps[row], taps[column])
    return model


def _phase_taps(scale: int) -> Tensor:
    """The weights of the left, own and right input pixel for each output pixel of a row: ``(scale, 3)``, float32.

    A camera pixel is an average over its area. So: take the parabola whose averages over three neighbouring pixels are
    the given values, and average it over the output pixel. The ``scale`` output pixels of an input pixel then average
    to that very pixel, which sharpens lightly where plain bilinear interpolation blurs. For scale 2 the weights are
    (1/8, 1, -1/8) and (-1/8, 1, 1/8), exact in every floating dtype.
    """
    rows = []
    for phase in range(scale):
        d = (phase + 0.5) / scale - 0.5  # centre of the output pixel, in input pixels from the centre of its own
        bend = d * d + (1.0 / scale**2 - 1.0) / 12.0
        rows.append([(bend - d) / 2, 1.0 - bend, (bend + d) / 2])
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


class _ConvNormRelu(nn.Module):
    """Convolution, batch normalization with frozen statistics, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))


class _Block(nn.Module):
    """Four branches that depend on nothing but the block's input, concatenated: 256 channels out."""

    width = 256

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.point = _ConvNormRelu(inputs, 64, 1)
        self.near = nn.Sequential(_ConvNormRelu(inputs, 64, 1), _ConvNormRelu(64, 96, 3))
        self.far = nn.Sequential(_ConvNormRelu(inputs, 32, 1), _ConvNormRelu(32, 64, 5))
        self.pool = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), _ConvNormRelu(inputs, 32, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.point(x), self.near(x), self.far(x), self.pool(x)], dim=1)


class _Branches(nn.Module):
    """The layers of ``branches``; see there."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        width = _Block.width
        self.stem = nn.Sequential(
            _ConvNormRelu(3, 32, 3, stride=2), _ConvNormRelu(32, 64, 3), nn.MaxPool2d(3, stride=2, padding=1)
        )
        self.blocks = nn.Sequential(
            _Block(64), _Block(width), _Block(width), nn.MaxPool2d(3, stride=2, padding=1), _Block(width), _Block(width)
        )
        self.classify = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(self.stem(x))
        return self.classify(features.mean(dim=(2, 3)))


def branches(classes: int = 1000) -> nn.Module:
    """An inception-like classifier: blocks of four branches that do not depend on each other, so they can overlap.

    Input: ``(N, 3, H, W)`` of order 1 (a normalized picture, or ``torch.randn``); N may be 0, H and W are at least 32.
    Output: ``(N, classes)`` logits of the same dtype, a few units each. The weights are random: classes mean nothing;
    activations stay between 1 and some tens from layer to layer, so float16 neither overflows nor fades.
    """
    generator = torch.Generator(device="cpu").manual_seed(2881)
    model = _blank(lambda: _Branches(classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            _kaiming(module.weight, generator, slope=0.0)
            # A ReLU's output has a mean, which random filters would turn into a constant that drowns the input from
            # layer to layer. Filters that sum to zero pass only what varies: 1 - 1/pi of the second moment.
            module.weight -= module.weight.mean(dim=(1, 2, 3), keepdim=True)
            module.weight *= (1.0 - 1.0 / math.pi) ** -0.5
        elif isinstance(module, nn.BatchNorm2d):
            # Kaiming weights after a ReLU give a second moment of 1; statistics near (0, 1) keep it there while every
            # channel still has its own scale and shift, as in a trained network.
            _normal(module.running_mean, 0.1, generator)
            _uniform(module.running_var, 0.5, 1.5, generator)
            _uniform(module.weight, 0.8, 1.2, generator)
            _normal(module.bias, 0.1, generator)
            assert module.num_batches_tracked is not None
            module.num_batches_tracked.zero_()
        elif isinstance(module, nn.Linear):
            _normal(module.weight, math.sqrt(2.0 / module.in_features), generator)
            _normal(module.bias, 0.1, generator)
    return model


_Model = TypeVar("_Model", bound=nn.Module)


def _blank(build: Callable[[], _Model]) -> _Model:
    """The module that ``build`` makes: float32, CPU, eval, no gradients, every weight still to be filled.

    Layers draw their initial weights from PyTorch's global generator, which a library must not move under its user.
    Built on the meta device they draw nothing.
    """
    with torch.device("meta"):
        model = build()
    return model.float().to_empty(device="cpu").eval().requires_grad_(False)


def _kaiming(weight: Tensor, generator: torch.Generator, slope: float) -> None:
    """Fill with normal values that keep the second moment at 1 through a (leaky) ReLU of this negative slope."""
    fan_in = weight[0].numel()
    _normal(weight, math.sqrt(2.0 / (1.0 + slope * slope) / fan_in), generator)


def _normal(tensor: Tensor | None, std: float, generator: torch.Generator) -> None:
    assert tensor is not None
    tensor.normal_(0.0, std, generator=generator)


def _uniform(tensor: Tensor | None, low: float, high: float, generator: torch.Generator) -> None:
    assert tensor is not None
    tensor.uniform_(low, high, generator=generator)


@dataclass(frozen=True)
class Builtin:
    """A built-in model and the input shapes that it is tried with. It takes one tensor and returns one tensor.

    ``benchmark``: shapes to measure and report, the smallest first. ``boundary``: valid shapes at the edges (a single
    element, odd sizes, an empty batch). ``unit_range``: the input is a picture in [0, 1]; otherwise values of order 1
    with both signs.
    """

    make: Callable[[], nn.Module]
    summary: str
    benchmark: tuple[Shape, ...]
    boundary: tuple[Shape, ...]
    unit_range: bool = False


#: Name on the command line -> model.
BUILTIN: dict[str, Builtin] = {
    "relu": Builtin(
        make=relu,
        summary="the reported network: one ReLU",
        benchmark=((1, 3, 5), (1, 3, 2160, 3840)),
        boundary=((1,), (1, 3, 5), (3, 7, 11), (1, 3, 33, 65), (0, 3, 5), (1, 3, 2160, 3840)),
    ),
    "upscaler": Builtin(
        make=upscaler,
        summary="a compact x2 video upscaler: 16 3x3 convs of 64 channels, PReLU, pixel shuffle",
        benchmark=((1, 3, 270, 480),),
        boundary=((1, 3, 1, 1), (1, 3, 5, 7), (3, 3, 17, 31), (0, 3, 16, 16)),
        unit_range=True,
    ),
    "branches": Builtin(
        make=branches,
        summary="an inception-like net: blocks of four independent branches",
        benchmark=((1, 3, 64, 64),),
        boundary=((1, 3, 32, 32), (1, 3, 33, 47), (3, 3, 65, 35), (0, 3, 32, 32)),
    ),
}
