"""What a help text costs: CPU seconds (user and system) of `anabranch --help` and of each command's, median of several.

    $ .venv/bin/python benchmarks/bench_help.py

Each is a process of its own, as a user starts it. The budget is half a second each; the exit status is 1 where one is
over it.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

import click

from anabranch.cli import main

BUDGET = 0.5


def cpu_seconds(arguments: list[str]) -> float:
    """Of one process, until it has ended."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "anabranch", *arguments], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@click.command()
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1))
def measure(repeats: int) -> None:
    """Print the median of each command, and whether it is within the budget."""
    commands = [[], *([name] for name in main.list_commands(click.Context(main)))]
    over = 0
    for command in commands:
        for option in ("--help", "--no-such-option"):
            arguments = [*command, option]
            seconds = statistics.median(cpu_seconds(arguments) for _ in range(repeats))
            over += seconds > BUDGET
            note = f"  over the budget of {BUDGET} s" if seconds > BUDGET else ""
            print(f"{seconds:6.3f} s  anabranch {' '.join(arguments)}{note}", flush=True)
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    measure()
