"""What is computed: networks and the inputs they get. Weights are seeded, so each process makes the same bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from anabranch import models
from anabranch.check import find_subject
from anabranch.errors import InputError


@dataclass(frozen=True)
class Work:
    """A network and its one input.

    ``make`` returns a float32 module on the CPU in ``eval()`` mode. ``cpu_shape`` replaces ``shape`` on the CPU where
    the full size would take seconds a call. ``max_streams``: more calls in flight would measure memory only.
    ``copies``: most engines that a system with an engine per thread builds; each may hold a gigabyte. ``extra``: run
    only where it is named.
    """

    name: str
    summary: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    cpu_shape: tuple[int, ...] | None = None
    channels_last: bool = False
    max_streams: int = 64
    copies: int = 4
    needs: str | None = None
    extra: bool = False

    def shape_on(self, device: str) -> tuple[int, ...]:
        return self.cpu_shape if device == "cpu" and self.cpu_shape else self.shape


class _Residual(nn.Module):
    """Convolution, normalization and ReLU twice, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norms[0](self.convs[0](x)))
        return functional.relu(x + self.norms[1](self.convs[1](y)))


class _Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.project(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """``build()`` with fixed weights; PyTorch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2991)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                # Keeps activations of order 1 through ReLUs: nothing fades or overflows in float16.
                nn.init.kaiming_normal_(module.weight)
    return model.eval().requires_grad_(False)


def calibrated(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """``model`` with the running statistics of its normalizations measured on noise of ``shape``, as training leaves
    them. Without, some networks amplify rounding so much that two right algorithms look like two outputs."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    generator = torch.Generator().manual_seed(11)
    magnitudes = torch.tensor([0.5, 1.0, 1.5, 2.0]).reshape(4, 1, 1, 1)
    with torch.no_grad():
        for _ in range(2):
            model(magnitudes * torch.randn((4, *shape[1:]), generator=generator))
    for norm in norms:
        norm.eval()
    return model


def residual() -> nn.Module:
    """Eight residual blocks, 64 wide: no branch to overlap."""
    return _seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            *[_Residual(64) for _ in range(8)],
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 1000),
        )
    )


def encoder() -> nn.Module:
    """Twelve transformer layers, 768 wide, 12 heads."""
    return _seeded(lambda: nn.Sequential(*[_Layer(768, 12) for _ in range(12)], nn.LayerNorm(768)))


def chain() -> nn.Module:
    """Twenty small kernels, each needing the one before: ten times a linear layer and a normalization."""
    return _seeded(lambda: nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(256, 256), nn.LayerNorm(256))]))


#: In float16 eager PyTorch itself is off by 12% of mobilenet_v3_large's largest output without it, with it by 1%.
_CALIBRATED = ("mobilenet_v3_large",)


def _torchvision(name: str, shape: tuple[int, ...]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        options: dict[str, object] = {"weights": None}
        if name in ("googlenet", "inception_v3"):
            options |= {"init_weights": False, "aux_logits": name == "inception_v3"}
        model: nn.Module = getattr(torchvision.models, name)(**options)
        return model

    return lambda: calibrated(_seeded(build), shape) if name in _CALIBRATED else _seeded(build)


def _image(name: str, size: int, copies: int = 16, extra: bool = False) -> Work:
    shape = (1, 3, size, size)
    return Work(
        name,
        f"torchvision's {name}, {size} x {size}",
        _torchvision(name, shape),
        shape,
        channels_last=True,
        copies=copies,
        needs="torchvision",
        extra=extra,
    )


WORKS: dict[str, Work] = {
    w.name: w
    for w in (
        Work("relu", "the reported network: one ReLU", models.relu, (1, 3, 5), copies=16),
        Work("relu-4k", "one ReLU on a 4K frame", models.relu, (1, 3, 2160, 3840)),
        _image("googlenet", 224),
        _image("inception_v3", 299),
        _image("resnet18", 224, extra=True),
        _image("resnet50", 224),
        _image("mobilenet_v3_large", 224),
        Work("branches", "blocks of four branches", models.branches, (1, 3, 224, 224), channels_last=True),
        Work("residual", "eight residual blocks, no branches", residual, (1, 3, 224, 224), channels_last=True),
        Work("encoder", "12 transformer layers, 768 wide, 128 tokens", encoder, (1, 128, 768), copies=16),
        Work(
            "upscaler-1080p",
            "video upscaler x2, one 1080p frame",
            models.upscaler,
            (1, 3, 1080, 1920),
            cpu_shape=(1, 3, 135, 240),
            channels_last=True,
            max_streams=4,
        ),
        Work(
            "upscaler-270p",
            "video upscaler x2, one 270p frame",
            models.upscaler,
            (1, 3, 270, 480),
            cpu_shape=(1, 3, 135, 240),
            channels_last=True,
            extra=True,
        ),
        Work("chain", "20 small kernels in a row", chain, (1, 32, 256), copies=16),
    )
}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def default_works() -> list[str]:
    """All that is installed and not extra; our own convolutional networks stand in where torchvision is not."""
    stand_ins = {"branches", "residual"} if installed("torchvision") else set()
    left_out = stand_ins | {w.name for w in WORKS.values() if w.extra or (w.needs and not installed(w.needs))}
    return [w.name for w in WORKS.values() if w.name not in left_out]


def find_work(name: str) -> Work:
    """A name of ``WORKS``, or ``module:callable@1,3,224,224``: what returns a module, and the shape of its input."""
    if name in WORKS:
        work = WORKS[name]
        if work.needs and not installed(work.needs):
            raise InputError(f"work {name!r} needs {work.needs}, which is not installed: pip install {work.needs}")
        return work
    model, _, shape = name.partition("@")
    if ":" not in model or not shape:
        raise InputError(f"work {name!r} given; expected one of {', '.join(WORKS)}, or module:callable@1,3,224,224")
    try:
        sizes = tuple(int(n) for n in shape.split(","))
    except ValueError:
        raise InputError(f"work {name!r}: {shape!r} is not a shape; expected one such as 1,3,224,224") from None
    return Work(name, model, find_subject(model).make, sizes)
