"""Runs the cases along four paths and counts what went wrong.

Each output is judged twice, both times by ``anabranch._judge``. The engine's serial result is compared with eager
PyTorch: structure, types, strides and shared memory with eager in the case's dtype, elements with eager in float32.
Then every concurrent result is compared with the engine's own serial one, bit for bit.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from anabranch.check._bench import Bench, Options
from anabranch.check._case import Case, Subject
from anabranch.check._device import find_device
from anabranch.check._row import Row
from anabranch.check._watch import Watch, interleaved
from anabranch.errors import InputError


def paths_for(device: str) -> tuple[str, ...]:
    """``main``: the main stream; ``fresh``: a new custom stream for each call; ``rotate``: one thread, all streams in
    turn; ``threads``: each thread on streams of its own."""
    return ("main", "fresh", "rotate", "threads") if find_device(device).has_streams else ("main", "threads")


@contextmanager
def float32_exactly() -> Iterator[None]:
    """TF32 and the like off, so that float32 eager is a reference."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def run_check(
    subject: Subject,
    cases: Sequence[Case],
    options: Options,
    progress: Callable[[Row | None, int], None] = lambda row, calls: None,
) -> list[Row]:
    """Check every case along every path. ``progress(row, calls)`` hears of finished calls, and of finished rows."""
    device = find_device(options.device)
    if options.inject and not device.has_streams:
        raise InputError(
            f"--inject {options.inject} needs streams, and device {options.device!r} has none; use --device cuda"
        )
    paths = options.paths or paths_for(options.device)
    rows = []
    with float32_exactly(), torch.no_grad(), interleaved(options.device, options.seed):
        with concurrent.futures.ThreadPoolExecutor(options.threads, "anabranch-check") as workers:
            for case in cases:
                bench = Bench(subject, case, options, workers, lambda: progress(None, 0))
                for path in paths:
                    with Watch(options.device) as watch:
                        row = bench.run(path, lambda n: progress(None, n))
                    row.races, row.report = watch.races, watch.report
                    rows.append(row)
                    progress(row, 0)
                if options.boundary:
                    rows[-len(paths)].boundary = bench.boundary()
                for row in rows[-len(paths) :]:
                    row.silent = bench.eager.silence()
                bench.close()
    return rows
