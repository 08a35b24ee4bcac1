"""Both runtimes tell the same calls apart: what C++ takes for a known signature is of that signature in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import anabranch
from anabranch.export import TensorSpec

pytest.importorskip("anabranch.runtime._native")

#: Of inputs that engines are compiled for: dense, permuted, with gaps, expanded, complex, of one element, empty.
COMPILED = {
    "dense": lambda: torch.randn(2, 3, 4),
    "permuted": lambda: torch.randn(4, 2, 3).permute(1, 2, 0),
    "with gaps": lambda: torch.randn(2, 3, 8)[..., ::2],
    "expanded": lambda: torch.randn(2, 1, 4).expand(2, 3, 4),
    "complex": lambda: torch.randn(2, 3, 4, dtype=torch.complex64),
    "one element": lambda: torch.randn(1, 1, 1),
    "empty": lambda: torch.randn(2, 0, 4),
}


@pytest.fixture(scope="module")
def engines() -> dict[str, Any]:
    made = {}
    with torch.no_grad():
        for name, make in COMPILED.items():
            made[name] = anabranch.compile(torch.nn.Tanh(), [make()], backend="eager", runtime="native")
    return made


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of a few shapes, in any layout that views can have, at any offset, of any kind that a caller may come with."""
    shape = draw(st.sampled_from([(2, 3, 4), (1, 1, 1), (2, 0, 4), (2, 3), (4, 3, 2)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.half]))
    order = draw(st.permutations(range(len(shape))))
    step, offset = draw(st.integers(1, 2)), draw(st.integers(0, 3))
    sizes = [shape[i] for i in order]
    flat = torch.randn(offset + step * max(1, torch.Size(sizes).numel()), dtype=dtype)
    strides, n = [0] * len(shape), step
    for i in reversed(range(len(sizes))):
        strides[i], n = n, n * max(1, sizes[i])
    x = flat.as_strided(sizes, strides, offset).permute([order.index(i) for i in range(len(shape))])
    kind = draw(st.sampled_from(["as it is", "expanded", "conjugate", "negative", "requires grad", "parameter"]))
    if kind == "expanded":
        x = x[:, :1].expand(x.shape) if x.shape[1] else x
    elif kind == "conjugate":
        x = x.conj()
    elif kind == "negative":
        x = torch._neg_view(x)
    elif kind == "requires grad":
        x = x.detach().requires_grad_()
    elif kind == "parameter":
        x = torch.nn.Parameter(x, requires_grad=False)
    return x


@pytest.mark.parametrize("name", list(COMPILED))
@settings(max_examples=150, deadline=None)
@given(x=tensors(), grad=st.booleans())
def test_the_same_calls_have_a_signature(engines: dict[str, Any], name: str, x: torch.Tensor, grad: bool) -> None:
    engine = engines[name]
    (known,) = engine._first().signature.given
    went_to_python: list[Any] = []
    engine._call = lambda *args, **kwargs: went_to_python.append(args)
    try:
        with torch.set_grad_enabled(grad):
            engine(x)
            try:
                engine._table.key((x,), {})
                refused = False
            except anabranch.InputError:
                refused = True
    finally:
        del engine._call
    found = TensorSpec.of(x)
    same = [(s.shape, s.is_contiguous or s.strides, s.dtype, s.conj, s.neg) for s in (found, known)]
    if not went_to_python:
        assert not refused
        assert same[0] == same[1]
    elif type(x) is torch.Tensor and not refused:
        # What has gaps, or is expanded, is looked at in Python: kernels read a dense copy of it.
        assert same[0] != same[1] or not known.matches(x), "a dense call of the signature went by Python"
