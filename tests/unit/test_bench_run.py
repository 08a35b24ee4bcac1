"""The benchmark's run: wrong outputs are counted, and what a system does to its process stays there."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import bench_systems
import pytest
import torch
from click.testing import CliRunner

from anabranch.bench import Options, _builds, _process, _run, find_system, find_work, run_bench, strike, summary
from anabranch.bench._measure import Meter
from anabranch.bench._report import without_baseline
from anabranch.bench._work import calibrated
from anabranch.cli import main
from anabranch.errors import InputError

FAST = {"streams": (1, 2), "rounds": 1, "seconds": 0.01, "patience": 60.0, "torch_threads": 1}


def run(*systems: str, works: tuple[str, ...] = ("relu",), **options: Any) -> dict[str, Any]:
    names = [s if "-" in s or s == "eager" else f"bench_systems:{s}" for s in systems]
    return run_bench(works, names, Options(**{**FAST, **options}))


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_builds, "_PAUSE", 0.0)
    monkeypatch.setattr(_builds, "_CONTEXT", 4.0)


def cell(content: dict[str, Any], system: str, work: str = "relu") -> dict[str, Any]:
    (found,) = [c for c in content["cells"] if c["system"].endswith(system) and c["work"] == work]
    return found


@pytest.fixture(scope="module")
def faulty() -> dict[str, Any]:
    """One run with all the systems that end by themselves."""
    return run(
        "right",
        "zeros_on_one_thread",
        "stale",
        "another_threads",
        "nearly",
        "off",
        "aborts",
        "faults",
        "aborts_on_threads",
        "refuses",
        "refuses_threads",
    )


def test_a_right_system_has_every_figure_and_no_wrong_output(faulty: dict[str, Any]) -> None:
    found = cell(faulty, ":right")
    assert found["status"] == "ok"
    assert found["serial_error"] == 0
    assert not found["serially_wrong"]
    for key in ("p50_us", "p99_us", "host_us", "copy_us"):
        assert 0 < found["latency"][key]["low"] <= found["latency"][key]["median"]
    assert found["latency"]["host_us"]["median"] <= found["latency"]["p99_us"]["median"]
    for n in ("1", "2"):
        row = found["throughput"][n]
        assert row["per_s"]["median"] > 0
        assert row["checked"] >= int(n) * 3
        assert (row["wrong"], row["inexact"], row["all_zero"]) == (0, 0, 0)
    assert found["build_s"] > 0
    assert found["memory_mb"] > 0
    assert found["first_call_ms"] > 0


def test_as_many_outputs_are_checked_as_were_asked_for_in_the_first_round() -> None:
    content = run("right", rounds=2, checked=100, latencies=3)
    found = cell(content, ":right")
    assert found["latency"]["host_us"]["rounds"] == content["settings"]["latencies_a_round"] * 2 == 6
    for n in (1, 2):
        row = found["throughput"][str(n)]
        # The second round checks what it timed, up to 48, and the first call of each thread.
        assert n * 101 < row["checked"] <= n * 149
        assert row["wrong"] == 0


def test_checking_ends_where_it_would_take_longer_than_there_is_patience_for() -> None:
    meter = Meter(find_work("relu"), find_system("bench_systems:right"), "cpu", torch.float32, 2, float("inf"))
    meter.build()
    assert meter.throughput(2, 0.01, checked=20)["checked"] == 2 * 20
    assert meter.throughput(2, 0.01, patience=0.0, checked=500)["checked"] == 2 * 2
    assert meter.throughput(2, 0.01, patience=0.0)["checked"] == 2 * 2


def test_zeros_on_one_thread_are_struck_out_with_their_count(faulty: dict[str, Any]) -> None:
    found = cell(faulty, "zeros_on_one_thread")
    assert found["throughput"]["1"]["wrong"] == 0
    row = found["throughput"]["2"]
    # Every call of the second thread, and no other.
    assert row["wrong"] == row["all_zero"] == row["checked"] // 2
    text = strike(found, "2", "peer")
    assert text.startswith("~~")
    assert text.endswith(f"~~ {row['wrong']} of {row['checked']} wrong")
    assert not strike(found, "1", "peer").startswith("~~")
    assert faulty["works"]["relu"]["best_peer"]["2"] != found["system"]
    assert f"~~ {row['wrong']} of {row['checked']} wrong" in summary(faulty)


def test_an_output_that_nobody_wrote_is_wrong(faulty: dict[str, Any]) -> None:
    assert cell(faulty, "stale")["throughput"]["2"]["wrong"] > 0


def test_an_output_of_another_call_is_wrong(faulty: dict[str, Any]) -> None:
    assert cell(faulty, "another_threads")["throughput"]["2"]["wrong"] > 0


def test_other_bits_within_rounding_are_counted_apart_and_only_ours_promises_them(faulty: dict[str, Any]) -> None:
    found = cell(faulty, "nearly")
    row = found["throughput"]["2"]
    assert row["wrong"] == 0
    assert row["inexact"] > 0
    assert not strike(found, "2", "peer").startswith("~~")
    assert strike(found, "2", "ours").startswith("~~")


def test_a_system_that_is_off_from_the_start_is_struck_out_everywhere(faulty: dict[str, Any]) -> None:
    found = cell(faulty, ":off")
    assert found["serially_wrong"]
    for figure in ("p50_us", "1", "2"):
        assert strike(found, figure, "peer").endswith("off by 50%")


@pytest.mark.parametrize(("system", "signal"), [("aborts", "SIGABRT"), ("faults", "SIGSEGV")])
def test_a_crash_is_a_result_with_the_signal_and_the_last_words(
    faulty: dict[str, Any], system: str, signal: str
) -> None:
    found = cell(faulty, f":{system}")
    assert found["status"] == "crashed"
    assert found["reason"] == f"build: {signal}"
    assert found["crash"]["how"] == signal
    assert found["crash"]["stderr"]
    assert "latency" not in found


def test_a_crash_among_threads_keeps_what_was_measured_before(faulty: dict[str, Any]) -> None:
    found = cell(faulty, "aborts_on_threads")
    assert found["status"] == "crashed"
    assert found["reason"] == "2 streams: SIGABRT"
    assert found["latency"]["calls"] > 0
    assert list(found["throughput"]) == ["1"]


def test_what_a_system_raises_is_a_result(faulty: dict[str, Any]) -> None:
    found = cell(faulty, ":refuses")
    assert found["status"] == "failed"
    assert found["reason"] == "build: RuntimeError: this model has an operator that nobody knows"
    threads = cell(faulty, "refuses_threads")
    assert threads["status"] == "ok"
    assert threads["without"] == {"2": "ValueError: one thread only"}


def test_one_that_hangs_is_killed_and_the_run_goes_on() -> None:
    content = run("hangs_on_threads", "right", patience=3.0)
    found = cell(content, "hangs_on_threads")
    assert found["status"] == "hung"
    assert found["reason"] == "2 streams: no answer"
    assert cell(content, ":right")["throughput"]["2"]["wrong"] == 0


def test_a_build_that_takes_too_long_is_given_up() -> None:
    content = run("never_built", "swallows", "right", build_seconds=8.0)
    for system in ("never_built", "swallows"):
        assert cell(content, system)["status"] == "slow"
        assert cell(content, system)["reason"] == "not built within 8 s"
    assert cell(content, ":right")["status"] == "ok"


def test_a_build_without_an_answer_gets_one_more_process(
    monkeypatch: pytest.MonkeyPatch, no_pauses: None, tmp_path: Path
) -> None:
    end = _builds.Builds._end

    def soon(self: Any, group: Any, close: float) -> float:
        """Until it hangs there is time; then there is none."""
        if group.stage != "build" or group.building.tries:
            return end(self, group, close)
        return 0.0 if (tmp_path / "order").exists() else time.monotonic() + 0.5

    monkeypatch.setattr(_process, "serve", bench_systems.serve_and_hang_once)
    monkeypatch.setattr(_builds.Builds, "_end", soon)
    found = cell(run("right", logs=tmp_path), ":right")
    assert found["status"] == "ok"
    assert list(found["throughput"]) == ["1", "2"]
    assert [text.split(" (host ")[0] for text in found["retried"]] == ["build: no answer"]


def test_a_build_that_was_cut_off_is_made_again_with_what_is_left_of_the_time() -> None:
    content = run("late", "right", limit=240.0, build_share=0.5)
    assert cell(content, "late")["status"] == "ok"
    assert cell(content, "late")["throughput"]["2"]["wrong"] == 0


def test_what_a_crash_took_along_is_built_again() -> None:
    other = "bench_systems:small@2,4"
    content = run("aborts_on_relu_threads", works=("relu", other), rounds=2, batch=2)
    assert cell(content, "aborts_on_relu_threads")["status"] == "crashed"
    found = cell(content, "aborts_on_relu_threads", other)
    assert found["status"] == "ok"
    assert found["latency"]["p50_us"]["rounds"] == 2
    assert found["throughput"]["2"]["per_s"]["rounds"] == 2


def test_contexts_are_created_one_at_a_time_and_the_baseline_is_built_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_process, "serve", bench_systems.serve_and_log)
    content = run("right", "off", "eager", streams=(1,), cores=3, logs=tmp_path)
    assert [c["status"] for c in content["cells"]] == ["ok"] * 3
    lines = (tmp_path / "order").read_text().splitlines()
    starts = [line for line in lines if not line.startswith("build")]
    assert starts == [f"{what} {name}" for name in ORDER for what in ("begin", "end")]
    assert sorted(set(lines) - set(starts)) == sorted(f"build {name}" for name in ORDER)


ORDER = ("eager", "bench_systems:right", "bench_systems:off")


def test_processes_have_as_many_hardware_queues_as_a_gpu_has_channels_for() -> None:
    assert [_builds.hardware_queues(n) for n in (1, 14, 15, 26, 27, 48, 100)] == [32, 32, 16, 16, 8, 8, 8]
    content = run("right", "eager", streams=(1,), limit=0.1)
    assert content["settings"]["hardware_queues"] is None


def test_a_context_that_was_refused_is_asked_for_again_in_a_new_process(
    monkeypatch: pytest.MonkeyPatch, no_pauses: None
) -> None:
    monkeypatch.setattr(_process, "serve", bench_systems.serve_contexts_badly)
    found = cell(run("right"), ":right")
    assert found["status"] == "ok"
    assert found["throughput"]["2"]["wrong"] == 0
    for why, text in zip(
        ("RuntimeError: CUDA error: out of memory", "no answer in 4 s", "SIGKILL"), found["retried"], strict=True
    ):
        assert text.startswith(f"context: {why} (host ")


def test_what_its_surroundings_ended_is_built_again(no_pauses: None) -> None:
    systems = ("out_of_memory_at_first", "killed_at_first")
    content = run(*systems, "right", "out_of_memory")
    whys = ("build: RuntimeError: CUDA error: out of memory", "build: SIGKILL")
    for system, why in zip(systems, whys, strict=True):
        found = cell(content, f":{system}")
        assert found["status"] == "ok"
        assert "crash" not in found
        assert list(found["throughput"]) == ["1", "2"]
        assert [text.split(" (host ")[0] for text in found["retried"]] == [why]
    assert "retried" not in cell(content, ":right")
    never = cell(content, ":out_of_memory")
    assert never["status"] == "failed"
    assert never["reason"] == whys[0]
    assert len(never["retried"]) == 5


def test_a_figure_that_there_was_no_memory_for_is_measured_in_the_next_round() -> None:
    found = cell(run("out_of_memory_at_the_first_latency", rounds=2), "first_latency")
    assert found["status"] == "ok"
    assert found["latency"]["p50_us"]["rounds"] == 1
    assert found["throughput"]["2"]["per_s"]["rounds"] == 2
    why = "RuntimeError: CUDA error: out of memory"
    assert [t.split(" (host ")[0] for t in found["retried"]] == [f"first calls: {why}", f"latency: {why}"]


def test_the_baseline_is_built_again_whatever_ended_it(monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    monkeypatch.setattr(_process, "serve", bench_systems.serve_and_kill_eager_once)
    content = run("eager")
    found = cell(content, "eager")
    assert found["status"] == "ok"
    assert list(found["throughput"]) == ["1", "2"]
    assert [text.split(" (host ")[0] for text in found["retried"]] == ["latency: SIGABRT"]
    assert without_baseline(content) == []


def test_a_run_without_its_baseline_says_so_and_fails(monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    monkeypatch.setattr(_process, "serve", bench_systems.serve_no_context_to_eager)
    args = ["relu", "--device", "cpu", "--streams", "1", "--rounds", "1", "--seconds", "0.01"]
    result = CliRunner().invoke(main, ["bench", *args, "--systems", "eager", "bench_systems:right"])
    assert result.exit_code == 2
    why = "context: RuntimeError: CUDA error: out of memory, 9 times"
    assert f"no figures of the baseline: relu: eager is failed: {why}" in result.output
    assert "right" in result.output


def test_each_cell_and_figure_that_is_not_there_says_why() -> None:
    systems = [find_system("bench_systems:right"), find_system("eager")]
    works = [find_work("relu"), find_work("upscaler-1080p")]
    unfinished = _run._Run(works, systems, Options(**{**FAST, "streams": (1, 2, 16)}), lambda *_: None)
    waiting, built, measured, crashed = unfinished.cells
    built.end("ok", "")
    built.retried.append("latency: out of memory")
    measured.end("ok", "")
    measured.latency.append({"p50_us": 1.0})
    measured.throughput[1] = [{"per_s": 1.0}]
    crashed.end("crashed", "build: SIGSEGV")
    unfinished._account()
    assert (waiting.status, waiting.reason) == ("skipped", "out of time before its build")
    assert (built.status, built.reason) == ("skipped", "out of time before its measurement; latency: out of memory")
    assert measured.status == "ok"
    assert measured.without == {2: "out of time before its measurement", 16: "at most 4 streams for this work"}
    assert (crashed.reason, crashed.without) == ("build: SIGSEGV", {})


def test_a_lost_device_ends_its_cell_as_a_crash_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_process, "serve", bench_systems.serve_a_lost_device)
    found = cell(run("refuses_threads"), "refuses_threads")
    assert found["status"] == "crashed"
    assert found["reason"] == "2 streams: ValueError: one thread only"
    assert found["latency"]["calls"] > 0
    assert list(found["throughput"]) == ["1"]


def test_out_of_time_is_said(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    content = run("right", limit=0.5, json=target)
    found = cell(content, ":right")
    assert found["status"] == "skipped"
    assert "out of time" in found["reason"]
    assert json.loads(target.read_text())["cells"] == content["cells"]


def test_the_file_holds_where_and_how(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "bench.json"
    steps: list[tuple[int, int]] = []
    options = Options(**{**FAST, "streams": (1,)}, json=target, logs=tmp_path / "logs")
    content = run_bench(["relu"], ["eager"], options, lambda done, of, what: steps.append((done, of)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert not content["partial"]
    saved = json.loads(target.read_text())
    assert saved["partial"]
    assert saved["cells"] == content["cells"]
    for key in ("date", "device", "torch", "command", "cores", "load_before", "load_after", "seconds"):
        assert key in content["environment"]
    assert content["settings"]["streams"] == [1]
    assert content["works"]["relu"]["shape"] == [1, 3, 5]
    assert content["systems"]["eager"] == {"label": "PyTorch eager", "family": "peer"}
    assert list((tmp_path / "logs").iterdir())


def test_calibrated_normalizations_normalize_what_they_get() -> None:
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Hardswish()]
    layers += [torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.BatchNorm2d(8), torch.nn.Dropout(0.5)]
    model = calibrated(torch.nn.Sequential(*layers).eval(), (1, 3, 32, 32))
    assert not any(module.training for module in model.modules())
    generator = torch.Generator().manual_seed(5)
    x = torch.tensor([0.5, 1.0, 1.5, 2.0]).reshape(4, 1, 1, 1) * torch.randn((4, 3, 32, 32), generator=generator)
    with torch.no_grad():
        y = model(x).transpose(0, 1).flatten(1)
    assert y.mean(1).abs().max() < 0.2
    assert ((y.var(1) > 0.7) & (y.var(1) < 1.3)).all()


def test_names_that_are_not_there_are_refused() -> None:
    with pytest.raises(InputError, match="one of relu"):
        run("right", works=("nonsense",))
    with pytest.raises(InputError, match="one of eager"):
        run_bench(["relu"], ["nonsense"], Options())
    with pytest.raises(InputError, match="no_such"):
        run_bench(["relu"], ["bench_systems:no_such"], Options())
    with pytest.raises(InputError, match="shape"):
        run("right", works=("bench_systems:small@2,x",))
