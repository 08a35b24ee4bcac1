"""Tokens of small language models: by sessions on threads, exactly those that transformers itself generates."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import transformers as t
from tiny_transformers import DECODER
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache
from transformers.modeling_outputs import BaseModelOutput

import anabranch
from anabranch.generation import Decoder, Sampler, greedy, tokens

LENGTH, COUNT, THREADS = 80, 64, 8
SIZES: dict[str, Any] = {**DECODER, "max_position_embeddings": 128}


@pytest.fixture(autouse=True, scope="module")
def one_thread_for_each_operator() -> Iterator[None]:
    """Threads of the tests' own are enough for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case(NamedTuple):
    model: Any
    prompts: list[torch.Tensor]
    #: What each call of a text's first tokens is given beside them.
    first: list[dict[str, torch.Tensor]]
    #: What transformers generates.
    expected: list[list[int]]


def _causal(kind: str, **sizes: Any) -> Any:
    torch.manual_seed(3)
    config = getattr(t, f"{kind}Config")(**SIZES, **sizes)
    model = getattr(t, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": lambda: _causal("Llama"),
    "qwen2": lambda: _causal("Qwen2"),
    "mistral": lambda: _causal("Mistral", sliding_window=16),
    "gemma": lambda: _causal(
        "Gemma3Text",
        sliding_window=16,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,  # else a word is most like itself
    ),
    "mixture of experts": lambda: _causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
}


@functools.cache
def case(name: str) -> Case:
    if name == "whisper":
        return _whisper()
    model = CAUSAL[name]()
    # Not 0: transformers takes it for padding.
    prompts = [torch.randint(1, 96, (1, 3 + i % 4)) for i in range(THREADS)]
    options = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(p, **options)[0, p.shape[1] :].tolist() for p in prompts]
    return Case(model, prompts, [{} for _ in prompts], expected)


def _whisper() -> Case:
    torch.manual_seed(3)
    config = t.WhisperConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=50,
        max_target_positions=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=0.3,
    )
    model = t.WhisperForConditionalGeneration(config).eval().requires_grad_(False)
    prompts = [torch.randint(3, 96, (1, 4)) for _ in range(THREADS)]
    sounds = [torch.randn(1, 16, 100) for _ in prompts]
    expected = []
    for token, sound in zip(prompts, sounds, strict=True):
        encoded, cache, made = BaseModelOutput(model.model.encoder(sound)[0]), None, []
        for _ in range(COUNT):
            out = model(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, greedy(out.logits[:, -1])
            made.append(int(token))
        expected.append(made)
    return Case(model, prompts, [{"source": x} for x in sounds], expected)


def made_by(call: Any, prompt: torch.Tensor, count: int = COUNT, **options: Any) -> list[int]:
    return [int(token) for token in itertools.islice(tokens(call, prompt, **options), count)]


def engine_of(name: str, **settings: Any) -> Any:
    given = case(name)
    decoder = Decoder(given.model, LENGTH, source=given.first[0].get("source"))
    options = {"backend": "eager", "require_full": True, "dynamic": False} | settings
    inputs = [given.prompts[0]] if given.first[0] else [given.prompts[0][:, :1]]
    return anabranch.compile(decoder, inputs, kwargs=given.first[0], **options)


def on_threads(engine: Any, given: Case, amid: Callable[[list[Any]], None] = lambda sessions: None) -> list[list[int]]:
    """What eight sessions on eight threads make. ``amid``: done when each has made half of it."""
    sessions = [engine.session() for _ in range(THREADS)]
    found: list[list[int]] = [[] for _ in sessions]
    half = threading.Barrier(THREADS, lambda: amid(sessions), timeout=300)
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            # A prompt's tokens one by one, where the engine has been compiled for one.
            chunk = None if given.first[i] else 1
            made = tokens(sessions[i], given.prompts[i], chunk=chunk, **given.first[i])
            found[i] += [int(token) for token in itertools.islice(made, COUNT // 2)]
            half.wait()
            found[i] += [int(token) for token in itertools.islice(made, COUNT // 2)]
        except BaseException as e:
            errors.append(e)
            half.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


@pytest.mark.parametrize("name", [*CAUSAL, "whisper"])
@pytest.mark.parametrize("runtime", ["native", pytest.param("python", marks=pytest.mark.slow)])
def test_eight_sessions_on_eight_threads_make_eagers_tokens(name: str, runtime: str) -> None:
    given = case(name)
    assert len({tuple(text) for text in given.expected}) > THREADS // 2, "texts that are alike prove nothing"
    assert max(len(set(text)) for text in given.expected) > 4
    with engine_of(name, runtime=runtime) as engine:
        assert on_threads(engine, given) == given.expected


def test_two_caches_in_each_others_place_are_found() -> None:
    given = case("llama")

    def swap(sessions: list[Any]) -> None:
        a, b = sessions[2].state, sessions[5].state
        caches = [name for name in a if name != "position"]
        sessions[2].load(a | {name: b[name] for name in caches})
        sessions[5].load(b | {name: a[name] for name in caches})

    with engine_of("llama") as engine:
        found = on_threads(engine, given, swap)
    wrong = [i for i, (ours, theirs) in enumerate(zip(found, given.expected, strict=True)) if ours != theirs]
    assert wrong == [2, 5]


def test_inductors_tokens() -> None:
    given = case("mistral")
    with engine_of("mistral", backend="inductor") as engine:
        assert on_threads(engine, given) == given.expected


def test_prompts_of_any_length_by_one_range() -> None:
    given = case("gemma")
    decoder = Decoder(given.model, LENGTH)
    prompt = anabranch.Input((1, anabranch.Dim("tokens", 1, 32)), torch.int64)
    with anabranch.compile(decoder, [prompt], backend="eager", require_full=True) as engine:
        for i in (0, 1, 2, 3):
            assert made_by(engine.session(), given.prompts[i]) == given.expected[i]
        long = torch.randint(1, 96, (1, 40))
        options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
        expected = given.model.generate(long, **options)[0, 40:].tolist()
        for chunk in (32, 7):  # pieces that do not divide the prompt, and that go across the window
            assert made_by(engine.session(), long, 30, chunk=chunk) == expected
        assert engine.stats().specializations == 2, "one for a single token, one for all other lengths"


def test_a_text_as_long_as_the_cache_and_no_longer() -> None:
    with engine_of("llama") as engine:
        session, prompt = engine.session(), case("llama").prompts[0]
        made = tokens(session, prompt, chunk=1)
        for _ in range(LENGTH - prompt.shape[1] + 1):  # the last one is made, and not kept
            next(made)
        with pytest.raises(anabranch.SessionFull, match="position"):
            next(made)
        session.reset()
        assert made_by(session, prompt, chunk=1) == case("llama").expected[0]


def test_sampled_tokens_are_those_that_the_model_itself_gives_for_the_same_generator() -> None:
    given = case("qwen2")
    decoder = Decoder(given.model, LENGTH)
    for options in ({}, {"temperature": 0.7, "top_k": 12}, {"top_p": 0.8, "top_k": 40}):
        samplers = [Sampler(generator=torch.Generator().manual_seed(11), **options) for _ in range(2)]
        with torch.no_grad():
            expected = made_by(decoder, given.prompts[0], choose=samplers[0], chunk=1)
        decoder.reset()
        with engine_of("qwen2") as engine:
            assert made_by(engine.session(), given.prompts[0], choose=samplers[1], chunk=1) == expected


@pytest.mark.parametrize("kept", [1, 3])
def test_a_sampler_draws_of_the_likely_tokens_only(kept: int) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]]).repeat(500, 1)
    drawn = {int(x) for x in Sampler(top_k=kept, generator=torch.Generator().manual_seed(1))(logits)}
    assert drawn == {1, 3, 2} if kept == 3 else drawn == {1}
    # Of softmax(logits): 0.64, 0.24, 0.09, ...
    chances = {1: 0.5, 3: 0.9}[kept]
    drawn = {int(x) for x in Sampler(top_p=chances, generator=torch.Generator().manual_seed(1))(logits)}
    assert drawn == {1, 3, 2} if kept == 3 else drawn == {1}


def test_a_sampler_draws_as_often_as_the_chances_say() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]]).repeat(20_000, 1)
    drawn = Sampler(temperature=2.0, generator=torch.Generator().manual_seed(5))(logits).flatten()
    expected = (logits[0] / 2).softmax(0)
    found = drawn.bincount(minlength=3) / len(drawn)
    assert (found - expected).abs().max() < 5 * (0.25 / len(drawn)) ** 0.5


# -- what transformers offers itself ----------------------------------------------------------------------------------


def test_the_librarys_exportable_module() -> None:
    given = case("llama")
    given.model.generation_config.cache_implementation = "static"
    try:
        module = TorchExportableModuleWithStaticCache(given.model, 1, LENGTH, torch.device("cpu")).eval()
    finally:
        given.model.generation_config.cache_implementation = None
    first = torch.tensor([[1]]), None, torch.tensor([0])
    with anabranch.compile(module, [*first], backend="eager", require_full=True, dynamic=False) as engine:
        for i in range(2):
            session, made = engine.session(), list[int]()
            text = given.prompts[i][0].tolist()
            for at in range(len(text) + COUNT - 1):
                token = text[at] if at < len(text) else made[-1]
                logits = session(torch.tensor([[token]]), None, torch.tensor([at]))
                if at >= len(text) - 1:
                    made.append(int(logits[0, -1].argmax()))
            assert made == given.expected[i]
        assert sum(name.startswith("cumulative_length") for name in session.state) == 2, "its counters are state, too"
        assert "puts tensors into" not in engine.explain(), "it keeps none: nodes of the engine's own graph do"


def _static_cache(model: Any, length: int = LENGTH) -> t.StaticCache:
    cache = t.StaticCache(config=model.config, max_cache_len=length)
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    return cache


def test_a_static_cache_is_an_input_that_a_call_writes() -> None:
    given = case("llama")
    options = {"use_cache": True}
    kwargs = {"past_key_values": _static_cache(given.model), **options}
    inputs = [given.prompts[0][:, :1]]
    engine = anabranch.compile(given.model, inputs, kwargs=kwargs, backend="eager", require_full=True, dynamic=False)
    caches = [_static_cache(given.model) for _ in range(2)]
    texts: list[list[int]] = [[], []]
    for at in range(given.prompts[0].shape[1] + COUNT - 1):  # two texts, a token of each in turn
        for i in range(2):
            text = given.prompts[i * 4][0].tolist()
            token = text[at] if at < len(text) else texts[i][-1]
            out = engine(torch.tensor([[token]]), past_key_values=caches[i], **options)
            assert type(out.past_key_values) is t.StaticCache
            assert out.past_key_values.layers[1].keys is caches[i].layers[1].keys
            if at >= len(text) - 1:
                texts[i].append(int(out.logits[0, -1].argmax()))
    assert texts == [given.expected[0], given.expected[4]]
    assert int(caches[0].layers[0].cumulative_length) == given.prompts[0].shape[1] + COUNT - 1
    engine.close()


def test_an_engine_behind_generate() -> None:
    given = case("llama")
    kwargs = {"past_key_values": _static_cache(given.model), "use_cache": True, "return_dict": True}
    engine = anabranch.compile(given.model, [given.prompts[0]], kwargs=kwargs, backend="eager", require_full=True)

    @functools.wraps(given.model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return engine(*args, **kwargs)

    given.model.forward = forward
    try:
        for i in range(3):
            text = given.model.generate(
                given.prompts[i],
                past_key_values=_static_cache(given.model),
                max_new_tokens=COUNT,
                do_sample=False,
                pad_token_id=0,
                disable_compile=True,
            )
            assert text[0, given.prompts[i].shape[1] :].tolist() == given.expected[i]
    finally:
        del given.model.forward
    assert engine.stats().calls >= 3 * COUNT
    engine.close()


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_cache_that_counts_in_python_is_refused_by_name() -> None:
    model = case("mistral").model
    with pytest.raises(anabranch.InputError, match=r"StaticSlidingWindowLayer.*Python number.*generation\.Decoder"):
        anabranch.compile(
            model, [torch.tensor([[1]])], kwargs={"past_key_values": _static_cache(model), "use_cache": True}
        )


def test_a_cache_without_tensors_yet_is_refused_by_name() -> None:
    model = case("llama").model
    cache = t.StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(anabranch.InputError, match="early_initialization"):
        anabranch.compile(model, [torch.tensor([[1]])], kwargs={"past_key_values": cache, "use_cache": True})


def test_what_a_decoder_refuses() -> None:
    with pytest.raises(ValueError, match="length=0"):
        Decoder(case("llama").model, 0)
    with pytest.raises(anabranch.UnsupportedModel, match="source=features"):
        Decoder(case("whisper").model, 8)
    torch.manual_seed(0)
    config = t.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(anabranch.UnsupportedModel, match="registers what it keeps as buffers"):
        Decoder(t.MambaForCausalLM(config).eval(), 8)


def test_what_tokens_and_samplers_refuse() -> None:
    with pytest.raises(ValueError, match=r"\[3\] given; expected \[batch, n\]"):
        next(tokens(lambda x: x, torch.tensor([1, 2, 3])))
    for wrong in ({"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="expected"):
            Sampler(**wrong)  # type: ignore[arg-type]


_NARROW: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ASKING: dict[str, Callable[[], Any]] = {
    # Positions of the mask, which are cut where the text begins.
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(**_NARROW, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3)
    ),
    # A mask of ones as long as the text.
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(**_NARROW, initializer_range=0.3)),
    "biogpt": lambda: t.BioGptForCausalLM(
        t.BioGptConfig(**_NARROW, intermediate_size=64, max_position_embeddings=64, initializer_range=0.3)
    ),
}


@pytest.mark.parametrize("name", ASKING)
def test_models_that_ask_how_long_the_text_is_are_told(name: str) -> None:
    torch.manual_seed(3)
    model = ASKING[name]().eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    engine = anabranch.compile(Decoder(model, 32), [torch.randint(3, 90, (1, 7))], backend="eager")
    for length in (7, 5):
        prompt = torch.randint(3, 90, (1, length))
        expected = model.generate(prompt, max_new_tokens=16, do_sample=False)[0, length:].tolist()
        with engine.session() as session:
            made = [int(token) for token in itertools.islice(tokens(session, prompt), 16)]
        assert made == expected
