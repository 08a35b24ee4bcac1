"""A call that waits for the device, one that asks it, and one that waits only while it builds."""

from __future__ import annotations

import torch

from .streams import SIM, A


class Waits:
    def __call__(self) -> None:
        A.synchronize()


class Asks:
    def __call__(self) -> None:
        done = torch.Event(SIM)
        done.record(A)
        done.query()


class Builds:
    def __call__(self) -> None:
        self._build()

    def _build(self) -> None:
        A.synchronize()


def waits() -> None:
    Waits()()


def asks() -> None:
    Asks()()


def builds() -> None:
    Builds()()


def outside() -> None:
    A.synchronize()
