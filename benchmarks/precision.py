"""Mixed precision on a GPU: how fast, and how far off, beside plain half precision and ``torch.autocast``.

    python benchmarks/precision.py --json benchmarks/results/precision_h200.json
    python benchmarks/precision.py --only "tiny"    # small models, also on a CPU, to see that it runs

``speed``: a float32 model (the benchmark's encoder; resnet50's shapes; Llama 1B's shapes with random weights, 512
tokens) as engines of ``precision=torch.float16``, ``"mixed"``, ``torch.bfloat16`` and ``"mixed-bf16"``, all of the
default backend, and under ``torch.autocast``, in eager and in ``torch.compile``. All are timed in turn, call by call
until the device is done; a figure is the median of the rounds. Errors are relative to the norm of the result of the
model in float32, without TF32; the largest over inputs that no engine has seen. ``speed_ratio`` is plain half's time
over mixed's (0.9: a tenth slower), ``error_ratio`` mixed's error over autocast's in eager.

``threads``: 8 threads with a stream each make 500 calls each, for every precision, of inputs that vary from call to
call. Every result is compared on the device, bit for bit, with what one thread alone gave.
"""

from __future__ import annotations

import functools
import gc
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jobs
import torch
from torch import nn

import anabranch
from anabranch.check._bench import on_threads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THREADS, CALLS, VARIANTS = 8, 500, 16
PRECISIONS: dict[str, Any] = {
    "float32": None,
    "float16": torch.float16,
    "mixed": "mixed",
    "bfloat16": torch.bfloat16,
    "mixed-bf16": "mixed-bf16",
}


class _Bottleneck(nn.Module):
    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(given, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        same = given == 4 * width and stride == 1
        self.short: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(given, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.short(x))


def resnet(depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> nn.Module:
    """resnet50's shapes, with random weights; its batch norms have seen random pictures."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    given = width
    for stage, depth in enumerate(depths):
        for block in range(depth):
            layers.append(_Bottleneck(given, width << stage, 2 if stage and not block else 1))
            given = 4 * (width << stage)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, 1000)).to(DEVICE)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(8, 3, 64, 64, device=DEVICE))
    return model.eval()


def encoder() -> nn.Module:
    from anabranch.bench._work import encoder as benchmarks

    return benchmarks().to(DEVICE)


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).to(DEVICE).eval()


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def llama(**sizes: int) -> nn.Module:
    """Llama 3.2 1B's shapes, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        **sizes,
    }
    with torch.device(DEVICE):
        return _Logits(LlamaForCausalLM(LlamaConfig(**shape))).eval()


def _floats(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape, device=DEVICE)


def _ids(vocabulary: int, *shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, vocabulary, shape, device=DEVICE)


TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 300}
WORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "encoder, 8 sequences": (encoder, _floats(8, 128, 768)),
    "encoder": (encoder, _floats(1, 128, 768)),
    "resnet50, batch 32": (resnet, _floats(32, 3, 224, 224)),
    "resnet50": (resnet, _floats(1, 3, 224, 224)),
    "llama-1b, 512 tokens": (llama, _ids(128256, 1, 512)),
    "tiny encoder": (layer, _floats(2, 9, 32)),
    "tiny llama": (functools.partial(llama, **TINY), _ids(300, 2, 16)),
}


def exact() -> None:
    """No TF32: float32 is what errors are measured against."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(2991)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast(DEVICE, dtype=dtype)


def _under(dtype: torch.dtype, model: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    def call(x: torch.Tensor) -> Any:
        with autocast(dtype):
            return model(x)

    return call


def speed(name: str, rounds: int) -> dict[str, Any]:
    """All ways to run one work, in turn."""
    exact()
    make, draw = WORKS[name]
    model, first = make(), draw()
    engines = {
        key: anabranch.compile(model, [first], precision=precision)
        for key, precision in PRECISIONS.items()
        if precision is not None
    }
    ways: dict[str, Callable[[torch.Tensor], Any]] = dict(engines)
    # PyTorch 2.11's cache does not tell autocast to bfloat16 from that to float16.
    torch._functorch.config.enable_autograd_cache = False
    compiled = torch.compile(model)
    for key, dtype in {"float16": torch.float16, "bfloat16": torch.bfloat16}.items():
        ways[f"autocast {key}"] = _under(dtype, model)
        ways[f"autocast {key}, compiled"] = _under(dtype, compiled)
    errors = dict.fromkeys(ways, 0.0)
    finite = dict.fromkeys(ways, True)
    times: dict[str, list[float]] = {key: [] for key in ways}
    with torch.no_grad():
        for _ in range(3):
            x = draw()
            expected = model(x).double()
            for key, call in ways.items():
                result = call(x).double()
                finite[key] &= bool(result.isfinite().all())
                errors[key] = max(errors[key], float((result - expected).norm() / expected.norm()))
        with jobs.measuring():
            for turn in range(rounds + 3):
                x = draw()
                for key, call in ways.items():
                    synchronize()
                    start = time.perf_counter()
                    call(x)
                    synchronize()
                    if turn >= 3:  # the first ones warm up
                        times[key].append(time.perf_counter() - start)
    us = {key: 1e6 * statistics.median(t) for key, t in times.items()}
    told = {key: e.summary()["signatures"][0]["precision"] for key, e in engines.items()}
    return {
        "us": {key: round(t, 1) for key, t in us.items()},
        "error": errors,
        "finite": finite,
        "share_half": {key: t["share_half"] for key, t in told.items() if t is not None},
        "speed_ratio": {
            "float16": us["float16"] / us["mixed"],
            "bfloat16": us["bfloat16"] / us["mixed-bf16"],
        },
        "error_ratio": {
            "float16": errors["mixed"] / errors["autocast float16"],
            "bfloat16": errors["mixed-bf16"] / errors["autocast bfloat16"],
        },
    }


def threads(name: str, precision: str, calls: int) -> dict[str, Any]:
    """How many of the calls of all threads differ from what one thread alone gives."""
    exact()
    make, draw = WORKS[name]
    inputs = [draw() for _ in range(VARIANTS)]
    engine = anabranch.compile(make(), [inputs[0]], precision=PRECISIONS[precision], max_contexts=THREADS)
    engine.warm([inputs[0]], contexts=THREADS)
    with torch.no_grad():
        expected = [engine(x).clone() for x in inputs]
    synchronize()
    if all(torch.equal(expected[0], e) for e in expected[1:]):
        raise RuntimeError("all inputs have one result; a call that is mixed up with another would not show")
    wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(THREADS)]
    streams = [torch.cuda.Stream() if DEVICE == "cuda" else None for _ in range(THREADS)]
    barrier = threading.Barrier(THREADS)

    def work(i: int) -> None:
        stream = streams[i]
        barrier.wait()
        with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else nullcontext():
            for call in range(calls):
                which = (5 * i + 3 * call) % VARIANTS
                result = engine(inputs[which].clone())
                wrong[i] += (result != expected[which]).any() | ~result.isfinite().all()
            if stream is not None:
                stream.synchronize()

    with jobs.measuring():
        start = time.perf_counter()
        on_threads(THREADS, work)
        seconds = time.perf_counter() - start
    captured = engine.summary()["signatures"][0]["captured"]
    made = {"calls": THREADS * calls, "wrong": int(sum(int(w) for w in wrong)), "captured": captured}
    engine.close()
    gc.collect()
    return {**made, "seconds": round(seconds, 2)}


def measurements() -> dict[str, jobs.Job]:
    found: dict[str, jobs.Job] = {}
    for name in WORKS:
        tiny = name.startswith("tiny")
        prefix = "tiny " if tiny else ""
        found[f"{prefix}speed: {name}"] = functools.partial(speed, name, 2 if tiny else 200)
        if tiny or name in ("encoder", "resnet50"):
            for precision in PRECISIONS:
                count = 4 if tiny else CALLS
                found[f"{prefix}threads: {name}, {precision}"] = functools.partial(threads, name, precision, count)
    return found


main = jobs.command(__doc__, __file__, measurements)

if __name__ == "__main__":
    main()
