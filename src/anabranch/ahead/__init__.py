"""Building before the GPU is there: :func:`build`, and the command ``anabranch build``."""

from anabranch.ahead._build import Build, BuiltEngine, build

__all__ = ["Build", "BuiltEngine", "build"]
