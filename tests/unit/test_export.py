"""From a model to a flat graph: what a signature is, what each output is, and which models are refused by name."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anabranch
from anabranch._judge import differences
from anabranch.export import TensorSpec, flatten_call, leaf_key

pytestmark = pytest.mark.usefixtures("seeded")

CPU = torch.device("cpu")
both_backends = pytest.mark.parametrize("backend", ["eager", "inductor"])


class Fn(nn.Module):
    """A function as a model."""

    def __init__(self, fn: Any, **buffers: torch.Tensor) -> None:
        super().__init__()
        self.fn = fn
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


def build(fn: Any, *inputs: Any, backend: str = "eager", **options: Any) -> anabranch.Engine:
    model = fn if isinstance(fn, nn.Module | torch.export.ExportedProgram) else Fn(fn)
    return anabranch.compile(model, list(inputs), backend=backend, **options)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


# -- signatures -------------------------------------------------------------------------------------------------------


def key(x: Any) -> tuple[Any, ...]:
    return leaf_key(x, 0, CPU)


def test_key_of_contiguous_tensors_is_shape_and_dtype() -> None:
    assert key(torch.randn(2, 3)) == key(torch.randn(2, 3))
    assert key(torch.randn(2, 3)) != key(torch.randn(3, 2))
    assert key(torch.randn(2, 3)) != key(torch.randn(2, 3).half())
    assert hash(key(torch.randn(2, 3))) == hash(key(torch.randn(2, 3)))


@pytest.mark.parametrize(
    ("name", "make", "strides"),
    [
        ("channels_last", lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), (60, 1, 15, 3)),
        ("transposed", lambda: torch.randn(4, 6).t(), (1, 6)),
        ("permuted", lambda: torch.randn(2, 3, 4).permute(2, 0, 1), (1, 12, 4)),
        # What follows is not dense: the strides are those of a dense copy.
        ("sliced columns", lambda: torch.randn(4, 10)[:, 2:7], (5, 1)),
        ("every other", lambda: torch.randn(20)[::2], (1,)),
        ("expanded", lambda: torch.randn(1, 5).expand(3, 5), (5, 1)),
        ("sliced channels_last", lambda: torch.randn(2, 8, 4, 5).to(memory_format=torch.channels_last)[:, :3], None),
    ],
)
def test_strides_are_canonical(name: str, make: Any, strides: tuple[int, ...] | None) -> None:
    x = make()
    expected = strides or tuple(x.clone(memory_format=torch.preserve_format).stride())
    assert TensorSpec.of(x).strides == expected
    assert TensorSpec.of(torch.empty_strided(x.shape, expected)).strides == expected, "canonical is a fixed point"


def test_key_tells_dense_layouts_apart() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert key(x) != key(x.to(memory_format=torch.channels_last))
    assert key(torch.randn(4, 4)) != key(torch.randn(4, 4).t())


def test_strides_of_size_one_and_empty_dimensions_do_not_matter() -> None:
    assert key(torch.randn(1, 5)) == key(torch.empty_strided((1, 5), (99, 1)))
    assert key(torch.randn(3, 1)) == key(torch.empty_strided((3, 1), (1, 7)))
    assert key(torch.empty(0, 3)) == key(torch.empty_strided((0, 3), (7, 2)))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 4),
        torch.randn(4, 3).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(0, 4),
        torch.randn(()),
    ],
    ids=["contiguous", "transposed", "channels_last", "empty", "scalar"],
)
def test_a_spec_matches_the_aligned_tensor_it_was_made_from(x: torch.Tensor) -> None:
    spec = TensorSpec.of(x)
    assert spec.matches(x)
    assert spec.nbytes == x.numel() * 4
    assert spec.empty(CPU).stride() == x.stride()


def test_a_spec_does_not_match_a_misaligned_or_strided_tensor() -> None:
    spec = TensorSpec.of(torch.randn(8))
    base = torch.randn(20)
    assert base.data_ptr() % 16 == 0
    assert not spec.matches(base[1:9])
    assert not spec.matches(base[0:16:2])
    assert spec.matches(base[4:12])


def test_synthesized_values_leave_the_callers_random_state_alone() -> None:
    spec = TensorSpec((100,), (1,), torch.float32)
    before = torch.get_rng_state()
    x = spec.synthesize(CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 <= x.min() < x.max() < 1


def test_numbers_are_keyed_by_type_and_bits() -> None:
    assert key(1) != key(True)
    assert key(1) != key(1.0)
    assert key(0.0) != key(-0.0)
    assert key(math.nan) == key(float("nan"))
    assert key("a") != key("b")
    assert key(None) == key(None)


# -- Input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "like"),
    [
        (anabranch.Input((2, 3)), torch.empty(2, 3)),
        (anabranch.Input([2, 3], torch.half), torch.empty(2, 3, dtype=torch.half)),
        (
            anabranch.Input((2, 3, 4, 5), memory_format=torch.channels_last),
            torch.empty(2, 3, 4, 5, memory_format=torch.channels_last),
        ),
        (
            anabranch.Input((2, 3, 2, 4, 5), memory_format=torch.channels_last_3d),
            torch.empty(2, 3, 2, 4, 5, memory_format=torch.channels_last_3d),
        ),
        (anabranch.Input((0, 3), torch.int64), torch.empty(0, 3, dtype=torch.int64)),
        (anabranch.Input(()), torch.empty(())),
    ],
    ids=["float", "half", "channels_last", "channels_last_3d", "empty", "scalar"],
)
def test_input_stands_for_a_tensor(spec: anabranch.Input, like: torch.Tensor) -> None:
    engine = build(lambda x: x + 1, spec)
    x = torch.empty_like(like).copy_(torch.randn(like.shape) * 10)
    assert same(engine(x), x + 1)
    assert engine.stats().specializations == 1, "the call must find what the Input compiled"


def test_input_refuses_what_no_tensor_has() -> None:
    with pytest.raises(anabranch.InputError, match="sizes must be 0 or more"):
        anabranch.Input((2, -1))
    with pytest.raises(anabranch.InputError, match="needs 4 sizes"):
        anabranch.Input((2, 3), memory_format=torch.channels_last)


def test_input_inside_a_structure() -> None:
    engine = build(lambda d: d["a"] - d["b"][0], {"a": anabranch.Input((3,)), "b": [anabranch.Input((3,))]})
    a, b = torch.randn(2, 3)
    assert same(engine({"a": a, "b": [b]}), a - b)


# -- structures -------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "left right")


@dataclass
class Plain:
    x: torch.Tensor
    scale: float


@dataclass
class Nested:
    inner: Plain
    items: list[torch.Tensor]


@dataclass
class Registered:
    x: torch.Tensor


torch.export.register_dataclass(Registered)


@dataclass
class Answer:
    total: torch.Tensor
    parts: tuple[torch.Tensor, ...]


def test_dicts_and_nested_tuples_keep_their_structure() -> None:
    def fn(d: dict[str, Any], rest: Any) -> Any:
        return {"s": (d["a"] - d["b"], [rest[0][0] * 2]), "t": OrderedDict(k=rest[1] - 1)}

    a, b, c, d = torch.randn(4, 3)
    engine = build(fn, {"a": a, "b": b}, ((c,), d))
    given, expected = engine({"a": d, "b": c}, ((b,), a)), fn({"a": d, "b": c}, ((b,), a))
    assert type(given["t"]) is OrderedDict
    assert same(given["s"][0], expected["s"][0])
    assert same(given["s"][1][0], expected["s"][1][0])
    assert same(given["t"]["k"], expected["t"]["k"])


def test_a_dict_in_another_order_gives_the_right_values() -> None:
    a, b = torch.randn(2, 3)
    engine = build(lambda d: d["a"] - 2 * d["b"], {"a": a, "b": b})
    assert same(engine({"b": b, "a": a}), a - 2 * b)


def test_namedtuples_in_and_out() -> None:
    engine = build(lambda p: Pair(p.right - 1, p.left * 3), Pair(torch.randn(3), torch.randn(2)))
    left, right = torch.randn(3), torch.randn(2)
    out = engine(Pair(left, right))
    assert type(out) is Pair
    assert same(out.left, right - 1)
    assert same(out.right, left * 3)


def test_dataclasses_need_not_be_registered() -> None:
    def fn(n: Nested) -> Answer:
        y = n.inner.x * n.inner.scale
        return Answer(y + n.items[0], (y, n.items[1] * 2))

    def make(scale: float) -> Nested:
        return Nested(Plain(torch.randn(3), scale), [torch.randn(3), torch.randn(3)])

    engine = build(fn, make(2.5))
    for scale in (2.5, 3.5):
        given = make(scale)
        out, expected = engine(given), fn(given)
        assert type(out) is Answer
        assert same(out.total, expected.total)
        assert all(map(same, out.parts, expected.parts))
    assert engine.stats().specializations == 2, "a number in a dataclass is part of the signature"


def test_registered_dataclasses() -> None:
    engine = build(lambda r: Registered(r.x - 1), Registered(torch.randn(3)))
    x = torch.randn(3)
    assert same(engine(Registered(x)).x, x - 1)


class Keywords(nn.Module):
    def forward(self, a: torch.Tensor, *, b: torch.Tensor, c: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return (a - 2 * b + 3 * c) * scale


@pytest.mark.parametrize("at_compile", ["bc", "cb"])
def test_keyword_inputs_in_any_order(at_compile: str) -> None:
    a, b, c = torch.randn(3, 4)
    values = {"b": b, "c": c}
    engine = anabranch.compile(Keywords(), [a], kwargs={k: values[k] for k in at_compile}, backend="eager")
    expected = Keywords()(a, b=b, c=c)
    assert same(engine(a, b=b, c=c), expected)
    assert same(engine(a, c=c, b=b), expected)
    assert engine.stats().specializations == 1
    assert same(engine(c=c, a=a, b=b), expected)


def test_a_mapping_of_inputs_is_taken_as_keywords() -> None:
    a, b, c = torch.randn(3, 4)
    engine = anabranch.compile(Keywords(), {"c": c, "a": a, "b": b}, backend="eager")
    assert same(engine(a=a, b=b, c=c), Keywords()(a, b=b, c=c))
    assert engine.stats().specializations == 1


def test_number_string_and_none_inputs_specialize() -> None:
    def fn(x: torch.Tensor, n: Any, mode: str | None) -> torch.Tensor:
        y = x if n is None else x * n
        return y.relu() if mode == "relu" else y - 1

    x = torch.randn(5)
    engine = build(fn, x, 2, "relu")
    cases: list[tuple[Any, str | None]] = [(2, "relu"), (3, "relu"), (2.5, None), (None, "other"), (True, "relu")]
    for n, mode in [*cases, *cases]:
        assert same(engine(x, n, mode), fn(x, n, mode)), (n, mode)
    assert engine.stats().specializations == len(cases)


def test_negative_zero_is_not_zero() -> None:
    def fn(x: torch.Tensor, s: float) -> torch.Tensor:
        return torch.copysign(x, torch.tensor(s))

    x = torch.randn(5)
    engine = build(fn, x, 0.0)
    assert same(engine(x, 0.0), x.abs())
    assert same(engine(x, -0.0), -x.abs())


def test_flattening_a_call_ignores_keyword_order() -> None:
    a, b = torch.randn(2, 3)
    first, second = flatten_call((), {"b": b, "a": a}), flatten_call((), {"a": a, "b": b})
    assert first[1] == second[1]
    assert all(x is y for x, y in zip(first[0], second[0], strict=True))


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_the_same_tensor_twice_is_one_object() -> None:
    def fn(x: torch.Tensor) -> Any:
        y = x * 2
        return y, x + 1, y

    first, middle, last = build(fn, torch.randn(3))(torch.randn(3))
    assert first is last
    assert first is not middle


@both_backends
def test_views_of_one_computed_tensor_share_storage_as_in_eager(backend: str) -> None:
    def fn(x: torch.Tensor) -> Any:
        y = x.relu() + 1
        return y, y.t(), y[1:, 2], y.flatten()

    x = torch.randn(4, 5)
    out, expected = build(fn, x, backend=backend)(x), fn(x)
    for o, e in zip(out, expected, strict=True):
        assert same(o, e)
        assert o.storage_offset() == e.storage_offset()
        assert o.untyped_storage().data_ptr() == out[0].untyped_storage().data_ptr()
    out[0].zero_()
    assert not out[2].any()


@pytest.mark.clause(4)
def test_an_input_handed_back_is_the_same_object() -> None:
    engine = build(lambda x, y: (y, x + y, x), torch.randn(3), torch.randn(3))
    x, y = torch.randn(2, 3)
    out = engine(x, y)
    assert out[0] is y
    assert out[2] is x
    assert same(out[1], x + y)


def test_a_non_contiguous_input_handed_back_is_the_callers_own() -> None:
    engine = build(lambda x: (x, x[1:], x * 2), torch.randn(4, 3))
    x = torch.randn(4, 9)[:, ::3]
    given, view, computed = engine(x)
    assert given is x
    assert view.data_ptr() == x[1:].data_ptr()
    assert same(view, x[1:])
    assert torch.equal(computed, x * 2)


def test_views_of_inputs_alias_the_input() -> None:
    engine = build(lambda x: (x.t(), x[1:].flatten(), x.sum()), torch.randn(3, 4))
    x = torch.randn(3, 4)
    transposed, flat, total = engine(x)
    assert same(transposed, x.t())
    assert same(total, x.sum())
    x[2, 3] = 42.0
    assert transposed[3, 2] == 42.0
    assert flat[-1] == 42.0


class HandsBack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("scratch", torch.randn(4), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x), self.linear.weight, self.mean, self.scratch, self.linear.weight.t()


@both_backends
def test_parameters_and_buffers_handed_back_are_the_models_own(backend: str) -> None:
    model = HandsBack()
    x = torch.randn(2, 3)
    y, weight, mean, scratch, transposed = build(model, x, backend=backend)(x)
    torch.testing.assert_close(y, model.linear(x).detach())
    assert weight is model.linear.weight
    assert mean is model.mean
    assert scratch is model.scratch
    assert transposed.data_ptr() == model.linear.weight.data_ptr()
    assert transposed.shape == (3, 4)


def test_constants_come_back_as_they_are() -> None:
    engine = build(lambda x: {"n": 3, "s": "text", "none": None, "x": x + 1, "f": 2.5}, torch.randn(2))
    x = torch.randn(2)
    out = engine(x)
    assert (out["n"], out["s"], out["none"], out["f"]) == (3, "text", None, 2.5)
    assert same(out["x"], x + 1)


def test_a_model_that_computes_nothing() -> None:
    engine = build(lambda x: (x, 7), torch.randn(2))
    x = torch.randn(2)
    out = engine(x)
    assert out[0] is x
    assert out[1] == 7
    assert engine.plan.steps == ()


def test_a_model_without_inputs() -> None:
    model = Fn(lambda: torch.arange(5) * 3)
    engine = anabranch.compile(model, backend="eager")
    assert same(engine(), torch.arange(5) * 3)
    assert engine() is not engine()


@both_backends
def test_a_tensor_constant_is_fresh_at_each_call(backend: str) -> None:
    engine = build(lambda x: (torch.tensor([1.0, 2.0, 3.0]), x + torch.tensor(2.5)), torch.randn(3), backend=backend)
    x = torch.randn(3)
    first, _ = engine(x)
    first.add_(10)
    again, y = engine(x)
    assert again.tolist() == [1.0, 2.0, 3.0]
    assert same(y, x + 2.5)


@both_backends
def test_in_place_work_on_temporaries_and_views_stays_right(backend: str) -> None:
    def fn(x: torch.Tensor) -> Any:
        y = x + 1
        row = y[1]
        row.mul_(3)
        y[:, 0] = 7.0
        return y, row

    x = torch.randn(3, 4)
    out = build(fn, x, backend=backend)(x)
    for o, e in zip(out, fn(x), strict=True):
        assert same(o, e)


# -- weights ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_tied_weights(precision: torch.dtype | None) -> None:
    model = Tied()
    ids = torch.randint(0, 7, (2, 5))
    engine = build(model, torch.randint(0, 7, (2, 5)), precision=precision)
    out = engine(ids)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out, model(ids).detach(), atol=0 if precision is None else 0.1, rtol=0)
    assert sum("weight" in b.name for b in engine.plan.buffers) in (1, 2)


def test_weights_are_shared_with_the_module_not_copied() -> None:
    model = nn.Linear(3, 4)
    x = torch.randn(2, 3)
    engine = build(model, x)
    with torch.no_grad():
        model.weight.mul_(2)
    torch.testing.assert_close(engine(x), model(x).detach())


def test_non_persistent_buffers_are_weights() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("offset", torch.randn(3), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - self.offset

    model = Model()
    x = torch.randn(3)
    assert same(build(model, x)(x), x - model.offset)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_parameter_changed_in_place_is_refused_by_name() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.layer.bias.add_(1)
            return self.layer(x)

    with pytest.raises(anabranch.UnsupportedModel, match=r"writes its parameter 'layer\.bias'.*register_buffer"):
        build(Written(), torch.randn(3))


def test_control_flow_on_data_is_refused() -> None:
    with pytest.raises(anabranch.UnsupportedModel, match=r"torch\.cond"):
        build(lambda x: x + 1 if x.sum() > 0 else x * 2, torch.randn(3), require_full=True)


def test_cond_takes_the_branch_of_each_call() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,))

    engine = build(fn, torch.randn(3), backend="inductor")
    x = torch.rand(3) + 0.5
    assert same(engine(x), x + 1)
    assert same(engine(-x), -x * 2)
    assert "cond" in engine.explain()


# -- random ops -------------------------------------------------------------------------------------------------------

RANDOM = {
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "rand_like": lambda x: x + torch.rand_like(x),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()) - x,
    "randn": lambda x: torch.randn(x.shape) * x,
}


@pytest.mark.parametrize(
    ("op", "backend"),
    [*((op, "eager") for op in RANDOM), ("dropout", "inductor"), ("rand_like", "inductor"), ("bernoulli", "inductor")],
)
def test_random_ops_draw_anew_at_each_call_what_eager_would(op: str, backend: str) -> None:
    fn, x = RANDOM[op], torch.randn(64)
    engine = build(fn, x, backend=backend)
    torch.manual_seed(5)
    first, second = engine(x), engine(x)
    assert not torch.equal(first, second), "frozen random numbers"
    torch.manual_seed(5)
    assert torch.equal(first, fn(x))
    assert torch.equal(second, fn(x))
    assert "random" in engine.explain()


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("sdpa", lambda q: F.scaled_dot_product_attention(q, q, q)),
        ("dropout off", lambda q: F.dropout(q, 0.5, training=False) + 1),
        ("dropout module in eval", nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()),
        ("transformer in eval", nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_only_could_be_random_is_not_counted_random(name: str, fn: Any) -> None:
    q = torch.randn(2, 5, 4)
    engine = build(fn, q)
    assert "random" not in engine.explain()
    torch.testing.assert_close(engine(q), fn(q).detach())


def test_sdpa_with_dropout_is_random() -> None:
    q = torch.randn(1, 2, 8, 4)
    engine = build(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), q)
    assert "random" in engine.explain()
    assert not torch.equal(engine(q), engine(q))


# -- the default dtype ------------------------------------------------------------------------------------------------

COUNTS = torch.tensor([[3, 0, 2], [5, 1, 4]])


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (torch.ones(3), torch.zeros(2, 3) - x, torch.full((2,), 1.5)),
        lambda x: (torch.arange(0, 1, 0.25), torch.linspace(0, 1, 5), torch.eye(3), torch.hann_window(6)),
        lambda x: (x * 2.5, x / 2, x / (x + 1), 1.5 - x, x**0.5, x.sqrt(), x.sigmoid(), torch.atan2(x, x + 1)),
        lambda x: (
            (x > 1) * 0.5,
            torch.where(x > 1, x, 7),
            torch.where(x > 1, 0.5 * x, 7.0),
            x.exp().sum(),
        ),
        lambda x: (x.float().mean(0), x.to(torch.float16) * 2, x.half() / (x + 1), x // 2, x + 1, x.clamp(max=1.5)),
        lambda x: (torch.tensor([1.5, 2.5]) * 2, x.double() * 2.5, torch.ones_like(x), x.new_zeros(2)),
    ],
    ids=["factories", "ranges", "promotion", "where", "explicit", "other types"],
)
def test_the_default_dtype_of_the_call_changes_nothing(fn: Any) -> None:
    expected = fn(COUNTS)
    engine = build(fn, COUNTS)
    torch.set_default_dtype(torch.float64)
    try:
        out = engine(COUNTS)
    finally:
        torch.set_default_dtype(torch.float32)
    for o, e in zip(out, expected, strict=True):
        assert same(o, e), f"{o} {o.dtype}, not {e} {e.dtype}"


# -- shapes that depend on data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("nonzero", lambda x: (x > 0).nonzero()),
        ("masked_select", lambda x: torch.masked_select(x, x > 0) * 2),
        ("boolean index", lambda x: (x[x > 0] + 1, x[0])),
        ("unique", lambda x: torch.unique(x.round())),
        ("item", lambda x: x * x.sum().item()),
        ("item out", lambda x: (x + 1, x.sum().item())),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_data_dependent_shapes_follow_the_data(name: str, fn: Any) -> None:
    try:
        engine = build(fn, torch.randn(3, 4), backend="inductor")
    except anabranch.UnsupportedModel as e:
        pytest.fail(f"refused, though torch.export takes it: {e}")
    for x in (torch.randn(3, 4), torch.rand(3, 4) + 1, -torch.rand(3, 4) - 1):
        out, expected = engine(x), fn(x)
        outs = out if isinstance(out, tuple) else (out,)
        expecteds = expected if isinstance(expected, tuple) else (expected,)
        for o, e in zip(outs, expecteds, strict=True):
            assert same(o, e) if isinstance(e, torch.Tensor) else o == pytest.approx(e)
    assert "data-dependent" in engine.explain()


#: Operators one by one: whether an engine has to ask for values on the host. ``i`` are integers from 0 to 3.
DEPENDS: dict[str, tuple[bool, Any]] = {
    "index": (False, lambda x, i: x[i] * 2),
    "index of two dimensions": (False, lambda x, i: x[i, i]),
    "index with a slice": (False, lambda x, i: x[1:, i]),
    "index_put": (False, lambda x, i: x.index_put((i,), x[:3])),
    "index_put, added": (False, lambda x, i: x.index_put((i, i), x[0, :3], accumulate=True)),
    "assignment": (False, lambda x, i: torch.zeros_like(x).index_put_((i,), x.new_ones(()))),
    "index_select": (False, lambda x, i: x.index_select(1, i)),
    "index_add": (False, lambda x, i: x.index_add(0, i, x[:3])),
    "index_copy": (False, lambda x, i: x.index_copy(0, i.clamp(0, 0)[:1], x[:1] + 1)),
    "index_fill": (False, lambda x, i: x.index_fill(0, i, 2.0)),
    "gather": (False, lambda x, i: x.gather(0, i[None])),
    "take": (False, lambda x, i: x.take(i)),
    "take_along_dim": (False, lambda x, i: x[:, :3].take_along_dim(i[None], 0)),
    "scatter": (False, lambda x, i: x.scatter(0, i[None], 1.0)),
    "scatter_add": (False, lambda x, i: x.scatter_add(0, i[None], x[:1, :3])),
    "scatter_reduce": (False, lambda x, i: x.scatter_reduce(0, i[None], x[:1, :3], "amax")),
    "embedding": (False, lambda x, i: torch.nn.functional.embedding(i, x)),
    "one_hot": (False, lambda x, i: torch.nn.functional.one_hot(i, 4) * x[:3]),
    "masked_fill": (False, lambda x, i: x.masked_fill(x > 0, 1.0)),
    "masked_scatter": (False, lambda x, i: x.masked_scatter(x > 0, x.flip(0))),
    "where": (False, lambda x, i: torch.where(x > 0, x, -x)),
    "topk": (False, lambda x, i: x.topk(2)),
    "sort": (False, lambda x, i: x.sort(0)),
    "argmax": (False, lambda x, i: x[x.argmax(0)]),
    "cumsum": (False, lambda x, i: x.cumsum(0)),
    "searchsorted": (False, lambda x, i: torch.searchsorted(x.sort().values, x)),
    "bucketize": (False, lambda x, i: torch.bucketize(x, torch.tensor([-0.5, 0.0, 0.5]))),
    "histc": (False, lambda x, i: x.histc(4, -1, 1)),
    "repeat_interleave, sized": (False, lambda x, i: x[:3].repeat_interleave(i * 0 + 2, 0, output_size=6)),
    "tril_indices": (False, lambda x, i: x[tuple(torch.tril_indices(4, 4))]),
    "repeat_interleave": (True, lambda x, i: x[:3].repeat_interleave(i, 0) + 1),
    "bincount": (True, lambda x, i: torch.bincount(i, minlength=4)),
    "index_put of a mask": (True, lambda x, i: x.index_put((x > 0,), x.new_ones(()))),
    "index of a mask": (True, lambda x, i: x[x > 0] + 1),
    "where of one argument": (True, lambda x, i: torch.where(x > 0)),
    "unique_consecutive": (True, lambda x, i: torch.unique_consecutive(i)),
    "argwhere": (True, lambda x, i: torch.argwhere(x > 0)),
    "item": (True, lambda x, i: x * x.amax().item()),
}


@pytest.mark.parametrize("name", DEPENDS)
def test_what_depends_on_data(name: str) -> None:
    depends, fn = DEPENDS[name]
    engine = build(fn, torch.randn(4, 4), torch.tensor([1, 0, 3]))
    assert engine._first().program.data_dependent is depends, engine.explain()
    for k in range(3):
        x, i = torch.randn(4, 4), torch.tensor([k, 3, 1])
        assert not differences(engine(x, i), fn(x, i), inputs=[x, i])


# -- exported programs and files --------------------------------------------------------------------------------------


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: torch.compile(net, backend="eager"),
        nn.DataParallel,
        lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
    ],
    ids=["torch.compile", "DataParallel", "both"],
)
def test_what_wraps_a_model_is_taken_off(wrap: Any) -> None:
    net = small_net()
    engine = anabranch.compile(wrap(net), [torch.randn(3, 6)], backend="eager")
    x = torch.randn(3, 6)
    assert torch.equal(engine(x), net(x).detach())
    assert "Sequential" in repr(engine)


class Encodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 2)
        self.register_buffer("calls", torch.zeros(5))

    @torch.no_grad()
    def encode(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return self.first(x).tanh() * scale

    def count(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.first(x) + self.calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.encode(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_method_is_a_model(backend: str, runtime: str) -> None:
    model = Encodes().eval()
    options: dict[str, Any] = {"backend": backend, "runtime": runtime, "require_full": True}
    engine = anabranch.compile(model.encode, [torch.randn(3, 6)], kwargs={"scale": 2.0}, **options)
    assert "Encodes.encode" in repr(engine)
    for n, scale in ((3, 2.0), (3, 0.5), (4, 0.25)):
        x = torch.randn(n, 6)
        torch.testing.assert_close(engine(x, scale=scale), model.encode(x, scale=scale))
    x, counting = torch.randn(3, 6), anabranch.compile(model.count, [torch.randn(3, 6)], **options).session()
    for n in (1, 2):
        torch.testing.assert_close(counting(x), (model.first(x) + n).detach())
    assert list(counting.state) == ["owner.calls"]
    assert not model.calls.any()


def test_an_exported_program_defaults_to_its_own_example_inputs() -> None:
    net = small_net()
    exported = torch.export.export(net, (torch.randn(3, 6),))
    engine = anabranch.compile(exported, backend="eager")
    x = torch.randn(3, 6)
    torch.testing.assert_close(engine(x), net(x).detach())
    assert engine.stats().specializations == 1


def test_an_exported_program_of_static_shape_refuses_others() -> None:
    engine = anabranch.compile(torch.export.export(small_net(), (torch.randn(3, 6),)), backend="eager")
    with pytest.raises(anabranch.InputError, match=r"float32\[4, 6\]"):
        engine(torch.randn(4, 6))
    assert engine(torch.randn(3, 6)).shape == (3, 2)


def test_an_exported_program_with_dynamic_shapes_takes_new_ones() -> None:
    net = small_net()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(net, (torch.randn(3, 6),), dynamic_shapes=({0: batch},))
    engine = anabranch.compile(exported, backend="eager")
    for n in (3, 8, 1):
        x = torch.randn(n, 6)
        torch.testing.assert_close(engine(x), net(x).detach())


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_an_exported_program_in_another_precision(precision: torch.dtype) -> None:
    net = small_net()
    engine = anabranch.compile(torch.export.export(net, (torch.randn(3, 6),)), backend="eager", precision=precision)
    x = torch.randn(3, 6)
    assert engine(x).dtype is torch.float32
    torch.testing.assert_close(engine(x), net(x).detach(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("as_text", [True, False], ids=["str", "Path"])
def test_a_pt2_file(tmp_path: Path, as_text: bool) -> None:
    net = small_net()
    path = tmp_path / "small.pt2"
    torch.export.save(torch.export.export(net, (torch.randn(3, 6),)), path)
    engine = anabranch.compile(str(path) if as_text else path, backend="eager")
    x = torch.randn(3, 6)
    torch.testing.assert_close(engine(x), net(x).detach())
    assert "small" in repr(engine)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated"])
def test_a_bad_pt2_file_is_an_input_error_with_its_path(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.pt2"
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a zip")
    elif damage == "truncated":
        torch.export.save(torch.export.export(small_net(), (torch.randn(3, 6),)), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(anabranch.InputError, match=r"torch\.export\.save") as info:
        anabranch.compile(path, [torch.randn(3, 6)], backend="eager")
    assert str(path) in str(info.value)


def test_compiling_leaves_the_random_state_and_the_modes_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout()).eval()
    before = torch.get_rng_state()
    build(model, anabranch.Input((2, 3)))
    build(RANDOM["rand_like"], anabranch.Input((2, 3)))
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
