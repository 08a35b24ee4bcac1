"""What ``anabranch bench`` says of outputs: wrong ones of each kind are counted, what says nothing is not measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from wrong_outputs import BITS, PLANTED, Change, Everything

from anabranch._exit import NOT_JUDGED, RIGHT, WRONG
from anabranch.bench import Subject
from anabranch.bench._measure import Meter
from anabranch.bench._report import status
from anabranch.bench._system import Ready, System
from anabranch.bench._work import Work
from anabranch.errors import CannotJudge

WORK = Work("everything", "outputs of every kind", lambda: Everything().eval(), (2, 6))
#: Differences that other systems' wrappers make, and that are no fault.
FORM = {
    "strides",
    "an input that is a copy",
    "a view that is a copy",
    "a list for a tuple",
    "a constant",
    "a type",
}


def meter(change: Change, when: Callable[[int], bool], family: str = "ours", work: Work = WORK) -> Meter:
    """A system that gives the model's own results, changed in those calls whose number ``when`` is true of."""
    count = [0]

    def build(subject: Subject) -> Ready:
        def call(x: torch.Tensor) -> Any:
            count[0] += 1
            y = subject.model(x)
            return change(y) if when(count[0]) else y

        return Ready(call)

    return Meter(work, System("planted", "planted", build, family=family), "cpu", torch.float32, 1, float("inf"))


def test_right_outputs_are_all_right() -> None:
    for family in ("ours", "peer"):
        right = meter(lambda n: n, lambda i: False, family)
        built = right.build()
        assert built["error"] <= 1e-6
        figures = right.throughput(1, 0.01, checked=20)
        assert figures["checked"] == 20
        assert (figures["wrong"], figures["inexact"], figures["all_zero"]) == (0, 0, 0)


@pytest.mark.parametrize("name", PLANTED)
def test_a_system_that_is_wrong_from_the_start_is_serially_wrong(name: str) -> None:
    built = meter(PLANTED[name], lambda i: True).build()
    assert not built["error"] <= built["allowed_error"]
    built = meter(PLANTED[name], lambda i: True, "peer").build()
    assert (built["error"] <= built["allowed_error"]) == (name in FORM)


@pytest.mark.parametrize("name", [*PLANTED, *BITS])
def test_outputs_that_are_wrong_later_are_counted(name: str) -> None:
    # Calls: one to build, one for each of eight inputs; then those that are measured.
    planted = meter({**PLANTED, **BITS}[name], lambda i: i > 9)
    assert planted.build()["error"] <= 1e-6
    figures = planted.throughput(1, 0.01, checked=10)
    if name in ("strides", "an input that is a copy", "a view that is a copy"):
        assert figures["wrong"] == 0  # looked at once, when it is built
        return
    assert figures["wrong"] + figures["inexact"] == figures["checked"] == 10
    assert (figures["inexact"] > 0) == (name in BITS)
    assert figures["all_zero"] == (10 if name == "all zeros" else 0)


@pytest.mark.parametrize(
    "fn", [lambda x: x * math.nan, lambda x: x * 0.0 + 1.0, lambda x: [], lambda x: x[:0], lambda x: None]
)
def test_a_work_whose_outputs_say_nothing_cannot_be_judged(fn: Any) -> None:
    class Of(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return fn(x)

    with pytest.raises(CannotJudge, match="could not be told"):
        meter(lambda y: y, lambda i: False, work=Work("of", "", lambda: Of().eval(), (2, 6))).build()


def cell(**more: Any) -> dict[str, Any]:
    return {"work": "w", "system": "s", "status": "ok", "throughput": {}, **more}


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        ([cell()], RIGHT),
        ([cell(), cell(status="crashed", reason="build: SIGSEGV")], RIGHT),
        ([cell(), cell(serially_wrong=True)], WRONG),
        ([cell(throughput={"2": {"wrong": 1, "inexact": 0, "checked": 9}})], WRONG),
        ([cell(throughput={"2": {"wrong": 0, "inexact": 1, "checked": 9}})], WRONG),
        ([cell(), cell(status="failed", reason="build: CannotJudge: its outputs are NaN everywhere")], NOT_JUDGED),
        ([cell(status="failed", reason="build: ValueError")], NOT_JUDGED),
    ],
)
def test_the_exit_status_says_what_was_seen(cells: Any, wanted: int) -> None:
    assert status({"cells": cells, "systems": {"s": {"family": "ours"}}}) == wanted
