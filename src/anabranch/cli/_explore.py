"""The options of ``anabranch explore``."""

from __future__ import annotations

from typing import Any

import click

ORACLES = ("values", "race", "poison", "deadlock", "host-wait")


@click.command("explore", short_help="Run a program under every interleaving, or many; say what that came to.")
@click.argument("program", metavar="PROGRAM.py[:FUNCTION]")
@click.option(
    "--scheduler",
    default="exhaustive",
    show_default=True,
    type=click.Choice(["exhaustive", "random", "pct", "fifo", "lazy"]),
)
@click.option(
    "--seed", default=0, show_default=True, help="Of random and pct: the first; each schedule takes the next."
)
@click.option("--depth", default=3, show_default=True, type=click.IntRange(1), help="Of pct: orderings a bug needs.")
@click.option("--schedules", default=5000, show_default=True, type=click.IntRange(1), help="At most so many.")
@click.option("--steps", default=20_000, show_default=True, type=click.IntRange(1), help="Of one schedule, at most.")
@click.option("--no-reduce", is_flag=True, help="exhaustive: try equivalent schedules, too.")
@click.option("--replay", "replayed", metavar="SCHEDULE", help="Run just this one.")
@click.option("--args", "arguments", metavar="LITERAL", help="What FUNCTION is called with: a Python tuple.")
@click.option("--reference", metavar="FUNCTION|LITERAL", help="What it must return, if it returns something.")
@click.option("--oracle", "oracles", multiple=True, type=click.Choice(ORACLES), help="Only these. Default: all.")
@click.option("--keep-going", is_flag=True, help="Do not stop at the first failure.")
@click.option("--json", "json_path", metavar="FILE", help="Write the verdict there (- for stdout).")
@click.option("--trace", "trace_path", metavar="FILE", help="Write the failing schedule's trace, for anabranch race.")
def command(**given: Any) -> None:
    """Run FUNCTION (main, unless it is given) of PROGRAM.py, or of module:FUNCTION, under one schedule after another.
    What a failure was, with the command that replays it, comes first; the last line is the verdict.

    Exit status: 0 exhaustive (every schedule was tried, none failed); 1 failed; 2 the exploration could not be made,
    or a replayed schedule does not fit; 3 bounded (none failed, but a limit came before every schedule was tried: that
    is no success). A replay that does not fail, and any scheduler but exhaustive, end with 3.
    """
    from anabranch.explore._command import run

    run(**given)
