"""Calls of ``torch.compile``d functions while another thread builds engines with cold caches: all come out right.

    python benchmarks/bystanders.py --device cuda --calls 10000 --json benchmarks/results/bystanders_h200.json

A thread calls functions that were compiled before. With ``--new-functions`` another one compiles a new function every
now and then; before PyTorch 2.13 that alone may disturb the first one. Each result is compared with eager's.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import anabranch
from anabranch.check import write_json


class Block(nn.Module):
    """A few layers; each width is another model, so that nothing of it is in a cache."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 32)
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.linear(x)))
        return self.attention(y, y, y, need_weights=False)[0].softmax(-1)


class Caller:
    """Makes calls in a thread until it is stopped; counts those that failed or came out wrong."""

    def __init__(self, device: torch.device, new_functions: bool) -> None:
        self.calls = 0
        self.compiled = 0
        self.wrong = 0
        self.errors: Counter[str] = Counter()
        self._device = device
        self._stop = threading.Event()
        self._functions: list[tuple[Callable[..., Any], Callable[..., Any]]] = []
        self._new_functions = new_functions
        if not new_functions:
            module = Block(16).eval().to(device)
            self._add(lambda x: torch.sin(x) * 2 + x.cos())
            self._add(module)
        self._thread = threading.Thread(target=self._run)

    def _add(self, function: Callable[..., Any]) -> None:
        self._functions.append((torch.compile(function, dynamic=False), function))
        with torch.no_grad():
            self._functions[-1][0](self._input(0))
        self.compiled += 1

    def _input(self, seed: int) -> torch.Tensor:
        return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed)).to(self._device)

    def _run(self) -> None:
        with torch.no_grad():
            while not self._stop.is_set():
                try:
                    if self._new_functions and self.calls % 100 == 0:
                        k = self.compiled + 1
                        self._functions.clear()
                        self._add(lambda x, k=k: (x * k).sin() + k)
                    x = self._input(self.calls)
                    for compiled, eager in self._functions:
                        self.calls += 1
                        self.wrong += not torch.allclose(compiled(x), eager(x), atol=1e-3)
                except Exception as e:
                    self.errors[f"{type(e).__name__}: {e}"[:300]] += 1

    def __enter__(self) -> Caller:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--backend", default=None, help="Of the engines. Default: the device's best.")
@click.option("--calls", default=10_000, show_default=True, help="Build until so many calls were made.")
@click.option("--new-functions", is_flag=True, help="Another thread compiles functions meanwhile.")
@click.option("--limit", default=300.0, show_default=True, help="Seconds after which to end anyway.")
@click.option("--json", "target", type=click.Path(path_type=Path))
def main(device: str, backend: str | None, calls: int, new_functions: bool, limit: float, target: Path | None) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    place = torch.device(device)
    callers = [Caller(place, new_functions=new) for new in (False, True)[: 1 + new_functions]]
    engines, began = 0, time.monotonic()
    with ExitStack() as running:
        for caller in callers:
            running.enter_context(caller)
        while sum(c.calls for c in callers) < calls and time.monotonic() - began < limit:
            width = 17 + engines
            anabranch.compile(Block(width).eval().to(place), [torch.randn(2, 5, width, device=place)], backend=backend)
            engines += 1
    total = {
        "calls": sum(c.calls for c in callers),
        "wrong": sum(c.wrong for c in callers),
        "errors": sum(sum(c.errors.values()) for c in callers),
        "engines built meanwhile": engines,
        "functions compiled meanwhile": sum(c.compiled for c in callers[1:]),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(total)
    messages = dict(sum((c.errors for c in callers), Counter[str]()))
    for message, times in messages.items():
        print(f"{times} x {message}")
    if target is not None:
        options = f"--device {device} --calls {calls}" + " --new-functions" * new_functions
        environment = {
            "date": date.today().isoformat(),
            "device": anabranch.devices.get_device(place.type).describe(0),
            "torch": torch.__version__,
            "backend": backend,
            "command": f"python benchmarks/bystanders.py {options}",
        }
        write_json(target, {"environment": environment, "total": total, "errors": messages})
    raise SystemExit(bool(total["wrong"] or total["errors"] or total["calls"] < calls))


if __name__ == "__main__":
    main()
