"""The options of ``anabranch calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("calibrate")
@click.argument("model")
@click.option(
    "--data",
    required=True,
    metavar="FILE|module:callable",
    help="Samples: a file of torch.save with a list of them, or a callable that returns them. A sample is a tensor, a"
    " tuple of positional inputs, or a dict of keyword inputs.",
)
@click.option(
    "--budget",
    default=1e-3,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="The most that a result may be off, relative to its norm.",
)
@click.option("--dtype", default="float16", show_default=True, type=click.Choice(["float16", "bfloat16"]))
@click.option(
    "--reference",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "float64"]),
    help="What errors are measured against: the model as it is, or computed in float64.",
)
@click.option("--samples", default=8, show_default=True, type=click.IntRange(1), help="Use so many of them.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: cuda where there is a GPU, else cpu.")
@click.option(
    "--out",
    default="precision.json",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the proposal to this file, for compile(precision=...).",
)
@click.option("--svg", type=click.Path(path_type=Path, dir_okay=False), help="Draw the error along the depth.")
@click.option("--rows", default=20, show_default=True, type=click.IntRange(1), help="Operators in the table.")
def command(**given: Any) -> None:
    """Find out which operators of MODEL can be in half precision, on samples.

    MODEL is relu, upscaler or branches (built in), module:callable, or a .pt2 file; a float32 one. Each operator is
    computed in half precision beside the reference, and the rest of the model goes on from its result: so the table
    tells where values leave the range, and whose rounding costs what. The proposal has the most floating-point
    operations in half precision that keep the budget.

    Exit status: 0 the proposal is written, 2 the model could not be measured, 130 interrupted.
    """
    from anabranch.calibrate._command import run

    run(**given)
