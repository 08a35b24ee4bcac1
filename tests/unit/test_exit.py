"""How every command ends: the status that its help names, one line, no traceback."""

from __future__ import annotations

import errno
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from anabranch import _exit
from anabranch.cli import main
from anabranch.errors import InputError

COMMANDS = ("bench", "build", "calibrate", "check", "explore", "race")


def status_of(body: Callable[[], Any]) -> int:
    with pytest.raises(SystemExit) as end:
        _exit.run("anabranch test", body)
    assert isinstance(end.value.code, int)
    return end.value.code


def raising(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (SystemExit(1), 1, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("given: x"), 2, "anabranch test: given: x"),
        (InputError("x given; expected y"), 2, "anabranch test: x given; expected y"),
        (click.UsageError("no such option"), 2, "Error: no such option"),
        (click.ClickException("no"), 2, "Error: no"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.py"), 2, "anabranch test: a.py: No such file"),
        (ValueError("one\ntwo"), 2, "anabranch test: ValueError: one ("),
        (KeyError(), 2, "anabranch test: KeyError ("),
        (RecursionError("too deep"), 2, "anabranch test: RecursionError: too deep"),
        (MemoryError(), 2, "anabranch test: MemoryError"),
    ],
)
def test_every_error_is_a_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(raising(error)) == status
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 1


def test_the_users_own_line_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    status_of(raising(ValueError("wrong")))
    assert re.search(rf"\({re.escape(__file__)}:\d+\)", capsys.readouterr().err)


def test_what_a_body_returns_is_its_status() -> None:
    assert status_of(lambda: None) == 0
    assert status_of(lambda: 3) == 3
    assert status_of(lambda: "text") == 0


class Full(io.StringIO):
    """A stream on a full disk."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_output_that_cannot_be_written_is_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    assert status_of(lambda: 0) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_without_streams_a_command_keeps_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def body() -> int:
        click.echo("hello")
        return 1 if sys.stdout.isatty() else 0

    assert status_of(body) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_names_every_exit_status(command: str) -> None:
    done = CliRunner().invoke(main, [command, "--help"])
    assert done.exit_code == 0
    text = " ".join(done.output.split())
    for status in (0, 1, 2, 130, *([3] if command == "explore" else [])):
        assert re.search(rf"Exit status:.*\b{status}\b", text), status


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        *([command, "--no-such-option"] for command in COMMANDS),
        ["race"],
        ["race", "no_such.jsonl"],
        ["race", "/"],
        ["race", "/dev/null"],
        ["explore", "no_such.py"],
        ["explore", "/"],
        ["explore", "no_such_module:main"],
        ["explore", "{folder}/broken.py"],
        ["explore", "{folder}/leaves.py"],
        ["explore", "{folder}/good.py:nothing_here"],
        ["explore", "{folder}/good.py", "--args", "(1"],
        ["explore", "{folder}/good.py", "--args", "3"],
        ["explore", "{folder}/good.py", "--schedules", "0"],
        ["explore", "{folder}/good.py", "--json", "/proc/no/such.json"],
        ["explore", "{folder}/good.py", "--trace", "/proc/no/such.jsonl"],
        ["explore", "{folder}/good.py", "--replay", "nonsense"],
        ["bench", "nonsense", "--device", "cpu"],
        ["bench", "broken_program:make@2,3", "--device", "cpu"],
        ["bench", "relu", "--device", "cpu", "--systems", "nonsense"],
        ["bench", "relu", "--device", "cpu", "--json", "/proc/no/such.json"],
        ["bench", "relu", "--device", "cpu", "--plot", "/proc/no/such.png"],
        ["bench", "--from", "{folder}/broken.py"],
        ["bench", "--from", "{folder}/list.json"],
        ["build", "nonsense", "--shape", "2,3"],
        ["build", "relu", "--shape", "2,x"],
        ["build", "relu", "--dtype", "int7"],
        ["build", "relu", "--json", "/proc/no/such.json"],
    ],
    ids=" ".join,
)
def test_what_a_user_gets_wrong_is_a_line_and_status_2(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("def main():\n    pass\n")
    (tmp_path / "broken.py").write_text("def main(:\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "list.json").write_text("[]")
    done = CliRunner().invoke(main, [a.format(folder=tmp_path) for a in arguments])
    assert done.exit_code == 2, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    assert "xpected" in done.output or len(done.stderr.splitlines()) <= 6
    assert done.stderr.strip(), "no line"
