"""The options of ``anabranch explore``."""

from __future__ import annotations

from typing import Any

import click

ORACLES = ("values", "race", "poison", "deadlock", "host-wait")


@click.command("explore", short_help="Run a program under every order of its threads and streams.")
@click.argument("program", metavar="PROGRAM.py[:FUNCTION]")
@click.option(
    "--scheduler",
    default="exhaustive",
    show_default=True,
    type=click.Choice(["exhaustive", "random", "pct", "fifo", "lazy"]),
)
@click.option(
    "--seed", default=0, show_default=True, help="First seed of random and pct; each schedule takes the next one."
)
@click.option(
    "--depth", default=3, show_default=True, type=click.IntRange(1), help="For pct: how many orderings a bug needs."
)
@click.option("--schedules", default=5000, show_default=True, type=click.IntRange(1), help="The most schedules to run.")
@click.option(
    "--steps", default=20_000, show_default=True, type=click.IntRange(1), help="The most steps of one schedule."
)
@click.option("--no-reduce", is_flag=True, help="For exhaustive: run equivalent schedules, too.")
@click.option("--replay", "replayed", metavar="SCHEDULE", help="Run only this schedule.")
@click.option("--args", "arguments", metavar="LITERAL", help="Arguments of FUNCTION: a Python tuple.")
@click.option("--reference", metavar="FUNCTION|LITERAL", help="What FUNCTION must return.")
@click.option(
    "--oracle", "oracles", multiple=True, type=click.Choice(ORACLES), help="Use only these oracles. Default: all."
)
@click.option("--keep-going", is_flag=True, help="Do not stop at the first failure.")
@click.option("--json", "json_path", metavar="FILE", help="Write the verdict there (- for stdout).")
@click.option("--trace", "trace_path", metavar="FILE", help="Write the failing schedule's trace, for anabranch race.")
def command(**given: Any) -> None:
    """Run FUNCTION (main, unless it is given) of PROGRAM.py, or of module:FUNCTION, under one schedule after another.
    A failure is reported with the command that replays it. The last line is the verdict.

    Exit status: 0 exhaustive: every schedule was tried and none failed; 1 failed; 2 the exploration could not run, what
    the program returns cannot be compared, or a replayed schedule does not fit the program; 3 bounded: none failed, but
    not every schedule was tried. Replays that do not fail, and all schedulers but exhaustive, end with 3; 130
    interrupted.
    """
    from anabranch.explore._command import run

    run(**given)
