"""The race checker: happens-before by vector clocks over streams, host threads and bytes.

Needs no PyTorch and no GPU. ``docs/race.md`` states the rules; ``anabranch race TRACE.jsonl`` is the command.
"""

from anabranch.race._detector import Detector, Result, check_lines, check_trace
from anabranch.race._proof import PlanProof, Violation, check_plan
from anabranch.race._report import Access, Allocation, Report, Site

__all__ = [
    "Access",
    "Allocation",
    "Detector",
    "PlanProof",
    "Report",
    "Result",
    "Site",
    "Violation",
    "check_lines",
    "check_plan",
    "check_trace",
]
