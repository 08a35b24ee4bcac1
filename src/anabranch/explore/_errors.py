"""What can keep an exploration from being made; a finding is a verdict, not an error."""

from __future__ import annotations

from anabranch.errors import AnabranchError


class ExploreError(AnabranchError):
    """The exploration cannot be made: no such program, a scheduler that it cannot use, a system call that failed."""


class ReplayDiverged(ExploreError):
    """A replayed schedule asks for a step that the program cannot take there: another program, or another version."""


class NotDeterministic(ExploreError):
    """The program did something else when it was run again under the same schedule, so no schedule can be explored."""
