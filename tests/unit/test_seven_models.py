"""The seven models of ``examples/models.py``, small: their parts are the model of transformers, and engines are right.

Weights are random. Each is asked from four threads, with a prompt of its own each: a picture, a sound or text is read,
and tokens are made, by sessions of one engine.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import anabranch
from anabranch._judge import differences
from contract.support import ROUNDING, assert_same

if importlib.util.find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "transformers is not installed; run `make install`, or pip install -r requirements/dev.txt"
    )

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = (
    "autoglm-phone-9b",
    "glm-4.6v-fp8",
    "kimi-k2-thinking",
    "hunyuanocr",
    "glm-asr-nano-2512",
    "glm-tts",
    "spark-formalizer-x1-7b",
)
#: Those that read a picture or a sound.
READERS = ("autoglm-phone-9b", "glm-4.6v-fp8", "hunyuanocr", "glm-asr-nano-2512")
THREADS, TOKENS = 4, 6


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, Any]]:
    """The example's modules, which import one another as files of one folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import models
        import seven
        import seven.engines

        yield {"models": models, "seven": seven, "engines": seven.engines}
        for name in [name for name in sys.modules if name == "models" or name.split(".")[0] == "seven"]:
            del sys.modules[name]


@pytest.fixture
def always_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eager, transformers leaves the causal mask out where it finds the cache empty, which takes another kernel and
    other roundings. No graph can look. With the mask, eager and engines have the same bits."""
    import transformers.masking_utils

    monkeypatch.setattr(transformers.masking_utils, "_ignore_causal_mask_sdpa", lambda *args, **kwargs: False)


def made(programs: dict[str, Any], name: str) -> tuple[Any, list[Any], Any]:
    """A model, four prompts, and its modules for eager."""
    model = programs["seven"].make(name)
    prompts = [model.prompt(seed) for seed in range(1, THREADS + 1)]
    return model, prompts, programs["engines"].modules(model, prompts[0].ids.shape[1] + TOKENS)


def test_these_are_the_seven(programs: dict[str, Any]) -> None:
    assert tuple(programs["seven"].MAKERS) == NAMES
    with pytest.raises(LookupError, match="no model 'gpt-5'; there are autoglm-phone-9b, "):
        programs["seven"].make("gpt-5")


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_are_the_model_of_transformers(programs: dict[str, Any], name: str) -> None:
    """Bit for bit, in eager; and with the cache they make the tokens that ``generate`` makes."""
    model, prompts, parts = made(programs, name)
    with torch.no_grad():
        for prompt in prompts[:2]:
            features = None if prompt.media is None else model.tower(prompt.media)
            logits = model.language(prompt.ids, features, prompt.positions).logits
            assert_same(logits, model.whole(**prompt.whole).logits)
            inputs = {k: v for k, v in prompt.whole.items() if k != "use_cache"}
            limits = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
            theirs = model.whole.generate(**inputs, **limits)[:, prompt.ids.shape[1] :]
            assert_same(programs["engines"].answer(model, parts, prompt, TOKENS).ids, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_true_sizes_need_no_memory_to_be_known(programs: dict[str, Any], name: str) -> None:
    """Of so many layers as are asked for, which the weights of a layer tell."""
    sizes = {n: programs["seven"].make(name, small=False, device="meta", layers=n).whole for n in (2, 3, 5)}
    counts = {n: sum(p.numel() * p.element_size() for p in m.state_dict().values()) for n, m in sizes.items()}
    assert counts[5] - counts[3] == 2 * (counts[3] - counts[2]) > 10**8


@pytest.mark.parametrize("name", NAMES)
def test_a_small_one_has_the_kinds_of_the_true_one(programs: dict[str, Any], name: str) -> None:
    """The same modules, and the same kind of rotary embedding: else what runs small says nothing of the true one."""
    made = [programs["seven"].make(name, small=small, device="meta", layers=2).whole for small in (True, False)]
    assert len({frozenset(type(m) for m in model.modules()) for model in made}) == 1
    texts = [model.config.get_text_config().rope_parameters for model in made]
    assert len({(p["rope_type"], frozenset(p)) for p in texts}) == 1


def test_what_a_tower_sees_and_hears_matters(programs: dict[str, Any]) -> None:
    for name in READERS:
        model, (prompt, other, *_), _ = made(programs, name)
        with torch.no_grad():
            features = [model.tower(x.media) for x in (prompt, other)]
            logits = [model.language(prompt.ids, f, prompt.positions).logits for f in features]
        assert differences(*features), name
        assert differences(*logits), name


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(pytest.param(name, "eager", id=f"{name}-eager") for name in NAMES),
        *(pytest.param(name, "inductor", id=f"{name}-inductor", marks=pytest.mark.slow) for name in NAMES),
    ],
)
def test_four_threads_get_what_eager_gives(
    programs: dict[str, Any], always_masked: None, name: str, backend: str
) -> None:
    """Features, logits, tokens and sound: with the backend eager bit for bit, with inductor the same tokens."""
    model, prompts, plain = made(programs, name)
    answer = programs["engines"].answer
    with torch.no_grad():
        expected = [answer(model, plain, prompt, TOKENS).all() for prompt in prompts]
        for a, b in itertools.pairwise(expected):
            assert differences(a[-1], b[-1]), "two prompts have one answer: a wrong session would not show"
        engines = programs["engines"].engines(model, plain, prompts[0], TOKENS, backend=backend)
        rounding = None if backend == "eager" else ROUNDING
        for _ in range(2):
            answers = programs["models"].on_threads(model, engines, prompts, TOKENS, "cpu")
            for result, wanted in zip(answers, expected, strict=True):
                assert_same(result.all(), wanted, rounding=rounding)
    for engine in (engines.tower, engines.decoder, engines.flow):
        if engine is not None:
            assert engine.summary()["fragments"] is None, engine.explain()
    engines.close()


#: Of the text beside the picture. Three tokens gather their experts, more go through all of them.
LENGTHS: dict[str, tuple[int, ...]] = {"glm-4.6v-fp8": (20, 9, 31, 20), "kimi-k2-thinking": (20, 3, 31, 20)}


@pytest.mark.parametrize(
    "name", ["spark-formalizer-x1-7b", *(pytest.param(name, marks=pytest.mark.slow) for name in LENGTHS)]
)
def test_prompts_of_many_lengths(programs: dict[str, Any], always_masked: None, name: str) -> None:
    model = programs["seven"].make(name)
    prompts = [model.prompt(seed, text=length) for seed, length in enumerate((12, *LENGTHS.get(name, (20, 9, 31, 20))))]
    answer, plain = programs["engines"].answer, programs["engines"].modules(model, 80)
    with torch.no_grad():
        expected = [answer(model, plain, prompt, TOKENS).all() for prompt in prompts]
        engines = programs["engines"].engines(model, plain, prompts[0], TOKENS, backend="eager")
        for prompt, wanted in zip(prompts, expected, strict=True):
            assert_same(answer(model, engines, prompt, TOKENS).all(), wanted, str(prompt.ids.shape))
    engines.close()


def test_two_sessions_swapped_are_noticed(programs: dict[str, Any]) -> None:
    """What a runtime that mixed up two caches would answer is another answer."""
    model, prompts, parts = made(programs, "spark-formalizer-x1-7b")
    with torch.no_grad():
        expected = [programs["engines"].answer(model, parts, prompt, TOKENS).ids for prompt in prompts[:2]]
        engines = programs["engines"].engines(model, parts, prompts[0], TOKENS, backend="eager")
        sessions = [engines.decoder.session() for _ in range(2)]
        tokens = [sessions[i](prompts[i].ids).argmax(-1, keepdim=True) for i in range(2)]
        swapped = [[token] for token in tokens]
        for _ in range(TOKENS - 1):
            for i in range(2):
                swapped[i].append(sessions[1 - i](swapped[i][-1]).argmax(-1, keepdim=True))
        for ids, wanted in zip(swapped, expected, strict=True):
            assert differences(torch.cat(ids, 1), wanted)
    engines.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autoglm-phone-9b", "hunyuanocr"])
def test_a_whole_model_in_many_graphs_is_right_too(programs: dict[str, Any], name: str) -> None:
    """As nobody should use it: the loops over pictures stay Python, between graphs."""
    model, prompts, _ = made(programs, name)
    with torch.no_grad(), anabranch.compile(model.whole, kwargs=prompts[0].whole, backend="eager") as engine:
        for prompt in prompts[:2]:
            assert_same(engine(**prompt.whole), model.whole(**prompt.whole))
        assert "graphs with Python between them" in engine.explain()


def run(programs: dict[str, Any], *options: str) -> Any:
    return CliRunner().invoke(programs["models"].main, [*options])


def test_the_example_checks(programs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it keeps becomes a row of ``docs/models.md``."""
    kept = tmp_path / "seven_here.json"
    options = ("--small", "--sessions", "2", "--tokens", "4", "--rounds", "1", "--backend", "eager", "--check")
    result = run(programs, "glm-tts", *options, "--json", str(kept))
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    expected = {"model": "glm-tts", "right": True, "wrong": 0, "answers": 4, "tokens": 8, "tokens_as_eager": 8}
    assert {k: row[k] for k in expected} == expected
    assert set(row["error_to_eager"]) == {"logits", "sound"}
    rows = json.loads(kept.read_text())["rows"]
    assert rows == [row]
    other = {**row, "model": "hunyuanocr", "right": False, "wrong": 3}
    programs["models"].keep(kept, other)
    programs["models"].keep(kept, {**row, "right": True})
    rows = json.loads(kept.read_text())["rows"]
    assert [r["model"] for r in rows] == ["hunyuanocr", "glm-tts"]
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks"))
    import tables

    monkeypatch.delitem(sys.modules, "tables")
    lines = tables.seven_of(rows).splitlines()
    assert lines[0].startswith("cpu, PyTorch ")
    assert lines[-2].startswith("| hunyuanocr | not right | 3 of 4 | ")
    assert lines[-1].startswith("| glm-tts | right | 0 of 4 | logits ")


def test_the_example_finds_a_wrong_answer(programs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One session's tokens are another's in one call of three."""
    models, right = programs["models"], programs["models"].on_threads
    calls = []

    def mixed(*args: Any) -> Any:
        calls.append(args)
        answers = right(*args)
        return answers[::-1] if len(calls) == 2 else answers

    monkeypatch.setattr(models, "on_threads", mixed)
    options = ("--small", "--sessions", "2", "--tokens", "4", "--backend", "eager", "--check")
    result = run(programs, "spark-formalizer-x1-7b", *options)
    row = json.loads(result.stdout)
    assert (result.exit_code, row["right"], row["wrong"], row["answers"]) == (1, False, 2, 8)


def test_the_example_lists_and_refuses(programs: dict[str, Any]) -> None:
    assert run(programs, "--list").output.split() == list(NAMES)
    result = run(programs, "gpt-5", "--small")
    assert result.exit_code == 2
    assert "gpt-5 given; expected of autoglm-phone-9b" in result.output
    result = run(programs, "hunyuanocr", "--device", "cpu")
    assert "true sizes need a GPU, and there is none; add --small" in result.output
