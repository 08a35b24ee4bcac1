"""Tokens, one after another: of a session, or of whatever is called with tokens and returns logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each text: of ``[batch, vocabulary]``, int64 ``[batch, 1]``; the first of equal ones."""
    return logits.argmax(-1, keepdim=True)


@dataclass(frozen=True)
class Sampler:
    """Draws a token of each text, as its logits say: of ``[batch, vocabulary]``, int64 ``[batch, 1]``.

    Draws come from ``generator``, or from the device's default one: threads that are to draw the same each time need a
    generator each.

    Source of the method: top-k sampling (Fan et al. 2018), top-p sampling (Holtzman et al. 2020).
    """

    #: Above 0; below 1 likely tokens become likelier.
    temperature: float = 1.0
    #: Draw from so many of the most likely tokens; None: from all.
    top_k: int | None = None
    #: Draw from the fewest most likely tokens that together have this probability.
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} given; expected more than 0. Use greedy for none.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} given; expected at least 1, or None for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} given; expected more than 0 and at most 1")

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p < 1:
            values, order = logits.sort(-1, descending=True)
            chances = values.softmax(-1)
            # The first that goes beyond is still drawn from.
            values = values.masked_fill(chances.cumsum(-1) - chances >= self.top_p, float("-inf"))
            logits = torch.empty_like(logits).scatter_(-1, order, values)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)


def tokens(
    call: Callable[..., torch.Tensor],
    prompt: torch.Tensor,
    *,
    choose: Callable[[torch.Tensor], torch.Tensor] = greedy,
    chunk: int | None = None,
    **first: Any,
) -> Iterator[torch.Tensor]:
    """Tokens that follow a prompt, without end, int64 ``[batch, 1]`` each; the host waits for none of them.

    Streams: everything is queued on the stream that is current when the iterator is asked.

    :param call: a session of an engine made of a :class:`~anabranch.generation.Decoder`, or such a module.
    :param prompt: int64 ``[batch, n]``, at least one token.
    :param choose: makes tokens of logits: :func:`greedy`, a :class:`Sampler`, or a function.
    :param chunk: give the prompt to ``call`` so many tokens at a time; None: all at once.
    :param first: what else the first call is given (``source``, images).
    :raises SessionFull: once the session's cache is.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"a prompt of shape {list(prompt.shape)} given; expected [batch, n] with at least one token")
    logits = None
    for part in prompt.split(chunk or prompt.shape[1], 1):
        logits = call(part.contiguous(), **first)
        first = {}
    while True:
        assert logits is not None
        token = choose(logits)
        yield token
        logits = call(token)
