"""Models of several pieces: captured, direct, captured; results of eager, whatever passes between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def _weights(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5


class _Piecewise(torch.nn.Module):
    """``after(before(x), middle(before(x)))``, with matrix products on both sides."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(_weights(width, width, seed=1))
        self.b = torch.nn.Parameter(_weights(width, width, seed=2))

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x @ self.a) * 1.5 + 0.25

    def after(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(h @ self.b) * 2 + h.roll(1, -1)


class Masked(_Piecewise):
    """Elements that a mask chooses are added up: how many depends on data, the result's size does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.before(x)
        return self.after(h + torch.masked_select(h, h > 0.3).mean())


class Written(_Piecewise):
    """A mask is written through, and both sides are returned."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h = self.before(x)
        h = h.clone()
        h[h > 0.5] = -1.0
        y = self.after(h)
        return y, y.t(), h.view(-1)


class Counted(_Piecewise):
    """``nonzero`` and ``unique`` in the middle; a number and a tensor of any size are returned, too."""

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        h = self.before(x)
        rows = torch.nonzero(h.sum(-1) > 0.1).view(-1)
        kinds = torch.unique((h * 4).round())
        chosen = h[rows].sum(0)
        y = self.after(h * chosen.sigmoid() + kinds.mean())
        return y, rows, rows.numel(), kinds


class Twice(_Piecewise):
    """What one direct piece has found is used in the next, behind a captured one: a tensor of any size goes past it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.before(x)
        found = torch.nonzero(h > 1.0)
        y = self.after(h + found.sum() * 1e-3)
        picked = y[found[:, 0], found[:, 1]]
        return torch.relu(y * 2 + 1) * 3 - picked.sum(), picked


class Dropped(_Piecewise):
    """Dropout between products."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(F.dropout(self.before(x), 0.4, training=True))


class Drawn(_Piecewise):
    """Draws early and late, of which the second could come first."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.before(x)
        h = self.after(h * torch.bernoulli(torch.sigmoid(h)))
        h = torch.tanh(h * 2 + 1) * torch.rand_like(h)
        late = torch.rand(h.shape[-1], device=h.device)
        return torch.relu(h * 3 - late) * 0.5 + h, late


class Sampled(_Piecewise):
    """How many numbers are drawn depends on data; others are drawn behind."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.before(x)
        noise = torch.rand(torch.masked_select(h, h > 0.3).numel(), device=h.device)
        y = self.after(h + noise.mean())
        return torch.relu(y * 2 + 1) * 3 + torch.rand(1, device=h.device), y


#: By name; results of the first ones depend on their inputs alone.
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "masked": Masked,
    "written": Written,
    "counted": Counted,
    "twice": Twice,
    "dropout": Dropped,
    "drawn": Drawn,
    "sampled": Sampled,
}
DATA, RANDOM = ("masked", "written", "counted", "twice"), ("dropout", "drawn", "sampled")


class PieceMlp(torch.nn.Module):
    """As ``contract.support.Mlp``, in three pieces: a draw in the middle, of which it is known what is drawn."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Linear(width, width) for _ in range(2))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(_weights(*p.shape, seed=i))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.a(x)) * 1.5 + 0.25
        h = h * torch.bernoulli(torch.ones_like(h))
        return torch.tanh(self.b(h)) * 2 + h.roll(1, -1)
