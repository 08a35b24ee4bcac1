"""A build disturbs nobody: what other threads compiled runs on, and what they compile meanwhile comes out right."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import standalone_compile
from torch.fx.experimental.proxy_tensor import make_fx

import anabranch


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.norm(self.linear(x)), -1)


class OtherCode:
    """Threads that make ``call(0)``, ``call(1)``, ... again and again; notes what went wrong."""

    def __init__(self, call: Callable[[int], None], threads: int = 1) -> None:
        self.wrong: list[str] = []
        self._call, self._stop, self._made = call, threading.Event(), [0] * threads
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(threads)]

    def _work(self, thread: int) -> None:
        while not self._stop.is_set():
            try:
                self._call(self._made[thread])
            except Exception as e:
                self.wrong.append(f"{type(e).__name__}: {e}")
            self._made[thread] += 1

    def await_calls(self, each: int = 50) -> None:
        """Until every thread has made so many more calls."""
        wanted = [n + each for n in self._made]
        while any(n < w for n, w in zip(self._made, wanted, strict=True)):
            time.sleep(0)

    def __enter__(self) -> None:
        for t in self._threads:
            t.start()
        self.await_calls(1)

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for t in self._threads:
            t.join(60)


def test_what_others_compiled_runs_on_while_an_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(lambda x: x.sin() * 2 + x.cos(), backend="eager", dynamic=False)
    noted: list[bool] = []

    @torch.compiler.disable
    def kept_out(x: torch.Tensor) -> torch.Tensor:
        notes = torch.fx.traceback.current_meta.get("custom", {})
        noted.append(notes.get("_torchdynamo_disable_method") == "kept_out")
        return x.exp() - 1

    module = Net(8).eval()
    inputs = [torch.randn(4, 8, generator=torch.Generator().manual_seed(k)) for k in range(16)]
    with torch.no_grad():
        compiled(inputs[0])
        wanted = [(x.sin() * 2 + x.cos(), x.exp() - 1, module(x)) for x in inputs]

    def call(k: int) -> None:
        k %= len(inputs)
        with torch.no_grad():
            given = compiled(inputs[k]), kept_out(inputs[k]), module(inputs[k])
            assert torch.compile(torch.sin, backend="eager") is not torch.sin
        assert all(map(torch.equal, given, wanted[k]))

    other_code = OtherCode(call)

    class Slow(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            other_code.await_calls()  # in the middle of the trace
            return super().forward(x)

    def compile_slowly(*args: Any, **kwargs: Any) -> Any:
        make_fx(lambda x: (other_code.await_calls(), x + 1)[1])(inputs[0])  # as it traces its patterns
        return standalone_compile(*args, **kwargs)

    monkeypatch.setattr("torch._inductor.standalone_compile", compile_slowly)

    with other_code:
        anabranch.compile(Slow(9, 4).eval(), [torch.randn(3, 9)], backend="inductor").close()
    assert not other_code.wrong, f"{len(other_code.wrong)} calls, the first: {other_code.wrong[0]}"
    assert not any(noted)  # a call of theirs is no part of the trace


def test_a_build_and_a_compile_in_another_thread_wait_for_each_other() -> None:
    events: list[str] = []
    begun, engines = threading.Event(), list[Any]()

    class Traced(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            events.append("built")
            return super().forward(x)

    def build() -> None:
        begun.set()
        engines.append(anabranch.compile(Traced(6).eval(), [torch.randn(2, 6)], backend="eager"))

    other = threading.Thread(target=build, daemon=True)

    def backend(module: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        # In the midst of a compile of PyTorch's: one that builds an engine itself must not wait for the other thread.
        events.append("compiling")
        other.start()
        assert begun.wait(60)
        engines.append(anabranch.compile(Net(7).eval(), [torch.randn(2, 7)], backend="eager"))
        events.append("compiled")
        return module.forward

    x = torch.randn(5)
    assert torch.equal(torch.compile(lambda x: x * 3 + 1, backend=backend)(x), x * 3 + 1)
    other.join(60)
    assert len(engines) == 2
    assert events[:2] == ["compiling", "compiled"]
    assert set(events[2:]) == {"built"}


def test_the_flags_of_a_trace_are_put_back() -> None:
    tracer: Any = importlib.import_module("torch.export._trace")

    def flags() -> list[Any]:
        compiler: Any = torch.compiler
        named = tracer._ignore_backend_decomps, tracer._compiling_state_context
        return [compiler._is_compiling_flag, compiler._is_exporting_flag, *named]

    before = flags()
    anabranch.compile(Net(5).eval(), [torch.randn(2, 5)], backend="eager").close()
    assert flags() == before

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(anabranch.UnsupportedModel):
        anabranch.compile(Broken(), [torch.randn(2, 5)], backend="eager", require_full=True)
    assert flags() == before
