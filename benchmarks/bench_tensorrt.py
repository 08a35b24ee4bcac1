"""The backend ``tensorrt`` beside Torch-TensorRT, both in one run of ``anabranch bench``, and whether each bar is met.

    python benchmarks/bench_tensorrt.py                     # 1 or 2 H200 -> benchmarks/results/tensorrt_h200.json
    python benchmarks/bench_tensorrt.py --works relu,encoder --out FOLDER    # some of it
    python benchmarks/bench_tensorrt.py --merge a.json --merge b.json        # several calls' files, judged together

What follows ``--`` goes to ``anabranch bench``. Each system is called from 8 threads on 8 streams, 500 checked calls
each, and on one stream. Ours runs as ``compile`` decides in both runtimes, and with and without CUDA graphs in the
native one; Torch-TensorRT with one engine for all threads in both of its runtimes, with and without CUDA graphs; and
private graphs of ours that one thread launches, as what the GPU can do. The upscaler gets 270p frames here: 8 x 500
calls at 1080p would take 40 s for each system.

Time, estimated from builds and rates of ``bench_h200.json``: on one GPU with 16 cores 150 s of building and 250 s of
measuring; on two 90 and 130. A peer's deadlock costs another 60 s. Whatever happens the program ends within 570 s:
``--limit`` ends builds and rounds at 480 s; one measurement that hangs may take 60 s more, start and end 25.

(The name: a program ``tensorrt.py`` in this folder would be what ``import tensorrt`` finds.)
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from lanes import deal, merge, run_lanes, statuses

from anabranch.bench import find_work
from anabranch.bench._report import median, number, right, wrong
from anabranch.check import write_json

RESULTS = Path(__file__).parent / "results"

#: Lanes of like cost, light works first.
LANES = (
    ("relu", "encoder", "upscaler-270p", "googlenet"),
    ("relu-4k", "resnet18", "resnet50", "inception_v3"),
)
#: Those that the bar on FLOPs is for.
CNNS = ("resnet18", "resnet50", "googlenet", "inception_v3", "upscaler-270p", "upscaler-1080p")

#: As compile decides: whose latency and calls a second are judged.
MAIN = "anabranch-tensorrt-native"
GRAPHS, DIRECT = f"{MAIN}-graphs", f"{MAIN}-direct"
OURS = (MAIN, "anabranch-tensorrt-python", GRAPHS, DIRECT)
PEER_GRAPHS = ("trt-cpp-graphs-shared", "trt-python-graphs-shared")
PEERS = ("trt-cpp-shared", "trt-python-shared", *PEER_GRAPHS)
#: What the GPU does of ours where no host is in the way.
BOUND = "bound-tensorrt"

STREAMS, CHECKED = 8, 500
SHARE, ERROR, LATENCY, THROUGHPUT = 95.0, 1.5, 1.0, 4.0
BARS = {
    "flops_share": f"at least {SHARE:.0f}% of a convolutional network's FLOPs in TensorRT",
    "error": f"error against float32 eager at most {ERROR} x the smallest of Torch-TensorRT's",
    "wrong": f"0 wrong of {STREAMS} x {CHECKED}, with and without CUDA graphs",
    "latency": f"p50 at most {LATENCY:.0f} x that of Torch-TensorRT with CUDA graphs",
    "throughput": f"calls a second on {STREAMS} streams at least {THROUGHPUT:.0f} x Torch-TensorRT's best right figure",
}
PASS, FAIL, NOT_MEASURED, NO_BAR = "pass", "fail", "not measured", "no bar"

Cells = dict[str, dict[str, Any]]


def verdict(content: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Work -> bar -> ``ours``, ``theirs``, ``ratio`` (ours to theirs) and ``result``, with ``why`` where it needs one.

    A bar passes only with all that it compares in the run. A peer that crashed, hung or raised has shown what it can
    do; a cell that time ran out for has not. Ours fails by ending so.
    """
    found = {}
    for work in content["works"]:
        cells = {c["system"]: c for c in content["cells"] if c["work"] == work}
        found[work] = {
            "flops_share": _flops_share(cells, work in CNNS),
            "error": _error(cells),
            "wrong": _wrong(cells),
            "latency": _latency(cells),
            "throughput": _throughput(cells),
        }
    return found


def _flops_share(cells: Cells, judged: bool) -> dict[str, Any]:
    shares = {}
    for name in OURS:
        share = re.search(r"([\d.]+)% of FLOPs", cells.get(name, {}).get("note", ""))
        if share:
            shares[name] = float(share[1])
    ours = min(shares.values(), default=None)
    lacking = [f"{n}: no share" for n in OURS if n not in shares and n in cells and _has(cells[n], None)]
    row = _row(cells, OURS, None, ours, None, ours is not None and ours >= SHARE, lacking)
    if not judged:
        row["result"] = NO_BAR  # of a ReLU there is no share: it has no FLOPs
        row.pop("why", None)
    return row


def _error(cells: Cells) -> dict[str, Any]:
    errors = {n: float(c["serial_error"]) for n, c in cells.items() if "serial_error" in c}
    ours = max((errors[n] for n in OURS if n in errors), default=None)
    theirs = min((errors[n] for n in PEERS if n in errors and not cells[n]["serially_wrong"]), default=None)
    passed = ours is not None and theirs is not None and ours <= ERROR * theirs
    return _row(cells, (*OURS, *PEERS), None, ours, theirs, passed and not _off(cells, OURS), _none(theirs))


def _wrong(cells: Cells) -> dict[str, Any]:
    figure = str(STREAMS)
    counts = {
        name: wrong(cell, figure, "ours" if name in OURS else "peer")
        for name, cell in cells.items()
        if median(cell, figure) is not None
    }
    lacking = []
    for name in (n for n in OURS if n in counts):
        if counts[name][1] < STREAMS * CHECKED:
            lacking.append(f"{name}: {counts[name][1]} outputs checked")
    for name, wanted in ((GRAPHS, "captured"), (DIRECT, "direct")):
        if name in counts and not cells[name].get("note", "").startswith(wanted):
            lacking.append(f"{name}: not {wanted}")
    texts = {
        n: f"{counts[n][0]} of {counts[n][1]}" if n in counts else _reason(cells.get(n), figure)
        for n in (*OURS, *PEERS)
    }
    seen = sum(counts[n][0] for n in OURS if n in counts)
    ours, theirs = ({n: texts[n] for n in names} for names in (OURS, PEERS))
    row = _row(cells, (*OURS, *PEERS), figure, ours, theirs, True, lacking)
    if seen or _off(cells, OURS):
        # Whatever else is missing.
        row["result"] = FAIL
    return row


def _latency(cells: Cells) -> dict[str, Any]:
    ours = median(cells[MAIN], "p50_us") if MAIN in cells else None
    theirs = min(_right(cells, PEER_GRAPHS, "p50_us"), default=None)
    passed = ours is not None and theirs is not None and ours <= LATENCY * theirs
    return _row(cells, (MAIN, *PEER_GRAPHS), "p50_us", ours, theirs, passed and not _off(cells, [MAIN]), _none(theirs))


def _throughput(cells: Cells) -> dict[str, Any]:
    figure = str(STREAMS)
    ours = median(cells[MAIN], figure) if MAIN in cells else None
    alike = max(_right(cells, PEERS, figure), default=None)
    alone = max(_right(cells, PEERS, "1"), default=None)
    # Where none of theirs is right on so many streams, what remains to its users is one.
    theirs = alone if alike is None else alike
    passed = ours is not None and theirs is not None and ours >= THROUGHPUT * theirs
    passed = passed and right(cells[MAIN], figure, "ours")
    row = _row(cells, (MAIN, *PEERS), figure, ours, theirs, passed, _none(theirs))
    row["theirs_on_streams"] = None if theirs is None else 1 if alike is None else STREAMS
    best = max((v for v in (alike, alone) if v is not None), default=None)
    row["theirs_on_any_streams"] = best
    row["ratio_to_any_streams"] = _ratio(ours, best)
    row["bound"] = bound = median(cells[BOUND], figure) if BOUND in cells else None
    row["ratio_to_bound"] = _ratio(ours, bound)
    if row["result"] == FAIL and bound is not None and theirs is not None and bound < THROUGHPUT * theirs:
        limit = f"the GPU does {number(bound)} at most, {number(bound / theirs)} x theirs"
        row["why"] = "; ".join(filter(None, (row.get("why"), limit)))
    return row


def _right(cells: Cells, names: Sequence[str], figure: str) -> list[float]:
    """The figures of these peers that no wrong output is behind."""
    values = [median(cells[n], figure) for n in names if n in cells and right(cells[n], figure, "peer")]
    return [v for v in values if v is not None]


def _off(cells: Cells, names: Sequence[str]) -> bool:
    """Whether one of these is wrong with one call at a time already."""
    return any(cells[n].get("serially_wrong", False) for n in names if n in cells)


def _none(theirs: float | None) -> list[str]:
    return ["no right figure of Torch-TensorRT"] if theirs is None else []


def _has(cell: dict[str, Any], figure: str | None) -> bool:
    """``figure`` None: what is known once it is built."""
    return "serial_error" in cell if figure is None else median(cell, figure) is not None


def _ended(cell: dict[str, Any] | None, figure: str | None) -> bool:
    """Whether there is no (further) figure by the system's own doing; want of time, memory or a module is not."""
    if cell is None:
        return False
    why = str(cell.get("without", {}).get(figure, ""))
    if why and not why.startswith(("NotReady", "at most")):
        return "out of memory" not in why
    reason = cell.get("reason", "")
    return cell["status"] in ("crashed", "hung", "failed") and not re.search("out of memory|SIGKILL", reason)


def _reason(cell: dict[str, Any] | None, figure: str | None) -> str:
    if cell is None:
        return "not in this run"
    return str(cell.get("without", {}).get(figure) or cell.get("reason") or cell["status"])


def _ratio(ours: Any, theirs: Any) -> float | None:
    return float(f"{ours / theirs:.4g}") if isinstance(ours, float) and isinstance(theirs, float) and theirs else None


def _row(
    cells: Cells,
    names: Sequence[str],
    figure: str | None,
    ours: Any,
    theirs: Any,
    passed: bool,
    lacking: Sequence[str],
) -> dict[str, Any]:
    """``names``: whose figure the bar compares; ``lacking``: what else it would need."""
    without = [n for n in names if n not in cells or not _has(cells[n], figure)]
    # Among many threads ours may not end at all; elsewhere a figure that it left stands.
    threads = figure == str(STREAMS)
    ended = [n for n in names if n in OURS and _ended(cells.get(n), figure) and (threads or n in without)]
    missing = [n for n in without if n not in ended and not (n in PEERS and _ended(cells.get(n), figure))]
    reasons: dict[str, list[str]] = {}
    for name in (*ended, *missing):
        reasons.setdefault(_reason(cells.get(name), figure), []).append(name)
    why = [*(f"{', '.join(of)}: {reason}" for reason, of in reasons.items()), *lacking]
    result = FAIL if ended else NOT_MEASURED if missing or lacking else PASS if passed else FAIL
    row = {"ours": ours, "theirs": theirs, "ratio": _ratio(ours, theirs), "result": result}
    return row | ({"why": "; ".join(why)} if why else {})


def text(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A line a bar of each work."""

    def short(value: Any) -> str:
        if isinstance(value, dict):
            return "; ".join(f"{name.removeprefix('anabranch-tensorrt-')} {v}" for name, v in value.items())
        if value is None:
            return "-"
        return number(value) if value >= 1 else f"{value:.3g}"

    lines = []
    for work, bars in found.items():
        for bar, row in bars.items():
            why = f" ({row['why']})" if "why" in row else ""
            figures = f"ours {short(row['ours'])}, theirs {short(row['theirs'])}, ratio {short(row['ratio'])}"
            lines.append(f"{work:15} {bar:12} {row['result']:13} {figures}{why}")
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the results.")
@click.option("--limit", default=480.0, show_default=True, help="Seconds a lane may take.")
@click.option("--lanes", type=click.IntRange(1, 2), help="Default: as many as there are GPUs.")
@click.option("--works", help="Names, with commas; all.")
@click.option("--merge", "files", type=click.Path(path_type=Path, exists=True), multiple=True, help="Runs nothing.")
@click.option("--device", default="cuda", type=click.Choice(["cuda", "cpu"]), help="cpu: a rehearsal.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def main(
    out: Path, limit: float, lanes: int | None, works: str | None, files: tuple[Path, ...], device: str, more: Any
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    missing: list[Path] = []
    if files:
        parts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    else:
        chosen = works.split(",") if works else [w for lane in LANES for w in lane]
        for name in chosen:
            find_work(name)  # refused now, not by one lane of two
        systems = ",".join((*OURS, *PEERS, BOUND))
        settings = ["--systems", systems, "--streams", f"1,{STREAMS}", "--checked", str(CHECKED)]
        settings += ["--rounds", "3", "--seconds", "0.1", "--build-seconds", "240", "--build-share", "0.5"]
        # Half of the patience goes to the slowest's checked calls. One core a call: a GPU's caller computes nothing.
        settings += ["--patience", "60", "--torch-threads", "1", *more]
        dealt = deal(chosen, LANES, lanes or max(1, min(2, torch.cuda.device_count())))
        parts, missing = run_lanes(dealt, out, device, limit, settings)
    content = merge(parts, f"python benchmarks/bench_tensorrt.py {' '.join(sys.argv[1:])}".rstrip())
    found = verdict(content)
    results = [row["result"] for bars in found.values() for row in bars.values()]
    counts = {result: results.count(result) for result in (PASS, FAIL, NOT_MEASURED, NO_BAR)}
    content["verdict"] = {"bars": BARS, "results": counts, "works": found}
    target = out / f"tensorrt_{'h200' if device == 'cuda' else device}.json"
    write_json(target, content)
    print(text(found))
    print(f"cells: {statuses(content)}; bars: {counts}; {target}")
    if missing:
        print(f"not all of it: {', '.join(map(str, missing))} was not written")
    sys.exit(bool(missing or counts[FAIL] or counts[NOT_MEASURED]))


if __name__ == "__main__":
    main()
