"""Writes the tables of the README, ``docs/bench.md`` and ``docs/models.md`` from the files in ``benchmarks/results``.

``--check`` writes nothing and fails where a page differs from what the files hold.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from anabranch.bench import overview, summary
from anabranch.bench._report import median, most, number, strike

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


def matrix() -> str:
    """One line a model: rows, calls, wrong, most calls in flight."""
    content = json.loads((RESULTS / "matrix_h200.json").read_text())
    models: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        models.setdefault(f"{row['model'].removesuffix('-4k')} {row['shape']}", []).append(row)
    lines = ["| network, input | rows | calls | most in flight | wrong |", "|---|---|---|---|---|"]
    for name, rows in models.items():
        calls, wrong = (sum(r[key] for r in rows) for key in ("calls", "wrong"))
        lines.append(f"| {name} | {len(rows)} | {calls:,} | {max(r['in_flight'] for r in rows)} | **{wrong}** |")
    where = content["environment"]
    lines += [
        "",
        f"Rows: float32, float16, bfloat16 x 1, 8, 40 streams x 1, 8 threads x captured, direct. {where['device']},"
        f" PyTorch {where['torch']}, {where['date'][:10]}.",
    ]
    return "\n".join(lines)


def stale() -> str:
    """What the check finds with the reported bug put back, by dtype and shape; the main stream is always right."""
    content = json.loads((RESULTS / "stale_stream_h200.json").read_text())
    lines = [
        "| path | dtype | shape | wrong | of them all zero | non-finite |",
        "|---|---|---|---|---|---|",
    ]
    for r in content["rows"]:
        lines.append(
            f"| {r['path']} | {r['dtype']} | {r['shape']} | {r['wrong']} of {r['calls']} | {r['all_zero']} |"
            f" {r['non_finite']} |"
        )
    return "\n".join(lines)


def speed() -> str:
    """The README's table: the best peer that was right against ours, a line a work."""
    content = h200()
    assert len(content["works"]) <= 9, "the README has room for nine works"
    return overview(content)


def everyone() -> str:
    """The benchmark on a GPU: the best peer that was right against ours, and who was wrong."""
    content = h200()
    where = content["environment"]
    load = max(lane["load_before"][0] for lane in where["lanes"])
    lines = [
        f"[bench_h200.json](../benchmarks/results/bench_h200.json), made by `{where['command']}` on {where['cores']}"
        f" cores with a load of at most {load:.1f} before. {sum('latency' in c for c in content['cells'])} of"
        f" {len(content['cells'])} cells have figures; the next table names the others.",
        "",
        summary(content),
    ]
    return "\n".join(lines)


def h200() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / "bench_h200.json").read_text())
    return content


#: What was measured before (facts.md, 2026-11-22), on one H200 of a host with 16 cores:
#: what, work, system, figure, value. A number of streams is calls a second; with "us", microseconds a call.
FACTS = (
    ("eager, host us", "relu", "eager", "host_us", 10.3),
    ("torch.compile, host us", "relu", "compile", "host_us", 60),
    ("reduce-overhead, host us", "relu", "compile-overhead", "host_us", 95),
    ("Torch-TensorRT Python, host us", "relu", "trt-python-shared", "host_us", 96),
    ("Torch-TensorRT Python + CUDA graphs, host us", "relu", "trt-python-graphs-shared", "host_us", 128),
    ("Torch-TensorRT C++, host us", "relu", "trt-cpp-shared", "host_us", 84),
    ("Torch-TensorRT C++ + CUDA graphs, host us", "relu", "trt-cpp-graphs-shared", "host_us", 96),
    ("eager, us a call", "relu-4k", "eager", "1 us", 28.0),
    ("torch.compile, us a call", "relu-4k", "compile", "1 us", 58),
    ("reduce-overhead, us a call", "relu-4k", "compile-overhead", "1 us", 109),
    *(
        (f"{what}, latency us", work, system, "p50_us", value)
        for work, values in (
            ("googlenet", (5444, 2024, 376, 405)),
            ("inception_v3", (9605, 3178, 809, 808)),
            ("resnet50", (3689, 1880, 443, 449)),
        )
        for (what, system), value in zip(
            (
                ("eager", "eager"),
                ("torch.compile", "compile"),
                ("reduce-overhead", "compile-overhead"),
                ("torch.compile in one CUDA graph", "bound"),
            ),
            values,
            strict=True,
        )
    ),
    ("Torch-TensorRT, best with CUDA graphs, latency us", "googlenet", "trt-*-graphs-*", "p50_us", 314),
    ("Torch-TensorRT, best with CUDA graphs, latency us", "inception_v3", "trt-*-graphs-*", "p50_us", 462),
    ("Torch-TensorRT, best with CUDA graphs, latency us", "resnet50", "trt-*-graphs-*", "p50_us", 402),
    *(("eager, a thread a stream, calls/s", "googlenet", "eager", n, v) for n, v in (("1", 139), ("4", 227))),
    *(("torch.compile, calls/s", "googlenet", "compile", n, v) for n, v in (("1", 568), ("4", 450), ("16", 225))),
    *(("C++, shared, calls/s", "googlenet", "trt-cpp-shared", n, v) for n, v in (("1", 194), ("4", 494))),
    *(
        ("C++, engine a thread, calls/s", "googlenet", "trt-cpp-each", n, v)
        for n, v in (("1", 221), ("4", 554), ("16", 366))
    ),
    *(
        ("graph + buffers per stream, calls/s", "googlenet", "bound", n, v)
        for n, v in (("1", 2738), ("4", 7046), ("16", 12739))
    ),
    ("eager, latency us", "upscaler-1080p", "eager", "p50_us", 18100),
    ("torch.compile, latency us", "upscaler-1080p", "compile", "p50_us", 8740),
    ("max-autotune, latency us", "upscaler-1080p", "compile-autotune", "p50_us", 8620),
    ("Torch-TensorRT, latency us", "upscaler-1080p", "trt-cpp-shared", "p50_us", 9130),
)


def facts() -> str:
    """What was measured before beside what this run measured."""
    content = h200()
    lines = ["| work | what | streams | before | now | now / before |", "|---|---|---|---|---|---|"]
    for what, work, system, figure, before in FACTS:
        cells = [c for c in content["cells"] if c["work"] == work and fnmatch.fnmatch(c["system"], system)]
        found = [v for c in cells if (v := median(c, figure.removesuffix(" us"))) is not None]
        now = min(found, default=None)
        if now is not None and figure.endswith(" us"):
            now = 1e6 / now
        streams = figure if figure.isdigit() else "1"
        ended = cells[0]["status"] if cells else "not in the run"
        measured = f"{number(now)} | {now / before:.2f}" if now is not None else f"{ended} | "
        lines.append(f"| {work} | {what} | {streams} | {number(before)} | {measured} |")
    return "\n".join(lines)


def missing() -> str:
    """Cells without figures, a line a work, and the fewest and most rounds of a figure that should be there."""
    content = h200()
    wanted = content["settings"]["rounds"]
    lines = ["| work | cells with figures | rounds a figure | no figures | ended later |", "|---|---|---|---|---|"]
    for work in content["works"]:
        cells = [c for c in content["cells"] if c["work"] == work]
        kinds: dict[str, list[str]] = {}
        for cell in (c for c in cells if "latency" not in c):
            kinds.setdefault(cell["status"], []).append(cell["system"])
        measured = [c for c in cells if "latency" in c]
        rounds = {c["latency"]["p50_us"]["rounds"] for c in measured}
        for cell in (c for c in measured if c["status"] == "ok"):
            for n in (str(n) for n in content["settings"]["streams"] if str(n) not in cell.get("without", {})):
                rounds.add(cell["throughput"][n]["per_s"]["rounds"] if n in cell["throughput"] else 0)
        without = "; ".join(f"{status}: {', '.join(names)}" for status, names in kinds.items())
        later = "; ".join(f"{c['system']}: {c['reason']}" for c in measured if c["status"] != "ok")
        lines.append(
            f"| {work} | {len(measured)} of {len(cells)} | {min(rounds, default=0)} to {max(rounds, default=0)} of"
            f" {wanted} | {without} | {later} |"
        )
    where = content["environment"]
    lines += ["", f"{where['device']}, PyTorch {where['torch']}, {where['date'][:10]}."]
    return "\n".join(lines)


#: What holds one engine for all threads, and what holds one for each.
_SHARED = ("eager", "compile*", "trt-*-shared")
_EACH = ("trt-*-each",)


def native() -> str:
    """The native runtime beside eager, the best right peers that share an engine or hold one each, and the bound."""
    content = json.loads((RESULTS / "native_h200.json").read_text())
    lines = [
        "| work | host us: eager, ours | latency us: eager, ours | streams | best peer with one engine | best with one"
        " engine a thread; MB | ours; MB | bound | ours / bound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    checked = differed = 0
    for work in content["works"]:
        cells = {c["system"]: c for c in content["cells"] if c["work"] == work and "latency" in c}
        mine, bound, eager = cells["anabranch-inductor-native"], cells["bound"], cells["eager"]
        figures = [f for name in cells if name.endswith("-native") for f in cells[name]["throughput"].values()]
        checked += sum(f["checked"] for f in figures)
        differed += sum(f["wrong"] + f["inexact"] for f in figures)
        streams = max(mine["throughput"], key=int)
        ours, limit = median(mine, streams) or 0, median(bound, streams) or 1
        hosts, latencies = ([number(median(c, f) or 0) for c in (eager, mine)] for f in ("host_us", "p50_us"))
        peers = [_best(content, work, names, streams) for names in (_SHARED, _EACH)]
        lines.append(
            f"| {work} | {', '.join(hosts)} | {', '.join(latencies)} | {streams} | {peers[0][0]} |"
            f" {'; '.join(peers[1])} | {strike(mine, streams, 'ours')}; {mine['memory_mb']:,.0f} |"
            f" {strike(bound, streams, 'bound')} | **{ours / limit:.2f}** |"
        )
    frame = {c["system"]: c for c in content["cells"] if c["work"] == "relu-4k" and "latency" in c}
    ours_us, eager_us = (1e6 / (median(frame[s], "1") or 1) for s in ("anabranch-inductor-native", "eager"))
    copy = median(frame["anabranch-inductor-native"], "copy_us")
    many = [json.loads(f.read_text())["total"] for f in sorted(RESULTS.glob("many_calls_h200*.json"))]
    where = content["environment"]
    lines += [
        "",
        f"Backend inductor. One call after the other, `relu-4k` takes {ours_us:.1f} us, a copy of its frame {copy:.1f},"
        f" eager {eager_us:.1f}. {checked:,} outputs of the native runtime were checked, {differed} differed."
        f" `benchmarks/many_calls.py`, 16 threads, each call with a new input: {sum(m['calls'] for m in many):,} calls,"
        f" {sum(m['wrong'] for m in many)} wrong. {where['device']}, PyTorch {where['torch']}, {where['date'][:10]}.",
    ]
    return "\n".join(lines)


def tensorrt() -> str:
    """The backend tensorrt beside Torch-TensorRT's shared engines: the bars of bench_tensorrt.py."""
    content = json.loads((RESULTS / "tensorrt_h200.json").read_text())
    lines = [
        "| work | wrong of ours: native, Python, graphs, direct | wrong of theirs: C++, Python, C++ graphs, Python"
        " graphs |"
        " latency us: ours, theirs with graphs | calls a second, 8 threads: ours, theirs, ratio | what the GPU does |"
        " error / theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    for work, bars in content["verdict"]["works"].items():
        wrong, latency, calls, error = (bars[k] for k in ("wrong", "latency", "throughput", "error"))
        ours, theirs = (_short(", ".join(wrong[of].values())) for of in ("ours", "theirs"))
        mark = "" if calls["result"] == "pass" else f" ({calls['result']})"
        ratio = "both 0" if error["theirs"] == 0 else f"{error['ratio']:.2f}"
        lines.append(
            f"| {work} | {ours} | {theirs} | **{number(latency['ours'])}**, {number(latency['theirs'])} |"
            f" **{number(calls['ours'])}**, {number(calls['theirs'])}, **{calls['ratio']:.2f}**{mark} |"
            f" {number(calls['bound'])} | {ratio} |"
        )
    results, where = content["verdict"]["results"], content["environment"]
    rtx, theirs = (where["versions"][name] for name in ("tensorrt-rtx-cu13-bindings", "torch-tensorrt-rtx"))
    lines += [
        "",
        f"Theirs is the best figure with no wrong output behind it. Bars: {results['pass']} passed, {results['fail']}"
        f" failed, {results['not measured']} not measured. {where['device']}, PyTorch {where['torch']}, TensorRT-RTX"
        f" {rtx}, Torch-TensorRT {theirs}, {where['date'][:10]}.",
    ]
    return "\n".join(lines)


def zoo() -> str:
    """Each file's table of models, and every model that is not right, or does not run captured, with the reason."""
    files = [f for f in sorted(RESULTS.glob("zoo_*.json"), reverse=True) if not f.name.startswith("zoo_sizes_")]
    runs = [json.loads(f.read_text()) for f in files]
    return "\n\n".join(map(zoo_of, runs)) or "No run has been committed."


def zoo_of(content: dict[str, Any]) -> str:
    where, rows = content["environment"], content["rows"]
    right = [r for r in rows if r["status"] == "right"]
    calls, wrong = (sum(r.get(key, 0) for r in rows) for key in ("calls", "wrong"))
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"## {where['device']}",
        "",
        f"**{len(right)} of {len(rows)} models are right**, {wrong} of {calls:,} concurrent calls were wrong."
        f" {_faster(rows)}{where['cores']} cores, PyTorch {where['torch']}, {versions}, {where['date'][:10]}.",
        "",
        *([where["about"], ""] if "about" in where else []),
        *_filled(("model", "verdict", *_FIGURES), [_model(r) for r in rows]),
    ]
    failures = [f"- {r['model']}: {r['status']}: {_text(r['why'])}" for r in rows if r["status"] != "right"]
    direct = [
        f"- {r['model']}: {_text('; '.join([s['reason'], *s['reasons'][:1]]))}"
        for r in right
        if where["kind"] != "cpu" and not (s := r["summary"])["captured"]
    ]
    missing = [f"- {r['model']}: {what}: {_text(why)}" for r in rows for what, why in r.get("aside", {}).items()]
    for title, found in (
        ("Not right", failures),
        ("Right, but not captured", direct),
        ("Figures that are missing", missing),
    ):
        lines += ["", f"### {title}: {len(found)}", "", *found] if found else []
    return "\n".join(lines)


def seven() -> str:
    """What ``examples/models.py --check --json`` kept of each run."""
    runs = [json.loads(f.read_text()) for f in sorted(RESULTS.glob("seven_*.json"), reverse=True)]
    told = [seven_of(run["rows"]) + (f"\n\n{run['about']}" if "about" in run else "") for run in runs]
    return "\n\n".join(told) or "No run has been committed."


def seven_of(rows: list[dict[str, Any]]) -> str:
    """The table of one run."""
    columns = (
        "model",
        "verdict",
        "wrong",
        "off from eager",
        "tokens as eager",
        "weights GB",
        "layers",
        "tokens/s",
        "build s",
    )
    lines = [f"{rows[0]['device']}, PyTorch {rows[0]['torch']}, {rows[0]['dtype']}, {rows[0]['date']}.", ""]
    cells = []
    for r in rows:
        off = ", ".join(f"{name} {value:.1e}" for name, value in r["error_to_eager"].items())
        cells.append(
            [
                r["model"],
                "right" if r["right"] else "not right",
                f"{r['wrong']} of {r['answers']}",
                off,
                f"{r['tokens_as_eager']} of {r['tokens']}",
                f"{r['weights_GB']:.1f}",
                str(r["layers"]),
                f"{r['tokens_per_s_together']:,.0f}" if r["tokens_per_s_together"] is not None else "-",
                f"{r['seconds']['build']:.0f}",
            ]
        )
    for row in (columns, ["---"] * len(columns), *cells):
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


#: What the peak of a build is compared with.
_BUILDS = (("weights", "eager_activations"), ("compile_build",))
_FIGURES = ("us", "eager", "compile", "overhead", "build", "FLOPs", "kernels", "memory", "context", "build memory")


def _faster(rows: list[dict[str, Any]]) -> str:
    """How many are faster and slower than each peer."""
    text = ""
    for ours, peer, label in (
        ("us", "eager_us", "eager"),
        ("us", "compile_us", "torch.compile"),
        ("us_beside_overhead", "overhead_us", "reduce-overhead"),
    ):
        ratios = [r[peer] / r[ours] for r in rows if r["status"] == "right" and ours in r and peer in r]
        if ratios:
            fast, slow = sum(x >= 1.5 for x in ratios), sum(x < 1 / 1.05 for x in ratios)
            text += f"Of {len(ratios)}, {fast} are at least 1.5 times faster than {label}, {slow} slower by over 5%. "
    return text


def _model(row: dict[str, Any]) -> list[str]:
    summary = row.get("summary", {})
    flops = summary.get("flops", {}).get("share_captured")
    launches = row.get("launches")
    memory = row.get("memory", {})
    figures = [
        f"{row['us']:,.0f}" if "us" in row else "",
        *(_ratio(row.get(peer), row.get("us")) for peer in ("eager_us", "compile_us")),
        _ratio(row.get("overhead_us"), row.get("us_beside_overhead")),
        _built(row.get("builds", [])),
        f"{flops:.0%}" if flops is not None and launches else "",
        f"{launches['captured']} of {launches['all']}" if launches else "",
        _ratio(_held(memory, "ours"), _held(memory, "eager")),
        _context(memory),
        ", ".join(filter(None, (_ratio(_held(memory, "ours_build"), _held(memory, *of)) for of in _BUILDS))),
    ]
    return [row["model"] + (f", {row['dtype']}" if "dtype_reason" in row else ""), row["status"], *figures]


def _held(memory: dict[str, Any], *names: str) -> int | None:
    """Bytes, as the driver counts them where every figure of the row has that."""
    if any(name not in memory for name in names):
        return None
    counts = "device" if memory["eager"]["device"] is not None else "reserved"
    return sum(memory[name] if name == "weights" else memory[name][counts] for name in names)


def _context(memory: dict[str, Any]) -> str:
    mine, *theirs = (_held(memory, n) for n in ("further_context", "eager_activations", "eager_stream"))
    beside = ", ".join(f"{n / 1e6:,.0f}" for n in theirs if n is not None)
    return f"{mine / 1e6:,.0f} ({beside})" if mine is not None else ""


def _ratio(value: float | None, by: float | None) -> str:
    return f"{value / by:.2f}" if value is not None and by else ""


def _built(builds: list[dict[str, Any]]) -> str:
    both = [b for b in builds if "ours_s" in b and "compile_s" in b]
    if not both:
        return ", ".join(f"{b['ours_s']:.1f}" for b in builds if "ours_s" in b)
    ours = math.exp(sum(math.log(b["ours_s"]) for b in both) / len(both))
    theirs = math.exp(sum(math.log(b["compile_s"]) for b in both) / len(both))
    return f"{ours:.1f}, {ours / theirs:.2f}"


def _filled(names: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """A table without the columns that no row has a figure for."""
    kept = [i for i in range(len(names)) if any(row[i] for row in rows)]
    head = [[names[i] for i in kept], ["---"] * len(kept)]
    return [f"| {' | '.join(cells)} |" for cells in [*head, *([row[i] for i in kept] for row in rows)]]


def _text(text: str) -> str:
    """Of an error, in a line of markdown, as far as one can read it."""
    text = text if len(text) <= 400 else f"{text[:400]} [...]"
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", text)


def _short(text: str) -> str:
    return re.sub(r"8 streams: ", "", re.sub(r"(\d+) of (\d+)", r"\1", text))


def _best(content: dict[str, Any], work: str, names: tuple[str, ...], streams: str) -> tuple[str, ...]:
    """The most calls a second of the right ones of these peers, on so many streams or fewer; the megabytes it holds."""
    found = most(content, work, "peer", names, int(streams))
    if found is None:
        return ("none",)
    value, cell, n = found
    on = "" if n == streams else f", {n} stream{'s' * (n != '1')}"
    return f"{number(value)} ({content['systems'][cell['system']]['label']}{on})", f"{cell['memory_mb']:,.0f}"


SECTIONS = {
    "README.md": {"bench": speed},
    "docs/bench.md": {
        "matrix": matrix,
        "stale": stale,
        "bench": everyone,
        "bench-missing": missing,
        "native": native,
        "bench-tensorrt": tensorrt,
        "bench-facts": facts,
    },
    "docs/models.md": {"zoo": zoo, "seven": seven},
}


def changed() -> dict[Path, str]:
    """The pages that differ from what the results hold, with the text that they should have."""
    pages = {}
    for page, sections in SECTIONS.items():
        file = ROOT / page
        before = text = file.read_text(encoding="utf-8")
        for name, make in sections.items():
            text = re.sub(
                rf"<!-- {name} -->.*?<!-- /{name} -->",
                lambda _, name=name, make=make: f"<!-- {name} -->\n{make()}\n<!-- /{name} -->",
                text,
                flags=re.S,
            )
        if text != before:
            pages[file] = text
    return pages


def main() -> None:
    pages = changed()
    if "--check" in sys.argv:
        names = ", ".join(str(page.relative_to(ROOT)) for page in pages)
        sys.exit(f"{names}: run python benchmarks/tables.py" if pages else 0)
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
