"""Tokens of small language models on a GPU, from sessions on threads and streams of their own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import anabranch
from gpu.support import Gpu, on_threads

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def _model(kind: str) -> Any:
    import transformers as t

    torch.manual_seed(5)
    if kind == "mistral":
        made: Any = t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=16))
    else:
        made = t.LlamaForCausalLM(t.LlamaConfig(**SIZES))
    return made.eval().requires_grad_(False).to("cuda")


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_eight_sessions_make_the_tokens_that_each_makes_alone(gpu: Gpu, runtime: str, kind: str, backend: str) -> None:
    from anabranch.generation import Decoder, tokens

    threads, count = 8, 48
    prompts = [torch.randint(512, (1, 5), device="cuda") for _ in range(threads)]
    decoder = Decoder(_model(kind), 64)
    engine = anabranch.compile(
        decoder, [prompts[0][:, :1]], runtime=runtime, backend=backend, dynamic=False, cuda_graphs=True, max_contexts=3
    )

    def made(call: Any, i: int) -> torch.Tensor:
        return torch.cat(list(itertools.islice(tokens(call, prompts[i], chunk=1), count)), 1)

    alone = []
    for i in range(threads):
        with engine.session() as session:
            alone.append(made(session, i))
    torch.cuda.synchronize()
    assert len({tuple(x.flatten().tolist()) for x in alone}) > threads // 2
    found: list[Any] = [None] * threads

    def work(i: int) -> None:
        with torch.cuda.stream(gpu.stream()), engine.session() as session:
            found[i] = made(session, i)

    on_threads(threads, work)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    if backend == "eager":
        with torch.no_grad():
            assert torch.equal(alone[0], made(decoder, 0))
