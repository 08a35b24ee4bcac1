"""The text of the reports, against files under ``snapshots``. Set ANABRANCH_UPDATE_SNAPSHOTS=1 to write them anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from race_programs import PROGRAMS, parse

from anabranch.race import check_lines, check_trace

HERE = Path(__file__).parent
BROKEN = [p for p in PROGRAMS if p.verdict != "clean"]


def _compare(name: str, text: str) -> None:
    path = HERE / "snapshots" / f"{name}.txt"
    if os.environ.get("ANABRANCH_UPDATE_SNAPSHOTS"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", ["C01", "C02", "C03", "C04", "C16", "C17", "C24", "C33", "C36", "C40", "C43", "V01"])
def test_corpus_reports(name: str) -> None:
    result = check_trace(HERE / "corpus" / f"{name}.jsonl")
    _compare(name, "\n\n".join(map(str, result.reports)) + "\n")


def test_reports_of_our_programs() -> None:
    parts = []
    for program in BROKEN:
        reports = check_lines(parse(program.text)).reports
        assert reports, program.name
        parts.append(f"== {program.name}\n" + "\n\n".join(map(str, reports)))
    _compare("programs", "\n\n".join(parts) + "\n")


def test_source_lines_stand_in_for_trace_lines() -> None:
    events = parse("op a > x; op b x >")
    events[0]["source"] = "model.py:12"
    events[1]["source"] = "serve.py:34"
    (report,) = check_lines(events).reports
    assert report.first is not None
    assert (report.first.site.where, report.second.site.where) == ("model.py:12", "serve.py:34")
    _compare("source_lines", f"{report}\n")


def test_one_report_for_one_race_however_often_it_happens() -> None:
    loop = []
    for _ in range(50):
        for event, source in zip(parse("op a > x; op b x >"), ("a.py:1", "b.py:2"), strict=True):
            loop.append({**event, "source": source})
    result = check_lines(loop)
    # Write then read; and, from the second round on, the next write against the read before it.
    assert [(r.first.site.where, r.second.site.where) for r in result.reports if r.first] == [
        ("a.py:1", "b.py:2"),
        ("b.py:2", "a.py:1"),
    ]
    assert result.conflicts > 50


def test_adjacent_bytes_make_one_report() -> None:
    (report,) = check_lines(parse("op a > x[0:64]; op c y[0:1] >; op b x[8:16] >; op b x[0:64] >")).reports[1:]
    assert (report.start, report.stop) == (0, 64)


def test_range_is_the_overlap_in_the_second_buffer() -> None:
    (report,) = check_lines(parse("op a > x[0:100]; alloc y a x[40:80]; op b y[10:90] >")).reports
    assert (report.buffer, report.start, report.stop) == ("y", 10, 60)


def test_plain_data() -> None:
    (report,) = check_lines(parse("op a > x; op b x >")).reports
    data = report.to_dict()
    assert data["text"] == str(report)
    assert data["fix"] == list(report.fix)
    assert data["first"]["stream"] == "a"
