"""Malformed input: the line, what was expected; and no bytes at all crash or hang the core."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest
import race_generator

from anabranch._toolchain import build
from anabranch.errors import AnabranchError, TraceError
from anabranch.race import Detector, _library, check_lines

HERE = Path(__file__).parent
GOOD = '{"do": "op", "stream": "s", "reads": ["a"], "writes": []}'
CASES = {
    '{"do": "op", "stream": "s", "reads": []}': 'expected "writes" to be a list of buffer names',
    '{"do": "op", "stream": 3, "reads": [], "writes": []}': 'expected "stream" to be a name in "op", found a number',
    '{"do": "op", "stream": "", "reads": [], "writes": []}': "found an empty string",
    '{"do": "op", "stream": "s", "reads": "a", "writes": []}': "found a string",
    '{"do": "op", "stream": "s", "reads": [1], "writes": []}': "found a list that holds something else",
    '{"do": "op", "stream": "s", "reads": ["a[8:0]"], "writes": []}': 'found "a[8:0]"',
    '{"do": "op", "stream": "s", "reads": ["a[-1:8]"], "writes": []}': 'expected a buffer like "a" or "a[0:8]"',
    '{"do": "op", "stream": "s", "reads": ["a[0]"], "writes": []}': 'found "a[0]"',
    '{"do": "op", "stream": "s", "reads": [""], "writes": []}': "found an empty string",
    '{"do": "op", "stream": "s", "stream": "t", "reads": [], "writes": []}': 'found "stream" twice',
    '{"do": "launch", "stream": "s"}': 'expected "do" to be one of stream, alias, op',
    '{"stream": "s"}': 'expected "do" to name an event, found nothing',
    '{"do": 7}': 'expected "do" to name an event, found a number',
    '["op"]': "expected '{': one JSON object a line, found '[' at column 1",
    '{"do": "op"': "expected ',' or '}' after the value, found the end of the line",
    '{"do": "op"} x': "expected the end of the line after '}', found 'x' at column 14",
    '{"do": "op", }': "expected a field name in double quotes, found '}'",
    "{'do': 'op'}": "expected a field name in double quotes",
    '{"do": "sync"}': 'expected either "on" (a stream or an event) or "device" in "sync", found neither',
    '{"do": "sync", "on": "s", "device": 0}': "found both",
    '{"do": "sync", "device": -1}': 'expected "device" to be a whole number from 0',
    '{"do": "sync", "device": 0.5}': "found a number that is not whole or too large",
    '{"do": "sync", "device": 01}': "expected a number without leading zeros",
    '{"do": "stream", "stream": "s", "kind": "fast"}': 'expected "kind" to be "nonblocking" or "blocking"',
    '{"do": "stream", "stream": "s", "device": true}': "found true or false",
    '{"do": "begin_capture", "stream": "s"}': 'expected "mode" to be a name',
    '{"do": "begin_capture", "stream": "s", "mode": "local"}': '"global", "thread_local" or "relaxed"',
    '{"do": "alloc", "buffer": "a"}': "expected \"stream\" to be a stream's name, or null for host memory",
    '{"do": "alloc", "buffer": "a[8]", "stream": null}': 'found "a[8]"',
    '{"do": "free", "buffer": null}': 'expected "buffer" to be a name in "free", found null',
    '{"do": "lock", "lock": {}}': "found an object",
    '{"do": "unsafe_call", "thread": 1}': 'expected "thread" to be a name',
    '{"do": "unsafe_call", "source": []}': 'expected "source" to be a name',
    '{"do": "unsafe_call", "note": nope}': "expected a JSON value",
    '{"do": "un\\x"}': "expected one of",
    '{"do": "\\ud800"}': "expected the second half of a surrogate pair",
    '{"do": "a\tb"}': "expected control characters to be escaped",
    '{"do": "unsafe_call", "x": ' + "[" * 100 + "]" * 100 + "}": "nested at most 64 deep",
}  # fmt: skip


@pytest.mark.parametrize("line", CASES, ids=range(len(CASES)))
def test_says_where_and_what_was_expected(line: str) -> None:
    with pytest.raises(TraceError) as caught:
        check_lines([GOOD, "", line])
    assert str(caught.value).startswith("line 3: expected ")
    assert CASES[line] in str(caught.value)


def test_bytes_that_are_not_utf8() -> None:
    for bad in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82"):
        with pytest.raises(TraceError, match="expected UTF-8 text"):
            check_lines([b'{"do": "lock", "lock": "' + bad + b'"}'])


def test_what_is_tolerated() -> None:
    lines = [
        b"\xef\xbb\xbf" + GOOD.encode() + b"\r",
        b"   ",
        b'  { "do" : "unsafe_call" , "extra": {"a": [1, -2.5e3, true, null, "\\u00e9"]} }  ',
        '{"do": "lock", "lock": "é \\ud83d\\ude00 \\"quoted\\"", "thread": null, "source": "a.py:3"}'.encode(),
        b'{"do": "alloc", "buffer": "a", "stream": null, "reuses": null}',
    ]
    assert check_lines(lines).verdict == "clean"
    detector = Detector()
    detector.feed_bytes(b"\n".join(lines))
    assert detector.finish().events == 4


def test_an_empty_trace_is_clean() -> None:
    assert check_lines([]).verdict == "clean"


def test_a_refused_event_leaves_no_trace() -> None:
    detector = Detector()
    detector.feed({"do": "op", "stream": "a", "reads": [], "writes": ["x"]})
    with pytest.raises(TraceError, match="line 2"):
        detector.feed({"do": "op", "stream": "b", "reads": ["x"], "writes": ["x[4:2]"]})
    assert detector.finish().verdict == "clean"
    detector.feed({"do": "op", "stream": "b", "reads": ["x"], "writes": []})
    assert detector.finish().verdict == "race"


def test_nothing_is_read_after_a_malformed_line() -> None:
    detector = Detector()
    with pytest.raises(TraceError, match="line 1"):
        detector.feed_bytes(b"{\n" + GOOD.encode() + b"\n")
    with pytest.raises(TraceError, match="line 1"):
        detector.feed_bytes(GOOD.encode())
    with pytest.raises(TraceError, match="line 1"):
        detector.finish()


def _seeds() -> list[bytes]:
    rng = random.Random(5)
    corpus = [path.read_bytes() for path in sorted((HERE / "corpus").glob("*.jsonl"))]
    return corpus + ["\n".join(race_generator.trace(rng)).encode() for _ in range(200)]


@pytest.mark.parametrize("files", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_files_never_crash_or_hang(files: int) -> None:
    seeds, rng = _seeds(), random.Random(6)
    core = _library.load()
    seen = [0, 0, 0]
    for _ in range(files):
        data = race_generator.mutate(rng, rng.choice(seeds))
        # Straight through the C interface: this is what has to hold for any bytes.
        handle = core.anabranch_race_new(20)
        status = core.anabranch_race_bytes(handle, data, len(data)) or core.anabranch_race_end(handle)
        seen[status] += 1
        if status == _library.MALFORMED:
            assert core.anabranch_race_error(handle).startswith(b"line ")
        core.anabranch_race_delete(handle)
    assert seen[_library.FAILED] == 0
    assert min(seen[:2]) > files / 10  # both the parser and what is behind it were exercised
    print(seen)


def test_mutated_files_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{_library.FOLDER}")
    sources = [*_library.sources(), HERE / "sanitizer_driver.cpp"]
    try:
        program = build("race-sanitized", sources, flags=flags, shared=False)
    except AnabranchError as error:
        pytest.skip(f"no sanitizers here: {str(error).splitlines()[-1]}")
    seeds, rng = _seeds(), random.Random(7)
    traces = seeds + [race_generator.mutate(rng, rng.choice(seeds)) for _ in range(5_000)]
    packed = b"".join(len(t).to_bytes(4, "little") + t for t in traces)
    done = subprocess.run([str(program)], input=packed, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    assert json.loads(done.stdout)["traces"] == len(traces)
