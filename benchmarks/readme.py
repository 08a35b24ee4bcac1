"""Writes the README's tables from ``benchmarks/results``. ``--check`` only compares."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

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


def main() -> None:
    readme = ROOT / "README.md"
    before = text = readme.read_text(encoding="utf-8")
    for name, make in (("matrix", matrix), ("stale", stale)):
        text = re.sub(
            rf"<!-- {name} -->.*?<!-- /{name} -->",
            lambda _, name=name, make=make: f"<!-- {name} -->\n{make()}\n<!-- /{name} -->",
            text,
            flags=re.S,
        )
    if "--check" in sys.argv:
        sys.exit("README.md: run benchmarks/readme.py" if text != before else 0)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
