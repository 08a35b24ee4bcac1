"""Deterministic exploration: run a program under every interleaving of its threads and device queues, or many of them.

`explore` runs a function again and again, each time under another schedule, and gives a `Verdict`: ``exhaustive``,
``bounded`` or ``failed``, never bare success. See ``docs/explore.md``.
"""

from __future__ import annotations

from anabranch.explore._controlled import controlled
from anabranch.explore._errors import ExploreError, NotDeterministic, ReplayDiverged
from anabranch.explore._explore import explore, observed
from anabranch.explore._run import Failure, Run
from anabranch.explore._schedulers import Scheduler, exhaustive, fifo, lazy, pct, random, replay
from anabranch.explore._shared import Var
from anabranch.explore._verdict import Verdict

__all__ = [
    "ExploreError",
    "Failure",
    "NotDeterministic",
    "ReplayDiverged",
    "Run",
    "Scheduler",
    "Var",
    "Verdict",
    "controlled",
    "exhaustive",
    "explore",
    "fifo",
    "lazy",
    "observed",
    "pct",
    "random",
    "replay",
]
