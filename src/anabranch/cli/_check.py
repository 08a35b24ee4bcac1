"""The options of ``anabranch check``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anabranch.cli._options import DTYPES, Shape


@click.command("check")
@click.argument("model")
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu", "sim"]),
    help="Default: cuda where there is a GPU, else cpu. sim, the simulated accelerator, has streams and needs no GPU.",
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Default: float32, float16.")
@click.option("--shape", "shapes", multiple=True, type=Shape(), help="Default: boundary shapes in several layouts.")
@click.option("--streams", default=8, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=8, show_default=True, type=click.IntRange(1))
@click.option("--calls", type=click.IntRange(1), help="Calls for each row of the table. Default: 100; on sim, 16.")
@click.option("--runtime", default="auto", show_default=True, type=click.Choice(["auto", "native", "python"]))
@click.option(
    "--backend", type=click.Choice(["inductor", "eager", "tensorrt"]), help="Default: inductor; on sim, eager."
)
@click.option(
    "--graphs/--direct", "cuda_graphs", default=None, help="Always, or never, use CUDA graphs. Default: what is faster."
)
@click.option("--dynamic", is_flag=True, help="Check kernels that are compiled for all sizes of the input at once.")
@click.option("--max-contexts", default=16, show_default=True, type=click.IntRange(1))
@click.option("--inject", type=click.Choice(["stale-stream"]), help="Put a known bug back, to show that it is found.")
@click.option("--seed", default=0, show_default=True, help="With --device sim: the seed of the schedule.")
@click.option("--boundary/--no-boundary", default=True, help="Compare with eager for NaN, infinities and zeros, too.")
@click.option(
    "--patience",
    default=600.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Give up after so many seconds without progress, builds included.",
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the rows to this file."
)
def command(**given: Any) -> None:
    """Call MODEL's engine on many streams and threads at once and compare every output.

    MODEL is relu, upscaler or branches (built in), module:callable, or a .pt2 file. Concurrent outputs must equal the
    engine's own serial output bit for bit; the serial output must be near float32 eager. On sim the race checker
    watches, too, and names what is missing.

    Exit status: 0 all outputs are right, 1 an output is wrong or the race checker found something, 2 the outputs cannot
    be judged (they say nothing, or cannot be compared) or the check could not run, 130 interrupted.
    """
    from anabranch.check._command import run

    run(**given)
