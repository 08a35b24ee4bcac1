"""Sizes that are rounded up before a call: which models may be given more rows, and that calls notice nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import anabranch
from anabranch import Dim, Input
from anabranch.errors import InputError, UnsupportedModel
from contract.support import ROUNDING, Fn, assert_same, on_threads

_TO = [16, 32, 64]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Masked(nn.Module):
    """Attention to what a mask says is there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(2, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, 2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.out(y.transpose(1, 2).flatten(2)) + x


class Embedded(nn.Module):
    """Rows of a table, of which the first is not zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table, self.last = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.table(ids))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + sum(shape)))


def served(engine: Any, dim: int = 0) -> list[int]:
    """The size of the first input of each call that kernels were given, from now on."""
    sizes: list[int] = []
    for made in engine._table:
        run = made.calls.direct.run

        def noting(inputs: Any, *rest: Any, run: Callable[..., Any] = run) -> Any:
            sizes.append(inputs[0].shape[dim])
            return run(inputs, *rest)

        made.calls.direct.run = noting
    return sizes


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_rows_by_themselves_are_padded_and_results_cut_back(runtime: str, backend: str) -> None:
    model = Mlp().eval()
    dim = Dim("batch", 1, 64, pad_to=_TO)
    engine = anabranch.compile(model, [Input((dim, 8))], backend=backend, runtime="python")
    before, sizes = engine.stats().specializations, served(engine)
    for n in (5, 16, 17, 63, 64, 2, 33):
        x = drawn(n, 8, seed=n)
        kept = x.clone()
        y = engine(x)
        with torch.no_grad():
            assert_same(y, model(x), str(n), rounding=ROUNDING)
        assert torch.equal(x, kept)
        assert y.is_contiguous()
        assert y.untyped_storage().nbytes() == y.nbytes, "a result keeps the memory of what was cut off"
        assert not y.is_inference()
    assert sizes == [16, 16, 32, 64, 64, 16, 64]
    assert engine.stats().specializations == before
    assert engine.stats().calls == 7
    native = anabranch.compile(model, [Input((dim, 8))], backend=backend, runtime=runtime)
    for n in (5, 16, 1):
        x = drawn(n, 8, seed=n)
        with torch.no_grad():
            assert_same(native(x), model(x), str(n), rounding=ROUNDING)


def test_what_is_special_and_what_is_beyond_the_list_is_given_as_it_is() -> None:
    model = Mlp().eval()
    engine = anabranch.compile(model, [Input((Dim("batch", 0, 99, pad_to=[8]), 8))], backend="eager", runtime="python")
    for n in (0, 1):
        engine(drawn(n, 8))
    sizes = served(engine)
    for n in (0, 1, 3, 8, 9, 99):
        x = drawn(n, 8, seed=n)
        with torch.no_grad():
            assert_same(engine(x), model(x), str(n), rounding=ROUNDING)
    assert sizes == [0, 1, 8, 8, 9, 99]
    with pytest.raises(InputError, match="size 0 of input 0 is 100"):
        engine(drawn(100, 8))


def test_bounds_and_names_are_of_what_a_call_is_given() -> None:
    batch = Dim("batch", 4, 16, pad_to=[16])

    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 + y

    engine = anabranch.compile(Fn(model), [Input((batch, 3)), Input((batch, 3))], backend="eager")
    assert_same(engine(drawn(5, 3), drawn(5, 3, seed=1)), model(drawn(5, 3), drawn(5, 3, seed=1)))
    with pytest.raises(InputError, match="'batch' was declared as 4 to 16"):
        engine(drawn(3, 3), drawn(3, 3))
    with pytest.raises(InputError, match="so they must be equal"):
        engine(drawn(5, 3), drawn(6, 3))


def softmax(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(0)


def weak_mean(x: torch.Tensor) -> torch.Tensor:
    return x + 1e-3 * x.mean(0)


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x / x.shape[0]


def convolution(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool1d(x.T[None], 3, stride=1, padding=1)[0].T


def counted(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    return x * 2, x.shape[0]


def handed_back(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * 2, x


def flipped(x: torch.Tensor) -> torch.Tensor:
    return x.flip(0)


def random(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x)


def written(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1) * 2


def two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * 2, x.cumsum(0).flip(0)


REFUSED = {
    softmax: "result 0 ",
    weak_mean: "result 0 mixes them: what is padding changes it",
    scaled: "result 0 is another one than without padding",
    convolution: "result 0 ",
    counted: "sizes are among its results",
    handed_back: "it hands back an input",
    flipped: "result 0 ",
    random: "it draws random numbers",
    written: "it writes into inputs",
    two: "result 1 ",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_what_mixes_rows_is_refused_by_name(function: Any) -> None:
    wanted = [Input((Dim("batch", 1, 64, pad_to=_TO), 3))]
    with pytest.raises(UnsupportedModel, match=f"pad_to was given for 'batch'.*{REFUSED[function]}.*Leave pad_to out"):
        anabranch.compile(Fn(function), wanted, backend="eager")
    engine = anabranch.compile(Fn(function), [Input((Dim("batch", 1, 64), 3))], backend="eager")
    if function not in (random, written):
        assert_same(engine(drawn(5, 3)), Fn(function)(drawn(5, 3)))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_attention_with_a_mask_that_is_padded_with_false(backend: str) -> None:
    model = Masked().eval()
    length = Dim("length", 2, 32, pad_to=[8, 32])
    engine = anabranch.compile(
        model, [Input((3, length, 8)), Input((3, length), torch.bool)], backend=backend, runtime="python"
    )
    sizes = served(engine, 1)
    for n in (5, 8, 9, 30):
        x, mask = drawn(3, n, 8, seed=n), drawn(3, n, seed=n) > -0.5
        mask[:, 0] = True
        y = engine(x, mask)
        with torch.no_grad():
            assert_same(y, model(x, mask), str(n), rounding=ROUNDING)
        assert y.is_contiguous()
    assert sizes == [8, 8, 32, 32]
    with pytest.raises(UnsupportedModel, match=r"'length'.*result 0 "):
        anabranch.compile(Ignoring().eval(), [Input((3, length, 8)), Input((3, length), torch.bool)], backend=backend)


class Ignoring(Masked):
    """The mask says what is not there: where it is padded with False, everything is."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x, ~mask)


def test_integers_are_padded_with_valid_ones() -> None:
    model = Embedded().eval()
    wanted = [Input((2, Dim("length", 1, 32, pad_to=[8, 32])), torch.int64)]
    engine = anabranch.compile(model, wanted, backend="eager")
    for n in (3, 8, 20):
        ids = torch.randint(0, 20, (2, n), generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            assert_same(engine(ids), model(ids), str(n), rounding=ROUNDING)

    def mean(ids: torch.Tensor) -> torch.Tensor:
        return model.table.weight[ids].mean(1)

    def from_one(ids: torch.Tensor) -> torch.Tensor:
        return model.last.weight.T[ids - 1] * 2

    with pytest.raises(UnsupportedModel, match="result 0 is another one than without padding"):
        anabranch.compile(Fn(mean), wanted, backend="eager")
    engine = anabranch.compile(Fn(from_one), wanted, backend="eager")
    ids = torch.randint(1, 9, (2, 5), generator=torch.Generator().manual_seed(1))
    assert_same(engine(ids), from_one(ids))


def test_two_sizes_and_structures_and_keywords() -> None:
    class Model(nn.Module):
        def forward(self, given: dict[str, torch.Tensor], *, factor: float, extra: torch.Tensor) -> Any:
            y = given["x"] * factor + extra
            more = y.unsqueeze(1).expand(-1, 3, -1, -1) * 1
            return {"twice": y * 2, "all": (y.transpose(0, 1), None, extra + 1), "more": more}

    rows, columns = Dim("rows", 2, 32, pad_to=[8, 32]), Dim("columns", 2, 16, pad_to=[4, 16])
    model = Model()
    engine = anabranch.compile(
        model,
        [{"x": Input((rows, columns, 3))}],
        kwargs={"factor": 1.5, "extra": Input((columns, 3))},
        backend="eager",
    )
    for n, m in ((3, 5), (8, 3), (9, 16), (8, 4)):
        x, extra = drawn(n, m, 3, seed=n), drawn(m, 3, seed=m)
        assert_same(engine({"x": x}, factor=1.5, extra=extra), model({"x": x}, factor=1.5, extra=extra), f"{n}, {m}")


def test_sizes_that_the_model_treats_otherwise_are_not_padded() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] > 8 else x - 1

    engine = anabranch.compile(Fn(model), [Input((Dim("batch", 1, 64, pad_to=[6, 16, 64]), 3))], backend="eager")
    for n in (2, 5, 6, 7, 8, 9, 12, 16, 17, 64):
        x = drawn(n, 3, seed=n)
        assert_same(engine(x), model(x), str(n))


def test_inputs_that_lie_otherwise_and_results_in_channels_last() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    wanted = Input((Dim("batch", 2, 8, pad_to=[8]), 3, 6, 6), memory_format=torch.channels_last)
    engine = anabranch.compile(model, [wanted], backend="eager")
    x = drawn(5, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
    y = engine(x)
    assert_same(y, expected, rounding=ROUNDING)
    assert y.stride() == expected.stride()
    row_wise = anabranch.compile(Mlp().eval(), [Input((Dim("batch", 2, 8, pad_to=[8]), 8))], backend="eager")
    x = drawn(8, 10).t()[:5, :]
    with torch.no_grad():
        assert_same(row_wise(x), Mlp().eval()(x), rounding=ROUNDING)


def test_it_is_told() -> None:
    engine = anabranch.compile(Mlp().eval(), [Input((Dim("batch", 1, 64, pad_to=_TO), 8))], backend="eager")
    assert "'batch' is rounded up to 16, 32 or 64" in engine.explain()


def test_lists_that_make_no_sense() -> None:
    assert Dim("n", 1, 64, pad_to=[64, 16, 16]).pad_to == (16, 64)
    for wrong in ([1, 16], [0], [65], [16.0], [True], [3]):
        with pytest.raises(InputError, match=r"pad_to=\[.*expected sizes of 2 or more, within its bounds"):
            Dim("n", 4, 64, pad_to=wrong)


def test_threads_call_with_many_sizes_at_once(runtime: str) -> None:
    model = Mlp().eval()
    engine = anabranch.compile(model, [Input((Dim("batch", 1, 64, pad_to=_TO), 8))], backend="eager", runtime=runtime)
    inputs = [drawn(n, 8, seed=n) for n in range(1, 65)]
    expected = [engine(x) for x in inputs]

    def work(i: int) -> None:
        for k in range(64):
            n = (7 * i + k) % 64
            assert_same(engine(inputs[n]), expected[n], str(n))

    on_threads(8, work)
