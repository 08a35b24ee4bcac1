"""What an exploration says: verdicts, reports, schedules as text, limits, the command line, and the way back from a
failure's command to the failure."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from programs import threads

from anabranch.cli import main
from anabranch.errors import AnabranchError
from anabranch.explore import (
    ExploreError,
    ReplayDiverged,
    Var,
    explore,
    fifo,
    lazy,
    pct,
    random,
    replay,
)
from anabranch.explore import _schedule as schedule

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = "tests/sim/programs/threads.py"


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explore", *arguments])


def _fresh(command: str) -> subprocess.CompletedProcess[str]:
    """The printed command, in a process that knows nothing of this one."""
    words = shlex.split(command)
    assert words[0] == "anabranch"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=Path.cwd(), env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("program", ["lost_update", "philosophers", "two_preemptions", "lost_wakeup"])
def test_the_printed_command_replays_the_failure(program: str) -> None:
    verdict = explore(getattr(threads, program))
    assert verdict.command is not None
    done = _fresh(verdict.command)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == str(verdict)
    assert verdict.failure is not None
    assert done.stdout.startswith(f"{verdict.failure.oracle}: ")


def test_arguments_and_reference_are_in_the_command() -> None:
    verdict = explore(threads.writers, args=(3,), reference=3, oracles=("values",))
    assert verdict.command is not None
    assert "--args '(3,)' --reference 3 --oracle values" in verdict.command
    done = _fresh(verdict.command)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == str(verdict)


def test_a_closure_is_replayed_in_python() -> None:
    def program() -> None:
        threads.lost_update()

    verdict = explore(program)
    assert verdict.command is None
    assert verdict.schedule is not None
    assert f"explore(fn, scheduler=replay({verdict.schedule!r}))" in verdict.report()
    again = explore(program, scheduler=replay(verdict.schedule))
    assert (again.kind, again.schedule, again.failures) == (verdict.kind, verdict.schedule, verdict.failures)


REPORT = """\
values: AssertionError: an update was lost: 1 (thread T0, {file}:{line})

the schedule, 15 steps:

T0           T0.1          T0.2
-----------  ------------  ------------
start T0.1
start T0.2
             begin
             read var0.1
                           begin
                           read var0.1
                           write var0.1
                           end
             write var0.1
             end
join T0.1
join T0.2
read var0.1
read var0.1
end

replay it with:
  {command}

failed(T0*2-T0.1*2-T0.2*4-T0.1*2-T0*5)"""


def test_report() -> None:
    verdict = explore(threads.lost_update)
    source = Path(threads.__file__)
    line = next(n for n, text in enumerate(source.read_text().splitlines(), 1) if "an update was lost" in text)
    assert verdict.report() == REPORT.format(file=source, line=line, command=verdict.command)


def test_a_long_schedule_is_cut_in_the_middle() -> None:
    verdict = explore(threads.endless, steps=200, scheduler=fifo())
    from anabranch.explore._drawing import draw

    assert verdict.run is not None
    lines = draw(verdict.run.steps, lines=20).splitlines()
    assert len(lines) == 23
    assert "... 180 steps ..." in lines


@pytest.mark.parametrize(
    ("text", "actors"),
    [
        ("", []),
        ("T0", ["T0"]),
        ("T0*2-s1-T0.1*3", ["T0", "T0", "s1", "T0.1", "T0.1", "T0.1"]),
        ("g1.2:0-s4097", ["g1.2:0", "s4097"]),
    ],
)
def test_schedules_as_text(text: str, actors: list[str]) -> None:
    assert schedule.parse(text) == actors
    assert schedule.write(actors) == text


@pytest.mark.parametrize("text", ["T0--s1", "T0*0", "*3", "T0 s1", "T0*x", "-"])
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(ExploreError, match="not an actor with a count"):
        explore(threads.event, scheduler=replay(text))


def test_a_replay_that_does_not_fit() -> None:
    with pytest.raises(ReplayDiverged, match=r"step 2 of the schedule is one of s1.*T0 \(start T0.2\)"):
        explore(threads.lost_update, scheduler=replay("T0-s1"))
    assert issubclass(ReplayDiverged, AnabranchError)
    done = _run(f"{PROGRAMS}:lost_update", "--replay", "T0.7")
    assert done.exit_code == 2
    assert "another program or another version of it" in done.output


def test_a_replay_may_end_early() -> None:
    assert str(explore(threads.event, scheduler=replay("T0*2"))) == "bounded(1 schedule, 1)"


@pytest.mark.parametrize("scheduler", [fifo(), lazy(), random(3), pct(3)], ids=repr)
def test_no_scheduler_but_exhaustive_says_exhaustive(scheduler: Any) -> None:
    verdict = explore(threads.event, scheduler=scheduler, schedules=1)
    assert str(verdict) == "bounded(1 schedule, 1)"
    assert not verdict.failed


def test_limits_are_never_success() -> None:
    assert str(explore(threads.writers, schedules=5)) == "bounded(5 schedules, 5)"
    # The last one is allowed: the limit did not come first.
    assert str(explore(threads.writers, schedules=6)) == "exhaustive(6 schedules)"
    assert str(explore(threads.writers, args=(2,), reduce=False, schedules=5)) == "bounded(5 schedules, 5)"
    assert str(explore(threads.writers, args=(2,), reduce=False, schedules=69)) == "exhaustive(69 schedules)"
    assert str(explore(threads.endless, steps=50)) == "bounded(50 steps, 1)"
    assert str(explore(threads.writers, scheduler=random(0), schedules=7)) == "bounded(7 schedules, 7)"


def test_a_failure_at_the_limit_is_a_failure() -> None:
    first = explore(threads.lost_update).schedules
    assert explore(threads.lost_update, schedules=first).failed
    assert explore(threads.lost_update, schedules=first - 1).kind == "bounded"


def _chatter() -> Var:
    print("said once a schedule")
    return Var(1)


def test_what_programs_print_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    explore(_chatter)
    assert capfd.readouterr().out == ""
    explore(_chatter, show_output=True)
    assert capfd.readouterr().out == "said once a schedule\n"


def test_run_n_of_random_is_run_0_of_the_nth_seed() -> None:
    many = explore(threads.lost_update, scheduler=random(0), schedules=50)
    single = explore(threads.lost_update, scheduler=random(many.schedules - 1), schedules=1)
    assert many.failed
    assert single.schedule == many.schedule


@pytest.mark.parametrize(
    ("arguments", "status", "last"),
    [
        ([":event"], 0, "exhaustive(1 schedule)"),
        ([":lost_update"], 1, "failed(T0*2-T0.1*2-T0.2*4-T0.1*2-T0*5)"),
        ([":writers", "--schedules", "2"], 3, "bounded(2 schedules, 2)"),
        ([":writers", "--args", "(2,)", "--no-reduce"], 0, "exhaustive(69 schedules)"),
        ([":writers", "--args", "(2,)", "--scheduler", "random", "--schedules", "3"], 3, "bounded(3 schedules, 3)"),
        ([":writers", "--args", "(2,)", "--scheduler", "pct", "--schedules", "3"], 3, "bounded(3 schedules, 3)"),
        ([":writers", "--scheduler", "lazy"], 3, "bounded(1 schedule, 1)"),
        ([":adders", "--reference", "3"], 0, "exhaustive(1 schedule)"),
        ([":endless", "--steps", "9"], 3, "bounded(9 steps, 1)"),
    ],
)
def test_command_line(arguments: list[str], status: int, last: str) -> None:
    done = _run(PROGRAMS + arguments[0], *arguments[1:])
    assert done.output.splitlines()[-1] == last
    assert done.exit_code == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.py"], "no such file"),
        (["no_such_module_here:f"], "no module"),
        ([f"{PROGRAMS}:absent"], "has no function 'absent'"),
        ([PROGRAMS], "has no function 'main'"),
        ([f"{PROGRAMS}:event", "--args", "(1"], "not a Python literal"),
        ([f"{PROGRAMS}:event", "--args", "1"], "expected a tuple"),
        ([f"{PROGRAMS}:event", "--replay", "T0--"], "not an actor with a count"),
    ],
)
def test_what_cannot_be_explored(arguments: list[str], message: str) -> None:
    done = _run(*arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_json_and_trace(tmp_path: Path) -> None:
    answer, trace = tmp_path / "verdict.json", tmp_path / "trace.jsonl"
    done = _run(f"{PROGRAMS}:lost_update", "--json", str(answer), "--trace", str(trace))
    assert done.exit_code == 1
    data = json.loads(answer.read_text())
    assert data["verdict"] == "failed"
    assert data["failures"][0]["oracle"] == "values"
    assert data["command"] in done.output
    assert CliRunner().invoke(main, ["race", str(trace)]).exit_code == 0


@pytest.mark.parametrize("options", [{"oracles": ("valus",)}, {"schedules": 0}, {"steps": 0}, {"scheduler": "random"}])
def test_arguments_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ExploreError):
        explore(threads.event, **options)
