"""``anabranch check`` judges every output: a wrong one of each kind is called wrong, what says nothing is not called
right, and what a user did wrong is a line and status 2."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from wrong_outputs import BITS, PLANTED, Change, Everything

import anabranch
from anabranch.check import Case, Options, Row, Subject, _bench, run_check
from anabranch.check._boundary import boundary
from anabranch.check._command import judgement
from anabranch.cli import main

SRC = Path(__file__).resolve().parents[2] / "src"
FAST = Options("cpu", streams=2, threads=2, calls=4, backend="eager", runtime="python", timed=False)
CASE = Case(torch.float32, (2, 6))


class Planted:
    """A real engine whose results are changed: always, or where ``when(x)``."""

    def __init__(self, engine: Any, change: Change, when: Callable[[torch.Tensor], bool]) -> None:
        self.engine, self.change, self.when = engine, change, when

    def __call__(self, x: torch.Tensor) -> Any:
        y = self.engine(x)
        return self.change(y) if self.when(x) else y

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


MODEL = Everything().eval()


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with anabranch.compile(MODEL, [torch.empty(2, 6)], backend="eager", runtime="python") as made:
        yield made


@pytest.fixture
def check(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """The rows of a check whose engine gives changed results."""

    def run(change: Change, when: Callable[[torch.Tensor], bool] = lambda x: True, **options: Any) -> list[Row]:
        monkeypatch.setattr(_bench, "compile", lambda *args, **kwargs: Planted(engine, change, when))
        return run_check(Subject("everything", lambda: MODEL), [CASE], Options(**{**vars(FAST), **options}))

    return run


def elsewhere(x: torch.Tensor) -> bool:
    return threading.current_thread() is not threading.main_thread()


def test_a_right_engine_passes(check: Any) -> None:
    rows = check(lambda n: n, boundary=True)
    assert [r.path for r in rows] == ["main", "threads"]
    for row in rows:
        assert row.ok, row
        assert row.calls == 4
        assert not row.silent
    assert rows[0].boundary.tried == 24
    assert rows[0].boundary.told == []
    assert judgement(rows) == ("all outputs right: 0 wrong of 8 calls", 0)


@pytest.mark.parametrize("name", PLANTED)
def test_a_serial_output_that_is_wrong_is_called_wrong(check: Any, name: str) -> None:
    rows = check(PLANTED[name], paths=("main",))
    assert not rows[0].ok
    assert rows[0].problems or rows[0].max_error > rows[0].tolerance
    assert judgement(rows)[1] == 1


@pytest.mark.parametrize("name", [*PLANTED, *BITS])
def test_a_concurrent_output_that_is_wrong_is_called_wrong(check: Any, name: str) -> None:
    main_row, threads = check({**PLANTED, **BITS}[name], elsewhere)
    assert main_row.ok
    assert not threads.ok
    assert threads.wrong == threads.calls or threads.problems


@pytest.mark.parametrize("name", ["a float", "NaN for a number", "an integer", "a boolean", "an imaginary part"])
def test_an_output_that_is_wrong_at_special_values_only_is_called_wrong(check: Any, name: str) -> None:
    (row,) = check(PLANTED[name], lambda x: bool(x.isnan().any()), paths=("main",), boundary=True)
    assert not row.problems
    assert not row.ok
    assert {line.split(":")[0] for line in row.boundary.wrong} <= {"input with NaN here and there", "input all NaN"}


def test_numbers_where_only_eagers_precision_overflows_are_told() -> None:
    x = torch.full((2, 4), 3.0, dtype=torch.float16)
    found = boundary(lambda x: (x.float() * 2 / 2).half(), lambda x: x * 2 / 2, lambda x: x.float() * 2 / 2, x, list)
    assert not found.wrong
    assert any("numbers where eager has infinities or NaN, and float32 has not" in line for line in found.told)
    wrong = boundary(lambda x: (x * 2 / 2).clamp(-1, 1), lambda x: x * 2 / 2, lambda x: x.float() * 2 / 2, x, list)
    assert any(line.startswith("input with inf here and there") for line in wrong.wrong)


def test_zeros_of_the_other_sign_are_told_and_no_error(check: Any) -> None:
    (row,) = check(BITS["the sign of a zero"], paths=("main",), boundary=True)
    assert row.ok
    assert any("zeros of the other sign" in line for line in row.boundary.told)


def test_an_output_that_a_later_call_writes_to_is_wrong(check: Any) -> None:
    kept: list[torch.Tensor] = []

    def one_buffer(nest: dict[str, Any]) -> dict[str, Any]:
        if not kept:
            kept.append(torch.empty_like(nest["float"]))
        return {**nest, "float": kept[0].copy_(nest["float"])}

    _, threads = check(one_buffer, elsewhere)
    assert threads.wrong >= 3


def rows_of(model: torch.nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> list[Row]:
    return run_check(Subject("m", lambda: model.eval()), [Case(dtype, (3, 4))], Options(**{**vars(FAST), **options}))


class Of(torch.nn.Module):
    """A model of one function."""

    def __init__(self, fn: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(x)


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda x: x * math.nan, "NaN is every element"),
        (lambda x: [x.log() * math.nan, (x * math.nan).half()], "NaN is every element"),
        (lambda x: x * 0, "the same for every input"),
        (lambda x: {"ones": torch.ones_like(x), "size": x.shape[0]}, "the same for every input"),
        (lambda x: x[:0], "no elements"),
        (lambda x: None, "returns no tensor"),
    ],
)
def test_outputs_that_say_nothing_are_not_called_right(fn: Any, why: str) -> None:
    rows = rows_of(Of(fn))
    assert all(r.ok and why in r.silent for r in rows)
    line, status = judgement(rows)
    assert status == 2
    assert line.startswith("CANNOT BE JUDGED")


def test_a_row_that_says_nothing_beside_rows_that_do_is_told_only() -> None:
    good, empty, nan = (
        Row("main", "float32", "2"),
        Row("main", "float32", "0", silent="its outputs have no elements"),
        "",
    )
    assert judgement([good, empty])[1] == 0
    nan = Row("main", "float32", "3", silent="NaN is every element of every output, in eager, too")
    assert judgement([good, nan])[1] == 2
    assert judgement([good, nan, Row("main", "float32", "4", wrong=1)])[1] == 1


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x * 300) ** 2 - (x * 300) ** 2,  # inf - inf in float16, 0 in float32
        lambda x: x * 1e5,
        lambda x: (x * 1e5).isinf(),
        lambda x: (x.abs() * 3e4 + 7e4).to(torch.int32),
        lambda x: torch.complex(x.float() * 1e5, (x * 1e5).float()),
    ],
)
def test_what_overflows_in_half_precision_is_called_wrong(fn: Any) -> None:
    assert all(r.ok for r in rows_of(Of(fn), torch.bfloat16, paths=("main",)))
    (row,) = rows_of(Of(fn), torch.float16, paths=("main",))
    assert not row.ok
    assert "float32" in "".join(row.problems) or not math.isfinite(row.max_error)


def test_an_index_that_rounding_moves_now_and_then_is_right() -> None:
    class Best(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 2).argmax(-1)  # ties in bfloat16, none in float32

    (row,) = run_check(
        Subject("best", lambda: Best().eval()),
        [Case(torch.bfloat16, (400, 2))],
        Options(**{**vars(FAST), "paths": ("main",)}),
    )
    assert row.ok, row.problems


def test_random_numbers_cannot_be_judged() -> None:
    with pytest.raises(anabranch.errors.CannotJudge, match="two results for one input"):
        rows_of(Of(lambda x: x + torch.rand_like(x)))


# -- the command ------------------------------------------------------------------------------------------------------

MODULE = """
import sys, threading, time, torch
class Good(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.linear = torch.nn.Linear(3, 2)
    def forward(self, x):
        return self.linear(x)
class Loops(torch.nn.Module):
    def forward(self, x):
        while True: time.sleep(0.01)
class Raises(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError("no such layer")
class Sparse(torch.nn.Module):
    def forward(self, x):
        return x.to_sparse()
class Draws(torch.nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)
class Unknown(torch.nn.Module):
    def forward(self, x):
        return object()
class Leaves(torch.nn.Module):
    def forward(self, x):
        sys.exit(0)
class Find(torch.nn.Module):
    def forward(self, x):
        return (x > 0).nonzero()
def raises(): raise ValueError("no checkpoint")
def leaves(): sys.exit(0)
def nothing(): pass
def needs(path): pass
number = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("models")
    (path / "subject_of_check.py").write_text(MODULE)
    (path / "broken_subject.py").write_text("def make(:\n")
    (path / "raising_subject.py").write_text("raise KeyError('HOME_OF_WEIGHTS')\n")
    (path / "leaving_subject.py").write_text("import sys\nsys.exit(0)\n")
    (path / "no_program.pt2").write_text("nothing")
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))


SMALL = ("--device", "cpu", "--backend", "eager", "--runtime", "python", "--dtype", "float32", "--calls", "2")


def refused(*args: str) -> str:
    """The one line with which the command refuses, after status 2."""
    result = CliRunner().invoke(main, ["check", *args])
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(("anabranch check: ", "Error: "))]
    return line


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no_such_module:make", "No module named"),
        ("broken_subject:make", "importing broken_subject raised SyntaxError"),
        ("raising_subject:make", r"raised KeyError: 'HOME_OF_WEIGHTS'.*raising_subject.py:1"),
        ("leaving_subject:make", "raised SystemExit"),
        ("subject_of_check:no_such", "no_such"),
        ("subject_of_check:number", "is a int"),
        ("subject_of_check:raises", r"raises\(\) raised ValueError: no checkpoint .*subject_of_check.py:"),
        ("subject_of_check:leaves", "SystemExit"),
        ("subject_of_check:nothing", "returned a NoneType"),
        ("subject_of_check:needs", "missing 1 required positional argument"),
        ("subject_of_check:Raises", "no such layer"),
        ("subject_of_check:Leaves", "exit"),
        ("subject_of_check:Sparse", "layout sparse_coo.*to_dense"),
        ("subject_of_check:Draws", "two results for one input"),
        ("subject_of_check:Unknown", "an object, which cannot be compared; return tensors"),
        (":make", "no module's name"),
        ("../subject_of_check:Good", "no module's name"),
        ("nonsense", "expected one of relu"),
        ("no_such_file.pt2", "no_such_file.pt2"),
    ],
)
def test_a_model_that_cannot_be_checked_is_a_line_and_status_2(folder: Path, model: str, words: str) -> None:
    assert re.search(words, refused(model, "--shape", "2,3", *SMALL))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shape", "2,4"), "raises where it gets float32[2, 4]"),
        (("--shape", "300000000000,3"), "GB are free"),
        (("--shape", "99999999999999999999,3"), "GB are free"),
        (("--shape", "2,-3"), "0 or more"),
        (("--shape", "2,three"), "not a shape"),
        (("--shape", "2,3", "--dtype", "int7"), "int7"),
        (("--shape", "2,3", "--device", "tpu"), "tpu"),
        (("--shape", "2,3", "--calls", "0"), "0"),
        (("--shape", "2,3", "--no-such-option"), "No such option"),
        (("--shape", "2,3", "--inject", "stale-stream"), "no streams"),
        (("--shape", "2,3", "--json", "/proc/no/such/rows.json"), "cannot be written"),
        ((), "give --shape"),
    ],
)
def test_options_that_cannot_be_used_are_a_line_and_status_2(folder: Path, options: Any, words: str) -> None:
    assert words in refused("subject_of_check:Good", *SMALL, *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_a_line_and_status_2() -> None:
    assert "PyTorch sees no GPU" in refused("relu", "--device", "cuda")


def test_a_file_that_cannot_be_loaded_is_a_line_and_status_2(folder: Path) -> None:
    assert "cannot be loaded as an exported program" in refused(str(folder / "no_program.pt2"), *SMALL)


def test_a_model_that_holds_a_lock_is_checked_and_the_file_says_what_came_of_it(folder: Path) -> None:
    target = folder / "new" / "rows.json"
    result = CliRunner().invoke(
        main, ["check", "subject_of_check:Good", "--shape", "2,3", *SMALL, "--json", str(target)]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "all outputs right: 0 wrong of 4 calls"
    first, second = json.loads(target.read_text())["rows"]
    assert first["boundary"]["tried"] == 24
    assert first["boundary"]["wrong"] == first["problems"] == []
    assert second["boundary"] is None


def test_where_it_was_raised_is_shown_if_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANABRANCH_TRACEBACK", "1")
    result = CliRunner().invoke(main, ["check", "subject_of_check:raises", "--shape", "2,3", *SMALL])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def command(folder: Path, *args: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{SRC}{os.pathsep}{folder}"}
    return subprocess.Popen(
        [sys.executable, "-m", "anabranch", "check", *args],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # Shells have what they run in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **{"stdout": subprocess.PIPE, **options},
    )


def test_a_model_that_never_ends_is_given_up_and_ctrl_c_ends_it_at_once(folder: Path) -> None:
    args = ("subject_of_check:Loops", "--shape", "2,3", *SMALL)
    given_up = command(folder, *args, "--patience", "8")
    interrupted = command(folder, *args)
    try:
        out, err = given_up.communicate(timeout=300)
        assert given_up.returncode == 2, err
        assert "nothing happened for 8 s" in err
        assert "Traceback" not in err
        interrupted.send_signal(signal.SIGINT)
        out, err = interrupted.communicate(timeout=120)
        assert interrupted.returncode == 130, err
        assert "interrupted" in err
        assert "Traceback" not in err
        assert not out
    finally:
        for process in (given_up, interrupted):
            process.kill()


def test_output_that_nobody_reads_changes_no_status(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = command(folder, "subject_of_check:Good", "--shape", "2,3", *SMALL, stdout=closed)
        _, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert err.strip() == ""
