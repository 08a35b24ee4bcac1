"""Writes the tables of the README and the docs from ``benchmarks/results``. ``--check`` only compares."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from anabranch.bench import strike, summary

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


def bench() -> str:
    """The benchmark: the best peer that was right against ours, and who was wrong."""
    content = json.loads((RESULTS / "bench_cpu.json").read_text())
    where = content["environment"]
    lines = [
        "[benchmarks/results/bench_cpu.json](benchmarks/results/bench_cpu.json), `python benchmarks/bench.py cpu`:"
        f" {where['cores']} cores, load {where['load_before'][0]:.1f} before and {where['load_after'][0]:.1f} after.",
        "",
        summary(content),
    ]
    return "\n".join(lines)


def partial() -> str:
    """Every figure of the unfinished run on a GPU, and what of it is missing."""
    content = json.loads((RESULTS / "bench_h200_partial.json").read_text())
    streams = [str(n) for n in content["settings"]["streams"]]
    lines = [
        f"| work | system | latency us | host us | {' | '.join(f'calls/s, {n}' for n in streams)} |",
        f"|---|---|---|---|{'---|' * len(streams)}",
    ]
    missing: dict[str, int] = {}
    for cell in content["cells"]:
        system = content["systems"][cell["system"]]
        if "latency" not in cell:
            missing[cell["status"]] = missing.get(cell["status"], 0) + 1
            continue
        names = ("p50_us", "host_us", *streams)
        figures = []
        for name in names:
            text = strike(cell, name, system["family"])
            figures.append("" if name in cell.get("without", {}) else text)
        lines.append(f"| {cell['work']} | {system['label']} | {' | '.join(figures)} |")
    where = content["environment"]
    counts = ", ".join(f"{n} {status}" for status, n in sorted(missing.items()))
    lines += ["", f"{where['device']}, PyTorch {where['torch']}, {where['date'][:10]}. Not there: {counts}."]
    return "\n".join(lines)


SECTIONS = {
    "README.md": {"matrix": matrix, "stale": stale, "bench": bench},
    "docs/bench.md": {"bench-h200": partial},
}


def main() -> None:
    stale_pages = []
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
            stale_pages.append(page)
            if "--check" not in sys.argv:
                file.write_text(text, encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(f"{', '.join(stale_pages)}: run benchmarks/readme.py" if stale_pages else 0)


if __name__ == "__main__":
    main()
