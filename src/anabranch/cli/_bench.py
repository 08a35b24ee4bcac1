"""The options of ``anabranch bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anabranch.cli._options import DTYPES

#: Options that take all the values up to the next option, as in ``--streams 1 4 16``.
_MANY = ("--streams", "--systems")


class _Command(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        joined: list[str] = []
        i = 0
        while i < len(args):
            joined.append(args[i])
            if args[i] in _MANY:
                values: list[str] = []
                while i + 1 < len(args) and not args[i + 1].startswith("-"):
                    # Counts end where something else begins, so works may follow them.
                    if args[i - len(values)] == "--streams" and not args[i + 1].replace(",", "").isdigit():
                        break
                    i += 1
                    values.append(args[i])
                if values:
                    joined.append(",".join(values))
            i += 1
        return super().parse_args(ctx, joined)


def _names(ctx: Any, param: Any, value: str | None) -> list[str]:
    return [v for v in (value or "").split(",") if v]


def _streams(ctx: Any, param: Any, value: str) -> tuple[int, ...]:
    try:
        streams = tuple(sorted({int(v) for v in _names(ctx, param, value)}))
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected numbers such as 1 4 16") from None
    if not streams or streams[0] < 1:
        raise click.BadParameter(f"{value!r}: expected numbers of 1 or more")
    return streams


@click.command("bench", cls=_Command)
@click.argument("works", nargs=-1, metavar="[WORK]...")
@click.option(
    "--systems",
    callback=_names,
    help="Names, or module:callable; give them after the WORKs. Default: all that run on the device.",
)
@click.option(
    "--streams", default="1,4,16", show_default=True, callback=_streams, help="How many streams; each has a thread."
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: cuda where there is a GPU.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: float16; float32 on CPU.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--latencies", default=1, show_default=True, type=click.IntRange(1), help="How often each round measures a latency."
)
@click.option("--seconds", default=0.2, show_default=True, help="Time to measure one figure in one round.")
@click.option(
    "--checked", type=click.IntRange(2), help="Outputs of each stream to check in the first round. Default: at most 48."
)
@click.option(
    "--build-seconds", default=300.0, show_default=True, help="Longest time to build one system for one work."
)
@click.option("--limit", default=0.0, help="Seconds for the whole run. The result names what was not done.")
@click.option("--build-share", default=0.6, show_default=True, help="The part of --limit after which no build begins.")
@click.option(
    "--batch", default=1, show_default=True, type=click.IntRange(1), help="How many works are built together."
)
@click.option("--cores", default=0, help="Cores for builds. Default: all.")
@click.option("--torch-threads", default=0, help="Cores for one call on the CPU. Default: PyTorch chooses.")
@click.option("--patience", default=120.0, show_default=True, help="Seconds after which a measurement counts as hung.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path, dir_okay=False), help="Draw them here (PNG).")
@click.option("--logs", type=click.Path(path_type=Path, file_okay=False), help="Keep the workers' output here.")
@click.option("--from", "source", type=click.Path(path_type=Path, exists=True), help="Show this JSON; run nothing.")
@click.option("--list", "listing", is_flag=True, help="List works and systems.")
def command(**given: Any) -> None:
    """Measure every system on every WORK, each in its own process, one at a time; check every output.

    The figures of a system with wrong outputs are struck out. A system that crashes or hangs is reported with the last
    lines of its output, and the run goes on. WORK is a name (see --list) or module:callable@SHAPE.

    Exit status: 0 all outputs that were checked are right (crashes and slow builds are results), 1 an output is wrong,
    2 outputs cannot be judged, nothing was measured, or the run could not begin, 130 interrupted.
    """
    from anabranch.bench._command import run

    run(**given)
