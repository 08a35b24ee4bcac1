"""What ``torch.export`` cannot record as it is written is recorded in other words, with eager's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import anabranch
from anabranch._judge import differences
from contract.support import Fn

pytestmark = pytest.mark.usefixtures("seeded")

WINDOW = torch.hann_window(16)


def spectrum(*batch: int, frames: int = 14, points: int = 9) -> torch.Tensor:
    return torch.randn(*batch, points, frames, dtype=torch.complex64)


def sound(z: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    return torch.istft(z * 2, *args, **options)


# -- the inverse of the short-time Fourier transform ------------------------------------------------------------------

INVERSES: dict[str, tuple[Callable[..., Any], torch.Tensor]] = {
    "with a window made in the model": (lambda z: sound(z, 16, 4, window=torch.hann_window(16)), spectrum(3)),
    "as a method": (lambda z: (z * 2).istft(16, 4, 16, WINDOW), spectrum(3)),
    "of one signal": (lambda z: sound(z, 16, window=WINDOW), spectrum()),
    "without a window": (lambda z: sound(z, 16, 3, center=False, normalized=True), spectrum(2)),
    "of an odd number": (lambda z: sound(z, 15, 3), spectrum(2, points=8)),
    "with a narrow window": (lambda z: sound(z, 16, 3, 12, WINDOW[:12] + 0.1), spectrum(2)),
    "cut off": (lambda z: sound(z, 16, 4, window=WINDOW, length=40), spectrum(2)),
    "padded": (lambda z: sound(z, 16, 4, window=WINDOW, length=90), spectrum(2)),
    "of both sides": (lambda z: sound(z, 16, 4, window=WINDOW, onesided=False), spectrum(2, points=16)),
    "with complex results": (lambda z: sound(z, 16, 4, window=WINDOW, return_complex=True), spectrum(2, points=16)),
}


@pytest.mark.parametrize("name", INVERSES)
def test_an_inverse_transform_is_in_one_graph(name: str) -> None:
    fn, z = INVERSES[name]
    engine = anabranch.compile(Fn(fn).eval(), [z], backend="eager", require_full=True)
    other = torch.randn_like(z)
    assert not differences(engine(other), fn(other), inputs=(other,))


def test_an_inverse_transform_of_many_lengths() -> None:
    engine = anabranch.compile(Fn(lambda z: sound(z, 16, 4, window=WINDOW)).eval(), [spectrum(2)], backend="eager")
    for frames in (20, 33, 14, 21):
        z = spectrum(2, frames=frames)
        assert not differences(engine(z), sound(z, 16, 4, window=WINDOW), inputs=(z,))
    assert len(engine.plans) == 2


def test_an_inverse_transform_of_an_exported_program() -> None:
    z = spectrum(3)
    program = torch.export.export(Fn(lambda z: sound(z, 16, 4, window=WINDOW)).eval(), (z,))
    engine = anabranch.compile(program, [z], backend="eager", require_full=True)
    assert not differences(engine(z), sound(z, 16, 4, window=WINDOW), inputs=(z,))


@pytest.mark.parametrize("change", [{"n_fft": 12}, {"hop_length": 0}, {"window": WINDOW[:5]}])
def test_wrong_arguments_of_an_inverse_transform_are_refused(change: dict[str, Any]) -> None:
    given = {"n_fft": 16, "hop_length": 4, "window": WINDOW, **change}
    with pytest.raises(anabranch.InputError, match="model does not accept these inputs"):
        anabranch.compile(Fn(lambda z: torch.istft(z * 2, **given)).eval(), [spectrum(2)], backend="eager")


# -- masked_select ----------------------------------------------------------------------------------------------------


SELECTS: tuple[Callable[..., torch.Tensor], ...] = (
    torch.masked_select,
    torch.Tensor.masked_select,
    lambda x, m: x.masked_select(mask=m),
)


@pytest.mark.parametrize("select", SELECTS)
def test_a_mask_may_be_larger_than_what_it_chooses_from(select: Callable[..., torch.Tensor]) -> None:
    x, mask = torch.randn(5), torch.rand(4, 5) > 0.1
    engine = anabranch.compile(Fn(lambda x, m: select(x, m) + 1).eval(), [x, mask], backend="eager")
    for given in (mask, torch.ones(4, 5) > 0, torch.rand(4, 5) > 0.7):
        assert not differences(engine(x, given), select(x, given) + 1, inputs=(x, given))
