"""A model of transformers with a static cache whose tensors are buffers: state, for an engine.

The caches of transformers keep a counter for each layer; those of sliding windows count in Python's numbers, which a
graph would freeze. Here is one counter for all layers, a tensor, and each layer keeps all tokens: windows are a matter
of the mask alone, so they are right however far the text goes beyond them.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticLayer
from transformers.modeling_outputs import BaseModelOutput

from anabranch.errors import UnsupportedModel

#: Layers of a dynamic cache that keep keys and values of tokens, and nothing else.
_PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


class _Kept(StaticLayer):
    """Keys and values of one layer, float ``[batch, heads, length, size]``, in the decoder's buffers."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values = keys, values
        self._written = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True


class _Layer(_Kept):
    """Of the text so far, which grows."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        super().__init__(keys, values)
        self.cumulative_length: Any = position

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The counter stays as it is until all layers have been here.
        places = torch.arange(key_states.shape[2], device=self.device) + self.cumulative_length
        keys, values = self._written
        keys.index_copy_(2, places, key_states.to(keys.dtype))
        values.index_copy_(2, places, value_states.to(values.dtype))
        return keys, values


class _CrossLayer(_Kept):
    """Of what an encoder has made: all of it at once, or as it is."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, is_there: bool) -> None:
        super().__init__(keys, values)
        self._is_there = is_there

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._written
        keys.copy_(key_states)
        values.copy_(value_states)
        return keys, values

    def get_seq_length(self) -> int:
        return self.max_cache_len if self._is_there else 0


class Decoder(torch.nn.Module):
    """A causal language model, or an encoder with a decoder, that keeps its cache from call to call.

    ``decoder(input_ids)`` appends int64 ``[batch, n]`` tokens to the text so far and returns what follows the last one:
    logits ``[batch, vocabulary]``. So a prompt is one call, or several, and each new token is one.

    Compiled, it keeps state, and is called through a session: ``anabranch.compile(decoder, inputs=[...]).session()``.
    A text longer than ``length`` raises :class:`~anabranch.SessionFull` there before anything is queued. Plain calls of
    the module itself write its own buffers; they are for one thread at a time.

    Source of the method: static caches as in transformers' ``StaticCache`` and its exportable modules.
    """

    position: torch.Tensor
    model: Any

    def __init__(
        self, model: torch.nn.Module, length: int, *, batch: int = 1, source: torch.Tensor | None = None
    ) -> None:
        """
        :param model: of transformers, with its weights where they are to be used.
        :param length: how many tokens a text may have, the prompt's among them.
        :param batch: how many texts are decoded together, all of one length.
        :param source: of a model with an encoder, an input for that: it tells how much each text attends to.
        :raises UnsupportedModel: where a layer keeps something else than keys and values, or ``source`` is missing.
        """
        super().__init__()
        if length < 1 or batch < 1:
            raise ValueError(f"length={length} and batch={batch} given; expected at least 1 each")
        self.model = model
        self.length, self.batch = length, batch
        self.encodes = bool(getattr(model.config, "is_encoder_decoder", False))
        if self.encodes and source is None:
            raise UnsupportedModel(
                f"{type(model).__name__} has an encoder, and no source is given; expected an example of the encoder's"
                " input, whose length decides how much is kept. Pass source=features."
            )
        keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if keeps_last else {}
        made = self._made_by_one_token(source)
        if not hasattr(made, "layers") and not hasattr(made, "self_attention_cache"):
            raise UnsupportedModel(
                f"{type(model).__name__} returns no past_key_values; expected a model that keeps keys and values. Write"
                " a module that registers what it keeps as buffers, and compile that."
            )
        pairs = (
            [("", made.self_attention_cache), ("cross_", made.cross_attention_cache)] if self.encodes else [("", made)]
        )
        self._layers = 0
        for prefix, cache in pairs:
            self._layers = len(cache.layers)
            for i, layer in enumerate(cache.layers):
                if type(layer).__name__ not in _PLAIN_LAYERS:
                    raise UnsupportedModel(
                        f"layer {i} of {type(model).__name__} keeps a {type(layer).__name__}; expected layers that keep"
                        " keys and values. Write a module that registers what it keeps as buffers, and compile that."
                    )
                for kind in ("keys", "values"):
                    x = getattr(layer, kind)
                    n = x.shape[2] if prefix else length
                    buffer = x.new_zeros((batch, x.shape[1], n, x.shape[3]))
                    self.register_buffer(f"{prefix}{kind}_{i}", buffer, persistent=False)
        device = next(iter(self.buffers())).device
        self.register_buffer("position", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        #: What the model is told besides, so that it does not read the length of the text so far.
        self._told = () if self.encodes else self._needed()

    @torch.no_grad()
    def _made_by_one_token(self, source: torch.Tensor | None) -> Any:
        """The cache that the model itself makes: of which shapes, only it knows."""
        device = next(self.model.parameters()).device
        first = torch.zeros((self.batch, 1), dtype=torch.int64, device=device)
        if self.encodes:
            out = self.model(source, decoder_input_ids=first, use_cache=True)
        else:
            out = self.model(input_ids=first, use_cache=True, **self._options)
        return getattr(out, "past_key_values", None)

    @torch.no_grad()
    def _needed(self) -> tuple[str, ...]:
        """The first of these with which a step does not ask how long the text is; nothing where all do."""
        known = inspect.signature(self.model.forward).parameters
        for told in ((), ("position_ids",), ("attention_mask",), ("position_ids", "attention_mask")):
            if not known.keys() >= {*told}:
                continue
            # Fake tensors have no values that one could ask for.
            with contextlib.suppress(Exception), FakeTensorMode(allow_non_fake_inputs=True):
                pairs = [map(torch.empty_like, self._buffers_of("", i)) for i in range(self._layers)]
                position = torch.empty_like(self.position)
                own = Cache(layers=[_Layer(keys, values, position) for keys, values in pairs])
                first = torch.zeros((self.batch, 3), dtype=torch.int64, device=position.device)
                also = self._also(told, 3, position)
                self.model(input_ids=first, past_key_values=own, use_cache=True, **self._options, **also)
                return told
        return ()

    def _also(self, told: tuple[str, ...], n: int, position: torch.Tensor) -> dict[str, torch.Tensor]:
        """What ``told`` names, of a call with ``n`` tokens."""
        made = {}
        if "position_ids" in told:
            made["position_ids"] = (torch.arange(n, device=position.device) + position).expand(self.batch, -1)
        if "attention_mask" in told:
            made["attention_mask"] = torch.ones((self.batch, self.length), dtype=torch.int64, device=position.device)
        return made

    def _buffers_of(self, prefix: str, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(self, f"{prefix}keys_{i}"), getattr(self, f"{prefix}values_{i}")

    def forward(self, input_ids: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
        """
        :param input_ids: the next tokens; or ``inputs_embeds`` among ``inputs``.
        :param inputs: what else the model takes (images, positions, ...); of a model with an encoder ``source``, in a
            text's first call.
        :returns: logits of what follows, ``[batch, vocabulary]``
        """
        own = Cache(layers=[_Layer(*self._buffers_of("", i), self.position) for i in range(self._layers)])
        tokens: Any = inputs["inputs_embeds"] if input_ids is None else input_ids
        if self.encodes:
            out = self._decode(input_ids, own, **inputs)
        else:
            also = self._also(self._told, tokens.shape[1], self.position)
            given = {**self._options, **also, **inputs}
            out = self.model(input_ids=input_ids, past_key_values=own, use_cache=True, **given)
        self.position.add_(tokens.shape[1])
        return out.logits[:, -1]

    def _decode(self, input_ids: Any, own: Cache, source: torch.Tensor | None = None, **inputs: Any) -> Any:
        cross = Cache(layers=[_CrossLayer(*self._buffers_of("cross_", i), source is None) for i in range(self._layers)])
        if source is not None:
            encoded = self.model.get_encoder()(source)[0]
        else:
            # Nobody looks at it: the keys and values that were made of it are there.
            encoded = self._buffers_of("cross_", 0)[0].new_zeros((self.batch, 1, self.model.config.hidden_size))
        return self.model(
            encoder_outputs=BaseModelOutput(encoded),
            decoder_input_ids=input_ids,
            past_key_values=EncoderDecoderCache(own, cross),
            use_cache=True,
            **inputs,
        )

    def reset(self) -> None:
        """Begin a new text. Of an engine's sessions: :meth:`anabranch.Session.reset`."""
        self.position.zero_()
