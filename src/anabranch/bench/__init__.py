"""The benchmark: every system does the same work in one run, each in its own process; wrong outputs are struck out."""

from anabranch.bench._options import Options
from anabranch.bench._report import overview, strike, summary, table
from anabranch.bench._run import run_bench
from anabranch.bench._system import SYSTEMS, Ready, Subject, System, default_systems, find_system
from anabranch.bench._work import WORKS, Work, default_works, find_work

__all__ = [
    "SYSTEMS",
    "WORKS",
    "Options",
    "Ready",
    "Subject",
    "System",
    "Work",
    "default_systems",
    "default_works",
    "find_system",
    "find_work",
    "overview",
    "run_bench",
    "strike",
    "summary",
    "table",
]
