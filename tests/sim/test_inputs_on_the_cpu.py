"""Inputs on the CPU beside a device stay there; what reads them runs direct, and results are eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from anabranch import InputError, NotCapturable
from anabranch._judge import differences
from contract.support import Fn, on_threads

X = torch.empty(4, 3)
#: A function, the shape of its input on the device, of the one on the CPU, and which of them comes first.
MODELS: dict[str, tuple[Callable[..., Any], Any, bool]] = {
    "a scalar": (lambda x, s: (x * s + 1, torch.lerp(x, x * 2, s.item())), torch.tensor(0.5), True),
    "moved": (lambda x, m: (x + m.to(x.device)).relu(), torch.randn(3), True),
    "computed with": (lambda x, m: x.sin() - (m * 3).cumsum(0).to(x.device), torch.randn(3), True),
    "handed back": (lambda m, x: (x @ x.t(), m, m[1:], m * 2), torch.randn(3), False),
    "unused": (lambda x, m: x * 2, torch.randn(3), True),
    "an index": (lambda i, x: x[i], torch.tensor([1, 0, 3]), False),
    "in parts": (lambda x, m: x + sum(m.chunk(2)).to(x.device), torch.randn(6), True),
    "strided": (lambda x, m: x + m.to(x.device), torch.randn(3, 4).t(), True),
}


def draw(like: torch.Tensor, k: int) -> torch.Tensor:
    if not like.is_floating_point():
        return like.roll(k)
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(k)).as_strided(like.shape, like.stride())


@pytest.mark.parametrize("name", MODELS)
def test_results_are_eagers_and_lie_where_eagers_do(name: str, runtime: str) -> None:
    import anabranch.sim  # makes the device

    fn, on_cpu, device_first = MODELS[name]

    def inputs(k: int, device: str) -> list[torch.Tensor]:
        both = [draw(X, k).to(device), draw(on_cpu, k)]
        return both if device_first else both[::-1]

    engine = anabranch.compile(Fn(fn).eval(), inputs(0, "sim"), runtime=runtime)

    def serve(thread: int) -> None:
        with torch.sim.stream(torch.sim.Stream()), torch.no_grad():
            for k in range(4):
                given = inputs(10 * thread + k, "sim")
                results, wanted = engine(*given), fn(*given)
                places = [[y.device for y in pytree.tree_leaves(z)] for z in (results, wanted)]
                assert places[0] == places[1]
                assert not differences(results, wanted, inputs=given, strides=False)
                expected = fn(*inputs(10 * thread + k, "cpu"))
                assert not differences(pytree.tree_map(torch.Tensor.cpu, results), expected, strides=False)

    on_threads(3, serve)
    assert engine.stats().direct_calls == 12
    assert engine.stats().specializations == 1
    assert "on the CPU" in engine.explain()
    reasons = engine.summary()["signatures"][0]["reasons"]
    if name != "unused" and name != "a scalar":
        assert {r["why"] for r in reasons} == {"input on the CPU"}
    if name in ("moved", "computed with", "in parts", "strided"):  # however it comes there
        assert "aten._to_copy.default" in {r["operator"] for r in reasons}


def test_an_input_stays_where_it_was_at_compile(runtime: str) -> None:
    import anabranch.sim  # makes the device

    x, m = draw(X, 1), torch.randn(3)
    mixed = anabranch.compile(Fn(lambda x, m: x + m.to(x.device)).eval(), [x.to("sim"), m], runtime=runtime)
    with pytest.raises(InputError, match=r"input 1 is on sim:0; it was on the CPU when the engine was compiled"):
        mixed(x.to("sim"), m.to("sim"))
    with pytest.raises(InputError, match=r"input 0 is on cpu; this engine runs on sim:0"):
        mixed(x, m)
    assert torch.equal(mixed(x.to("sim"), m).cpu(), x + m)
    assert torch.equal(mixed(x[:2].to("sim"), m).cpu(), x[:2] + m)  # another signature
    with pytest.raises(InputError, match=r"input 1 is on cpu; this engine runs on sim:0"):
        anabranch.compile(Fn(torch.add).eval(), [x.to("sim"), x.to("sim")], runtime=runtime)(x.to("sim"), x)


def test_a_model_that_takes_them_on_one_device_says_so() -> None:
    import anabranch.sim  # makes the device

    x, m = draw(X, 1), torch.randn(4, 3)
    with pytest.raises(
        InputError, match=r"several devices \(.* on sim:0, .* on cpu\) \(.*: Expected all tensors to be on"
    ):
        anabranch.compile(Fn(lambda x, m: x + m).eval(), [x.to("sim"), m])


def test_a_callers_capture_would_keep_its_values(runtime: str) -> None:
    import anabranch.sim  # makes the device

    x, m = draw(X, 1).to("sim"), torch.randn(3)
    engine = anabranch.compile(Fn(lambda x, m: x + m.to(x.device)).eval(), [x, m], runtime=runtime)
    with torch.sim.stream(torch.sim.Stream()):
        graph = anabranch.sim.Graph()
        with anabranch.sim.graph(graph), pytest.raises(NotCapturable, match="all inputs on sim:0"):
            engine(x, m)
    assert torch.equal(engine(x, m).cpu(), x.cpu() + m)
