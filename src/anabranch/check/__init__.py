"""The reported bug's test, as a tool: many calls in flight on many streams, each compared with the serial result."""

from anabranch.check._case import Case, Subject, cases_for, find_subject
from anabranch.check._run import Options, Row, run_check

__all__ = ["Case", "Options", "Row", "Subject", "cases_for", "find_subject", "run_check"]
