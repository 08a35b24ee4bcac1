"""The engines of a model: for pictures or sound, for the language model with its cache, and for steps of a flow.

Any number of texts are written at once, each by a session, on any threads and streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import anabranch
from anabranch.generation import Decoder, greedy
from seven.build import Model, Prompt

#: A call of the language model: an engine's session, or the module itself.
Call = Callable[..., Tensor]
#: Steps of a flow from noise to sound.
STEPS = 10


class Parts:
    """What turns a prompt into logits and tokens: the modules of a model, or the engines made of them."""

    def __init__(self, tower: Any, decoder: Any, flow: Any) -> None:
        self.tower, self.decoder, self.flow = tower, decoder, flow

    def text(self) -> Call:
        """A new text: of an engine a session, of a module the module itself, which has one cache."""
        if isinstance(self.decoder, Decoder):
            self.decoder.reset()
            return self.decoder
        return self.decoder.session()

    def close(self) -> None:
        """Free the engines."""
        for part in (self.tower, self.decoder, self.flow):
            if isinstance(part, anabranch.Engine):
                part.close()


def modules(model: Model, length: int) -> Parts:
    """For PyTorch's eager mode, one text at a time, of at most ``length`` tokens."""
    return Parts(model.tower, Decoder(model.language, length).eval(), model.flow)


def engines(model: Model, parts: Parts, prompt: Prompt, count: int, **options: Any) -> Parts:
    """Engines of the modules ``parts``, compiled for prompts like this one, for single tokens, and for the sound of
    ``count`` of them. ``options``: of :func:`anabranch.compile`.
    """
    parts.decoder.reset()  # sessions begin with what the module's buffers hold at compile
    tower = None if prompt.media is None else anabranch.compile(parts.tower, [prompt.media], **options)
    features = None if tower is None else tower(prompt.media)
    decoder = anabranch.compile(parts.decoder, [prompt.ids], kwargs=_first(prompt, features), **options)
    decoder.warm([prompt.ids[:, :1]], kwargs=_next(prompt, 0))
    flow = None
    if model.flow is not None:
        flow = anabranch.compile(model.flow, _flow(model, prompt.ids[:, :1].repeat(1, count)), **options)
    return Parts(tower, decoder, flow)


def _first(prompt: Prompt, features: Tensor | None) -> dict[str, Tensor]:
    given = {"features": features, "position_ids": prompt.positions}
    return {name: x for name, x in given.items() if x is not None}


def _next(prompt: Prompt, made: int) -> dict[str, Tensor]:
    """Where the next token stands, after so many that were made."""
    if prompt.positions is None:
        return {}
    at = prompt.ids.shape[1] + made + prompt.shift
    axes = prompt.positions.shape[0]
    return {"position_ids": torch.full((axes, 1, 1), at, dtype=torch.int64, device=prompt.ids.device)}


class Answer:
    """To one prompt, tensors on its device: ``features`` of the tower, or None; the ``logits`` after the prompt;
    ``ids`` that were made, int64 ``(1, n)``; ``sound``, ``(1, 2 * n, bins)``, or None.
    """

    def __init__(self, features: Tensor | None, logits: Tensor, ids: Tensor, sound: Tensor | None) -> None:
        self.features, self.logits, self.ids, self.sound = features, logits, ids, sound

    def all(self) -> list[Tensor]:
        return [x for x in (self.features, self.logits, self.ids, self.sound) if x is not None]


def answer(model: Model, parts: Parts, prompt: Prompt, count: int) -> Answer:
    """Reads the prompt and makes ``count`` tokens, the likeliest each; of a model with a flow, the sound of them.

    All is queued on the current stream; the host waits for nothing.
    """
    features = None if prompt.media is None else parts.tower(prompt.media)
    call = parts.text()
    logits = call(prompt.ids, **_first(prompt, features))
    made = [greedy(logits)]
    while len(made) < count:
        made.append(greedy(call(made[-1], **_next(prompt, len(made) - 1))))
    ids = torch.cat(made, 1)
    return Answer(features, logits, ids, None if model.flow is None else _sound(model, parts, ids))


def _flow(model: Model, ids: Tensor) -> list[Tensor]:
    """Inputs of the first step."""
    flow: Any = model.flow
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 2 * ids.shape[1], flow.bins, generator=generator)
    time, step = torch.zeros(1, device=ids.device), torch.full((1,), 1 / STEPS, device=ids.device)
    return [noise.to(ids.device, flow.embed.weight.dtype), ids, time, step]


def _sound(model: Model, parts: Parts, ids: Tensor) -> Tensor:
    x, ids, time, step = _flow(model, ids)
    for i in range(STEPS):
        x = parts.flow(x, ids, time + i / STEPS, step)
    return x
