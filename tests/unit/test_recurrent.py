"""Recurrent layers, and what packs sequences for them: sizes that depend on lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import anabranch

pytestmark = pytest.mark.usefixtures("seeded")


class Packed(nn.Module):
    def __init__(self, kind: type[nn.Module], whole: bool = False, is_sorted: bool = False, **options: Any) -> None:
        super().__init__()
        self.layer = kind(8, 6, batch_first=True, **options)
        self.whole, self.is_sorted = whole, is_sorted

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=self.is_sorted)
        y, state = self.layer(packed)
        return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1] if self.whole else None), state


MODELS = {
    "lstm": lambda: Packed(nn.LSTM, proj_size=4),
    "lstm, padded to the input's length": lambda: Packed(nn.LSTM, whole=True),
    "gru, both ways": lambda: Packed(nn.GRU, bidirectional=True),
    "rnn of two layers, sorted": lambda: Packed(nn.RNN, is_sorted=True, num_layers=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_of_all_lengths(name: str, runtime: str) -> None:
    model = MODELS[name]().eval()
    engine = anabranch.compile(model, [torch.randn(3, 5, 8), torch.tensor([5, 2, 1])], runtime=runtime)
    for given in ([5, 2, 3], [1, 4, 5], [2, 2, 2], [1, 1, 3], [5, 5, 5]):
        x, lengths = torch.randn(3, 5, 8), torch.tensor(sorted(given, reverse=True) if model.is_sorted else given)
        with torch.no_grad():
            wanted = torch.utils._pytree.tree_leaves(model(x, lengths))
        for y, w in zip(torch.utils._pytree.tree_leaves(engine(x, lengths)), wanted, strict=True):
            assert y.shape == w.shape
            assert y.dtype is w.dtype
            # Not to the bit: eager's own products of so few rows differ from call to call.
            assert torch.allclose(y, w, rtol=1e-5, atol=1e-6)
    assert engine.stats().specializations == 1


def test_the_users_layers_are_left_as_they_are() -> None:
    model = Packed(nn.GRU).eval()
    before = dict(model.layer.__dict__)
    anabranch.compile(model, [torch.randn(3, 5, 8), torch.tensor([5, 2, 1])], backend="eager")
    assert model.layer.__dict__.keys() == before.keys()
