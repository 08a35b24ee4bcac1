"""Generates text with one engine: a session for each text, each on a thread and a stream of its own.

    python examples/generate.py                                     # a small model with random weights
    python examples/generate.py --sessions 8 --tokens 200
    python examples/generate.py --model FOLDER --prompt "Once upon a time" --temperature 0.8 --top-p 0.95

FOLDER has a language model of transformers with its tokenizer. The weights are there once, however many texts there
are; each session has a cache. Prompts may have any length: one range of sizes serves them, and a graph of its own
serves single tokens. Nothing here synchronizes anything for the engine's sake; the host waits only to show progress.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

import anabranch
from anabranch.generation import Decoder, Sampler, greedy, tokens

#: After so many tokens the host waits for them, to show how far it is.
SHOWN_EVERY = 16
CONSOLE = Console(stderr=True)


def load(folder: Path | None, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model and its tokenizer; without a folder a small model with random weights, and none."""
    import transformers

    if folder is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        return model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).to(dtype), None


def encode(text: str, tokenizer: Any, device: torch.device) -> torch.Tensor:
    """int64 ``[1, n]``. Without a tokenizer the text is numbers of tokens."""
    try:
        ids = tokenizer(text).input_ids if tokenizer is not None else [int(word) for word in text.split()]
    except ValueError:
        raise click.UsageError(
            f"--prompt {text!r} given, and the model has no tokenizer; expected numbers of tokens, as in '5 17 3'."
        ) from None
    if not ids:
        raise click.UsageError("an empty --prompt given; expected at least one token")
    return torch.tensor([ids], device=device)


class Text:
    """One text that is being made."""

    def __init__(self, session: Any, prompt: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._made = tokens(session, prompt, choose=choose)
        self.ids: list[torch.Tensor] = []

    def make(self, count: int, show: Callable[[int], None], stream: Any) -> None:
        while len(self.ids) < count:
            some = list(itertools.islice(self._made, min(SHOWN_EVERY, count - len(self.ids))))
            self.ids += some
            if stream is not None:
                stream.synchronize()
            show(len(some))


def make_all(texts: list[Text], count: int, device: torch.device) -> float:
    """Each on its thread; returns the seconds that all took."""
    errors: list[BaseException] = []
    columns = TextColumn("text {task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=CONSOLE, transient=True) as progress:

        def work(text: Text, task: TaskID) -> None:
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            try:
                with torch.cuda.stream(stream) if stream is not None else nullcontext():
                    text.make(count, lambda n: progress.advance(task, n), stream)
            except BaseException as e:
                errors.append(e)

        threads = [
            threading.Thread(target=work, args=(text, progress.add_task(str(i + 1), total=count)))
            for i, text in enumerate(texts)
        ]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - began


@click.command(help=__doc__.split("\n", 1)[0] if __doc__ else None)
@click.option("--model", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Its folder.")
@click.option("--prompt", default="5 17 3", show_default=True, help="Text; for the small model, numbers of tokens.")
@click.option("--tokens", "count", default=64, show_default=True, type=click.IntRange(1), help="How many to make.")
@click.option("--sessions", default=1, show_default=True, type=click.IntRange(1), help="How many texts at once.")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), help="Sample; without it the likeliest token.")
@click.option("--top-k", type=click.IntRange(1), help="Sample from so many of the likeliest tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the likeliest of this chance.")
@click.option("--seed", default=0, show_default=True, help="Of the first text; each next one has the next seed.")
@click.option("--device", help="cpu or cuda; the default is a GPU if there is one.")
@click.option("--backend", help="As anabranch.compile takes it.")
def main(
    folder: Path | None,
    prompt: str,
    count: int,
    sessions: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    device: str | None,
    backend: str | None,
) -> None:
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer = load(folder, where, torch.float16 if where.type == "cuda" else torch.float32)
    model = model.to(where).eval().requires_grad_(False)
    ids = encode(prompt, tokenizer, where)

    def chooser(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        if temperature is None and top_k is None and top_p is None:
            return greedy
        # One for each text: threads that share a generator would take each other's draws.
        return Sampler(temperature or 1.0, top_k, top_p or 1.0, torch.Generator(where).manual_seed(seed + i))

    with CONSOLE.status("compiling"):
        began = time.perf_counter()
        decoder = Decoder(model, ids.shape[1] + count)
        prompts = anabranch.Dim("tokens", 1, max(ids.shape[1], 2))
        engine = anabranch.compile(decoder, [anabranch.Input((1, prompts), torch.int64)], backend=backend)
    CONSOLE.print(f"compiled in {time.perf_counter() - began:.1f} s")
    with engine:
        texts = [Text(engine.session(), ids, chooser(i)) for i in range(sessions)]
        seconds = make_all(texts, count, where)
        for text in texts:
            made = torch.cat(text.ids, 1)[0].tolist()
            click.echo(tokenizer.decode(made) if tokenizer is not None else " ".join(map(str, made)))
    total = sessions * count
    CONSOLE.print(f"{total} tokens in {seconds:.2f} s: {total / seconds:.0f} tokens a second")


if __name__ == "__main__":
    main()
