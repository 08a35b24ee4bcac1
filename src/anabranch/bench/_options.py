"""How a benchmark runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """How to run; see ``anabranch bench --help``. Times are in seconds."""

    device: str = "cpu"
    dtype: str = "float32"
    streams: tuple[int, ...] = (1, 4, 16)
    rounds: int = 3
    #: How often a round measures each latency, all systems in turn each time. A figure of a few microseconds moves with
    #: the host's clock from second to second, and this costs little.
    latencies: int = 1
    #: What each figure of each round takes, about.
    seconds: float = 0.2
    #: Outputs of each stream that a throughput's first round checks; None: a few, as the later rounds do.
    checked: int | None = None
    #: How long one system may take to be built for one work; more than that is reported as such.
    build_seconds: float = 300.0
    #: The whole run; what is not measured by then is reported as such. 0: no limit.
    limit: float = 0.0
    #: The part of a limited run's time after which building ends and measuring starts.
    build_share: float = 0.6
    #: Works that are built together. More use the cores better; all of their engines are held at once.
    batch: int = 1
    #: Cores that builds may use at a time. 0: all.
    cores: int = 0
    #: Longest time that one measurement may take before it counts as hung.
    patience: float = 120.0
    #: Threads that one call may use on the CPU. 0: PyTorch's own choice.
    torch_threads: int = 0
    json: Path | None = None
    #: Keep what the workers wrote to stdout and stderr here.
    logs: Path | None = None
