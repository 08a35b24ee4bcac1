"""Tokens of a language model on a GPU: of one session, of eight at once, of 64 alive; and prompts.

    python benchmarks/generate.py --json benchmarks/results/generate_h200.json

The model has a Llama's shape (16 layers, 2,048 wide, 8 heads of keys and values, vocabulary 32,000; random weights,
float16), a text at a time, and a cache of 512 tokens. ``decode``: tokens a second of one session, beside
``torch.compile(mode="reduce-overhead")`` of the model with the library's static cache, in turn; of eight sessions on
eight threads together; what reading the weights would allow, by how fast this card reads in this process; and whether
each of 64 sessions, called in turns, makes the tokens that it makes alone. ``prefill``: a prompt's call, by its length,
beside ``torch.compile``.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import jobs
import torch

LAYERS, WIDTH, VOCABULARY, CACHE = 16, 2048, 32_000, 512
TOKENS, ROUNDS = 256, 5
THREADS, SESSIONS, EACH = 8, 64, 64
PROMPTS = (128, 1000)
DTYPE = torch.float16


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    with torch.device("cuda"):
        made = LlamaForCausalLM(config).to(DTYPE)
    return made.eval().requires_grad_(False)


def weights_read(made: Any) -> int:
    """Bytes that a token reads: all weights, but of the embedding one row."""
    return sum(p.nbytes for p in made.parameters()) - made.get_input_embeddings().weight.nbytes


def bandwidth() -> float:
    """Bytes a second that this card reads: a sum over 4 GiB, the best of ten."""
    x = torch.ones(1 << 31, dtype=torch.float16, device="cuda")
    times = []
    for _ in range(11):
        torch.cuda.synchronize()
        began = time.perf_counter()
        torch.sum(x, dtype=torch.float32)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return x.nbytes / min(times[1:])


def prompt_of(seed: int, length: int = 8) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randint(VOCABULARY, (1, length), device="cuda", generator=generator)


def rate(work: Callable[[], Any], tokens: int) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return tokens / (time.perf_counter() - began)


def made_by(call: Any, seed: int, count: int) -> list[torch.Tensor]:
    from anabranch.generation import tokens

    return list(itertools.islice(tokens(call, prompt_of(seed), chunk=1), count))


def peer(made: Any) -> Callable[[int], None]:
    """Makes so many tokens with the library's static cache, under ``torch.compile``."""
    from transformers import StaticCache

    cache = StaticCache(config=made.config, max_cache_len=CACHE)
    heads, size = made.config.num_key_value_heads, WIDTH // made.config.num_attention_heads
    cache.early_initialization(1, heads, size, DTYPE, torch.device("cuda"))
    step = torch.compile(made.forward, mode="reduce-overhead", fullgraph=True)

    def run(count: int) -> None:
        cache.reset()
        token = prompt_of(0)[:, :1].clone()
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            out = step(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True).clone()

    with torch.no_grad():
        run(8)
    return torch.no_grad()(run)


def measure_decode() -> dict[str, Any]:
    import anabranch
    from anabranch.generation import Decoder

    made = model()
    decoder = Decoder(made, CACHE)
    began = time.perf_counter()
    engine = anabranch.compile(decoder, inputs=[prompt_of(0)[:, :1]], dynamic=False, cuda_graphs=True, max_contexts=8)
    built = time.perf_counter() - began
    engine.warm(contexts=THREADS)
    session = engine.session()
    theirs = peer(made)

    def ours(count: int) -> None:
        session.reset()
        made_by(session, 0, count)

    ours(8)
    rates: dict[str, list[float]] = {"ours": [], "reduce-overhead": []}
    for _ in range(ROUNDS):
        rates["ours"].append(rate(lambda: ours(TOKENS - 8), TOKENS))
        rates["reduce-overhead"].append(rate(lambda: theirs(TOKENS), TOKENS))
    one = {name: statistics.median(found) for name, found in rates.items()}
    limit = bandwidth() / weights_read(made)
    together = statistics.median(rate(lambda: on_threads(engine, TOKENS - 8), THREADS * TOKENS) for _ in range(3))
    return {
        "built_s": round(built, 1),
        "tokens_s": {name: round(x) for name, x in one.items()},
        "one_session_against_reduce_overhead": round(one["ours"] / one["reduce-overhead"], 3),
        "limit_by_reading_weights_tokens_s": round(limit),
        "eight_sessions_tokens_s": round(together),
        "eight_against_limit": round(together / limit, 3),
        "eight_against_one": round(together / one["ours"], 3),
        "alive": alive(engine),
        "stats": str(engine.stats()),
    }


def on_threads(engine: Any, count: int) -> None:
    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), engine.session() as session:
            made_by(session, i, count)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def alive(engine: Any) -> dict[str, Any]:
    """64 sessions, a token of each in turn on eight threads, against what each makes alone."""
    alone = []
    for i in range(SESSIONS):
        with engine.session() as session:
            alone.append(torch.cat(made_by(session, i, EACH), 1))
    sessions = [engine.session() for _ in range(SESSIONS)]
    found: list[Any] = [None] * SESSIONS

    def work(thread: int) -> None:
        from anabranch.generation import tokens

        mine = range(thread, SESSIONS, THREADS)
        with torch.cuda.stream(torch.cuda.Stream()):
            texts = {i: tokens(sessions[i], prompt_of(i), chunk=1) for i in mine}
            made: dict[int, list[torch.Tensor]] = {i: [] for i in mine}
            for _ in range(EACH):
                for i in mine:
                    made[i].append(next(texts[i]))
            for i in mine:
                found[i] = torch.cat(made[i], 1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    torch.cuda.synchronize()
    differ = sum(int((a != b).sum()) for a, b in zip(alone, found, strict=True))
    different = len({tuple(x.flatten().tolist()) for x in alone})
    return {"sessions": SESSIONS, "tokens_each": EACH, "tokens_that_differ": differ, "texts_that_differ": different}


def measure_prefill(length: int) -> dict[str, Any]:
    import anabranch
    from anabranch.generation import Decoder

    made = model()
    decoder = Decoder(made, 1024)
    prompts = [prompt_of(i, length) for i in range(4)]
    began = time.perf_counter()
    engine = anabranch.compile(decoder, inputs=[prompts[0]], dynamic=False)
    built = time.perf_counter() - began
    session, compiled = engine.session(), torch.compile(Decoder(made, 1024))

    def ours(i: int) -> Any:
        session.reset()
        return session(prompts[i % 4])

    def theirs(i: int) -> Any:
        compiled.reset()
        with torch.no_grad():
            return compiled(prompts[i % 4])

    wrong = sum(not torch.allclose(ours(i), theirs(i), rtol=2e-2, atol=2e-2) for i in range(4))
    times: dict[str, list[float]] = {"ours": [], "torch.compile": []}
    for i in range(40):
        for name, run in (("ours", ours), ("torch.compile", theirs)):
            torch.cuda.synchronize()
            began = time.perf_counter()
            run(i)
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found[4:]) * 1000 for name, found in times.items()}
    return {
        "built_s": round(built, 1),
        "ms": {name: round(x, 3) for name, x in medians.items()},
        "torch_compile_against_ours": round(medians["torch.compile"] / medians["ours"], 3),
        "far_from_torch_compile": wrong,
        "captured": engine.stats().contexts > 0,
    }


def measurements() -> dict[str, jobs.Job]:
    made: dict[str, jobs.Job] = {"decode": measure_decode}
    for length in PROMPTS:
        made[f"prefill {length}"] = lambda length=length: measure_prefill(length)
    return made


if __name__ == "__main__":
    jobs.command(__doc__, __file__, measurements)()
