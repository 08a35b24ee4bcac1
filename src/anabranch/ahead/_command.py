"""What ``anabranch build`` does; its options are in ``cli/_build.py``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click
import torch

from anabranch._exit import refuse_unwritable
from anabranch.ahead._build import Build, build
from anabranch.backends.tensorrt import library
from anabranch.check._case import cases_for, find_subject
from anabranch.check._report import write_json
from anabranch.errors import AnabranchError, BuildError, InputError
from anabranch.export import Input


def run(
    model: str,
    backend: str,
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[str, ...],
    channels_last: bool,
    precision: str | None,
    tf32: bool,
    capabilities: tuple[str, ...],
    cache: Path | None,
    require_full: bool,
    json_path: Path | None,
) -> None:
    """Build, print what was built, and exit with 1, 2 or 130 where that fails; takes the command's options."""
    options: dict[str, Any] = {
        "backend": backend,
        "precision": getattr(torch, precision, precision) if precision else None,
        "require_full": require_full,
        "cache": cache,
    }
    built: list[Build] = []
    try:
        if json_path:
            refuse_unwritable(json_path, parents=True)
        library()
    except AnabranchError as e:
        _end(str(e), 2)
    try:
        with _tf32_allowed(tf32):
            for name, make, inputs in _cases(model, [getattr(torch, d) for d in dtypes], shapes, channels_last):
                module = make()  # once: a callable may draw its weights
                for capability in capabilities or (None,):
                    where = f" for compute capability {capability}" if capability else ""
                    given = ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in inputs or ())
                    click.echo(f"anabranch build: {name}({given}){where} ...", err=True)
                    made = build(module, inputs, compute_capability=capability, **options)
                    built.append(replace(made, model=name))
                    click.echo(str(built[-1]))
    except BuildError as e:
        _end(str(e), 1)
    except AnabranchError as e:
        _end(str(e), 2)
    except SystemExit as e:
        _end(f"{model} called sys.exit({e.code!r}); give a model that returns tensors", 2)
    except KeyboardInterrupt:
        _end("interrupted; finished engines are in the cache. Run the command again to build the others", 130)
    if json_path:
        write_json(json_path, {"builds": [b.as_dict() for b in built], "nbytes": sum(b.nbytes for b in built)})


def _cases(
    model: str, dtypes: list[torch.dtype], shapes: tuple[tuple[int, ...], ...], channels_last: bool
) -> list[tuple[str, Callable[[], Any], list[Input] | None]]:
    """What to build: a name, the model, its inputs (None: those that an exported program has with it)."""
    if model.endswith(".pt2"):
        for option in ["--dtype"] * bool(dtypes) + ["--channels-last"] * channels_last:
            raise InputError(f"{option} given with {model}; an exported program keeps its own. Export it so.")
        if not shapes:
            return [(Path(model).stem, lambda: model, None)]
    subject = find_subject(model)
    memory = torch.channels_last if channels_last else torch.contiguous_format

    def make(dtype: torch.dtype) -> Callable[[], Any]:
        def made() -> Any:
            module = subject.make()
            return module if subject.fixed_dtype else module.to(dtype=dtype, memory_format=memory)

        return made

    chosen = [subject.fixed_dtype] if subject.fixed_dtype else dtypes or [torch.float32]
    return [
        (subject.name, make(case.dtype), [Input(case.shape, case.dtype, memory_format=memory)])
        for case in cases_for(replace(subject, boundary=()), chosen, shapes or None)
    ]


@contextmanager
def _tf32_allowed(allowed: bool) -> Iterator[None]:
    """The flags that build() reads, as they are in the program that will compile."""
    if not allowed:
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _end(message: str, status: int) -> NoReturn:
    click.echo(f"anabranch build: {message}", err=True)
    sys.exit(status)
