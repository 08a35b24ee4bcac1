"""What eager refuses by its values compiled kernels refuse, too, and all of it that is right runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import anabranch
from anabranch import Dim, Input
from contract.support import Fn, on_threads

Inputs = tuple[torch.Tensor, ...]
#: A model, inputs that it takes, inputs that eager refuses, and what it says of those.
Case = tuple[Callable[..., Any], list[Inputs], list[Inputs], str]


def _t(*values: Any) -> torch.Tensor:
    return torch.tensor(values)


def _cases() -> dict[str, Case]:
    x, index = torch.randn(4, 5), "index out of range"
    indices = [(x, _t(1, 3)), (-x, _t(0, 0))], [(x, _t(-1, 2)), (x, _t(1, -4))]
    chances = [(_t(0.2, 1.0, 0.0),), (_t(0.5, 0.5, 1.0),)]
    no_chances = [(_t(0.2, 1.5, 0.0),), (_t(-0.1, 0.5, 1.0),), (_t(0.1, float("nan"), 1.0),)]
    places = [(torch.randn(1, 1, 2, 2), torch.tensor([[[[0, 2], [8, 10]]]]))]
    no_places = [(torch.randn(1, 1, 2, 2), torch.tensor([[[[-1, 2], [8, 10]]]]))]
    lists = [[3, 0, -1, 1], [-1, 0, 0, 0]], [[0, 1, 2, 3], [2, -1, 0, 1]]
    labels = [(torch.randn(2, 4), torch.tensor(n)) for n in lists]
    no_labels = [(torch.randn(2, 4), torch.tensor(n)) for n in ([[3, 0, -1, 1], [-2, 0, 0, 0]], [[0, 4, -1, 3]] * 2)]
    repeats = [(x, _t(1, 0, 2, 3)), (x, _t(6, 0, 0, 0))]
    no_repeats = [(x, _t(1, -1, 3, 3)), (x, _t(1, 1, 1, 1))]
    return {
        "index_select": (lambda x, i: x.tanh().index_select(0, i), *indices, index),
        "index_add": (lambda x, i: x.index_add(0, i, x[:2] * 2), *indices, index),
        "index_copy": (lambda x, i: x.index_copy(0, i, x[:2] * 2), *indices, index),
        "unpool2d": (lambda x, i: F.max_unpool2d(x.tanh(), i, 2), places, no_places, index + "|invalid max index"),
        "unpool1d": (
            lambda x, i: F.max_unpool1d(x.tanh(), i, 2),
            [(torch.randn(1, 1, 2), torch.tensor([[[0, 2]]]))],
            [(torch.randn(1, 1, 2), torch.tensor([[[-1, 2]]]))],
            index,
        ),
        "unpool3d": (
            lambda x, i: F.max_unpool3d(x.tanh(), i, 2),
            [(torch.randn(1, 1, 1, 1, 2), torch.tensor([[[[[0, 2]]]]]))],
            [(torch.randn(1, 1, 1, 1, 2), torch.tensor([[[[[-1, 2]]]]]))],
            index,
        ),
        "cross_entropy": (lambda p: F.binary_cross_entropy(p, p * 0 + 0.5), chances, no_chances, "between 0 and 1"),
        "its_target": (lambda p: F.binary_cross_entropy(p * 0 + 0.5, p), chances, no_chances, "between 0 and 1"),
        "bernoulli": (lambda p: p.bernoulli().shape[0] + p, chances, no_chances, "probabilities between 0 and 1"),
        "repeats": (lambda x, n: x.repeat_interleave(n, 0, output_size=6) * 2, repeats, no_repeats, "repeats|sum of"),
        "labels": (F.multilabel_margin_loss, labels, no_labels, "'target' is out of range"),
        "assertion": (
            lambda x, i: (torch._assert_async(i.sum() > 0), x * 2)[1],
            [(x, _t(1, 0))],
            [(x, _t(1, -1)), (x, _t(0, 0))],
            "nonzero value, but got zero",
        ),
    }


CASES = _cases()


@pytest.mark.parametrize("backend", ["inductor", "eager"])
@pytest.mark.parametrize("name", list(CASES))
def test_values_that_eager_refuses_are_refused(name: str, backend: str) -> None:
    compute, good, bad, text = CASES[name]
    model = Fn(compute).eval()
    with anabranch.compile(model, list(good[0]), backend=backend, runtime="python") as engine:
        for inputs in (*good, *bad, *good):
            try:
                expected = model(*inputs)
            except (RuntimeError, IndexError):
                assert any(inputs is b for b in bad)
                with pytest.raises((RuntimeError, IndexError), match=text if backend == "inductor" else None):
                    engine(*inputs)
            else:
                assert not any(inputs is b for b in bad)
                torch.testing.assert_close(engine(*inputs), expected)


def test_a_call_that_is_refused_disturbs_no_other(runtime: str) -> None:
    compute, good, bad, text = CASES["index_add"]
    model = Fn(compute).eval()
    expected = [model(*inputs) for inputs in good]
    with anabranch.compile(model, list(good[0]), backend="inductor", runtime=runtime) as engine:

        def work(i: int) -> None:
            for turn in range(30):
                if i % 2:
                    with pytest.raises(RuntimeError, match=text):
                        engine(*bad[turn % 2])
                else:
                    torch.testing.assert_close(engine(*good[turn % 2]), expected[turn % 2])

        on_threads(4, work)


def test_in_a_range_of_sizes() -> None:
    model = Fn(lambda x, i, labels: (x.index_copy(0, i, x[:2]), F.multilabel_margin_loss(x, labels))).eval()
    n = Dim("n", 2, 9)
    inputs = [Input((n, n)), Input((2,), torch.int64), Input((n, n), torch.int64)]
    with anabranch.compile(model, inputs, backend="inductor") as engine:
        for size in (3, 5):
            x, good = torch.randn(size, size), torch.randint(-1, size, (size, size))
            expected = model(x, _t(0, 2), good)
            torch.testing.assert_close(engine(x, _t(0, 2), good), expected)
            with pytest.raises(RuntimeError, match="index out of range"):
                engine(x, _t(-1, 2), good)
            with pytest.raises(RuntimeError, match="'target' is out of range"):
                engine(x, _t(0, 2), good.index_fill(0, _t(1), size))
