"""``benchmarks/zoo.py``: verdicts, files that become one, what is counted; and its table in ``docs/models.md``.

And ``benchmarks/zoo_sizes.py``: which sizes vary, and what becomes of a model that is wrong at one of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import anabranch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, Any]]:
    """The program's modules, which import one another as files of one folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import tables
        import zoo
        import zoo_measure
        import zoo_models
        import zoo_sizes

        yield {"zoo": zoo, "measure": zoo_measure, "models": zoo_models, "sizes": zoo_sizes, "tables": tables}
        for name in ("tables", "zoo", "zoo_measure", "zoo_models", "zoo_sizes"):
            del sys.modules[name]


def row(**changes: Any) -> dict[str, Any]:
    base = {
        "model": "hf/a",
        "dtype": "float16",
        "stage": "done",
        "builds": [{"first": "ours", "ours_s": 4.0, "compile_s": 2.0}],
        "repeats": True,
        "error": 1e-3,
        "eager_error": 1e-3,
        "error_to_eager": 1e-3,
        "integers_differ": 0.0,
        "structure": "",
        "calls": 96,
        "wrong": 0,
        "summary": {"captured": True, "reason": "as asked", "reasons": [], "flops": {"share_captured": 1.0}},
        "us": 100.0,
        "eager_us": 250.0,
        "compile_us": 120.0,
        "launches": {"all": 40, "captured": 39},
    }
    return {**base, **changes}


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("changes", "status", "why"),
    [
        ({}, "right", ""),
        ({"error": 0.019}, "right", ""),
        ({"error": 0.021}, "wrong", "error 2.1e-02"),
        ({"error": 0.1, "eager_error": 0.06}, "right", ""),
        ({"error": 0.1, "eager_error": 0.04}, "wrong", "eager's 4.0e-02"),
        ({"error": 5.0, "eager_error": 3.0}, "wrong", "error 5.0"),
        ({"error": INFINITE}, "wrong", "error inf"),
        ({"error": INFINITE, "eager_error": INFINITE}, "right", ""),
        ({"error": INFINITE, "eager_error": INFINITE, "error_to_eager": 0.5}, "wrong", "to eager 5.0e-01"),
        ({"eager_differs": "other shapes", "error_to_eager": 0.5}, "wrong", "to eager 5.0e-01"),
        ({"dtype": "float32", "eager_error": 0.0}, "wrong", "error 1.0e-03"),
        ({"dtype": "float32", "eager_error": 0.0, "moved_error": 2e-3, "exact_error": 0.0}, "right", ""),
        ({"dtype": "float32", "eager_error": 0.0, "moved_error": 2e-3, "exact_error": 2e-3}, "wrong", "error 1.0e-03"),
        ({"integers_differ": 0.03}, "wrong", "3.0% of integers"),
        ({"wrong": 2, "wrong_first": "the output differs"}, "wrong", "2 of 96 concurrent calls differ: the output"),
        ({"repeats": False}, "wrong", "other bits"),
        ({"structure": "a list, not a tuple"}, "wrong", "structure: a list"),
        ({"thread_error": "RuntimeError: x"}, "wrong", "a thread's call: RuntimeError"),
        ({"stage": "latency"}, "failed", "ended at: latency"),
        ({"stage": "build", "failure": "InputError: no", "refused": True}, "refused", "build: InputError: no"),
        ({"stage": "build", "failure": "KeyError: no", "refused": False}, "failed", "build: KeyError"),
        ({"stage": "threads", "failure": "InputError: no", "refused": True}, "failed", "threads: InputError"),
        ({"stage": "profile", "failure": "no answer in 300 s"}, "right", ""),
        ({"stage": "profile", "failure": "no answer in 300 s", "wrong": 1}, "wrong", "1 of 96"),
        ({"stage": "not started"}, "not started", "no time"),
    ],
)
def test_a_verdict_has_its_reason(programs: dict[str, Any], changes: dict[str, Any], status: str, why: str) -> None:
    found, reason = programs["zoo"].verdict(row(**changes))
    assert found == status, reason
    assert why in reason
    assert bool(reason) == (status != "right")


def run(*rows: dict[str, Any], device: str = "GPU", command: str = "one") -> dict[str, Any]:
    where = {
        "kind": "cuda",
        "device": device,
        "torch": "2.11.0",
        "date": "2026-11-29",
        "commands": [command],
        "cores": 16,
        "versions": {"timm": "1.0"},
    }
    return {"environment": where, "rows": list(rows)}


def test_the_later_row_counts_and_builds_of_both_orders_are_kept(programs: dict[str, Any]) -> None:
    zoo = programs["zoo"]
    flipped = row(us=90.0, builds=[{"first": "compile", "ours_s": 2.0, "compile_s": 4.0}])
    idle = {"model": "hf/a", "stage": "not started"}
    parts = [
        run(zoo.judged(row()), zoo.judged(row(model="hf/b")), command="a"),
        run(zoo.judged(flipped), command="b"),
        run(zoo.judged(idle), zoo.judged({**idle, "model": "hf/c"}), command="c"),
    ]
    whole = zoo.merge(parts)
    assert [r["model"] for r in whole["rows"]] == ["hf/a", "hf/b", "hf/c"]
    first = whole["rows"][0]
    assert (first["us"], first["status"]) == (90.0, "right")
    assert [b["first"] for b in first["builds"]] == ["ours", "compile"]
    assert whole["environment"]["commands"] == ["a", "b", "c"]
    assert zoo.left_out(["hf/a", "hf/c", "hf/d"], whole) == ["hf/c", "hf/d"]
    with pytest.raises(click.ClickException, match="different machines"):
        zoo.merge([run(device="GPU"), run(device="CPU")])


def test_an_infinite_error_outlives_the_file(programs: dict[str, Any], tmp_path: Path) -> None:
    zoo = programs["zoo"]
    zoo.write(tmp_path / "a.json", run(zoo.judged(row(error=INFINITE, eager_error=INFINITE))))
    json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    result = CliRunner().invoke(
        zoo.main, ["--merge", str(tmp_path / "a.json"), "--json", str(tmp_path / "b.json")], catch_exceptions=False
    )
    assert result.output.startswith("1 of 1 right; wrong calls: 0 of 96")
    assert zoo.read(tmp_path / "b.json")["rows"][0]["eager_error"] == INFINITE


def test_kernels_of_graph_launches_are_told_from_the_others(programs: dict[str, Any]) -> None:
    def event(category: str, name: str, correlation: int) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "args": {"correlation": correlation}}

    events = [
        event("cuda_runtime", "cudaGraphLaunch", 1),
        event("cuda_driver", "cuLaunchKernelEx", 2),
        event("cuda_runtime", "cudaLaunchKernel", 3),
        *(event("kernel", name, 1) for name in "abc"),
        event("kernel", "d", 2),
        event("gpu_memcpy", "Memcpy HtoD", 4),
        {"ph": "X", "cat": "cpu_op", "name": "aten::relu", "args": {}},
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]
    assert programs["measure"].launches({"traceEvents": events}) == {"all": 4, "captured": 3}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.layer(x).masked_fill(mask, 0.5)
        return {"y": y, "largest": y.argmax(-1)}


@pytest.fixture
def subject(programs: dict[str, Any]) -> Any:
    """A model whose expected results are there, and a right engine of it."""
    measure = programs["measure"]
    torch.manual_seed(3)
    found = measure.Subject("own/two", measure.Options("cpu", "float32"), lambda row: None)
    found.row["dtype"] = "float32"
    found.device = torch.device("cpu")
    found.gauge = measure._Gauge(found.device)
    found.model = Two().eval().requires_grad_(False)
    found.given = [
        measure.Inputs((torch.randn(3, 6),), {"mask": torch.arange(15).view(3, 5) % 4 == i}) for i in range(4)
    ]
    found._eager()
    found.engine = anabranch.compile(
        found.model, list(found.sets[0].args), kwargs=found.sets[0].kwargs, backend="eager"
    )
    return found


def judged(programs: dict[str, Any], subject: Any) -> tuple[str, str]:
    with torch.no_grad():
        subject._serial()
        subject._threads()
    status: tuple[str, str] = programs["zoo"].verdict({**subject.row, "stage": "done"})
    return status


def test_a_right_engine_is_right(programs: dict[str, Any], subject: Any) -> None:
    assert judged(programs, subject) == ("right", "")
    assert (subject.row["calls"], subject.row["wrong"]) == (96, 0)
    subject._summary()
    assert subject.row["summary"]["captured"] is False
    json.dumps(subject.row)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda out, n: {**out, "y": out["y"] * 1.01}, "error 1."),
        (lambda out, n: {**out, "largest": out["largest"] + 1}, "100.0% of integers differ"),
        (lambda out, n: {**out, "largest": out["largest"].int()}, "structure: "),
        (lambda out, n: tuple(out.values()), "structure: "),
        (lambda out, n: {**out, "y": out["y"] + 1e-6 * (n > 12)}, "of 96 concurrent calls differ"),
    ],
)
def test_a_wrong_engine_is_found(programs: dict[str, Any], subject: Any, spoil: Any, why: str) -> None:
    engine, calls = subject.engine, iter(range(1000))
    subject.engine = lambda *args, **kwargs: spoil(engine(*args, **kwargs), next(calls))
    status, reason = judged(programs, subject)
    assert status == "wrong"
    assert why in reason


def test_a_call_that_raises_in_a_thread_is_told(programs: dict[str, Any], subject: Any) -> None:
    engine, calls = subject.engine, iter(range(1000))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 20:
            raise RuntimeError("out of luck")
        return engine(*args, **kwargs)

    subject.engine = call
    assert judged(programs, subject) == ("wrong", "a thread's call: RuntimeError: out of luck")


def test_the_table_names_every_model_and_why_it_is_not_right(programs: dict[str, Any]) -> None:
    zoo = programs["zoo"]
    direct = {"captured": False, "reason": "the host waits", "reasons": ["nonzero: depends on data (a.py:3)"]}
    memory = {name: {"allocated": 1, "reserved": 200, "device": None} for name in ("eager", "eager_activations")}
    memory |= {name: {"allocated": 9, "reserved": 300, "device": None} for name in ("ours", "ours_build")}
    rows = [
        row(memory={**memory, "weights": 100}, overhead_us=80.0, us_beside_overhead=100.0),
        row(model="hf/b", summary={**direct, "flops": {"share_captured": 0.0}}),
        row(model="hf/c", wrong=3, wrong_first="y differs", aside={"reduce-overhead": "RuntimeError: no"}),
        {"model": "hf/d", "stage": "build", "failure": "UnsupportedModel: <x> | y", "refused": True},
        {"model": "hf/e", "stage": "not started"},
    ]
    text = programs["tables"].zoo_of(run(*(zoo.judged(r) for r in rows)))
    assert "**2 of 5 models are right**, 3 of 288 concurrent calls were wrong. Of 2, 2 are at least 1.5 times" in text
    assert "| hf/a | right | 100 | 2.50 | 1.20 | 0.80 | 4.0, 2.00 | 100% | 39 of 40 | 1.50 | 1.00 |" in text
    assert "- hf/b: the host waits; nonzero: depends on data (a.py:3)" in text
    assert "- hf/c: wrong: 3 of 96 concurrent calls differ: y differs" in text
    assert r"- hf/d: refused: build: UnsupportedModel: \<x\> \| y" in text
    assert "- hf/e: not started: no time was left" in text
    assert "- hf/c: reduce-overhead: RuntimeError: no" in text
    assert "### Not right: 3" in text
    assert "### Right, but not captured: 1" in text
    widths = {line.replace(r"\|", "").count("|") for line in text.splitlines() if line.startswith("| ")}
    assert len(widths) == 1


def test_builds_of_both_orders_count_by_their_geometric_mean(programs: dict[str, Any]) -> None:
    both = [{"first": "ours", "ours_s": 8.0, "compile_s": 2.0}, {"first": "compile", "ours_s": 2.0, "compile_s": 2.0}]
    assert programs["tables"]._built(both) == "4.0, 2.00"
    assert programs["tables"]._built([{"first": "ours", "ours_s": 8.0}]) == "8.0"


def test_names_are_told_and_unknown_ones_refused(programs: dict[str, Any]) -> None:
    zoo, models = programs["zoo"], programs["models"]
    result = CliRunner().invoke(zoo.main, ["--list", "--families", "real,hf"], catch_exceptions=False)
    assert result.output.split()[:3] == ["real/bert-base", "real/vit-b16", "real/llama-1b"]
    assert len(set(models.default_names(list(models.NAMES)))) == sum(len(n) for n in models.NAMES.values())
    assert "no such" not in CliRunner().invoke(zoo.main, ["--help"], catch_exceptions=False).output
    for arguments, why in (
        (["--families", "hf,tensorflow"], "--families: no tensorflow; there are tv, timm, hf, real"),
        (["--only", "hf/bert"], "--json FILE is needed"),
    ):
        result = CliRunner().invoke(zoo.main, arguments)
        assert result.exit_code == 2
        assert why in result.output
    with pytest.raises(LookupError, match="no model 'bert'; a name is one of tv/NAME"):
        models.make("bert")


# -- sizes that vary ---------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A text, and pictures of the same number."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(20, 6), nn.Linear(6, 5)

    def forward(self, text: torch.Tensor, *, picture: torch.Tensor, factor: float) -> torch.Tensor:
        return self.layer(self.words(text).mean(1) + picture) * factor


def sized(programs: dict[str, Any], patch: pytest.MonkeyPatch, model: nn.Module, kind: str) -> tuple[str, str, Any]:
    """The verdict on a model of ours, and its row."""
    models, sizes = programs["models"], programs["sizes"]

    def make(name: str, of: Any) -> Any:
        def inputs(s: Any) -> Any:
            text = torch.randint(20, (s.batch, s.length))
            return models.Inputs((text,), {"picture": torch.randn(s.batch, 6), "factor": 0.5})

        return model.eval().requires_grad_(False), list(map(inputs, of))

    patch.setattr(models, "make", make)
    options = programs["measure"].Options("cpu", "float32", "eager")
    found = getattr(sizes, kind)("own/pooled", options, lambda row: None)
    with torch.no_grad():
        found.run()
    judge = sizes.taken if kind == "Exported" else programs["zoo"].judged
    row = judge(found.row)
    json.dumps(row)
    return row["status"], row["why"], row


def test_sizes_that_vary_are_seen_and_judged(programs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, row = sized(programs, monkeypatch, Pooled(), "Exported")
    assert (status, row["inputs"]) == ("taken", ["0: batch, 1: length", "0: batch"])
    status, _, row = sized(programs, monkeypatch, Pooled(), "Judged")
    assert (status, row["sizes"]) == ("right", ["batch", "length"])
    assert row["specializations"] >= 2, "a size of 1 is compiled by itself"


def test_a_model_that_needs_to_know_a_size(programs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Knows(Pooled):
        def forward(self, text: torch.Tensor, **rest: Any) -> torch.Tensor:
            return super().forward(text, **rest) * sum(range(int(text.shape[1])))

    status, why, _ = sized(programs, monkeypatch, Knows(), "Exported")
    assert status == "not taken"
    assert why.startswith("export: ")
    status, why, _ = sized(programs, monkeypatch, Knows(), "Judged")
    assert status == "refused"
    assert "build: UnsupportedModel: sizes were declared to vary ('batch', 'length')" in why


def test_a_size_at_which_an_engine_is_wrong_or_fails(programs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compile = anabranch.compile

    class Spoiled:
        def __init__(self, engine: Any, spoil: Any) -> None:
            self.engine, self.spoil = engine, spoil

        def __call__(self, text: torch.Tensor, **rest: Any) -> torch.Tensor:
            result: torch.Tensor = self.spoil(self.engine(text, **rest), *text.shape)
            return result

        def __getattr__(self, name: str) -> Any:
            return getattr(self.engine, name)

    def spoiled(spoil: Any) -> Any:
        return lambda *args, **kwargs: Spoiled(compile(*args, **kwargs), spoil)

    monkeypatch.setattr(anabranch, "compile", spoiled(lambda y, batch, length: y * (1 + 0.1 * (length == 17))))
    status, why, _ = sized(programs, monkeypatch, Pooled(), "Judged")
    assert (status, why[:8]) == ("wrong", "error 1.")
    monkeypatch.setattr(anabranch, "compile", spoiled(lambda y, batch, length: y if length != 17 else y.no))
    status, why, _ = sized(programs, monkeypatch, Pooled(), "Judged")
    assert status == "failed"
    assert why.startswith("the call of batch 5, length 17: AttributeError")


def test_a_batch_that_is_no_size(programs: dict[str, Any]) -> None:
    models, sizes = programs["models"], programs["sizes"]
    listed = [models.Inputs(([torch.ones(3, 4)] * s.batch,)) for s in sizes.CALLS]
    with pytest.raises(LookupError, match="a number of tensors"):
        sizes.varying(listed)
    with pytest.raises(LookupError, match="an input has no size that varies"):
        sizes.varying([models.Inputs((torch.ones(3, 4),)) for _ in sizes.CALLS])
    with pytest.raises(LookupError, match="follows none that was asked for"):
        sizes.varying([models.Inputs((torch.ones(s.batch + 1),)) for s in sizes.CALLS])


def test_each_size_has_five_values_with_its_bounds(programs: dict[str, Any]) -> None:
    sizes = programs["sizes"]
    for name, bounds in sizes.BOUNDS.items():
        values = {getattr(s, name) for s in sizes.CALLS}
        assert len(values) == 5
        assert {1, *bounds} <= values
        assert (min(values), max(values)) == bounds
