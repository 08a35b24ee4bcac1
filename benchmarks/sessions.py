"""Sessions on a GPU: what a thousand of them hold and cost, whether each is right, and how fast one is.

    python benchmarks/sessions.py --json benchmarks/results/sessions_h200.json

``memory``: what 1,000 sessions of a small model hold, against their state. ``host``: microseconds of the host that a
captured call of the first session takes, and one of the last. ``threads``: 100,000 calls from 16 threads, each of a
session drawn at random; every result is compared, bit for bit, with what one session alone gives for the same inputs.
``speed``: calls of one session, captured and direct, beside ``torch.compile(mode="reduce-overhead")`` of the model with
its buffers, in turn: until a call's results are there, and of 100 calls in a row. ``writes``: a call that writes one
row of a state, by the size of that state: a step that copied it would take longer.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from typing import Any

import jobs
import torch
import torch.nn.functional as F
from torch import nn

SESSIONS = 1000
THREADS = 16
CALLS = 100_000
DTYPE = torch.float16


class Recurrent(nn.Module):
    """A cell of ``width`` values, and how often it was called."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(width, width), nn.Linear(width, width)
        self.register_buffer("h", torch.zeros(1, width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.h.copy_(torch.tanh(self.of_input(x) + self.of_state(self.h)))
        self.count.add_(1)
        return self.h * 2 + 1 / self.count


class Average(nn.Module):
    """A running average of 32,768 values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(32768))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(x, alpha=0.1)
        return (x - self.mean).tanh()


class Layer(nn.Module):
    """Of a decoder that sees ``length`` tokens."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        for name in ("k", "v"):
            self.register_buffer(name, torch.zeros(1, heads, length, width // heads))

    def forward(self, x: torch.Tensor, at: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(self.before(x)).chunk(3, -1)
        q, k, v = (t.view(batch, tokens, self.heads, -1).transpose(1, 2) for t in parts)
        self.k.index_copy_(2, at, k)
        self.v.index_copy_(2, at, v)
        seen = F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Decoder(nn.Module):
    """One token a call, with a cache of fixed size."""

    def __init__(self, layers: int = 4, width: int = 512, heads: int = 8, length: int = 4096) -> None:
        super().__init__()
        self.length = length
        self.layers = nn.ModuleList(Layer(width, heads, length) for _ in range(layers))
        self.register_buffer("at", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(self.length, device=x.device)[None, None, None] <= self.at
        for layer in self.layers:
            x = layer(x, self.at, mask)
        self.at.add_(1)
        return x


class Row(nn.Module):
    """Writes one row of 1,024 values a call, and reads it."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(rows, 1024))
        self.register_buffer("at", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.index_copy_(0, self.at, x)
        result = self.rows.index_select(0, self.at) * 2
        self.at.add_(1).remainder_(self.rows.shape[0])
        return result


SHAPES = {Recurrent: (1, 1024), Average: (32768,), Decoder: (1, 1, 512), Row: (1, 1024)}


def made(kind: type[nn.Module], *options: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(*options).eval().requires_grad_(False).to("cuda", DTYPE)


def draw(kind: type[nn.Module]) -> torch.Tensor:
    return torch.randn(SHAPES[kind], device="cuda", dtype=DTYPE)


def compiled(kind: type[nn.Module], *options: Any, **settings: Any) -> Any:
    import anabranch

    return anabranch.compile(made(kind, *options), [draw(kind)], **settings)


def used_bytes() -> int:
    """Of the device, by all processes."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def measure_memory() -> dict[str, Any]:
    engine, x = compiled(Average), draw(Average)
    engine.session()(x)
    torch.cuda.synchronize()
    before = used_bytes()
    sessions = [engine.session() for _ in range(SESSIONS)]
    for session in sessions:
        session(x)
    torch.cuda.synchronize()
    held, state = used_bytes() - before, SESSIONS * sum(t.nbytes for t in sessions[0].state.values())
    stats = engine.stats()
    return {
        "sessions": SESSIONS,
        "held_mib": round(held / 2**20, 2),
        "state_mib": round(state / 2**20, 2),
        "of_state": round(held / state, 3),
        "captures": stats.captures,
        "graph_calls": stats.graph_calls,
    }


def measure_host() -> dict[str, Any]:
    engine, x = compiled(Recurrent, cuda_graphs=True), draw(Recurrent)
    sessions = [engine.session() for _ in range(SESSIONS)]
    for session in sessions:
        session(x)
    torch.cuda.synchronize()
    taken: dict[str, list[float]] = {"first": [], "last": []}
    for _ in range(300):
        for name, session in (("first", sessions[0]), ("last", sessions[-1])):
            session(x)
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(10):
                session(x)
            taken[name].append((time.perf_counter() - began) / 10 * 1e6)
            torch.cuda.synchronize()
    first, last = (statistics.median(column) for column in taken.values())
    assert engine.stats().direct_calls == 0
    return {"first_us": round(first, 2), "last_us": round(last, 2), "last_of_first": round(last / first, 3)}


def measure_threads() -> dict[str, Any]:
    from anabranch.check._bench import on_threads

    engine = compiled(Recurrent, cuda_graphs=True)
    inputs = [draw(Recurrent) for _ in range(64)]
    sessions = [engine.session() for _ in range(SESSIONS)]
    torch.cuda.synchronize()
    free = [threading.Lock() for _ in sessions]
    given: list[list[int]] = [[] for _ in sessions]
    results: list[list[torch.Tensor]] = [[] for _ in sessions]

    def calls(i: int) -> None:
        chooser, stream = random.Random(i), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(CALLS // THREADS):
                n = chooser.randrange(SESSIONS)
                while not free[n].acquire(blocking=False):
                    n = chooser.randrange(SESSIONS)
                k = chooser.randrange(len(inputs))
                given[n].append(k)
                results[n].append(sessions[n](inputs[k]))
                free[n].release()
            stream.synchronize()

    began = time.perf_counter()
    on_threads(THREADS, calls)
    seconds = time.perf_counter() - began
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    alone = engine.session()
    for ks, ys in zip(given, results, strict=True):
        alone.reset()
        for k, y in zip(ks, ys, strict=True):
            wrong += (alone(inputs[k]) != y).any()
    stats = engine.stats()
    return {
        "calls": sum(map(len, given)),
        "wrong": int(wrong),
        "calls_a_second": round(CALLS / seconds),
        "graph_calls": stats.graph_calls,
        "direct_calls": stats.direct_calls,
        "waits": stats.waits,
        "contexts": stats.contexts,
    }


def measure_speed(kind: type[nn.Module]) -> dict[str, Any]:
    peer = torch.compile(made(kind), mode="reduce-overhead")

    def by_peer(x: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            y: torch.Tensor = peer(x)
        return y

    ways = {
        "captured": compiled(kind, cuda_graphs=True).session(),
        "direct": compiled(kind, cuda_graphs=False).session(),
        "reduce-overhead": by_peer,
    }
    x, eager = draw(kind), made(kind)
    far = {}
    for i in range(5):
        y = draw(kind)
        with torch.no_grad():
            expected = eager(y).float()
        for name, call in ways.items():
            error = float((call(y).float() - expected).abs().max() / expected.abs().max())
            far[name] = max(far.get(name, 0.0), round(error, 4)) if i else round(error, 4)
    ready: dict[str, list[float]] = {name: [] for name in ways}
    row: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(9):
        for name, call in ways.items():
            call(x)
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(20):
                call(x)
                torch.cuda.current_stream().synchronize()
            ready[name].append((time.perf_counter() - began) / 20 * 1e6)
            began = time.perf_counter()
            for _ in range(100):
                call(x)
            torch.cuda.synchronize()
            row[name].append((time.perf_counter() - began) / 100 * 1e6)
    until = {name: round(statistics.median(v), 1) for name, v in ready.items()}
    each = {name: round(statistics.median(v), 1) for name, v in row.items()}
    return {
        "ready_us": until,
        "in_a_row_us": each,
        "error": far,
        "ready_of_peer": round(until["captured"] / until["reduce-overhead"], 3),
        "in_a_row_of_peer": round(each["captured"] / each["reduce-overhead"], 3),
    }


def measure_writes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mib in (1, 64, 1024):
        for way, settings in (("captured", {"cuda_graphs": True}), ("direct", {"cuda_graphs": False})):
            session, x = compiled(Row, mib << 9, **settings).session(), draw(Row)
            taken = []
            for _ in range(50):
                torch.cuda.synchronize()
                began = time.perf_counter()
                y = session(x)
                torch.cuda.current_stream().synchronize()
                taken.append((time.perf_counter() - began) * 1e6)
            assert torch.equal(y, x * 2)
            found[f"{way}, {mib} MiB"] = round(statistics.median(taken), 1)
    return {"us": found}


def measurements() -> dict[str, jobs.Job]:
    return {
        "memory": measure_memory,
        "host": measure_host,
        "threads": measure_threads,
        **{f"speed, {kind.__name__}": lambda kind=kind: measure_speed(kind) for kind in (Recurrent, Average, Decoder)},  # type: ignore[misc]
        "writes": measure_writes,
    }


main = jobs.command(__doc__, __file__, measurements)

if __name__ == "__main__":
    main()
