"""Views and writes inside a model are what they are in eager, although an engine's graph has no writes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import anabranch
from anabranch._judge import differences
from anabranch.export import _functional


class Model(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def check(function: Callable[..., Any], *inputs: torch.Tensor, runtime: str = "python") -> None:
    """What an engine returns equals eager's bit for bit, in value, strides and memory; on inputs of later calls too."""
    model = Model(function).eval()
    engine = anabranch.compile(model, inputs, backend="eager", runtime=runtime)
    for scale in (1, 3, -2):
        given = [(x * scale).as_strided(x.shape, x.stride()) if x.is_floating_point() else x for x in inputs]
        assert not differences(engine(*given), model(*given), inputs=given)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    "alias",
    [
        functools.partial(functional.dropout, p=0.5, training=False),
        nn.Dropout(0.1).eval(),
        lambda v: torch.einsum("ij->ji", v),
        lambda v: torch.einsum("ij->ij", v),
        lambda v: torch.meshgrid(v.flatten()[:1], v.flatten(), indexing="ij")[1],
        lambda v: torch.meshgrid(v.flatten(), v.flatten()[:1], indexing="xy")[0],
        lambda v: torch.broadcast_tensors(v, v[:1])[0],
        lambda v: v.type_as(v + 1),
        lambda v: v.expand(2, 3),
        lambda v: v.expand(1, 1, 2, 3),
        lambda v: v.expand_as(v),
        lambda v: torch.broadcast_to(v[:1], (1, 3)),
    ],
    ids=lambda alias: getattr(alias, "__name__", type(alias).__name__),
)
def test_a_write_through_what_lies_in_the_same_memory_is_seen(alias: Callable[..., torch.Tensor]) -> None:
    def through(x: torch.Tensor) -> Any:
        v = x.sin()
        w = alias(v)
        w.mul_(3.3)
        return v, w

    def beside(x: torch.Tensor) -> Any:
        v = x.sin()
        w = alias(v)
        v.tanh_()
        return w

    check(through, drawn(2, 3))
    check(beside, drawn(2, 3))


def test_a_write_through_a_view_that_expands_nothing_is_exact() -> None:
    def replaced(x: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        v = torch.full_like(x, float("inf"))
        v.expand(1, 4, 3)[0].copy_(new)
        return v

    check(replaced, drawn(4, 3) * 1e20, drawn(4, 3))


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(),
        lambda w: w[0].fill_(2.0),
        lambda w: w.select(1, 1).narrow(0, 0, 1).copy_(w.new_ones(1, 3)),
        lambda w: w.__setitem__(0, 1.25),
        lambda w: w.unbind(1)[1].zero_(),
        lambda w: w.index_fill_(1, torch.tensor([0]), -1.0),
    ],
)
def test_a_write_into_an_expanded_tensor_is_refused_with_its_line(write: Callable[[torch.Tensor], Any]) -> None:
    def expands(x: torch.Tensor) -> torch.Tensor:
        w = x.cos().expand(4, 2, 3)
        write(w)
        return w

    with pytest.raises(anabranch.UnsupportedModel, match=r"expanded tensor \(test_functional.py:\d+\).*clone"):
        anabranch.compile(Model(expands), [drawn(2, 3)], backend="eager", runtime="python")

    def copied(x: torch.Tensor) -> torch.Tensor:
        w = x.cos().expand(4, 2, 3).clone()
        write(w)
        return w

    check(copied, drawn(2, 3))


@pytest.mark.parametrize(
    "write",
    [
        lambda v: v.triu_(),
        lambda v: v.cumsum_(0),
        lambda v: v.scatter_(0, torch.zeros_like(v, dtype=torch.int64), 2.0),
        lambda v: v.index_add_(1, torch.tensor([1]), v[:, :1].clone()),
        lambda v: torch.cumsum(v.contiguous(), 1, out=v),
        lambda v: torch.mul(v.contiguous(), 2.0, out=v),
        lambda v: v.t_().tril_(),
        lambda v: v.rot90().zero_().add_(v.rot90()),
    ],
)
def test_a_write_keeps_the_order_in_memory(write: Callable[[torch.Tensor], Any]) -> None:
    def writes(x: torch.Tensor) -> Any:
        v = x.exp()
        write(v)
        return v, v.sum(0)

    check(writes, drawn(3, 4).t())
    check(writes, drawn(2, 5))


def test_a_write_keeps_gaps() -> None:
    def writes(x: torch.Tensor) -> torch.Tensor:
        return torch.select_scatter(x, x[0] * 2, 0, 1).clamp_(-1, 1)

    model = Model(writes)
    engine = anabranch.compile(model, [drawn(4, 6)[::2]], backend="eager", runtime="python")
    x = drawn(6, 6)[:4][::2]
    assert not differences(engine(x), model(x), inputs=[x])


def test_numbers_that_are_written_are_no_tensors() -> None:
    """Copies from a tensor on the CPU could not be captured."""

    def writes(x: torch.Tensor) -> Any:
        v, w = x.sin(), torch.tensor(5.0)
        v[0, 1] = 2.5
        v[1] = torch.tensor(3)
        w.copy_(x.sum())
        return v, w, torch.tensor(7.0)

    check(writes, drawn(2, 3))
    engine = anabranch.compile(Model(writes), [drawn(2, 3)], backend="eager", runtime="python")
    graph = engine._first().program.module.graph
    assert [n.args[1] for n in graph.nodes if n.target is torch.ops.aten.fill.Scalar] == [2.5, 3]


def test_constants_of_the_model_are_new_at_each_call() -> None:
    def writes(x: torch.Tensor) -> torch.Tensor:
        v = torch.tensor([1.0, 2.0, 3.0])
        v.cumsum_(0)
        v[1] += x.sum()
        return v

    check(writes, drawn(2, 3))


def test_an_input_that_an_operator_hands_back_is_the_callers_own() -> None:
    def loss(x: torch.Tensor, y: torch.Tensor) -> Any:
        return functional.mse_loss(x, y), x, y

    x, y = drawn(3, 2), drawn(2, 3).t()
    engine = anabranch.compile(Model(loss), [x, y], backend="eager", runtime="python")
    _, first, second = engine(x, y)
    assert first is x
    assert second is y


def test_operators_are_not_taken_apart_where_that_changes_a_zeros_sign() -> None:
    check(lambda x: (functional.softshrink(x), functional.hardshrink(x)), drawn(40))


@pytest.mark.parametrize("runtime", ["python", "native"])
@pytest.mark.parametrize(
    "view", [lambda x: x[:, ::2], lambda x: x[:1].expand(5, 6), lambda x: x.t()[1:], lambda x: x[1:, 1:]]
)
def test_inputs_with_gaps_give_eagers_bits(view: Callable[[torch.Tensor], torch.Tensor], runtime: str) -> None:
    def sums(x: torch.Tensor) -> Any:
        row = torch.select_scatter(x, x[0] * 2, 0, 0)
        return functional.gelu(x), x.sum(), x.median(0), row, x.logcumsumexp(0), x @ x.t()

    model = Model(sums)
    engine = anabranch.compile(model, [view(drawn(5, 6))], backend="eager", runtime=runtime)
    for k in range(3):
        x = view(drawn(5, 6) + k)
        assert not differences(engine(x), model(x), inputs=[x])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: functional.gelu(x @ x.t()) + x.sum(), True),
        (lambda x: functional.linear(x, x).log_softmax(-1), True),
        (lambda x: functional.conv2d(x[None, None], x[None, None]), True),
        (lambda x: functional.conv3d(x[None, None, None], x[None, None, None]), True),
        (lambda x: functional.scaled_dot_product_attention(*[x[None, None]] * 3), True),
        (lambda x: functional.batch_norm(x, x[0], x[1] ** 2), False),
        (lambda x: functional.layer_norm(x.view(2, 2, 2), (2,)).softmax(-1).permute(2, 0, 1), True),
        (lambda x: functional.conv1d(x[:, None], x[:, None, :2]).unbind(1), True),
        (lambda x: x.sin().add_(1), False),
        (lambda x: x.reshape(-1) * 2, False),
        (lambda x: x.to(torch.complex64).abs(), False),
        (lambda x: x + torch.tensor([1.0]), False),
        (lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), False),
    ],
    ids=[
        "product",
        "linear",
        "picture",
        "volume",
        "attention",
        "batch norm",
        "norm",
        "convolution",
        "write",
        "reshape",
        "complex",
        "constant",
        "branch",
    ],
)
def test_what_is_functional_is_left_as_it_is(function: Callable[..., Any], expected: bool) -> None:
    """Where functionalization is left out it would have changed nothing."""
    with torch.no_grad():
        recorded = torch.export.export(Model(function), (drawn(2, 4),), strict=False)
    assert _functional.is_functional(recorded) is expected
    if not expected:
        return
    with torch.no_grad():
        functionalized = recorded.run_decompositions({})
    assert functionalized.graph_module.code == recorded.graph_module.code
    assert functionalized.graph_signature == recorded.graph_signature
