"""The reported bug's test, as a tool: many calls in flight on many streams, each compared with the serial result."""

from anabranch.check._bench import Bench, Options
from anabranch.check._case import Case, Subject, cases_for, find_subject
from anabranch.check._report import environment, table, to_json, write_json
from anabranch.check._row import Row
from anabranch.check._run import float32_exactly, run_check

__all__ = [
    "Bench",
    "Case",
    "Options",
    "Row",
    "Subject",
    "cases_for",
    "environment",
    "find_subject",
    "float32_exactly",
    "run_check",
    "table",
    "to_json",
    "write_json",
]
