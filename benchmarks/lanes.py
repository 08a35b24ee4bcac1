"""Lanes: works dealt to the GPUs of a host, each lane a run of ``anabranch bench`` in processes of its own.

A lane measures one system at a time on its GPU and shares nothing with the others. All systems of a work are measured
in one lane, so ratios always compare what ran side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from anabranch.bench._report import with_ratios


def deal(works: Sequence[str], plan: Sequence[Sequence[str]], lanes: int) -> list[list[str]]:
    """The works in the lanes of ``plan``, or all in one, in their order there; those in none come last in the first."""
    known = [w for lane in plan for w in lane]
    dealt = [[w for w in lane if w in works] for lane in plan]
    dealt[0] += [w for w in works if w not in known]
    if lanes == 1:
        dealt = [[w for lane in dealt for w in lane]]
    return [lane for lane in dealt if lane]


def run_lanes(
    dealt: Sequence[list[str]], out: Path, device: str, limit: float, settings: Sequence[str]
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Run all lanes at once, each into ``out/lane<i>.json``: what they wrote, and the files that are missing."""
    files = [out / f"lane{i}.json" for i in range(len(dealt))]
    for file in files:
        file.unlink(missing_ok=True)  # of an earlier call: not to be taken for this one's
    threads = [
        threading.Thread(target=_lane, args=(i, len(dealt), works, file, device, limit, settings))
        for i, (works, file) in enumerate(zip(dealt, files, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    missing = [file for file in files if not file.exists()]
    if len(missing) == len(files):
        raise click.ClickException(f"no lane wrote a result; see {files[0].with_suffix('.log')}")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file not in missing], missing


def _lane(
    number: int, of: int, works: list[str], target: Path, device: str, limit: float, settings: Sequence[str]
) -> None:
    """One lane in processes of its own."""
    cores = max(1, (os.cpu_count() or 1) // of)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(number % max(1, torch.cuda.device_count()))}
    command = [
        *("taskset", "-c", f"{number * cores}-{(number + 1) * cores - 1}"),
        *(sys.executable, "-m", "anabranch", "bench", *works, "--device", device, "--json", str(target)),
        *("--batch", str(len(works)), "--cores", str(cores), "--limit", str(limit), *settings),
    ]
    with target.with_suffix(".log").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)


def merge(parts: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """Lanes of one call, or several calls, as one run. A work that is in several parts comes from the last of them."""
    if any(list(part["systems"]) != list(parts[0]["systems"]) for part in parts):
        raise click.ClickException(
            "the files hold different systems, so ratios cannot be compared; give files of runs with the same systems"
        )
    lanes: list[dict[str, Any]] = []
    for part in parts:
        where = part["environment"]
        keys = ("date", "command", "device", "seconds", "load_before", "load_after", "host_memory")
        about = {key: where[key] for key in keys if key in where}
        about["limit_seconds"] = part["settings"].get("limit_seconds")
        lanes += where.get("lanes") or [{"works": list(part["works"]), **about}]
    source = {work: part for part in parts for work in part["works"]}
    whole = {**parts[0], "environment": {**parts[0]["environment"], "lanes": lanes, "command": command}}
    whole["works"] = {work: part["works"][work] for work, part in source.items()}
    whole["cells"] = [c for work, part in source.items() for c in part["cells"] if c["work"] == work]
    whole["partial"] = any(part["partial"] for part in parts)
    return with_ratios(whole)


def statuses(content: dict[str, Any]) -> dict[str, int]:
    """How many cells ended how."""
    counts: dict[str, int] = {}
    for cell in content["cells"]:
        counts[cell["status"]] = counts.get(cell["status"], 0) + 1
    return counts
