"""The detector: events in, reports and a verdict out."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from anabranch.errors import AnabranchError, TraceError
from anabranch.race import _library
from anabranch.race._report import Report

Verdict = Literal["race", "stale", "clean"]

#: Distinct reports that a detector keeps; conflicts beyond them are only counted.
REPORT_LIMIT = 1000

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Result:
    """What a trace came to.

    ``verdict`` is ``race`` if two conflicting accesses are unordered anywhere, else ``stale`` if something already
    released was used, else ``clean``. ``conflicts`` and ``stale_uses`` count every finding, repeated ones included;
    ``reports`` holds the distinct ones in order of discovery, and ``unreported`` counts the findings after its limit.
    """

    verdict: Verdict
    reports: tuple[Report, ...]
    events: int
    threads: int
    streams: int
    conflicts: int
    stale_uses: int
    unreported: int

    @property
    def counts(self) -> dict[str, int]:
        return {
            "events": self.events,
            "threads": self.threads,
            "streams": self.streams,
            "reports": len(self.reports),
            "conflicts": self.conflicts,
            "stale_uses": self.stale_uses,
            "unreported": self.unreported,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``--json`` writes it."""
        return {
            "verdict": self.verdict,
            "counts": self.counts,
            "reports": [report.to_dict() for report in self.reports],
        }


class Detector:
    """Judges events as they come, in host issue order (the order in which the calls were issued).

    :meth:`feed` takes one event at a time; what it finds is in :attr:`reports` at once. Memory stays bounded by the
    live buffers (and by the distinct names; see ``docs/race.md``).

    Any thread may call any method: one lock, held during each call, guards the core. The order of the calls *is* the
    issue order, so a live user must call :meth:`feed` in that order.
    """

    def __init__(self, *, report_limit: int = REPORT_LIMIT) -> None:
        self._core = _library.load()
        self._lock = threading.Lock()
        self._handle = self._core.anabranch_race_new(report_limit)
        if not self._handle:
            raise MemoryError("no memory for a race detector")
        self._reports: list[Report] = []

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle:
            self._handle = None
            self._core.anabranch_race_delete(handle)

    def feed(self, event: Mapping[str, Any] | str | bytes) -> None:
        """Take one event: a mapping, or one line of a trace.

        Raises :class:`~anabranch.errors.TraceError` for a malformed one, with its number (events count from 1) and
        what was expected; it is then ignored, and the detector stays usable.
        """
        if isinstance(event, Mapping):
            try:
                event = json.dumps(dict(event))
            except (TypeError, ValueError) as error:
                raise TraceError(f"expected an event of plain JSON data: {error}") from error
        # A lone surrogate becomes bytes that the core refuses by name.
        data = event.encode("utf-8", "surrogatepass") if isinstance(event, str) else event
        data = data.removesuffix(b"\n")
        with self._lock:
            self._check(self._core.anabranch_race_line(self._handle, data, len(data)))

    def feed_bytes(self, data: bytes) -> None:
        """Take a piece of a trace file, of any size; :meth:`finish` takes what is left of its last line.

        Use this or :meth:`feed`, not both: a line that is only half there would come after the events fed meanwhile.

        Raises :class:`~anabranch.errors.TraceError` at the first malformed line; nothing after it is looked at.
        """
        with self._lock:
            self._check(self._core.anabranch_race_bytes(self._handle, data, len(data)))

    def finish(self) -> Result:
        """The result so far. May be called again after more events."""
        with self._lock:
            self._check(self._core.anabranch_race_end(self._handle))
            answer = self._core.anabranch_race_summary(self._handle)
            if answer is None:
                raise MemoryError("no memory for the reports")
            summary = json.loads(answer)
            reports = self._collect()
        return Result(
            verdict=summary["verdict"],
            reports=reports,
            events=summary["events"],
            threads=summary["threads"],
            streams=summary["streams"],
            conflicts=summary["conflicts"],
            stale_uses=summary["stale_uses"],
            unreported=summary["unreported"],
        )

    @property
    def verdict(self) -> Verdict:
        """The verdict so far."""
        conflicts, stale_uses, _ = self._counts()
        return "race" if conflicts else "stale" if stale_uses else "clean"

    @property
    def reports(self) -> tuple[Report, ...]:
        """The distinct reports so far, in order of discovery."""
        with self._lock:
            return self._collect()

    @property
    def races(self) -> tuple[Report, ...]:
        """Those of :attr:`reports` that are races."""
        return tuple(report for report in self.reports if report.verdict == "race")

    def _counts(self) -> tuple[int, int, int]:
        counts = (ctypes.c_uint64 * 3)()
        with self._lock:
            self._core.anabranch_race_counts(self._handle, counts)
        return counts[0], counts[1], counts[2]

    def _collect(self) -> tuple[Report, ...]:
        while (text := self._core.anabranch_race_report(self._handle, len(self._reports))) is not None:
            self._reports.append(Report.from_facts(json.loads(text)))
        return tuple(self._reports)

    def _check(self, status: int) -> None:
        if status == _library.OK:
            return
        message = self._core.anabranch_race_error(self._handle).decode("utf-8", "replace")
        raise TraceError(message) if status == _library.MALFORMED else AnabranchError(message)


def check_trace(trace: str | Path | BinaryIO, *, report_limit: int = REPORT_LIMIT) -> Result:
    """Judge a trace file (a path, or a file opened for reading bytes).

    Raises :class:`~anabranch.errors.TraceError` for a malformed line, with its number and what was expected, and
    :class:`OSError` when the file cannot be read.
    """
    if isinstance(trace, (str, Path)):
        with open(trace, "rb") as file:
            return check_trace(file, report_limit=report_limit)
    detector = Detector(report_limit=report_limit)
    while piece := trace.read(_CHUNK):
        detector.feed_bytes(piece)
    return detector.finish()


def check_lines(events: Iterable[Mapping[str, Any] | str | bytes], *, report_limit: int = REPORT_LIMIT) -> Result:
    """Judge events given one by one, as :meth:`Detector.feed` takes them. Raises as it does."""
    detector = Detector(report_limit=report_limit)
    for event in events:
        detector.feed(event)
    return detector.finish()
