"""What an engine refuses, it refuses by name: the cause, the model's line, and what to do. Nothing ends the process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

import anabranch
from anabranch._judge import Rounding, differences
from anabranch.export import Snapshot
from contract.support import Fn, on_threads

pytestmark = pytest.mark.usefixtures("seeded")


def build(fn: Callable[..., Any], *inputs: Any, **options: Any) -> anabranch.Engine:
    return anabranch.compile(Fn(fn).eval(), list(inputs), **{"backend": "eager", **options})


# -- inputs -----------------------------------------------------------------------------------------------------------


def quantized(x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def fake(x: torch.Tensor) -> torch.Tensor:
    return torch._subclasses.FakeTensorMode().from_tensor(x)


#: What is passed, and what its refusal says.
KINDS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "nested": (lambda x: torch.nested.nested_tensor([x, x[:1]]), "nested tensor.*to_padded_tensor"),
    "jagged": (lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged), "NestedTensor"),
    "sparse": (lambda x: x.to_sparse(), r"torch.sparse_coo.*to_dense\(\)"),
    "sparse rows": (lambda x: x.to_sparse_csr(), r"torch.sparse_csr.*to_dense\(\)"),
    "sparse blocks": (lambda x: x.to_sparse_bsr((1, 1)), r"torch.sparse_bsr.*to_dense\(\)"),
    "mkldnn": (lambda x: x.to_mkldnn(), r"torch._mkldnn.*to_dense\(\)"),
    "quantized": (quantized, r"quantized.*dequantize\(\)"),
    "meta": (lambda x: x.to("meta"), r"is on meta.*runs on cpu"),
    "fake": (fake, "FakeTensor"),
    "zero": (lambda x: torch._efficientzerotensor(x.shape), r"zero without memory.*clone\(\)"),
    "requires grad": (lambda x: x.clone().requires_grad_(), r"requires grad.*detach\(\)"),
    "in a list": (lambda x: [x, x.to_sparse()], "input 0 is on|input 1 has layout"),
}


@pytest.fixture(scope="module", params=["native", "python"])
def engine(request: pytest.FixtureRequest) -> anabranch.Engine:
    return build(lambda x: x * 3, torch.randn(2, 3), runtime=request.param)


@pytest.mark.parametrize("name", KINDS)
def test_a_tensor_of_another_kind_is_refused_and_nothing_ends(name: str, engine: anabranch.Engine) -> None:
    make, text = KINDS[name]
    x = torch.randn(2, 3)
    for call in (engine, lambda y: engine.warm([y]), lambda y: build(lambda x: x, y)):
        with pytest.raises(anabranch.InputError, match=text if name != "meta" or call is engine else None):
            call(make(x))
    assert torch.equal(engine(x), x * 3)


def test_transforms_of_the_caller_are_refused(engine: anabranch.Engine) -> None:
    x, ones = torch.randn(2, 3), torch.ones(2, 3)
    calls: list[Callable[[], Any]] = [
        lambda: torch.vmap(engine)(torch.randn(5, 2, 3)),
        lambda: torch.func.jvp(engine, (x,), (ones,)),
        lambda: torch.func.grad(lambda y: engine(y).sum())(x),
        lambda: torch.func.jacrev(engine)(x),
        lambda: torch.func.functionalize(torch.vmap(engine))(torch.randn(5, 2, 3)),
    ]
    for call in calls:
        with pytest.raises(anabranch.InputError, match=r"torch\.func transform.*outside the transform"):
            call()
    assert torch.equal(engine(x), x * 3)


def test_a_tangent_is_not_lost_in_silence(engine: anabranch.Engine) -> None:
    x = torch.randn(2, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones(2, 3))
        for given in (dual, dual.t().t()):
            with torch.no_grad(), pytest.raises(anabranch.InputError, match=r"tangent.*primal"):
                engine(given)
        assert torch.equal(engine(x), x * 3)
        assert torch.equal(engine(forward_ad.unpack_dual(dual).primal), x * 3)


def test_calls_inside_a_trace_of_the_caller_are_refused(engine: anabranch.Engine) -> None:
    x = torch.randn(2, 3)
    with torch._subclasses.FakeTensorMode(), pytest.raises(anabranch.InputError, match=r"FakeTensorMode.*outside"):
        engine(x)
    from torch.fx.experimental.proxy_tensor import make_fx

    with pytest.raises(anabranch.InputError, match="ProxyTorchDispatchMode"):
        make_fx(lambda y: engine(x) + y)(x)
    with pytest.raises(anabranch.UnsupportedModel, match="the model calls an engine"):
        build(lambda y: engine(y) + 1, x, require_full=True)


class Counts(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_harmless_mode_of_the_caller_is_let_alone(engine: anabranch.Engine) -> None:
    with Counts():
        for shape in ((2, 3), (3, 2)):
            x = torch.randn(shape)
            assert torch.equal(engine(x), x * 3)


# -- models -----------------------------------------------------------------------------------------------------------


class Modes(nn.Module):
    """Under ``enable_grad``, with parameters, and other modes inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        with torch.enable_grad():
            y = self.first(x)
            with torch.no_grad():
                y = y + self.first(y)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = self.second(y)
        with torch.set_grad_enabled(True):
            return y * 2, z, self.second(y).relu()


def gradient(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        return torch.autograd.grad(y.sin().sum(), y)[0]


def backward(x: torch.Tensor) -> torch.Tensor | None:
    with torch.enable_grad():
        y = x.detach().clone().requires_grad_()
        (y**3).sum().backward()
        return y.grad


WORKS: dict[str, Callable[..., Any]] = {
    "vmap": lambda x: torch.vmap(lambda row: row.softmax(0) * 2)(x),
    "vmap in vmap": lambda x: torch.vmap(torch.vmap(lambda v: v.sin() + 1))(x),
    "jvp": lambda x: torch.func.jvp(lambda y: y.sin(), (x,), (torch.ones_like(x),)),
    "gradient": gradient,
    "backward": backward,
    "script function": lambda x: scripted(x) + 1,
    "no_grad": lambda x: torch.no_grad()(lambda y: y * 2)(x),
    "inference": lambda x: torch.inference_mode()(lambda y: y * 2)(x) + 1,
}


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x.relu() * 2


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_grad_modes_inside_the_model(backend: str, runtime: str) -> None:
    model = Modes().eval()
    engine = anabranch.compile(model, [torch.randn(3, 4)], backend=backend)
    for x in (torch.randn(3, 4), torch.randn(3, 4)):
        for given, wanted in zip(engine(x), model(x), strict=True):
            torch.testing.assert_close(
                given, wanted.detach(), rtol=2e-2 if given.dtype is torch.bfloat16 else 1e-5, atol=1e-6
            )
            assert not given.requires_grad
    assert "data-dependent" not in engine.explain()


@pytest.mark.parametrize("name", WORKS)
def test_derivatives_and_transforms_inside_the_model(name: str) -> None:
    fn = WORKS[name]
    engine = build(fn, torch.randn(3, 4))
    for x in (torch.randn(3, 4), torch.randn(3, 4)):
        wanted = fn(x)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        given = engine(x)
        assert not differences(given if isinstance(given, tuple) else (given,), tuple(y.detach() for y in wanted))


class Energy(nn.Module):
    """Gradients by weights and by its input of what it computes itself."""

    def __init__(self, gradients: Callable[..., Any]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.gradients = gradients

    def forward(self, x: torch.Tensor) -> Any:
        return self.gradients(self.layers, x)


@torch.enable_grad()
def by_the_input(layers: nn.Module, x: torch.Tensor) -> Any:
    x.requires_grad_()
    energy = layers(x).sum()
    return energy.detach(), -torch.autograd.grad(energy, x)[0]


def by_the_weights(layers: nn.Module, x: torch.Tensor) -> Any:
    weights = list(layers.parameters())
    with torch.enable_grad():
        steps = torch.autograd.grad(layers(x).pow(2).mean(), weights)
    return [w.detach() - step for w, step in zip(weights, steps, strict=True)]


def twice(layers: nn.Module, x: torch.Tensor) -> Any:
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(layers(y).sum(), y, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), y)
    return first.detach(), second


def by_the_library(layers: nn.Module, x: torch.Tensor) -> Any:
    return torch.autograd.functional.jacobian(lambda y: layers(y).sum(0), x)


@pytest.mark.parametrize("gradients", [by_the_input, by_the_weights, twice, by_the_library])
def test_a_model_of_weights_may_compute_gradients(gradients: Callable[..., Any]) -> None:
    model = Energy(gradients).eval()
    with torch.no_grad():
        engine = anabranch.compile(model, [torch.randn(3, 4)], backend="eager")
    for mode in (torch.no_grad, torch.enable_grad):
        for x in (torch.randn(3, 4), torch.randn(3, 4)):
            with mode():
                assert not differences(engine(x.clone()), model(x.clone()))
    assert all(p.grad is None for p in model.parameters())


def has_cache(x: torch.Tensor) -> Any:
    class KeyCache:
        keys = x

    return {"y": x + 1, "past_key_values": KeyCache()}


class Answer:
    def __init__(self, **items: Any) -> None:
        self.items = items


HERE = r"test_refusals\.py:\d+"

#: A model that runs in eager, and what its refusal says.
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "torch.func.grad": (lambda x: torch.func.grad(lambda y: y.sin().sum())(x), r"runs in eager.*torch\.func"),
    # PyTorch 2.11 fails when it has forgotten the line.
    "jacfwd": (lambda x: torch.func.jacfwd(torch.sin)(x), rf"({HERE}|got <class 'torch\.Tensor'>).*torch\.func"),
    "gradient of the input": (lambda x: torch.autograd.grad(x.requires_grad_().sum(), x)[0], rf"{HERE}.*gradients"),
    "numpy": (lambda x: x + float(x.detach().numpy().sum()), rf"{HERE}.*PyTorch's operators"),
    "a branch": (lambda x: x if x.sum() > 0 else -x, rf"{HERE}.*torch\.cond"),
    "nested inside": (lambda x: torch.nested.nested_tensor([x, x]).to_padded_tensor(0.0), f"runs in eager.*{HERE}"),
    "a sparse result": (lambda x: (x, x.to_sparse()), r"torch\.sparse_coo.*to_dense\(\)"),
    "a cache": (has_cache, r"KeyCache.*\['past_key_values'\].*use_cache=False"),
    "an unknown container": (lambda x: [Answer(y=x + 1)], r"Answer.*output\[0\].*register_pytree_node"),
    "a set": (lambda x: {x + 1}, "set.*containers"),
    "a generator": (lambda x: (x * i for i in range(2)), "generator.*containers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_runs_in_eager_is_refused_with_the_cause(name: str) -> None:
    fn, text = REFUSED[name]
    with pytest.raises(anabranch.UnsupportedModel, match=f"(?s){text}"):
        build(fn, torch.randn(3, 4), require_full=True)


#: Of those, what Dynamo has graphs of, with Python between.
IN_FRAGMENTS = ("torch.func.grad", "jacfwd", "numpy", "a branch", "nested inside")


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_torch_export_refuses_runs_in_fragments_or_is_refused_with_the_cause(name: str) -> None:
    fn, text = REFUSED[name]
    if name not in IN_FRAGMENTS:
        with pytest.raises(anabranch.UnsupportedModel, match=f"(?s){text}"):
            build(fn, torch.randn(3, 4))
        return
    engine = build(fn, torch.randn(3, 4))
    for _ in range(3):
        x = torch.randn(3, 4)
        # Dynamo has PyTorch's operators compute what NumPy does.
        assert differences(engine(x), fn(x), rounding=Rounding() if name == "numpy" else None) == []


def _catches(x: torch.Tensor) -> torch.Tensor:
    try:
        return x.view(2, -1) @ torch.ones(5, 3)
    except RuntimeError:
        return x * 2


def _catches_and_branches(x: torch.Tensor) -> torch.Tensor:
    try:
        y = torch.cat([x, x], dim=5)
    except IndexError:
        y = torch.cat([x, x])
    return y + 1 if y.sum() > 0 else y


@pytest.mark.parametrize("fn", [_catches, _catches_and_branches])
def test_a_model_that_catches_what_operators_raise_runs_as_it_is(
    fn: Callable[[torch.Tensor], torch.Tensor], runtime: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = build(fn, torch.randn(3, 4), backend="inductor", runtime=runtime)
    assert "PyTorch's operators run the model as it is" in caplog.text
    assert "PyTorch's operators run it as it is" in engine.explain()

    def work(i: int) -> None:
        for n in (3, 4, 5):
            x = torch.randn(n, 4) + i - 1
            assert torch.equal(engine(x), fn(x))

    on_threads(3, work)
    with pytest.raises(anabranch.UnsupportedModel):
        build(fn, torch.randn(3, 4), require_full=True)


def _appends(items: list[torch.Tensor]) -> torch.Tensor:
    items.append(items[0] * 2)
    return items[0] + items[-1]


def _moves(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named["new"] = named.pop("a") * 2
    return named


def _moves_inside(given: tuple[dict[str, list[torch.Tensor]], int]) -> torch.Tensor:
    given[0]["a"][0] = given[0]["a"][0] * given[1]
    return given[0]["a"][0] + 1


@pytest.mark.parametrize(
    ("fn", "make"),
    [
        (_appends, lambda x: [x, x + 1]),
        (_moves, lambda x: {"a": x, "b": x + 1}),
        (_moves_inside, lambda x: ({"a": [x]}, 3)),
    ],
)
def test_containers_that_a_model_changes_are_the_callers(fn: Any, make: Any, runtime: str) -> None:
    engine = build(fn, make(torch.randn(2, 3)), runtime=runtime)
    assert "the model changes a list or a dict" in engine.explain()

    def work(i: int) -> None:
        for _ in range(4):
            x = torch.randn(2, 3)
            mine, eagers = make(x), make(x)
            assert differences((engine(mine), mine), (fn(eagers), eagers)) == []

    on_threads(3, work)
    with pytest.raises(anabranch.UnsupportedModel, match="changes a list or a dict"):
        build(fn, make(torch.randn(2, 3)), require_full=True)


def test_a_complex_number_is_a_part_of_the_signature(runtime: str) -> None:
    engine = build(lambda x, c: (x * c, c + 1), torch.randn(3), 1 + 2j, runtime=runtime, require_full=True)
    for c in (1 + 2j, 0.5j, 1 + 2j):
        x = torch.randn(3)
        assert differences(engine(x, c), (x * c, c + 1)) == []


#: Of an input, as large or where another one says.
VIEWS_BY_VALUE: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "cut to the longest": lambda x, n: x[:, : n.max()],
    "cut to a number": lambda x, n: (x[: int(n[0])], x.sum()),
    "split": lambda x, n: x.tensor_split(n, 1),
    "selected": lambda x, n: x.select(1, n[0]),
    "indexed": lambda x, n: x[n[1] - 1],
    "of a constant": lambda x, n: (TABLE[: n.max()], x * 2),
}
TABLE = torch.randn(9, 2)


@pytest.mark.parametrize("name", VIEWS_BY_VALUE)
def test_a_result_that_is_a_view_by_values_is_that_view(name: str) -> None:
    fn = VIEWS_BY_VALUE[name]
    x, lengths = torch.randn(3, 9), torch.tensor([2, 3])
    engine = build(fn, x, lengths)
    for given in (lengths, torch.tensor([1, 1]), torch.tensor([3, 2])):
        assert not differences(engine(x, given), fn(x, given), inputs=(x, given))


def test_inputs_are_blamed_where_eager_refuses_them_only() -> None:
    def fn(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 4:
            raise ValueError(f"expected four columns, got {x.shape[1]}")
        return table[x.long()]

    table = torch.randn(9, 3)
    engine = build(fn, torch.ones(2, 4), table)
    with pytest.raises(anabranch.InputError, match=r"does not accept these inputs.*four columns, got 5"):
        engine(torch.ones(2, 5), table)
    with pytest.raises(anabranch.InputError, match=r"does not accept these inputs"):
        build(lambda x: x @ x, torch.randn(2, 3))
    with pytest.raises(anabranch.InputError, match=r"does not accept these inputs"):
        build(lambda x: [1][3], torch.randn(2, 3))


def test_trying_a_model_leaves_it_and_the_random_state_alone() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += x.sum()
            x += torch.rand(3)
            return x + float(x.numpy().sum())

    model, x = Noisy(), torch.randn(2, 3)
    before, state = x.clone(), torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(anabranch.UnsupportedModel, match="numpy"):
            anabranch.compile(model, [x], backend="eager", require_full=True)
        assert torch.equal(x, before)
        assert not model.seen.any()
        assert torch.equal(torch.get_rng_state(), state)


def test_torchscript_is_refused_by_name() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ReLU(), inner])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](self.blocks[0](x))

    x = torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear, traced = torch.jit.script(nn.Linear(3, 2)), torch.jit.trace(nn.Linear(3, 2), x)
    for model, part in ((linear, "the model"), (traced, "the model"), (Wrapper(linear), "'blocks.1'")):
        with pytest.raises(anabranch.UnsupportedModel, match=f"{part}.*TorchScript.*Python module"):
            anabranch.compile(model.eval(), [x], backend="eager")


def test_weights_of_another_kind_are_refused_by_name() -> None:
    class Holds(nn.Module):
        def __init__(self, table: Any) -> None:
            super().__init__()
            self.register_buffer("table", table)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    x = torch.randn(2, 3)
    for kind in ("nested", "sparse", "mkldnn", "quantized", "fake"):
        with pytest.raises(anabranch.UnsupportedModel, match="'table' is"):
            anabranch.compile(Holds(KINDS[kind][0](x)), [x], backend="eager")
    with pytest.raises(anabranch.UnsupportedModel, match="'weight' is not initialized"):
        anabranch.compile(nn.LazyLinear(3), [x], backend="eager")


def test_mixed_types_that_fake_tensors_let_pass_are_the_inputs_fault() -> None:
    # On a GPU the model is tried on fake tensors, whose products take any types.
    from anabranch.export._isolation import run_on_zeros

    model = Snapshot.of(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()).eval())
    assert run_on_zeros(model, (torch.ones(2, 8),), {}) is None
    error = run_on_zeros(model, (torch.ones(2, 8, dtype=torch.float64),), {})
    assert error is not None
    assert "dtype" in str(error)
    assert run_on_zeros(model, (torch.ones(2, 7),), {}) is not None
