"""The explorer's oracle "values" tells wrong results of each kind; what it cannot compare ends the exploration."""

from __future__ import annotations

import pytest
import torch
from wrong_outputs import BITS, PLANTED, Change, Everything

from anabranch.errors import CannotJudge
from anabranch.explore import _oracles

#: Equal in value; the explorer compares values.
LAYOUT = {"strides", "an input that is a copy", "a view that is a copy", "a type"}
MODEL = Everything()


def results(change: Change) -> list[_oracles.Result]:
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(4))
    return [_oracles.collect(y, None) for y in (change(MODEL(x)), MODEL(x))]


def test_equal_results_are_equal_and_have_one_digest() -> None:
    same, wanted = results(lambda n: n)
    assert _oracles.values(same, wanted) is None
    assert _oracles.outcome(same, [], "complete") == _oracles.outcome(wanted, [], "complete")


@pytest.mark.parametrize("name", [n for n in (*PLANTED, *BITS) if n not in LAYOUT])
def test_a_wrong_result_of_each_kind_is_told(name: str) -> None:
    found, wanted = results({**PLANTED, **BITS}[name])
    assert _oracles.values(found, wanted)
    assert _oracles.outcome(found, [], "complete") != _oracles.outcome(wanted, [], "complete")


def test_numbers_may_be_nan() -> None:
    nan, other = (_oracles.collect([value, 1 + 2j], None) for value in (float("nan"), 2.0))
    assert _oracles.values(nan, _oracles.collect([float("nan"), 1 + 2j], None)) is None
    assert _oracles.values(nan, other)
    assert _oracles.values(other, nan)


@pytest.mark.parametrize("make", [lambda: torch.eye(2).to_sparse(), lambda: torch.empty(2, device="meta")])
def test_what_cannot_be_compared_is_an_error(make: object) -> None:
    with pytest.raises(CannotJudge, match=r"output\[0\] is a tensor .*; return"):
        _oracles.collect({"y": make()}, None)  # type: ignore[operator]
