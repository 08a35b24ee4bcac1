"""The command's help texts and usage errors: without PyTorch, and true to the code that is imported later."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import click
import pytest

from anabranch.cli import main

COMMANDS = ("bench", "build", "calibrate", "check", "explore", "race")

#: What a help text may not import: PyTorch, and what comes along with it.
HEAVY = ("torch", "numpy", "sympy", "rich")


def test_each_command_is_tried_here() -> None:
    with main.make_context("anabranch", [], resilient_parsing=True) as context:
        assert tuple(main.list_commands(context)) == COMMANDS


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_and_usage_errors_import_no_pytorch(command: str) -> None:
    script = f"""
import sys
from anabranch.cli import main

for arguments in (["--help"], ["-h"], ["--no-such-option"]):
    try:
        main([*{command.split()!r}, *arguments], prog_name="anabranch")
    except SystemExit as end:
        print("status", end.code, [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("status")] == [
        "status 0 []",
        "status 0 []",
        "status 2 []",
    ], done.stderr
    assert done.stdout.count(f"Usage: anabranch {command}".rstrip()) == 2
    assert "--no-such-option" in done.stderr


def options(name: str) -> dict[str, click.Parameter]:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    return {p.name: p for p in command.params if p.name}


def choices(name: str, option: str) -> Iterable[str]:
    kind = options(name)[option].type
    assert isinstance(kind, click.Choice)
    return tuple(kind.choices)


def default(name: str, option: str) -> Any:
    return options(name)[option].default


@pytest.mark.parametrize("name", COMMANDS)
def test_what_runs_takes_the_options_of_the_command(name: str) -> None:
    import importlib

    folder = "ahead" if name == "build" else name
    run = importlib.import_module(f"anabranch.{folder}._command").run
    inspect.signature(run).bind(**dict.fromkeys(options(name)))


def test_the_texts_of_the_options_are_those_of_the_code() -> None:
    import torch

    from anabranch.backends import BACKENDS
    from anabranch.check._inject import INJECTIONS
    from anabranch.cli._options import DTYPES
    from anabranch.explore import _explore, _oracles
    from anabranch.race._detector import REPORT_LIMIT
    from anabranch.runtime._compile import DEFAULT_MAX_CONTEXTS, RUNTIMES

    assert choices("check", "backend") == BACKENDS
    assert choices("check", "runtime") == ("auto", *RUNTIMES)
    assert choices("check", "inject") == INJECTIONS
    assert default("check", "max_contexts") == DEFAULT_MAX_CONTEXTS
    assert choices("explore", "oracles") == _oracles.ORACLES
    assert default("explore", "schedules") == _explore.SCHEDULES
    assert default("explore", "steps") == _explore.STEPS
    assert default("race", "limit") == REPORT_LIMIT
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)
