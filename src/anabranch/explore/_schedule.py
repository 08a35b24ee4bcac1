"""A schedule as text: the actor of every step in turn, with a count where one makes several: ``T0*12-s1-T1*3``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby

from anabranch.explore._errors import ExploreError

_PART = re.compile(r"([A-Za-z][A-Za-z0-9_.:]*)(?:\*([1-9][0-9]{0,8}))?")


def write(actors: Iterable[str]) -> str:
    counted = ((actor, sum(1 for _ in group)) for actor, group in groupby(actors))
    return "-".join(actor if count == 1 else f"{actor}*{count}" for actor, count in counted)


def parse(text: str) -> list[str]:
    """Raises :class:`ExploreError`, saying where, if ``text`` is no schedule."""
    actors: list[str] = []
    for part in text.strip().split("-") if text.strip() else ():
        found = _PART.fullmatch(part.strip())
        if found is None:
            raise ExploreError(
                f"{part!r} in the schedule is not an actor with a count; expected one such as T0*12 or s1"
            )
        actors += [found[1]] * int(found[2] or 1)
    return actors
