"""The incremental interface, its bounds, and its use from many threads."""

from __future__ import annotations

import io
import resource
import threading
from pathlib import Path

import pytest
from race_programs import parse

import anabranch.race
from anabranch.errors import TraceError
from anabranch.race import Detector, check_lines, check_trace


def test_findings_are_there_at_once() -> None:
    detector = Detector()
    first, second, third = parse("op a > x; op b x >; destroy b; destroy b")[:3]
    detector.feed(first)
    assert (detector.verdict, detector.races) == ("clean", ())
    detector.feed(second)
    assert detector.verdict == "race"
    assert len(detector.races) == 1
    detector.feed(third)
    detector.feed(third)
    assert [r.verdict for r in detector.reports] == ["race", "stale"]
    assert len(detector.races) == 1
    result = detector.finish()
    assert (result.events, result.streams, result.threads) == (4, 2, 1)
    assert detector.finish() == result


def test_takes_mappings_and_lines() -> None:
    detector = Detector()
    detector.feed({"do": "lock", "lock": "m"})
    detector.feed('{"do": "unlock", "lock": "m"}\n')
    detector.feed(b'{"do": "unsafe_call"}')
    assert detector.finish().events == 3
    with pytest.raises(TraceError, match="plain JSON data"):
        detector.feed({"do": object()})
    with pytest.raises(TraceError):
        detector.feed('{"do": "unsafe_call"}\n{"do": "unsafe_call"}')


def test_file_objects_and_paths(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"do": "unsafe_call"}')
    assert check_trace(path) == check_trace(str(path)) == check_trace(io.BytesIO(path.read_bytes()))
    with pytest.raises(OSError, match="absent"):
        check_trace(tmp_path / "absent")


def test_reports_stop_at_the_limit_and_the_rest_is_counted() -> None:
    detector = Detector(report_limit=3)
    for i in range(20):
        for event in parse(f"op a > x{i}; op b x{i} >"):
            detector.feed(event)
    result = detector.finish()
    assert (len(result.reports), result.unreported, result.conflicts) == (3, 17, 20)


def test_memory_is_bounded_by_live_buffers() -> None:
    def megabytes() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    lap = "".join(
        f'{{"do": "alloc", "buffer": "b{i}", "stream": "s"}}\n'
        f'{{"do": "op", "stream": "s", "reads": ["b{i}"], "writes": ["b{i}[0:8]", "b{i}[16:24]"]}}\n'
        f'{{"do": "free", "buffer": "b{i}"}}\n'
        for i in range(1000)
    ).encode()
    detector = Detector()
    for _ in range(20):
        detector.feed_bytes(lap)
    before = megabytes()
    for _ in range(400):
        detector.feed_bytes(lap)
    assert detector.finish().verdict == "clean"
    assert megabytes() - before < 8


def test_too_many_streams_is_an_error_not_a_crash() -> None:
    lines = (f'{{"do": "op", "stream": "s{i}", "reads": [], "writes": []}}\n' for i in range(40_000))
    with pytest.raises(TraceError, match="clocks fit in 1 GiB"):
        check_lines(lines)


def test_many_threads_may_feed() -> None:
    detector = Detector()

    def work(name: str) -> None:
        for _ in range(500):
            for event in parse(f"op {name} > {name}x; op {name} {name}x >"):
                detector.feed(event)

    workers = [threading.Thread(target=work, args=(f"s{i}",)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    result = detector.finish()
    assert (result.events, result.verdict) == (4000, "clean")


def test_what_is_exported() -> None:
    assert sorted(anabranch.race.__all__) == anabranch.race.__all__
    for name in anabranch.race.__all__:
        assert getattr(anabranch.race, name).__doc__
