"""The seven models of the bug report's page, by their public architectures, with random weights.

    python examples/models.py --list
    python examples/models.py hunyuanocr --small --sessions 4         # on the CPU; prints what the sessions write
    python examples/models.py autoglm-phone-9b --sessions 8           # at true size, on a GPU
    python examples/models.py autoglm-phone-9b hunyuanocr --check     # a line of JSON each, right or wrong

A model is a tower for pictures or sound, a language model with a cache, and for speech the steps of a flow: an engine
each. Every session reads a prompt of its own and writes the likeliest tokens, on a thread and a stream of its own.

With --check each session's answer is compared with the one that the same engines give it alone, bit for bit, and that
with PyTorch's eager mode. docs/models.md says what stands in for what, and what fits into how much memory.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import click
import seven
import torch
from seven.engines import Answer, Parts, answer, engines, modules

import anabranch
from anabranch._judge import Rounding, error, identical
from anabranch.check import write_json

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: How far float32 may be from eager's, relative to the largest value: of sums in another order.
FLOAT32 = 1e-4
#: Seconds for one model with --check, at true size.
LIMIT = 540.0


def stream_of_its_own(device: str) -> AbstractContextManager[Any]:
    """A stream of the calling thread's own, on a device that has streams."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def on_threads(model: seven.Model, parts: Parts, prompts: list[Any], count: int, device: str) -> list[Answer]:
    """An answer to each prompt, each on a thread and a stream of its own, all at once."""
    barrier = threading.Barrier(len(prompts))

    def work(prompt: Any) -> Answer:
        with torch.no_grad(), stream_of_its_own(device):
            barrier.wait()
            made = answer(model, parts, prompt, count)
            if device == "cuda":
                torch.cuda.current_stream().synchronize()
            return made

    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(work, prompts))


class Run:
    """One model, made, compiled and asked; with the seconds that each took."""

    def __init__(self, name: str, device: str, dtype: torch.dtype, options: dict[str, Any], **sizes: Any) -> None:
        """``options``: of :func:`anabranch.compile`; ``sizes``: of :func:`seven.make`."""
        self.device, self.dtype, self.options = device, dtype, {k: v for k, v in options.items() if v is not None}
        self.seconds: dict[str, float] = {}
        began = time.monotonic()
        self.model = seven.make(name, device=device, dtype=dtype, **sizes)
        wait(device)
        self.took("make", began)

    def took(self, what: str, began: float) -> None:
        self.seconds[what] = round(time.monotonic() - began, 4)
        click.echo(f"{self.model.name}: {what} took {self.seconds[what]:.2f} s", err=True)

    def ask(self, sessions: int, count: int) -> tuple[Parts, list[Any], list[Answer]]:
        """Engines, a prompt for each session, and PyTorch's own answers."""
        prompts = [self.model.prompt(seed) for seed in range(1, sessions + 1)]
        length = prompts[0].ids.shape[1] + count
        plain = modules(self.model, length)
        began = time.monotonic()
        expected = [answer(self.model, plain, prompt, count) for prompt in prompts]
        wait(self.device)
        self.took("eager", began)
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what eager's layers needed between them
        began = time.monotonic()
        compiled = engines(self.model, plain, prompts[0], count, **self.options)
        self.took("build", began)
        return compiled, prompts, expected

    def paths(self, compiled: Parts) -> dict[str, list[str]]:
        """Of each engine and each signature, how its calls run."""
        made = {}
        for part in ("tower", "decoder", "flow"):
            engine = getattr(compiled, part)
            if isinstance(engine, anabranch.Engine):
                signatures = engine.summary()["signatures"]
                made[part] = [f"{s['backend']}, {'captured' if s['captured'] else s['reason']}" for s in signatures]
        return made

    def check(self, sessions: int, count: int, rounds: int) -> dict[str, Any]:
        """What --check prints: see there."""
        compiled, prompts, expected = self.ask(sessions, count)
        began = time.monotonic()
        alone = [answer(self.model, compiled, prompt, count) for prompt in prompts]
        wait(self.device)
        self.took("alone", began)
        wrong = calls = 0
        for i in range(rounds + 1):
            if i == 1:  # in the first, graphs are captured for so many at once
                began = time.monotonic()
            together = on_threads(self.model, compiled, prompts, count, self.device)
            for a, b in zip(together, alone, strict=True):
                calls += 1
                wrong += not all(map(identical, a.all(), b.all()))
        self.took("together", began)
        both = list(zip(alone, expected, strict=True))
        errors = {
            "features": [error(a.features, e.features) for a, e in both if e.features is not None],
            "logits": [error(a.logits, e.logits) for a, e in both],
        }
        # Sound is made of the tokens, so it can be compared where these are the same.
        same = [(a, e) for a, e in both if identical(a.ids, e.ids)]
        errors["sound"] = [error(a.sound, e.sound) for a, e in same if e.sound is not None]
        worst = {name: float(f"{max(values):.2e}") for name, values in errors.items() if values}
        bound = Rounding(floor=FLOAT32).of(self.dtype)
        distinct = not any(identical(a.logits, b.logits) for a, b in zip(alone[1:], alone[:-1], strict=True))
        return {
            "right": wrong == 0 and distinct and all(value <= bound for value in worst.values()),
            "wrong": wrong,
            "answers": calls,
            "error_to_eager": worst,
            "bound": bound,
            "answers_differ": distinct,
            "tokens_as_eager": sum(int((a.ids == e.ids).sum()) for a, e in both),
            "tokens": sessions * count,
            "tokens_per_s_together": round(rounds * sessions * count / self.seconds["together"], 1),
            "tokens_per_s_alone": round(sessions * count / self.seconds["alone"], 1),
            "paths": self.paths(compiled),
        }


def size_of(model: seven.Model) -> float:
    """GB of weights, each counted once."""
    parts = [model.whole, *([] if model.flow is None else [model.flow])]
    tensors = {id(x): x for m in parts for x in (*m.parameters(), *m.buffers())}
    return sum(x.numel() * x.element_size() for x in tensors.values()) / 1e9


def in_use() -> float:
    """GB of the GPU that are not free, whoever has them."""
    free, all_of_it = torch.cuda.mem_get_info()
    return round((all_of_it - free) / 1e9, 2)


def checked(made: Callable[[], Run], name: str, limit: float, *asked: int) -> dict[str, Any]:
    """The line of one model. ``asked``: of :meth:`Run.check`.

    The process ends when its time is over: a build cannot be stopped otherwise.
    """
    began = time.monotonic()

    def over() -> None:
        click.echo(json.dumps({"model": name, "right": False, "why": f"not done after {limit:.0f} s"}))
        sys.stdout.flush()
        os._exit(3)

    # Each build says on stderr how long it took, so that one that is not done shows.
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("anabranch").setLevel(logging.INFO)
    timer = threading.Timer(limit, over)
    timer.daemon = True
    timer.start()
    run = made()
    on_gpu = run.device == "cuda"
    row = {
        "model": name,
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(0) if on_gpu else "cpu",
        "dtype": str(run.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "anabranch": anabranch.__version__,
        "layers": run.model.language.config.num_hidden_layers,
        "weights_GB": round(size_of(run.model), 2),
        **run.check(*asked),
        "seconds": {**run.seconds, "all": round(time.monotonic() - began, 1)},
        # PyTorch's allocator at most; and the device now, with what graphs and libraries took.
        "peak_GB": round(torch.cuda.max_memory_reserved() / 1e9, 2) if on_gpu else None,
        "device_GB": in_use() if on_gpu else None,
    }
    timer.cancel()
    return row


def keep(target: Path, row: dict[str, Any]) -> None:
    """Put the row into a file of rows, in the place of an older one of this model."""
    old = json.loads(target.read_text(encoding="utf-8"))["rows"] if target.exists() else []
    rows = [r for r in old if r["model"] != row["model"]] + [row]
    write_json(target, {"rows": sorted(rows, key=lambda r: list(seven.MAKERS).index(r["model"]))})


def each(names: tuple[str, ...]) -> bool:
    """Each model in a process of its own, which gives its memory back. Whether all ended well."""
    others = [x for x in sys.argv[1:] if x not in names and x != "all"]
    codes = [subprocess.run([sys.executable, __file__, name, *others], check=False).returncode for name in names]
    return not any(codes)


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--list", "listed", is_flag=True, help="Print the names.")
@click.option("--sizes", is_flag=True, help="Print the GB of the weights, without making any.")
@click.option("--small", is_flag=True, help="A few narrow layers, as in the tests, for a CPU.")
@click.option("--sessions", default=4, show_default=True, type=click.IntRange(1), help="So many texts at once.")
@click.option("--tokens", "count", default=16, show_default=True, type=click.IntRange(1), help="So many tokens each.")
@click.option("--check", is_flag=True, help="Compare, and print a line of JSON; status 1 where something is wrong.")
@click.option(
    "--rounds",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="With --check: how often all run, after once.",
)
@click.option("--limit", default=LIMIT, show_default=True, help="With --check: seconds for one model.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="With --check: keep the line in this file.")
@click.option("--layers", type=click.IntRange(1), help="So many layers of the language model.  [default: all]")
@click.option("--contexts", type=click.IntRange(1), help="So many calls of an engine at once; others wait.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="[default: cuda, if there is one]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="[default: bfloat16; float32 on the CPU]")
@click.option("--backend", type=click.Choice(["inductor", "eager"]), help="[default: anabranch's]")
def main(
    names: tuple[str, ...],
    listed: bool,
    sizes: bool,
    small: bool,
    sessions: int,
    count: int,
    check: bool,
    rounds: int,
    limit: float,
    target: Path | None,
    layers: int | None,
    contexts: int | None,
    device: str | None,
    dtype: str | None,
    backend: str | None,
) -> None:
    if listed:
        click.echo("\n".join(seven.MAKERS))
        return
    if names == ("all",):
        names = tuple(seven.MAKERS)
    unknown = [name for name in names if name not in seven.MAKERS]
    if unknown or not names:
        raise click.UsageError(
            f"{', '.join(unknown) or 'no name'} given; expected of {', '.join(seven.MAKERS)}, or all"
        )
    if sizes:
        for name in names:
            model = seven.make(name, small=small, device="meta", dtype=torch.bfloat16, layers=layers)
            click.echo(f"{name}: {size_of(model):.1f} GB, {model.language.config.num_hidden_layers} layers")
        return
    if len(names) > 1:
        sys.exit(0 if each(names) else 1)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not small:
        raise click.UsageError("true sizes need a GPU, and there is none; add --small")
    of = DTYPES[dtype or ("float32" if device == "cpu" else "bfloat16")]
    options = {"backend": backend, "max_contexts": contexts}
    make = partial(Run, names[0], device, of, options, small=small, layers=layers)
    with torch.no_grad():
        if check:
            row = checked(make, names[0], limit, sessions, count, rounds)
            click.echo(json.dumps(row))
            if target is not None:
                keep(target, row)
            sys.exit(0 if row["right"] else 1)
        run = make()
        compiled, prompts, _ = run.ask(sessions, count)
        began = time.monotonic()
        answers = on_threads(run.model, compiled, prompts, count, device)
        run.took("together", began)
    for i, made in enumerate(answers):
        sound = "" if made.sound is None else f", and sound {list(made.sound.shape)}"
        click.echo(f"session {i}: {made.ids[0].tolist()}{sound}")
    click.echo(f"{sessions * count / run.seconds['together']:.1f} tokens a second, {sessions} sessions")


if __name__ == "__main__":
    main()
