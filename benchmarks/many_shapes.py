"""Calls of very many shapes on a GPU: is each right, what do they cost, what do they hold, and does any ever wait.

    python benchmarks/many_shapes.py --json benchmarks/results/many_shapes_h200.json

The encoder (12 layers, 768 wide, float16) gets sequences of different lengths, resnet18 batches of different sizes.
Each measurement has a process of its own.

``threads``: 1,000 calls over 200 shapes, drawn by Zipf's law, from 8 threads with at most 16 graphs. Every result is
compared with eager's. The shapes came once before, from the smallest to the largest. ``memory``: what that process
holds in the end, against one that served the 16 largest shapes alone. ``repeated``: the time until a call's results are
there whose shape has a graph, against an engine for this very shape. ``total``: all calls of the encoder, one after
another, ours and ``torch.compile(dynamic=True)``'s, and ours from 8 threads; and all of them again (``again_s``), when
whatever a library prepares for a length has been prepared. Lengths that each system compiles for by themselves, as 1,
are called before. ``torch.compile`` takes cuDNN's attention here, which makes a plan for each length, in each thread
anew; ``torch.compile, no cuDNN`` has that turned off. With ``--together`` builds run side by side, and ``total`` is
timed one measurement at a time.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jobs

THREADS = 8
GRAPHS = 16
SHAPES = 200
CALLS = 1000
#: Calls of ``total``, and the largest length.
TOTAL = 1000
LONGEST = 512


def model(work: str) -> Any:
    import torch

    torch.manual_seed(0)
    if work == "encoder":
        from anabranch.bench._work import encoder

        net = encoder()
    else:
        from torchvision.models import resnet18

        net = resnet18(weights=None).eval()
    return net.requires_grad_(False).to("cuda", torch.float16)


def shape(work: str, size: int) -> tuple[int, ...]:
    return (1, size, 768) if work == "encoder" else (size, 3, 64, 64)


def declared(work: str, largest: int) -> Any:
    import torch

    import anabranch

    dim = anabranch.Dim("size", 1, largest)
    given = (1, dim, 768) if work == "encoder" else (dim, 3, 64, 64)
    return anabranch.Input(given, dtype=torch.float16, device="cuda")


def zipf(count: int, largest: int, seed: int) -> list[int]:
    """Sizes by Zipf's law: which size is how frequent is drawn, too."""
    chooser = random.Random(seed)
    sizes = list(range(1, largest + 1))
    chooser.shuffle(sizes)
    return chooser.choices(sizes, weights=[1 / (k + 1) for k in range(largest)], k=count)


def compiled(work: str, largest: int, **options: Any) -> Any:
    import anabranch

    return anabranch.compile(model(work), [declared(work, largest)], max_contexts=GRAPHS, **options)


def draw(work: str, size: int) -> Any:
    import torch

    return torch.randn(shape(work, size), device="cuda", dtype=torch.float16)


def used_bytes() -> int:
    """Of the device, by all processes."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def far(y: Any, expected: Any) -> Any:
    """Whether a result is off by more than float16 and another order of sums explain."""
    limit = 0.02 * expected.float().abs().max() + 1e-3
    return ((y.float() - expected.float()).abs() > limit).any() | y.isnan().any()


def measure_threads(work: str) -> dict[str, Any]:
    import torch

    from anabranch.check._bench import on_threads

    torch.cuda.init()
    before = used_bytes()
    engine = compiled(work, SHAPES)
    inputs = {n: draw(work, n) for n in range(1, SHAPES + 1)}
    net = model(work)
    with torch.no_grad():
        expected = {n: net(x) for n, x in inputs.items()}
    # Small to large: a graph of each size comes and goes.
    for n in inputs:
        for _ in range(2):
            engine(inputs[n])
    engine._shapes.wait()
    torch.cuda.synchronize()
    sizes = [zipf(CALLS // THREADS, SHAPES, seed=i) for i in range(THREADS)]

    def times(call: Any, slow: list[tuple[float, int]]) -> tuple[list[float], int]:
        taken, wrong = [], torch.zeros((), dtype=torch.int64, device="cuda")
        lock = threading.Lock()

        def calls(i: int) -> None:
            stream, mine, count = torch.cuda.Stream(), [], torch.zeros((), dtype=torch.int64, device="cuda")
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream), torch.no_grad():
                for n in sizes[i]:
                    x = inputs[n].clone()
                    began = time.perf_counter()
                    y = call(x)
                    mine.append(time.perf_counter() - began)
                    if mine[-1] > 0.01:
                        slow.append((round(mine[-1] * 1e3, 1), n))
                    count += far(y, expected[n])
                    stream.synchronize()
            with lock:
                taken.extend(mine)
                wrong.add_(count.cpu().item())

        on_threads(THREADS, calls)
        return taken, int(wrong)

    slow: list[tuple[float, int]] = []
    taken, wrong = times(engine, slow)
    stats = engine.stats()
    held = used_bytes() - before
    never = compiled(work, SHAPES, cuda_graphs=False)
    for n in range(1, SHAPES + 1):
        never(inputs[n])
    direct, direct_wrong = times(never, [])
    return {
        "calls": len(taken),
        "wrong": wrong + direct_wrong,
        "p99_us": round(percentile(taken, 0.99) * 1e6, 1),
        "median_us": round(statistics.median(taken) * 1e6, 1),
        "direct_p99_us": round(percentile(direct, 0.99) * 1e6, 1),
        "direct_median_us": round(statistics.median(direct) * 1e6, 1),
        "p99_of_direct": round(percentile(taken, 0.99) / percentile(direct, 0.99), 2),
        "over_10_ms": slow,
        "graph_calls": stats.graph_calls,
        "direct_calls": stats.direct_calls,
        "waits_for_build": stats.waits_for_build,
        "contexts": stats.contexts,
        "captures": stats.captures,
        "held_mib": held >> 20,
    }


def measure_memory(work: str) -> dict[str, Any]:
    """What an engine holds that serves the largest shapes alone."""
    import torch

    torch.cuda.init()
    before = used_bytes()
    engine = compiled(work, SHAPES)
    for n in range(SHAPES - GRAPHS + 1, SHAPES + 1):
        x = draw(work, n)
        for _ in range(4):
            engine(x)
        engine._shapes.wait()
    torch.cuda.synchronize()
    return {"largest_mib": (used_bytes() - before) >> 20}


def measure_all_shapes(work: str) -> dict[str, Any]:
    """What one holds that has served all shapes, small to large and then by Zipf's law."""
    import torch

    torch.cuda.init()
    before = used_bytes()
    engine = compiled(work, SHAPES)
    for n in [*range(1, SHAPES + 1), *zipf(CALLS, SHAPES, seed=99)]:
        x = draw(work, n)
        engine(x)
        engine(x)
        if n % 16 == 0:
            engine._shapes.wait()
    engine._shapes.wait()
    torch.cuda.synchronize()
    stats = engine.stats()
    return {"all_mib": (used_bytes() - before) >> 20, "contexts": stats.contexts, "captures": stats.captures}


def call_us(call: Any, x: Any, rounds: int = 5, calls: int = 50) -> float:
    """Microseconds of a call until its results are there."""
    import torch

    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call(x)
            torch.cuda.current_stream().synchronize()
        taken.append((time.perf_counter() - began) / calls)
    return statistics.median(taken) * 1e6


def measure_repeated(work: str) -> dict[str, Any]:
    import anabranch

    engine = compiled(work, SHAPES)
    sizes = [max(2, SHAPES * k // GRAPHS) for k in range(1, GRAPHS + 1)]
    rows = []
    for n in sizes:
        x = draw(work, n)
        if not engine.warm([x]):
            rows.append({"size": n, "graph": False})
            continue
        static = anabranch.compile(model(work), [x], dynamic=False)
        ours, theirs = call_us(engine, x), call_us(static, x)
        rows.append(
            {
                "size": n,
                "us": round(ours, 1),
                "static_us": round(theirs, 1),
                "of_static": round(ours / theirs, 3),
            }
        )
        static.close()
    ratios = [r["of_static"] for r in rows if "of_static" in r]
    return {"median": round(statistics.median(ratios), 3), "worst": max(ratios), "shapes": rows}


def measure_total(way: str, law: str) -> dict[str, Any]:
    import torch

    from anabranch.check._bench import on_threads

    net = model("encoder")
    sizes = zipf(TOTAL, LONGEST, seed=7) if law == "zipf" else random.Random(7).choices(range(1, LONGEST + 1), k=TOTAL)
    inputs = {n: draw("encoder", n) for n in sorted(set(sizes))}
    if "no cuDNN" in way:
        torch.backends.cuda.enable_cudnn_sdp(False)
    call = compiled("encoder", LONGEST) if way.startswith("ours") else torch.compile(net, dynamic=True)
    with torch.no_grad():
        for n in (7, 100, 1, 33, 20):
            call(draw("encoder", n))
    with torch.no_grad(), jobs.measuring():
        torch.cuda.synchronize()
        threads = THREADS if way == "ours, 8 threads" else 1

        def run(i: int) -> None:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream), torch.no_grad():
                for n in sizes[i::threads]:
                    call(inputs[n])
                stream.synchronize()

        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            on_threads(threads, run)
            seconds.append(round(time.perf_counter() - began, 3))
        wrong = sum(bool(far(call(inputs[n]), net(inputs[n]))) for n in random.Random(1).sample(sorted(inputs), 40))
    made = {"seconds": seconds[0], "again_s": seconds[1], "calls": TOTAL, "shapes": len(inputs), "wrong": wrong}
    if hasattr(call, "stats"):
        stats = call.stats()
        made |= {name: getattr(stats, name) for name in ("graph_calls", "direct_calls", "captures", "waits_for_build")}
    return made


def measurements() -> dict[str, Callable[[], dict[str, Any]]]:
    made: dict[str, Callable[[], dict[str, Any]]] = {}
    for law in ("zipf", "uniform"):
        for way in ("ours", "torch.compile", "torch.compile, no cuDNN", "ours, 8 threads"):
            made[f"total, {law}, {way}"] = lambda way=way, law=law: measure_total(way, law)  # type: ignore[misc]
    for work in ("encoder", "resnet18"):
        made[f"threads, {work}"] = lambda work=work: measure_threads(work)  # type: ignore[misc]
        made[f"memory, {work}, largest"] = lambda work=work: measure_memory(work)  # type: ignore[misc]
        made[f"memory, {work}, all"] = lambda work=work: measure_all_shapes(work)  # type: ignore[misc]
        made[f"repeated, {work}"] = lambda work=work: measure_repeated(work)  # type: ignore[misc]
    return made


main = jobs.command(__doc__, __file__, measurements)

if __name__ == "__main__":
    main()
