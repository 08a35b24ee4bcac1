"""Sizes that vary from call to call: one specialization for all of them, and what each size is treated as in eager."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import anabranch
from anabranch import Dim, Input
from contract.support import ROUNDING, Fn, assert_same, on_threads

Inputs = Callable[[int], tuple[Any, ...]]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + sum(shape)))


def eager(model: nn.Module, inputs: Sequence[Any]) -> Any:
    with torch.no_grad():
        return model(*inputs)


def check(engine: Any, model: nn.Module, *inputs: Any) -> None:
    rounding = None if engine.summary()["backend"] == "eager" else ROUNDING
    assert_same(engine(*inputs), eager(model, inputs), str([getattr(x, "shape", x) for x in inputs]), rounding=rounding)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_second_value_of_a_size_makes_it_vary(runtime: str, backend: str) -> None:
    model = Mlp().eval()
    engine = anabranch.compile(model, [drawn(4, 8)], backend=backend, runtime=runtime)
    made = []
    for n in (4, 7, 5, 2, 33, 7, 4):
        check(engine, model, drawn(n, 8, seed=n))
        made.append(engine.stats().specializations)
    assert made == [1, 2, 2, 2, 2, 2, 2]
    check(engine, model, drawn(1, 8))
    check(engine, model, drawn(0, 8))
    assert engine.stats().specializations == 4, "what broadcasts, and what is empty, is compiled by itself"
    assert engine.stats().waits_for_build == 3
    assert "float32[*, 8]" in engine.explain()


def test_what_is_special_is_no_second_value(runtime: str) -> None:
    model = Mlp().eval()
    engine = anabranch.compile(model, [drawn(1, 8)], backend="eager", runtime=runtime)
    for n in (0, 6, 9, 12):
        check(engine, model, drawn(n, 8))
    assert engine.stats().specializations == 3, "1, 0, and all others"


def test_a_batch_of_one_has_a_range_of_its_own(runtime: str) -> None:
    model = Mlp().eval()
    given = anabranch.Input((Dim("batch", 1, 8), Dim("length", 1, 64), 8))
    engine = anabranch.compile(model, [given], backend="eager", runtime=runtime)
    for n in (5, 9, 17, 33, 40):
        check(engine, model, drawn(1, n, 8))
        check(engine, model, drawn(3, n, 8))
    assert engine.stats().specializations == 2, "one for batches of one, of any length"
    for n in (2, 5, 8):
        check(engine, model, drawn(n, 1, 8))
    assert engine.stats().specializations == 3
    check(engine, model, drawn(1, 1, 8))
    assert engine.stats().specializations == 4


def test_each_shape_by_itself() -> None:
    engine = anabranch.compile(Mlp().eval(), [drawn(4, 8)], backend="eager", dynamic=False)
    for n in (4, 7, 5):
        check(engine, Mlp().eval(), drawn(n, 8))
    assert engine.stats().specializations == 3


def test_all_sizes_vary_from_the_first_call_on(runtime: str) -> None:
    model = Fn(lambda x: x.flip(0) * 2 + x.sum(-1, keepdim=True)).eval()
    engine = anabranch.compile(model, [drawn(4, 8)], backend="eager", runtime=runtime, dynamic=True)
    for shape in ((4, 8), (5, 9), (3, 2)):
        check(engine, model, drawn(*shape))
    assert engine.stats().specializations == 1


#: Models that treat some sizes otherwise, with inputs for a size, and sizes to call them with.
GUARDED: dict[str, tuple[Callable[..., Any], Inputs, Sequence[int]]] = {
    "squeeze": (lambda x: (x @ torch.ones(8, 3)).squeeze(), lambda n: (drawn(n, 8),), (4, 6, 1, 9)),
    "two ranges broadcast": (lambda x, y: x + y, lambda n: (drawn(n, 3), drawn(1 if n == 7 else n, 3)), (4, 6, 7, 9)),
    "a branch on one": (lambda x: x * 2 if x.shape[0] == 1 else x + 1, lambda n: (drawn(n, 3),), (4, 6, 1, 9)),
    "a branch on a size": (lambda x: x * 2 if x.shape[0] > 6 else x + 1, lambda n: (drawn(n, 3),), (4, 5, 7, 6, 9, 2)),
    "odd and even": (lambda x: x.view(2, -1) if x.shape[0] % 2 == 0 else x, lambda n: (drawn(n, 4),), (4, 6, 5, 7, 8)),
    "a size is a number of the model": (lambda x: x * x.shape[0] + x.numel(), lambda n: (drawn(n, 3),), (4, 6, 1, 9)),
    "sizes are handed back": (lambda x: (x + 1, x.shape[0], x.shape), lambda n: (drawn(n, 3),), (4, 6, 1, 9)),
    "a view is handed back": (lambda x: (x.view(-1), x.t(), x + 1), lambda n: (drawn(n, 3),), (4, 6, 1, 9)),
    "made of a size": (lambda x: x + torch.arange(x.shape[0]).unsqueeze(1), lambda n: (drawn(n, 3),), (4, 6, 1, 9)),
    "two sizes": (lambda x, y: x @ y, lambda n: (drawn(n, 5), drawn(5, n + 1)), (4, 6, 1, 9)),
    "one size in two inputs": (lambda x, y: torch.cat([x, y], 1), lambda n: (drawn(n, 2), drawn(n, 3)), (4, 6, 1, 9)),
    "twice another": (lambda x, y: x.repeat(2, 1) + y, lambda n: (drawn(n, 3), drawn(2 * n, 3)), (4, 6, 3, 9)),
    "padded": (lambda x: F.pad(x, (0, 0, 0, 16 - x.shape[0])), lambda n: (drawn(n, 3),), (4, 6, 16, 9)),
    "a table of positions": (
        lambda x: x + torch.arange(12.0).unsqueeze(1)[: x.shape[0]],
        lambda n: (drawn(n, 3),),
        (4, 6, 12, 1, 11),
    ),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda n: (drawn(1, 2, n, 8),),
        (4, 6, 1, 9),
    ),
    "indices": (
        lambda x, at: x.gather(1, (at - 1).unsqueeze(1)),
        lambda n: (drawn(n, 5), torch.randint(1, 6, (n,), generator=torch.Generator().manual_seed(n))),
        (4, 6, 1, 9),
    ),
    "depends on data": (lambda x: x[x > 0].sum() + x.nonzero().sum(), lambda n: (drawn(n, 3),), (4, 6, 1, 9)),
    "pictures": (
        lambda x: F.interpolate(F.conv2d(x, torch.ones(4, 3, 3, 3)), scale_factor=2.0),
        lambda n: (drawn(1, 3, n, n + 2),),
        (5, 8, 6, 13),
    ),
}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GUARDED)
def test_every_size_is_treated_as_in_eager(name: str, backend: str) -> None:
    fn, inputs, sizes = GUARDED[name]
    model = Fn(fn).eval()
    engine = anabranch.compile(model, list(inputs(sizes[0])), backend=backend)
    for n in (*sizes, *sizes):
        check(engine, model, *inputs(n))


def test_sizes_that_happen_to_be_equal_are_two() -> None:
    """The second value of one size is what another one is."""
    model = Fn(lambda x: (x.view(-1, 4) + 1).sum(1).view(x.shape[0], -1)).eval()
    engine = anabranch.compile(model, [drawn(6, 8)], backend="inductor")
    for n in (8, 9, 5):
        check(engine, model, drawn(n, 8))
    assert engine.stats().specializations == 2


def test_what_the_compiler_assumes_is_checked_whatever_is_cached(run_python: Any) -> None:
    """In a second process, too, where the compiler finds what it has made in the first one."""
    program = """
        import torch, anabranch
        engine = anabranch.compile(torch.nn.Softmax(-1).eval(), [torch.randn(4, 9)], backend="inductor")
        for shape in ((5, 11), (3, 5000), (6, 4097), (2, 4096)):
            x = torch.randn(shape)
            torch.testing.assert_close(engine(x), x.softmax(-1))
        (sizes,) = [made.program.sizes for made in engine._table.ranges][:1]
        print(sizes.refuses([(3, 5000)]))
    """
    first, second = run_python(program), run_python(program)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout
    assert "4096" in first.stdout, "this compiler assumes it no more: find another assumption"


def test_kinds_of_sizes_that_vary_are_few() -> None:
    """What is alike is compiled once; each branch on a size has one more range, up to a limit."""

    def model(x: torch.Tensor) -> torch.Tensor:
        return x * (x.shape[0] // 10)

    def steps(x: torch.Tensor) -> torch.Tensor:
        for limit in range(3, 40, 3):
            if x.shape[0] < limit:
                return x + limit
        return x

    engine = anabranch.compile(Fn(model).eval(), [drawn(4, 3)], backend="eager")
    for n in (5, 17, 23, 38):
        check(engine, Fn(model), drawn(n, 3))
    assert engine.stats().specializations == 2
    engine = anabranch.compile(Fn(steps).eval(), [drawn(4, 3)], backend="eager")
    for n in (*range(2, 40), *range(2, 40)):
        check(engine, Fn(steps), drawn(n, 3))
    assert "each is compiled by itself: 4 ranges are not right for all sizes that were met" in engine.explain()


def test_what_does_not_fit_the_model_says_so_and_leaves_no_trace() -> None:
    model = Mlp().eval()
    engine = anabranch.compile(model, [drawn(4, 8)], backend="eager")
    for _ in range(2):
        with pytest.raises(anabranch.InputError, match="does not accept these inputs"):
            engine(drawn(5, 7))
    for n in (5, 9):
        check(engine, model, drawn(n, 8))
    assert engine.stats().specializations == 2


def test_sizes_that_the_model_needs_to_know_are_compiled_one_by_one() -> None:
    model = Fn(lambda x: x * sum(range(int(x.shape[0])))).eval()
    engine = anabranch.compile(model, [drawn(4, 3)], backend="eager")
    for n in (5, 6, 5):
        check(engine, model, drawn(n, 3))
    assert engine.stats().specializations == 3
    assert (
        "sizes vary (0 of input 0), and each is compiled by itself: size 0 of input 0 has to be 6" in engine.explain()
    )
    assert "test_dynamic.py:" in engine.explain()


# -- how inputs lie in memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_inputs_that_lie_otherwise(runtime: str, backend: str) -> None:
    model = Fn(lambda x: F.avg_pool2d(x * 2, 2) + 1).eval()
    last = torch.channels_last
    first = drawn(2, 3, 6, 6).to(memory_format=last)
    engine = anabranch.compile(model, [first], backend=backend, runtime=runtime)
    check(engine, model, drawn(2, 3, 8, 6).to(memory_format=last))
    made = engine.stats().specializations
    for n in (10, 12):
        check(engine, model, drawn(2, 3, n, 6).to(memory_format=last))
    assert engine.stats().specializations == made == 2
    whole = drawn(2, 3, 16, 12).to(memory_format=last)
    for n in (10, 14):
        check(engine, model, whole[:, :, 1 : n + 1, 2:8])  # a crop
        check(engine, model, drawn(2 * 3 * n * 6 + 1)[1:].view(2, 3, n, 6))  # contiguous, and not aligned
        check(engine, model, drawn(2, 3, 1, 6).expand(2, 3, n, 6))
        check(engine, model, drawn(6, n, 3, 2).permute(3, 2, 1, 0))


def test_a_model_that_looks_at_strides() -> None:
    model = Fn(lambda x: x + 1 if x.is_contiguous() else x - 1).eval()
    engine = anabranch.compile(model, [drawn(4, 6)], backend="eager")
    for n in (5, 8):
        check(engine, model, drawn(n, 6))
        check(engine, model, drawn(n, 12)[:, ::2])
        check(engine, model, drawn(6, n).t())


def test_other_structures_and_numbers() -> None:
    def fn(inputs: dict[str, torch.Tensor], factor: float, *, extra: torch.Tensor | None = None) -> Any:
        y = inputs["a"] * factor + inputs["b"].sum()
        return {"y": y if extra is None else y + extra}

    class Model(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs)

    engine = anabranch.compile(Model().eval(), [{"a": drawn(4, 3), "b": drawn(2)}, 0.5], backend="eager")
    for n, factor in ((4, 0.5), (6, 0.5), (9, 0.5), (9, 0.75), (4, 0.75), (7, 0.25)):
        inputs = {"a": drawn(n, 3), "b": drawn(n)}
        assert_same(engine(inputs, factor), fn(inputs, factor))
        assert_same(engine(inputs, factor, extra=drawn(n, 3)), fn(inputs, factor, extra=drawn(n, 3)))


# -- declared ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_declared_range_is_compiled_once(runtime: str, backend: str) -> None:
    model = Mlp().eval()
    engine = anabranch.compile(model, [Input((Dim("batch", 1, 64), 8))], backend=backend, runtime=runtime)
    for n in (64, 2, 17, 33, 1):
        check(engine, model, drawn(n, 8))
    assert engine.stats().specializations == 2, "one for all sizes, one for 1"
    assert engine.stats().waits_for_build == 0
    for n in (0, 65):
        with pytest.raises(anabranch.InputError, match=rf"size 0 of input 0 is {n}; 'batch' was declared as 1 to 64"):
            engine(drawn(n, 8))


def test_sizes_of_one_name_are_equal() -> None:
    batch = Dim("batch", max=16)
    model = Fn(lambda x, y: (x.sum(0), y.sum(0))).eval()
    engine = anabranch.compile(model, [Input((batch, 3)), Input((batch, 4))], backend="eager")
    check(engine, model, drawn(5, 3), drawn(5, 4))
    with pytest.raises(anabranch.InputError, match="size 0 of input 1 is 6, and size 0 of input 0 is 5; both"):
        engine(drawn(5, 3), drawn(6, 4))
    with pytest.raises(anabranch.InputError, match="expected one name to have the same bounds"):
        anabranch.compile(model, [Input((batch, 3)), Input((Dim("batch", max=8), 4))], backend="eager")


def test_dims_of_torch_export() -> None:
    model = Mlp().eval()
    engine = anabranch.compile(model, [Input((torch.export.Dim("n", min=2, max=9), 8))], backend="eager")
    check(engine, model, drawn(9, 8))
    with pytest.raises(anabranch.InputError, match="'n' was declared as 2 to 9"):
        engine(drawn(10, 8))


@pytest.mark.parametrize("dim", [("b a", 0, None), ("b", -1, 3), ("b", 4, 3)])
def test_dims_that_make_no_sense(dim: tuple[Any, ...]) -> None:
    with pytest.raises(anabranch.InputError, match="given; expected"):
        Dim(*dim)


def test_a_size_that_the_model_fixes_cannot_be_declared() -> None:
    def needs_to_know(x: torch.Tensor) -> torch.Tensor:
        return x * sum(range(int(x.shape[0])))  # here

    with pytest.raises(anabranch.UnsupportedModel) as error:
        anabranch.compile(Fn(needs_to_know).eval(), [Input((Dim("n", 2, 9), 3))], backend="eager")
    line = needs_to_know.__code__.co_firstlineno + 1
    assert "('n'), and the model does not let them: size 0 of input 0 has to be" in str(error.value)
    assert f"test_dynamic.py:{line}" in str(error.value)


def test_bounds_that_have_no_ordinary_size() -> None:
    model = Mlp().eval()
    engine = anabranch.compile(model, [Input((Dim("n", 0, 1), 8))], backend="eager")
    for n in (0, 1):
        check(engine, model, drawn(n, 8))


def test_precision() -> None:
    model = Mlp().eval()
    engine = anabranch.compile(
        model, [Input((Dim("n", 2, 9), 8))], backend="eager", precision=torch.bfloat16, runtime="python"
    )
    alone = anabranch.compile(
        model, [drawn(5, 8)], backend="eager", precision=torch.bfloat16, runtime="python", dynamic=False
    )
    for n in (5, 8):
        assert_same(engine(drawn(n, 8)), alone(drawn(n, 8)))
    assert engine.stats().specializations == 1


# -- threads -----------------------------------------------------------------------------------------------------------


def test_threads_call_with_many_sizes_at_once(runtime: str) -> None:
    model = Mlp().eval()
    engine = anabranch.compile(model, [drawn(4, 8)], backend="eager", runtime=runtime)
    lock = threading.Lock()

    def work(i: int) -> None:
        for k in range(60):
            x = drawn(1 + (7 * i + 5 * k) % 23, 8, seed=k)
            y = engine(x)
            with lock:
                assert_same(y, eager(model, [x]))

    on_threads(8, work)
    assert engine.stats().specializations == 3
    assert engine.stats().calls == 480


class Numbers(nn.Module):
    """Returns numbers that Python computes of sizes, beside what kernels compute."""

    def forward(self, x: torch.Tensor) -> Any:
        n, t = x.shape
        y = torch.cat([x, x[:1]]) * n
        return y, n, n * t - 3, n / 3 + t, n % 4 == 1, y.shape, (n // 2, "text"), max(n, t), x


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_numbers_of_sizes_are_returned(runtime: str, backend: str) -> None:
    given = Input((Dim("batch", 2, 64), Dim("length", 2, 64)))
    engine = anabranch.compile(Numbers(), [given], backend=backend, runtime=runtime)
    for n, t in ((5, 9), (2, 2), (9, 5), (33, 64), (4, 4)):
        check(engine, Numbers(), drawn(n, t, seed=n))
    assert engine.stats().specializations == 1
    engine.close()
