"""Linear layers and mixtures of experts whose weights are float8 or 4-bit integers, in PyTorch's own operators.

Weights are stored as the checkpoints have them, and become floating-point numbers in ``forward``; activations stay as
they are. No kernel is fetched from anywhere. :func:`quantize` puts them in the place of the float layers of a model.

>>> layer = Fp8Linear.of(torch.nn.Linear(256, 128), block=(128, 128))
>>> layer(torch.randn(4, 256)).shape
torch.Size([4, 128])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

FP8 = torch.float8_e4m3fn
#: The largest float8_e4m3fn.
FP8_MAX = 448.0


class Fp8Weight(nn.Module):
    """A matrix, or a stack of them, in float8 (e4m3) with a scale for each block of rows and columns.

    ``weight``: float8 ``(..., rows, columns)``; ``scale``: float32 ``(..., ceil(rows / block[0]), ceil(columns /
    block[1]))``. An element is its float8 times the scale of its block, so it is off by at most 1/16 of itself, or,
    where it is below 2**-6 / 448 of the largest of its block, by 2**-10 / 448 of that. ``(1, columns)`` is a scale a
    row.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, *shape: int, block: tuple[int, int] = (128, 128), device: torch.device | None = None) -> None:
        super().__init__()
        if len(shape) < 2 or min(block) < 1:
            raise ValueError(f"given the shape {shape}, blocks of {block}; expected a matrix, and sizes of at least 1")
        self.block = block
        *stack, rows, columns = shape
        scales = (*stack, -(-rows // block[0]), -(-columns // block[1]))
        self.register_buffer("weight", torch.empty(shape, dtype=FP8, device=device))
        self.register_buffer("scale", torch.ones(scales, dtype=torch.float32, device=device))

    @classmethod
    def of(cls, weight: Tensor, block: tuple[int, int] = (128, 128)) -> Fp8Weight:
        made = cls(*weight.shape, block=block, device=weight.device)
        made.store(weight.detach())
        return made

    def store(self, weight: Tensor) -> None:
        """Take these floats, ``(..., rows, columns)``. A block of zeros gets the scale 1."""
        if weight.device.type == "meta":
            return
        *stack, rows, columns = weight.shape
        (r, c), (br, bc) = self.scale.shape[-2:], self.block
        padded = functional.pad(weight.float(), (0, c * bc - columns, 0, r * br - rows))
        largest = padded.abs().view(*stack, r, br, c, bc).amax((-3, -1))
        self.scale.copy_(torch.where(largest > 0, largest / FP8_MAX, 1.0))
        self.weight.copy_((weight.float() / self._spread(self.scale)).clamp(-FP8_MAX, FP8_MAX).to(FP8))

    def randomize(self, generator: torch.Generator) -> None:
        """Made-up weights of the size that a linear layer has, a matrix at a time: a stack may not fit as floats."""
        columns = self.weight.shape[-1]
        weights = self.weight.view(-1, *self.weight.shape[-2:])
        for matrix in weights:
            made = torch.randn(matrix.shape, generator=generator, device=matrix.device)
            matrix.copy_(made.mul_(FP8_MAX / 6).clamp_(-FP8_MAX, FP8_MAX).to(FP8))
        # Blocks differ, so that a scale in the wrong place shows.
        drawn = torch.rand(self.scale.shape, generator=generator, device=self.scale.device)
        self.scale.copy_((0.5 + drawn) * 6 / FP8_MAX * columns**-0.5)

    def _spread(self, scale: Tensor) -> Tensor:
        rows, columns = self.weight.shape[-2:]
        spread = scale.repeat_interleave(self.block[0], -2).repeat_interleave(self.block[1], -1)
        return spread[..., :rows, :columns]

    def dense(self, dtype: torch.dtype, chosen: Tensor | slice | None = None) -> Tensor:
        """The matrices as floats; of a stack, those that ``chosen`` (int64, or a slice) takes."""
        weight, scale = (
            (self.weight, self.scale) if chosen is None else (_take(self.weight, chosen), self.scale[chosen])
        )
        *stack, rows, columns = weight.shape
        (r, c), (br, bc) = scale.shape[-2:], self.block
        if (r * br, c * bc) != (rows, columns):
            return (weight.to(torch.float32) * self._spread(scale)).to(dtype)
        blocks = weight.to(torch.float32).view(*stack, r, br, c, bc) * scale[..., :, None, :, None]
        return blocks.to(dtype).view(*stack, rows, columns)


class Int4Weight(nn.Module):
    """A matrix, or a stack of them, in 4-bit integers, eight to an int32, with a scale for each group of a row.

    ``packed``: int32 ``(..., rows, columns / 8)``, the first column in the lowest bits, 8 added to each number, as
    compressed-tensors' ``pack-quantized`` has it; ``scale``: ``(..., rows, columns / group)`` in the model's dtype. An
    element is its integer, -8 to 7, times its scale: off by at most half a scale, which is the group's largest / 7.
    """

    packed: Tensor
    scale: Tensor
    shifts: Tensor

    def __init__(
        self, *shape: int, group: int = 32, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        super().__init__()
        *stack, rows, columns = shape
        if columns % 8 or columns % group:
            raise ValueError(f"given {columns} columns; expected a multiple of 8 and of the group, {group}")
        self.group = group
        self.register_buffer("packed", torch.zeros(*stack, rows, columns // 8, dtype=torch.int32, device=device))
        self.register_buffer("scale", torch.ones(*stack, rows, columns // group, dtype=dtype, device=device))

    @classmethod
    def of(cls, weight: Tensor, group: int = 32) -> Int4Weight:
        made = cls(*weight.shape, group=group, dtype=weight.dtype, device=weight.device)
        made.store(weight.detach())
        return made

    def store(self, weight: Tensor) -> None:
        """Take these floats, ``(..., rows, columns)``. A group of zeros gets the scale 1."""
        if weight.device.type == "meta":
            return
        grouped = weight.unflatten(-1, (-1, self.group)).float()
        largest = grouped.abs().amax(-1)
        self.scale.copy_(torch.where(largest > 0, largest / 7, 1.0))
        whole = (grouped / self.scale.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(-2)
        nibbles = (whole.to(torch.int64) + 8).unflatten(-1, (-1, 8))
        packed = (nibbles << (4 * torch.arange(8, device=weight.device))).sum(-1)
        self.packed.copy_(torch.where(packed >= 2**31, packed - 2**32, packed))

    def randomize(self, generator: torch.Generator) -> None:
        """Made-up weights of the size that a linear layer has."""
        self.packed.random_(-(2**31), 2**31, generator=generator)
        columns = self.packed.shape[-1] * 8
        drawn = torch.rand(self.scale.shape, generator=generator, device=self.scale.device)
        self.scale.copy_((0.5 + drawn) / 4.6 * columns**-0.5)  # 4.6: the deviation of -8 to 7

    def dense(self, dtype: torch.dtype, chosen: Tensor | slice | None = None) -> Tensor:
        """The matrices as floats; of a stack, those that ``chosen`` (int64, or a slice) takes."""
        packed, scale = (self.packed, self.scale) if chosen is None else (self.packed[chosen], self.scale[chosen])
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
        whole = ((packed.unsqueeze(-1) >> shifts) & 15) - 8
        return (whole.flatten(-2).unflatten(-1, (-1, self.group)).to(dtype) * scale.unsqueeze(-1).to(dtype)).flatten(-2)


Weight = Fp8Weight | Int4Weight


def _take(stack: Tensor, chosen: Tensor | slice) -> Tensor:
    """Of a stack in float8, for which PyTorch has no gather."""
    return stack.view(torch.uint8)[chosen].view(stack.dtype)


class QuantizedLinear(nn.Module):
    """``x @ weight.T + bias`` in the dtype of ``x``: ``(..., in)`` to ``(..., out)``."""

    def __init__(self, weight: Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.dense(x.dtype), self.bias)


class Fp8Linear(QuantizedLinear):
    """A linear layer with an :class:`Fp8Weight`."""

    @classmethod
    def of(cls, layer: nn.Linear, block: tuple[int, int] = (128, 128)) -> Fp8Linear:
        return cls(Fp8Weight.of(layer.weight, block), layer.bias)


class Int4Linear(QuantizedLinear):
    """A linear layer with an :class:`Int4Weight`."""

    @classmethod
    def of(cls, layer: nn.Linear, group: int = 32) -> Int4Linear:
        return cls(Int4Weight.of(layer.weight, group), layer.bias)


class QuantizedExperts(nn.Module):
    """The experts of a mixture, as transformers calls them, over stacks of quantized matrices.

    ``forward(x, index, weights)``: ``x`` ``(tokens, hidden)``, ``index`` int64 and ``weights`` ``(tokens, k)``: which
    experts a token is sent to, and with what weight. Gives ``(tokens, hidden)``.

    Nothing depends on how many tokens an expert gets, so a call can be captured: few tokens gather the matrices of
    their experts; many go through all experts, some experts at a time, because all are likely to be wanted then.
    """

    def __init__(self, experts: nn.Module, make: Callable[[Tensor], Weight], at_once: int | None = None) -> None:
        """
        :param experts: of transformers, with ``gate_up_proj`` ``(experts, 2 * inner, hidden)`` and ``down_proj``
        :param make: of a float stack, its quantized one
        :param at_once: how many experts are floats at once; None: so many that these are about 2**30 numbers
        """
        super().__init__()
        self.act, self.experts = experts.act_fn, len(experts.gate_up_proj)
        self.gate_up, self.down = make(experts.gate_up_proj), make(experts.down_proj)
        parts = -(-self.experts // (at_once or max(1, 2**30 // experts.gate_up_proj[0].numel())))
        self.at_once = -(-self.experts // parts)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        tokens, k = index.shape
        if tokens * k <= self.experts:
            chosen = index.reshape(-1)
            y = self._run(x.repeat_interleave(k, 0).unsqueeze(1), chosen).view(tokens, k, -1)
            return (y * weights.unsqueeze(-1).to(y.dtype)).sum(1).to(x.dtype)
        # How much of each expert a token gets: 0 of most.
        shares = torch.zeros(tokens, self.experts, dtype=weights.dtype, device=x.device).scatter(1, index, weights)
        result = torch.zeros_like(x)
        for first in range(0, self.experts, self.at_once):
            some = slice(first, min(first + self.at_once, self.experts))
            y = self._run(x.expand(some.stop - first, *x.shape), some)
            result = result + (y * shares[:, some].T.unsqueeze(-1).to(y.dtype)).sum(0)
        return result

    def _run(self, x: Tensor, chosen: Tensor | slice) -> Tensor:
        """``x``: ``(experts, tokens, hidden)``."""
        gate, up = torch.bmm(x, self.gate_up.dense(x.dtype, chosen).transpose(1, 2)).chunk(2, -1)
        return torch.bmm(self.act(gate) * up, self.down.dense(x.dtype, chosen).transpose(1, 2))


def quantize(
    model: nn.Module, make: Callable[[Tensor], Weight], linears: Callable[[str], bool] = lambda name: True
) -> nn.Module:
    """Replace layers of ``model``, in place: linears whose qualified name ``linears`` takes, and all stacked experts.

    ``make``: of a float matrix or stack, its quantized one. Raises ``ValueError`` where nothing is replaced.
    """
    replaced = 0
    for name, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            new: nn.Module
            if isinstance(layer, nn.Linear) and linears(f"{name}.{child}" if name else child):
                new = QuantizedLinear(make(layer.weight), layer.bias)
            elif isinstance(getattr(layer, "gate_up_proj", None), nn.Parameter):
                new = QuantizedExperts(layer, make)
            else:
                continue
            setattr(module, child, new.train(layer.training))
            replaced += 1
    if not replaced:
        raise ValueError(f"{type(model).__name__} has no linear layer and no stack of experts to quantize")
    return model
