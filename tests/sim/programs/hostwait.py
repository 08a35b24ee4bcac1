"""Calls that wait for the device, that ask it, and that wait only while they build; and an engine whose call waits."""

from __future__ import annotations

from typing import Any

import torch

import anabranch
from anabranch import _activity
from anabranch.devices import get_device
from contract import stateful

from .streams import SIM, A, B


@_activity.call
def waits() -> None:
    A.synchronize()


@_activity.call
def asks() -> None:
    done = torch.Event(SIM)
    done.record(A)
    done.query()


@_activity.call
def _does_nothing() -> None:
    pass


@_activity.call
def waits_at_last() -> None:
    """In the outer one of two calls, after it has built something and called another engine."""
    with _activity.building():
        A.synchronize()
    _does_nothing()
    A.synchronize()


@_activity.call
def builds() -> None:
    with _activity.building(), _activity.building():
        A.synchronize()


def outside() -> None:
    _does_nothing()
    A.synchronize()


@torch.library.custom_op("anabranch_tests::waiting", mutates_args=())
def waiting(x: torch.Tensor) -> torch.Tensor:
    """An operator whose kernel waits for the device."""
    A.synchronize()
    return x * 2


@waiting.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Waiting(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        waited: torch.Tensor = torch.ops.anabranch_tests.waiting(x)
        return waited


X = torch.arange(1.0, 5.0).to(SIM)
#: Compiled here, where the operator runs, too, and where it may wait.
ENGINES = {
    runtime: anabranch.compile(Waiting().to(SIM), [X], backend="eager", runtime=runtime, cuda_graphs=False)
    for runtime in ("python", "native")
}
stateful.install(get_device("sim"))


def silent(runtime: str, backend: str, graphs: bool) -> Any:
    model = torch.nn.ReLU().to(SIM)
    return anabranch.compile(model, [X], backend=backend, runtime=runtime, cuda_graphs=graphs, max_contexts=2)


#: Each has one context, or one instance.
GROWING = {
    runtime: {"contexts": silent(runtime, "eager", True), "instances": silent(runtime, stateful.NAME, False)}
    for runtime in ("python", "native")
}


def in_a_call_of(runtime: str) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = ENGINES[runtime](X)
    return result


def in_a_call_that_compiles(runtime: str) -> torch.Tensor:
    """A signature that was not seen before is compiled in the call."""
    with torch.no_grad():
        result: torch.Tensor = GROWING[runtime]["contexts"](X[:2])
    return result


def in_a_call_that_builds(runtime: str, what: str) -> torch.Tensor:
    """The second call finds the one context in use, and builds another."""
    engine = GROWING[runtime][what]
    with torch.no_grad():
        with A:
            engine(X)
        with B:
            result: torch.Tensor = engine(X)
    return result
