"""How fast the race checker judges a long trace, and how much memory it takes.

Writes a trace (by default 10 million events, 32 streams, 8 threads, 10,000 live buffers) to a temporary file, judges
it in a fresh process and writes wall time and peak memory to ``benchmarks/results/race_throughput.json``.

    python benchmarks/race_throughput.py [--events N] [--out FILE]

The trace is a serving program in small: each thread allocates blocks from its streams' pools (mostly reused ones),
fills, passes on, reads and frees them, with an event wherever work changes its stream; it is clean by construction.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STREAMS, THREADS, BUFFERS = 32, 8, 10_000
DATE = "2026-11-22"


def write_trace(path: Path, events: int, *, distinct_names: bool) -> None:
    """A clean program of about ``events`` events.

    ``distinct_names`` gives each allocation a name of its own, as a live recorder would; otherwise names come back.
    """
    rng = random.Random(0)
    per_thread = STREAMS // THREADS
    slots: list[list[tuple[str, int]]] = [[] for _ in range(THREADS)]  # (buffer, stream it is owned by)
    freed: list[list[list[str]]] = [[[] for _ in range(STREAMS)] for _ in range(THREADS)]
    made = 0
    count = 0
    with open(path, "w", encoding="ascii", buffering=1 << 20) as out:
        write = out.write

        def emit(line: str) -> None:
            nonlocal count
            write(line)
            count += 1

        while count < events:
            t = rng.randrange(THREADS)
            tail = f', "thread": "T{t}"}}\n'
            mine = slots[t]
            s = t * per_thread + rng.randrange(per_thread)
            if len(mine) < BUFFERS // THREADS or rng.random() < 0.5:
                if len(mine) >= BUFFERS // THREADS:
                    i = rng.randrange(len(mine))
                    name, owner = mine[i]
                    mine[i] = mine[-1]
                    mine.pop()
                    emit(f'{{"do": "free", "buffer": "{name}"{tail}')
                    freed[t][owner].append(name)
                pool = freed[t][s]
                if pool:
                    old = pool.pop()
                    name = f"b{made}" if distinct_names else old
                    emit(f'{{"do": "alloc", "buffer": "{name}", "stream": "s{s}", "reuses": "{old}"{tail}')
                else:
                    name = f"b{made}"
                    emit(f'{{"do": "alloc", "buffer": "{name}", "stream": "s{s}"{tail}')
                made += 1
                emit(f'{{"do": "op", "stream": "s{s}", "reads": ["weights"], "writes": ["{name}"]{tail}')
                mine.append((name, s))
            else:
                a, owner = mine[rng.randrange(len(mine))]
                b, other = mine[rng.randrange(len(mine))]
                if rng.random() < 0.5:
                    # Work on the owner's stream: no event is needed; half of the bytes each time.
                    lo = rng.choice((0, 4096))
                    emit(f'{{"do": "op", "stream": "s{owner}", "reads": ["weights", "{a}"], "writes": []{tail}')
                    emit(f'{{"do": "op", "stream": "s{owner}", "reads": [], "writes": ["{a}[{lo}:{lo + 4096}]"]{tail}')
                else:
                    # `a` is handed to the stream that owns `b`, and handed back.
                    emit(f'{{"do": "record", "event": "e{t}", "stream": "s{owner}"{tail}')
                    emit(f'{{"do": "wait", "stream": "s{other}", "event": "e{t}"{tail}')
                    emit(f'{{"do": "op", "stream": "s{other}", "reads": ["{a}"], "writes": ["{b}"]{tail}')
                    emit(f'{{"do": "record", "event": "f{t}", "stream": "s{other}"{tail}')
                    emit(f'{{"do": "wait", "stream": "s{owner}", "event": "f{t}"{tail}')
                if rng.random() < 0.02:
                    emit(f'{{"do": "lock", "lock": "m"{tail}')
                    emit(f'{{"do": "host", "reads": ["queue"], "writes": ["queue"]{tail}')
                    emit(f'{{"do": "unlock", "lock": "m"{tail}')
                    emit(f'{{"do": "sync", "on": "s{s}"{tail}')


def judge(path: str) -> dict[str, object]:
    """In a fresh process: judge the trace; its wall time and this process' peak memory."""
    from anabranch.race import Detector, check_trace

    Detector()  # compile, if need be, before the clock starts
    started = time.perf_counter()
    result = check_trace(path)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "verdict": result.verdict,
        "events": result.events,
        "streams": result.streams,
        "threads": result.threads,
        "seconds": round(seconds, 2),
        "events_per_second": round(result.events / seconds),
        "peak_rss_gb": round(peak / 1e9, 3),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "race_throughput.json")
    parser.add_argument("--judge", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.judge:
        print(json.dumps(judge(given.judge)))
        return
    rows = []
    for distinct in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.jsonl"
            write_trace(path, given.events, distinct_names=distinct)
            size = path.stat().st_size
            done = subprocess.run(
                [sys.executable, __file__, "--judge", str(path)], check=True, stdout=subprocess.PIPE, text=True
            )
        row = {"names": "one an allocation" if distinct else "reused", "trace_gb": round(size / 1e9, 2)}
        rows.append({**row, **json.loads(done.stdout)})
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "date": DATE,
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
        "command": f"python benchmarks/race_throughput.py --events {given.events}",
        "live_buffers": BUFFERS,
        "runs": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
