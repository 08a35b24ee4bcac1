"""Prints what a compiler's command line needs: ``g++ main.cpp $(python -m anabranch.cpp --sources --cflags ...)``."""

from __future__ import annotations

import shlex

import click

from anabranch import cpp


@click.command()
@click.option("--sources", is_flag=True, help="The files to compile along with a program.")
@click.option("--cflags", is_flag=True, help="Flags for the compiler.")
@click.option("--ldflags", is_flag=True, help="Flags for the linker; after the sources.")
@click.option("--cmake", is_flag=True, help="The folder for CMake's add_subdirectory.")
def main(sources: bool, cflags: bool, ldflags: bool, cmake: bool) -> None:
    """Print, on one line and in this order, what was asked for."""
    words: list[object] = []
    words += cpp.sources() if sources else []
    words += cpp.compile_flags() if cflags else []
    words += cpp.link_flags() if ldflags else []
    words += [cpp.cmake_path()] if cmake else []
    click.echo(shlex.join(map(str, words)))


if __name__ == "__main__":
    main(prog_name="python -m anabranch.cpp")
