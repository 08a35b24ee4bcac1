"""Calls that wait for the device, that ask it, and that wait only while they build; and an engine whose call waits."""

from __future__ import annotations

import torch

import anabranch
from anabranch import _activity

from .streams import SIM, A


def waits() -> None:
    _activity.begin_call()
    A.synchronize()
    _activity.end_call()


def asks() -> None:
    done = torch.Event(SIM)
    done.record(A)
    _activity.begin_call()
    done.query()
    _activity.end_call()


def waits_at_last() -> None:
    """In the outer one of two calls, after it has built something and called another engine."""
    _activity.begin_call()
    with _activity.building():
        A.synchronize()
    _activity.begin_call()
    _activity.end_call()
    A.synchronize()
    _activity.end_call()


def builds() -> None:
    _activity.begin_call()
    with _activity.building(), _activity.building():
        A.synchronize()
    _activity.end_call()


def outside() -> None:
    _activity.begin_call()
    _activity.end_call()
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
SILENT = {
    runtime: anabranch.compile(torch.nn.ReLU().to(SIM), [X], backend="eager", runtime=runtime, cuda_graphs=False)
    for runtime in ("python", "native")
}


def in_a_call_of(runtime: str) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = ENGINES[runtime](X)
    return result


def in_a_call_that_builds(runtime: str) -> torch.Tensor:
    """A signature that was not seen before is compiled in the call: that waits, for its own stream."""
    with torch.no_grad():
        result: torch.Tensor = SILENT[runtime](X[:2])
    return result
