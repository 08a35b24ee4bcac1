"""``Engine.summary``: counts, reasons and times as plain data, which ``explain()`` and the log tell people."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import anabranch
from anabranch.runtime import _phases, _specialization
from anabranch.runtime._flops import flops_of

pytestmark = pytest.mark.usefixtures("seeded")


class Function(nn.Module):
    """A function as a model."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: torch.Tensor) -> Any:
        return self.fn(*args)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def build(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> anabranch.Engine:
    return anabranch.compile(model.eval(), list(inputs), backend="eager", **options)


@pytest.mark.usefixtures("runtime")
def test_a_summary_is_plain_data_with_an_entry_for_each_signature(caplog: pytest.LogCaptureFixture) -> None:
    x, wide = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 7, 9)
    with caplog.at_level(logging.INFO, "anabranch"):
        began = time.perf_counter()
        engine = build(Net(), x, dynamic=False)
        engine(wide)
        took = time.perf_counter() - began
    summary = engine.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["model"], summary["device"], summary["backend"]) == ("Net", "cpu", "eager")
    assert summary["runtime"] == engine.runtime
    assert (summary["max_contexts"], summary["memory_limit"], summary["bytes"]) == (16, None, 0)
    assert [s["signature"] for s in summary["signatures"]] == ["float32[2, 3, 6, 5]", "float32[2, 3, 7, 9]"]
    total = 0.0
    for s, y in zip(summary["signatures"], (x, wide), strict=True):
        assert not s["captured"]
        assert "the CPU has no streams" in s["reason"]
        assert (s["reasons"], s["contexts"], s["bytes"], s["measured_us"]) == ([], 0, 0, {})
        assert s["operators"] == {"captured": 0, "direct": 4, "share_captured": 0.0}
        products = 2 * 2 * 8 * 27 * y.shape[2] * y.shape[3] + 2 * 2 * 8 * 5
        assert s["flops"] == {"captured": 0, "direct": products, "share_captured": 0.0}
        assert list(s["seconds"]) == [*_phases.PHASES, "total"]
        phases = [s["seconds"][name] for name in _phases.PHASES]
        assert sum(phases) == pytest.approx(s["seconds"]["total"], abs=1e-4)
        assert s["seconds"]["export"] == max(phases) > 0
        assert s["seconds"]["capture"] == s["seconds"]["measuring"] == 0
        total += s["seconds"]["total"]
    assert total < took
    text = engine.explain()
    told = [r.getMessage() for r in caplog.records if "built in" in r.getMessage()]
    assert len(told) == 2
    for s, line in zip(summary["signatures"], told, strict=True):
        where = _phases.describe({name: s["seconds"][name] for name in _phases.PHASES})
        assert line == f"Net({s['signature']}): {where}"
        assert f"  {where}\n" in text
        assert f"  floating-point operations: {s['flops']['direct']:,} a call, 0% captured\n" in text
    assert "  operators: 0 captured, 4 direct\n" in text


def test_reasons_name_the_operator_and_the_line_of_the_model() -> None:
    class Picks(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x[x > 0], F.dropout(x, training=True)

    line = Picks.forward.__code__.co_firstlineno + 1
    (summary,) = build(Picks(), torch.randn(4, 5)).summary()["signatures"]
    found = [(r["why"], r["operator"].split(".")[1], r["source"]) for r in summary["reasons"]]
    where = f"test_summary.py:{line}"
    assert found[0] == ("data-dependent", "index", where)
    assert [(why, source) for why, _, source in found[1:]] == [("random", where)]


def test_what_nobody_can_count_is_none() -> None:
    (one,) = build(Function(lambda x: x[x > 0] @ x[x > 0]), torch.randn(4, 5)).summary()["signatures"]
    assert one["flops"] == {"captured": 0, "direct": None, "share_captured": 0.0}
    (none,) = build(Function(torch.relu), torch.randn(4, 5)).summary()["signatures"]
    assert none["flops"] == {"captured": 0, "direct": 0, "share_captured": None}


def of(fn: Callable[..., Any], *inputs: torch.Tensor) -> int:
    """Operations of a function's exported graph."""
    engine = build(fn if isinstance(fn, nn.Module) else Function(fn), *inputs)
    counts = flops_of(engine._first().program.module.graph)
    assert None not in counts.values()
    return sum(n for n in counts.values() if n)


r = torch.randn
COUNTED: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "products": (
        lambda a, b, c: (
            a @ b,
            torch.addmm(a[:, :3], a, b[:, :3]),
            a @ c.transpose(1, 2),
            torch.baddbmm(c, c @ b, b.T @ c),
        ),
        (r(4, 6), r(6, 6), r(2, 6, 6)),
    ),
    "linear, einsum, tensordot": (
        lambda x, w: (F.linear(x, w), torch.einsum("bij,kj->bik", x, w), torch.tensordot(x, w, ([2], [1]))),
        (r(2, 3, 5), r(7, 5)),
    ),
    "convolutions": (
        lambda x, w, t: (
            F.conv2d(x, w, stride=2, groups=2),
            F.conv_transpose2d(x, t, stride=2),
            F.conv1d(x[..., 0], t[..., 0]),
        ),
        (r(2, 4, 9, 8), r(6, 2, 3, 3), r(4, 4, 3, 2)),
    ),
}


@pytest.mark.parametrize("name", list(COUNTED))
def test_operations_are_those_that_pytorch_counts_in_eager(name: str) -> None:
    fn, inputs = COUNTED[name]
    with FlopCounterMode(display=False) as counter:
        fn(*inputs)
    assert of(fn, *inputs) == counter.get_total_flops() > 0


def test_operations_that_pytorch_does_not_count_on_the_cpu() -> None:
    q, k = r(2, 6, 5, 8), r(2, 6, 7, 8)
    scores = 2 * 2 * 6 * 5 * 7 * (8 + 8)
    assert of(F.scaled_dot_product_attention, q, k, k) == scores
    shared = k[:, :2].contiguous()  # two heads of keys for six of queries
    assert of(lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), q, shared) == scores
    assert of(lambda a, v: (a @ v, v @ v), r(3, 8), r(8)) == 2 * 24 + 2 * 8
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        model = kind(5, 7, num_layers=2, bidirectional=True, batch_first=True)
        weights = 2 * gates * 7 * ((5 + 7) + (14 + 7))
        assert of(model, r(3, 6, 5)) == 2 * 3 * 6 * weights


def test_operations_are_counted_when_asked_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    monkeypatch.setattr(_specialization, "flops_of", lambda graph: counted.append(graph) or {})
    engine = build(nn.Linear(3, 4), r(2, 3))
    engine(r(2, 3))
    assert not counted
    engine.summary()
    engine.summary()
    engine.explain()
    assert len(counted) == 1


def test_each_moment_counts_for_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = _phases.Clock()

    def spend(seconds: float) -> None:
        now[0] += seconds

    spend(1)
    with clock.phase("lowering"):
        spend(2)
        with clock.phase("warm-up"):
            spend(4)
        spend(8)
    with contextlib.suppress(KeyError), clock.phase("capture"):
        spend(16)
        raise KeyError
    spend(32)
    seconds = clock.read()
    assert seconds == {"export": 0, "lowering": 10, "warm-up": 4, "capture": 16, "measuring": 0, "other": 33}
    assert (
        _phases.describe(seconds)
        == "built in 63.00 s: lowering 10.00 s, warm-up 4.00 s, capture 16.00 s, other 33.00 s"
    )
