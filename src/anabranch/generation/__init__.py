"""Language models of transformers, a token at a time: a model with a static cache of its own, and the tokens it makes.

Needs transformers. ``Decoder`` becomes an engine as any model does; each session of that engine has a cache, and the
weights are there once.
"""

from anabranch.generation._decoder import Decoder
from anabranch.generation._tokens import Sampler, greedy, tokens

__all__ = ["Decoder", "Sampler", "greedy", "tokens"]
