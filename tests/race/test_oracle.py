"""The detector against brute-force reachability, on random small traces."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import race_generator
import race_oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import TraceError
from anabranch.race import Detector


def _verdict(lines: list[str]) -> str:
    detector = Detector()
    try:
        detector.feed_bytes("\n".join(lines).encode())
        return detector.finish().verdict
    except TraceError:
        return "malformed"


@pytest.mark.parametrize("traces", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_agrees_on_random_traces(traces: int) -> None:
    rng = random.Random(20261122)
    seen: Counter[str] = Counter()
    for _ in range(traces):
        lines = race_generator.trace(rng)
        expected = race_oracle.judge(lines)
        assert _verdict(lines) == expected, "\n".join(lines)
        seen[expected] += 1
    # A generator that made only easy traces would prove nothing.
    assert traces - seen["malformed"] >= traces / 2
    assert seen["race"] >= traces / 3
    assert min(seen["clean"], seen["stale"], seen["malformed"]) >= traces / 20
    print(dict(seen))


@pytest.mark.parametrize("traces", [300, pytest.param(1_500, marks=pytest.mark.slow)])
def test_agrees_on_every_event_of_longer_traces(traces: int) -> None:
    """Not only the verdict: the same events race, and the same events are stale, also after the first finding."""
    rng = random.Random(47)
    racing = quiet = 0
    for _ in range(traces):
        trace = [e for _ in range(rng.randrange(1, 6)) for e in race_generator.events(rng)]
        oracle, detector = race_oracle.Oracle(), Detector(report_limit=0)
        before = (0, 0)
        for at, event in enumerate(trace):
            oracle.race = oracle.stale = False
            oracle.feed(event)
            detector.feed(event)
            result = detector.finish()
            now = (result.conflicts, result.stale_uses)
            found = (now[0] > before[0], now[1] > before[1])
            assert found == (oracle.race, oracle.stale), f"event {at} of {trace}"
            before = now
            racing += found[0]
            quiet += not found[0]
    assert min(racing, quiet) > traces * 5_000 / 1_500
    print(racing, quiet)


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_agrees_and_shrinks(rng: random.Random) -> None:
    lines = race_generator.trace(rng)
    assert _verdict(lines) == race_oracle.judge(lines)


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 40))
def test_pieces_of_any_size_give_the_same_result(rng: random.Random, size: int) -> None:
    lines = race_generator.trace(rng)
    data = "\n".join(lines).encode()
    whole, pieces = Detector(), Detector()
    answers = []
    for detector, step in ((whole, len(data) or 1), (pieces, size)):
        try:
            for at in range(0, len(data), step):
                detector.feed_bytes(data[at : at + step])
            answers.append(detector.finish().to_dict())
        except TraceError as error:
            answers.append({"error": str(error)})
    assert answers[0] == answers[1]
