"""Networks that draw random numbers, and what tests of their draws count.

Each network returns what it computes and, beside it, what was drawn, as integers that depend on nothing else: two calls
that drew the same are found by bits, whatever their inputs were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

WIDTH = 64
KEEP = 0.6
#: Of the sampler's eight choices, whatever its input is.
CHANCES = (0.05, 0.1, 0.1, 0.15, 0.2, 0.02, 0.08, 0.3)
#: What chi-squared of seven degrees of freedom exceeds once in a million times.
CHI_SQUARED = 40.53


def _weights(seed: int) -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)) * WIDTH**-0.5


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(_weights(1), requires_grad=False)
        self.b = torch.nn.Parameter(_weights(2), requires_grad=False)
        self.register_buffer("chances", torch.tensor(CHANCES))


Drawn = tuple[torch.Tensor, torch.Tensor]


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


class Dropout(_Layer):
    """Of ones, so that what is kept is seen, and of the input, twice."""

    def forward(self, x: torch.Tensor) -> Drawn:
        kept = F.dropout(torch.ones_like(x), 1 - KEEP, training=True)
        return F.dropout(x * kept + 1, 0.5, training=True), (kept > 0).int()


class Bernoulli(_Layer):
    def forward(self, x: torch.Tensor) -> Drawn:
        drawn = torch.bernoulli(torch.full_like(x, KEEP))
        return x * drawn - x, drawn.int()


class Noise(_Layer):
    def forward(self, x: torch.Tensor) -> Drawn:
        uniform, normal = torch.rand_like(x), torch.randn(x.shape, device=x.device)
        return x + uniform * normal, torch.cat([_bits(uniform), _bits(normal)])


class Sampler(_Layer):
    """As many samples of each row; the row's chances are the same whatever the input adds to its logits."""

    def forward(self, x: torch.Tensor) -> Drawn:
        logits = torch.log(self.chances) + x[:, :1].round()
        drawn = torch.multinomial(torch.softmax(logits, -1), WIDTH, replacement=True)
        return x + drawn, drawn.int()


class Gumbel(_Layer):
    """The argument of the maximum of logits and noise."""

    def forward(self, x: torch.Tensor) -> Drawn:
        uniform = torch.rand(*x.shape, len(CHANCES), device=x.device).clamp(1e-9, 1 - 1e-7)
        drawn = (torch.log(self.chances) - torch.log(-torch.log(uniform))).argmax(-1)
        return x + drawn, drawn.int()


class Between(_Layer):
    """A draw between two products, so that there are captured pieces on both of its sides."""

    def forward(self, x: torch.Tensor) -> Drawn:
        h = torch.relu(x @ self.a) * 1.5 + 0.25
        kept = torch.bernoulli(torch.full_like(h, KEEP))
        return torch.tanh((h * kept) @ self.b) * 2 + h.roll(1, -1), kept.int()


NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "dropout": Dropout,
    "bernoulli": Bernoulli,
    "noise": Noise,
    "sampler": Sampler,
    "gumbel": Gumbel,
    "between": Between,
}


class Given(_Layer):
    """Draws between two products from the generator that it is given, by name and in place."""

    def forward(self, x: torch.Tensor, generator: torch.Generator | None = None) -> Drawn:
        h = torch.relu(x @ self.a) * 1.5 + 0.25
        uniform = torch.rand(h.shape, generator=generator, device=h.device)
        noise = torch.empty_like(h).normal_(generator=generator)
        return torch.tanh((h * uniform) @ self.b) * 2 + noise, torch.cat([_bits(uniform), _bits(noise)])


class Held(Given):
    """The same from a generator of the model's own."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        super().__init__()
        self.generator = torch.Generator(device).manual_seed(seed)

    def forward(self, x: torch.Tensor) -> Drawn:  # type: ignore[override]
        return super().forward(x, self.generator)


# -- what is counted ---------------------------------------------------------------------------------------------------


def as_bytes(drawn: torch.Tensor) -> bytes:
    """What was drawn, by bits."""
    return drawn.cpu().numpy().tobytes()


def assert_all_differ(drawn: Iterable[torch.Tensor]) -> None:
    """No draw is made twice: of hundreds of bits each, all of them differ."""
    found = [as_bytes(d) for d in drawn]
    assert len(set(found)) == len(found), f"of {len(found)} draws {len(found) - len(set(found))} were made before"


def assert_rate(name: str, drawn: list[torch.Tensor]) -> None:
    """What was drawn has the frequencies that it should have, within what happens once in a million times."""
    together = torch.stack([d.cpu() for d in drawn]).double()
    if name in ("sampler", "gumbel"):
        counts = torch.stack([(together == k).sum() for k in range(len(CHANCES))]).double()
        expected = torch.tensor(CHANCES, dtype=torch.float64) * together.numel()
        assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARED, counts / together.numel()
        return
    if name == "noise":
        uniform, normal = (d.contiguous().int().view(torch.float32).double() for d in together.chunk(2, 1))
        _assert_mean(uniform, 0.5, 1 / 12)
        _assert_mean(normal, 0.0, 1.0)
        return
    _assert_mean(together, KEEP, KEEP * (1 - KEEP))
    # Draws of different calls have nothing to do with each other.
    agree = (together[1:] == together[:-1]).double()
    chance = KEEP**2 + (1 - KEEP) ** 2
    _assert_mean(agree, chance, chance * (1 - chance))


def assert_drawn_as_in_eager(
    name: str,
    drawn: list[torch.Tensor],
    model: torch.nn.Module,
    inputs: Iterable[Iterable[tuple[torch.Tensor]]],
    seed: int,
) -> bool:
    """Calls of several threads, which share the default generator, never draw the same, and draw as often as eager.

    ``drawn``: of each call; ``inputs``: by thread. Where a call draws once, each has what one of as many calls of
    eager's has under ``seed``, in some order; then these calls are made, and True is returned.
    """
    assert_all_differ(drawn)
    assert_rate(name, drawn)
    if name in ("dropout", "noise"):
        return False
    torch.manual_seed(seed)
    expected = [model(x)[1] for thread in inputs for (x,) in thread]
    assert Counter(map(as_bytes, drawn)) == Counter(map(as_bytes, expected))
    return True


def _assert_mean(values: torch.Tensor, mean: float, variance: float) -> None:
    """Within five standard deviations of the mean of so many."""
    deviation = (variance / values.numel()) ** 0.5
    assert abs(values.mean().item() - mean) < 5 * deviation, (values.mean().item(), mean, deviation)
