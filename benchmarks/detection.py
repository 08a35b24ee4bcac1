"""Detection models of torchvision on several threads: calls a second beside eager's, and are the boxes eager's.

    python benchmarks/detection.py --together --json benchmarks/results/detection_h200.json

How many boxes there are depends on the picture, so ``torch.export`` refuses these models, and an engine is several
graphs with Python between them. Each of four threads has a stream and pictures of its own, and looks at the device
after every call. Systems are timed in turn, in rounds, and the medians count.

Weights are random, so boxes are nearly as good as each other, and any rounding puts others first. What the default
backend returns must have the bits of its own call by itself; how many of its results are not eager's is counted, and so
is for how many pictures eager itself finds others once the picture is moved by an ulp. Backend ``eager`` rounds as
eager does: its boxes, labels and scores must be eager's, in eager's order, on all threads (``exact, NAME``).
cuDNN is held to algorithms that add in a fixed order, on all sides. ``torch.compile`` compiles such a model again for
other numbers of boxes, for minutes, and is in the zoo's table (``docs/models.md``).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import jobs
from turns import race

MODELS = {"ssdlite320_mobilenet_v3_large": "float16", "fasterrcnn_resnet50_fpn": "float32"}
THREADS = 4
PICTURES = 3
ROUNDS = 5
SECONDS = 1.5
WARM_SECONDS = 3.0


def differences(results: list[list[Any]], expected: list[list[Any]], tolerance: float) -> int:
    """How many of the results are others, or in another order."""
    import torch

    def differs(a: dict[str, Any], b: dict[str, Any]) -> bool:
        if a.keys() != b.keys() or any(a[k].shape != b[k].shape or a[k].dtype != b[k].dtype for k in a):
            return True
        if not torch.equal(a["labels"], b["labels"]):
            return True
        far = [(a[k].float() - b[k].float()).abs() > tolerance * (1 + b[k].float().abs()) for k in ("boxes", "scores")]
        return any(bool(x.any()) for x in far)

    pairs = [(a, b) for mine, theirs in zip(results, expected, strict=True) for a, b in zip(mine, theirs, strict=True)]
    return sum(len(a) != len(b) or any(map(differs, a, b)) for a, b in pairs)


def measure(name: str, backend: str | None) -> dict[str, Any]:
    """``backend``: None, the default, which is timed; ``"eager"``, which is compared alone."""
    import torch
    import zoo_models

    import anabranch

    torch.set_grad_enabled(False)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    dtype = getattr(torch, MODELS[name])
    model, _ = zoo_models.make(f"tv/{name}")
    model = model.to("cuda", dtype)
    generator = torch.Generator().manual_seed(5)

    def picture() -> Any:
        return [torch.rand(3, 320, 320, generator=generator).to("cuda", dtype)]

    def kept(call: Callable[[Any], Any], each: Callable[[Any], Any] = lambda x: x) -> list[list[Any]]:
        return [[copy.deepcopy(call([each(x[0])])) for x in mine] for mine in pictures]

    pictures = [[picture() for _ in range(PICTURES)] for _ in range(THREADS)]
    every = [x for mine in pictures for x in mine]
    eager = kept(model)
    tolerance = 2e-2 if dtype is torch.float16 else 1e-3
    began = time.perf_counter()
    engine = anabranch.compile(model, [pictures[0][0]], backend=backend)
    for x in every * 2:
        engine(x)
    engine.warm(contexts=THREADS)
    torch.cuda.synchronize()
    made: dict[str, Any] = {"dtype": MODELS[name], "threads": THREADS, "build_s": round(time.perf_counter() - began, 1)}
    alone = kept(engine)
    made["boxes"] = [len(y[0]["labels"]) for mine in eager for y in mine]
    made["differs_from_eager"] = differences(alone, eager, tolerance if backend is None else 0.0)
    made["eager_differs_when_moved_by_an_ulp"] = differences(
        kept(model, lambda x: torch.nextafter(x, torch.full_like(x, 2))), eager, tolerance
    )
    made["looked_at"] = made["wrong"] = 0

    def look(system: str, results: list[list[Any]]) -> None:
        if system == "anabranch":
            made["looked_at"] += len(every)
            made["wrong"] += differences(results, alone if backend is None else eager, 0.0)

    systems: dict[str, Any] = {"eager": model, "anabranch": engine}
    with race(systems if backend is None else {"anabranch": engine}, pictures) as timed, jobs.measuring():
        timed.warm(WARM_SECONDS)
        timed.run(ROUNDS, SECONDS, look)
    if backend is None:
        medians = timed.medians
        made |= {"calls_per_second": timed.rates, "medians": medians}
        made["times_eager"] = round(medians["anabranch"] / medians["eager"], 3)
    return {**made, "explain": engine.explain().splitlines()}


def measurements() -> dict[str, Callable[[], dict[str, Any]]]:
    made: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in MODELS:
        made[name] = lambda name=name: measure(name, None)  # type: ignore[misc]
        made[f"exact, {name}"] = lambda name=name: measure(name, "eager")  # type: ignore[misc]
    return made


main = jobs.command(__doc__, __file__, measurements)

if __name__ == "__main__":
    main()
