"""Programs for the explorer: one shared engine whose calls are three pieces, captured, direct and captured."""

from __future__ import annotations

from typing import Any

import torch
from engines import INPUTS, RUNTIMES, SIM, SOURCES, STREAMS, check, many_threads, one_thread

import anabranch


class Draws(torch.nn.Module):
    """A draw in the middle, of which it is known what is drawn: no host waits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(x * 2 + 1)
        h = h * torch.bernoulli(torch.ones_like(h))
        return torch.relu(h * 3 - 1)


class Looks(torch.nn.Module):
    """The host looks how many elements a mask chooses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(x * 2 + 1)
        h = h + torch.masked_select(h, h > 5).sum()
        return torch.relu(h * 3 - 1)


def make(model: torch.nn.Module, runtime: str, limit: int) -> Any:
    """An engine with as many contexts as ``limit`` lets it have, built."""
    x = torch.empty(4, device=SIM)
    engine = anabranch.compile(model.to(SIM), [x], backend="eager", runtime=runtime, max_contexts=limit)
    engine.warm(contexts=limit)
    (signature,) = engine.summary()["signatures"]
    assert [piece["captured"] for piece in signature["pieces"]] == [True, False, limit > 1]
    return engine


#: By model, runtime and limit: with one context the last piece runs direct.
ENGINES = {
    (model, runtime, limit): make(model(), runtime, limit)
    for model in (Draws, Looks)
    for runtime in RUNTIMES
    for limit in (1, 2)
}
EXPECTED = {model: [model()(x) for x in SOURCES] for model in (Draws, Looks)}
torch.accelerator.synchronize()


def _expecting(model: Any) -> None:
    import engines

    engines.EXPECTED = EXPECTED[model]


def draws_threads1_calls2(runtime: str, limit: int) -> None:
    _expecting(Draws)
    one_thread(ENGINES[Draws, runtime, limit], 2)


def draws_threads1_calls3(runtime: str, limit: int) -> None:
    _expecting(Draws)
    one_thread(ENGINES[Draws, runtime, limit], 3)


def draws_threads2_calls2(runtime: str, limit: int) -> None:
    _expecting(Draws)
    many_threads(ENGINES[Draws, runtime, limit], 2, 2)


def draws_threads2_calls1(runtime: str, limit: int) -> None:
    _expecting(Draws)
    many_threads(ENGINES[Draws, runtime, limit], 2, 1)


def looks_threads2_calls2(runtime: str, limit: int) -> None:
    _expecting(Looks)
    many_threads(ENGINES[Looks, runtime, limit], 2, 2)


def looks_threads2_calls1(runtime: str, limit: int) -> None:
    _expecting(Looks)
    many_threads(ENGINES[Looks, runtime, limit], 2, 1)


__all__ = ["ENGINES", "INPUTS", "STREAMS", "Draws", "Looks", "check"]
