"""The options of ``anabranch build``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anabranch.cli._options import DTYPES, Shape


@click.command("build")
@click.argument("model")
@click.option("--backend", default="tensorrt", show_default=True, type=click.Choice(["tensorrt"]))
@click.option(
    "--shape", "shapes", multiple=True, type=Shape(), help="Shape of the input. Give several for an engine each."
)
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Type of the input. Default: float32."
)
@click.option("--channels-last", is_flag=True, help="Put the model and the input in channels_last memory.")
@click.option(
    "--precision",
    type=click.Choice(["float16", "bfloat16", "mixed", "mixed-bf16"]),
    help="Compute in this type, as compile(precision=...) does.",
)
@click.option("--tf32", is_flag=True, help="Allow TF32, as torch.set_float32_matmul_precision('high') does.")
@click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    metavar="8.9",
    help="Compute capability of the GPU to build for. Default: that of this machine.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder for the engines. Default: where compile() looks on this machine.",
)
@click.option("--require-full", is_flag=True, help="Fail where an operator would have to run in PyTorch.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a list of what was built to this file.",
)
def command(**given: Any) -> None:
    """Build MODEL's engines ahead of time, into the cache.

    MODEL is relu, upscaler or branches (built in), module:callable, or a .pt2 file. TensorRT-RTX needs no GPU for it.
    On a machine with that GPU, anabranch.compile(model, inputs, backend="tensorrt") finds the engines, if it compiles
    the same model for the same inputs with the same versions; docs/tensorrt.md says how to take the cache there.

    Exit status: 0 built, 1 an operator or a network cannot be built (with --require-full: any operator), 2 the build
    could not be tried, 130 interrupted.
    """
    from anabranch.ahead._command import run

    run(**given)
