"""precision="mixed": each operator in the type that it can bear; what overflows in plain half does not here."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_precision import EXACT, MIXED
from tiny_transformers import MODELS
from torch import nn
from torch.nn import functional as F

import anabranch
from anabranch import InputError, Mixed
from contract.overflowing import NETWORKS
from contract.support import has_memory

pytestmark = pytest.mark.usefixtures("seeded")

#: Of the networks that overflow, relative to the result's norm. The largest is that of the norm of sums, whose first
#: layer's results lie close together.
BUDGET = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


def compiled(model: nn.Module, *inputs: Any, precision: Any = "mixed", **options: Any) -> anabranch.Engine:
    options = {"backend": "eager", "runtime": "python", **options}
    return anabranch.compile(model.eval(), list(inputs), precision=precision, **options)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def told(engine: anabranch.Engine) -> dict[str, Any]:
    """What the engine says of the precision of its first signature."""
    found: dict[str, Any] = engine.summary()["signatures"][0]["precision"]
    return found


def reasons(engine: anabranch.Engine) -> dict[str, str]:
    return {entry["operator"]: entry["why"] for entry in told(engine)["float32"]}


# -- networks that overflow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["mixed", "mixed-bf16"])
@pytest.mark.parametrize(
    ("name", "backend", "runtime"),
    [
        *((name, "eager", "native") for name in NETWORKS),
        ("norm_of_sums", "eager", "python"),
        ("large_logits", "inductor", "native"),
        ("growing_stream", "inductor", "python"),
    ],
)
def test_what_overflows_in_plain_half_is_finite_and_near(name: str, backend: str, runtime: str, precision: str) -> None:
    model, draw = NETWORKS[name]()
    inputs = [draw() for _ in range(3)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        plain = copy.deepcopy(model).half()
        assert not all(torch.isfinite(plain(x.half())).all() for x in inputs)
    dtype = torch.float16 if precision == "mixed" else torch.bfloat16
    like = anabranch.Input(tuple(inputs[0].shape))  # no values: the graph alone decides
    engine = compiled(model, like, precision=precision, backend=backend, runtime=runtime)
    for x, e in zip(inputs, expected, strict=True):
        y = engine(x)
        assert y.dtype is torch.float32
        assert error(y, e) < BUDGET[dtype]
    assert told(engine)["dtype"] == str(dtype).removeprefix("torch.")
    assert told(engine)["share_half"] >= 0.8


FEW = ("vit", "llama", "bert", "t5", "whisper")


@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in FEW)]
)
def test_most_of_the_work_of_public_architectures_is_in_half(name: str) -> None:
    model, make = MODELS[name]()
    given = make(torch.Generator().manual_seed(1))
    engine = anabranch.compile(model, kwargs=given, backend="eager", runtime="python", precision="mixed")
    assert told(engine)["share_half"] >= 0.8
    other = make(torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, result = _floats(model(**other)), _floats(engine(**other))
        with torch.autocast("cpu", dtype=torch.float16):
            peer = _floats(model(**other))
    assert len(expected) == len(result) > 0
    for e, r, p in zip(expected, result, peer, strict=True):
        assert r.dtype is e.dtype
        # The second term: where autocast rounds nothing, so may we.
        assert error(r, e) <= 1.5 * error(p, e) + 2e-4


def _floats(result: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_floating_point()]


# -- what decides ---------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) / 4
        y: torch.Tensor = self.norm(x + scores.softmax(-1) @ self.v(x))
        return y


def two() -> nn.Module:
    return nn.Sequential(_Block(), _Block())


def test_scores_norms_and_streams_stay_in_float32() -> None:
    engine = compiled(two(), torch.randn(2, 5, 16))
    why = reasons(engine)
    assert why["0:aten.matmul#0"].startswith("a softmax is taken of it")
    assert "0:aten.matmul#1" in told(engine)["half"]
    assert why["1.norm:aten.layer_norm#0"] == "a norm: squares are summed"
    assert why["0:aten.softmax#0"].startswith("exponentials")
    assert why["0:aten.add#0"] == "adds to a stream in float32"
    text = engine.explain()
    assert "float32, a norm: squares are summed: 2 layer_norm" in text
    assert "of floating-point operations in half precision" in text
    assert "float16: 6 linear, 2 matmul" in text


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("0", {"0.q:aten.linear#0", "0.k:aten.linear#0", "0.v:aten.linear#0", "0:aten.matmul#1"}),
        ("1.q", {"1.q:aten.linear#0"}),
        ("aten.linear", {f"{i}.{part}:aten.linear#0" for i in (0, 1) for part in "qkv"}),
        ("1:aten.linear", {f"1.{part}:aten.linear#0" for part in "qkv"}),
        ("1:aten.matmul#1", {"1:aten.matmul#1"}),
    ],
)
def test_what_the_user_lists_stays_in_float32(entry: str, kept: set[str]) -> None:
    x = torch.randn(2, 5, 16)
    model = two()
    free, bound = compiled(model, x), compiled(model, x, precision=Mixed(torch.float16, keep=[entry]))
    assert set(told(free)["half"]) - set(told(bound)["half"]) == kept
    assert {place for place, why in reasons(bound).items() if why == "listed in keep"} >= kept
    assert f"keep: {entry}" in bound.explain()
    with torch.no_grad():
        expected = model(x)
    assert 0 < error(bound(x), expected) < error(free(x), expected) * 1.2


def test_what_the_user_wants_in_half_is() -> None:
    x = torch.randn(2, 5, 16)
    model = two()
    engine = compiled(model, x, precision=Mixed(half=["0:aten.matmul#0", "1:aten.softmax"]))
    assert {"0:aten.matmul#0", "1:aten.softmax#0"} <= set(told(engine)["half"])
    assert "1:aten.matmul#0" in reasons(engine)
    with torch.no_grad():
        assert error(engine(x), model(x)) < 5e-3


@pytest.mark.parametrize("entry", ["2", "0.absent", "aten.no_such", "0:aten.no_such"])
def test_what_is_not_there_cannot_be_listed(entry: str) -> None:
    with pytest.raises(InputError, match=r"no such module, or PyTorch no such operator"):
        compiled(two(), torch.randn(2, 5, 16), precision=Mixed(keep=[entry]))


def test_what_matches_no_operator_is_told() -> None:
    x = torch.randn(2, 5, 16)
    engine = compiled(two(), x, precision=Mixed(keep=["0.norm", "aten.tan"], half=["1:aten.matmul#7"]))
    assert "listed, and no operator of this graph: aten.tan, 1:aten.matmul#7" in engine.explain()
    assert "no operator of this graph" not in compiled(two(), x, precision=Mixed(keep=["0.norm"])).explain()


def test_exported_programs_know_operators_and_no_modules() -> None:
    x = torch.randn(2, 5, 16)
    program = torch.export.export(two().eval(), (x,))
    given = {"backend": "eager", "runtime": "python"}
    with pytest.raises(InputError, match=r"'0.q' given, and the model has no such module"):
        anabranch.compile(program, precision=Mixed(keep=["0.q"]), **given)
    engine = anabranch.compile(program, precision=Mixed(keep=["aten.matmul", ":aten.linear#0"]), **given)
    kept = {place for place, why in reasons(engine).items() if why == "listed in keep"}
    assert kept >= {":aten.matmul#0", ":aten.matmul#1", ":aten.linear#0"}
    assert error(engine(x), program.module()(x)) < 2e-3


class _Wide(nn.Module):
    """A product of large values, which are small again in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.down(self.up(x) * 2e3) * 1e-3)


def test_values_of_the_inputs_decide_where_they_are_given() -> None:
    model, x = _Wide(), torch.randn(4, 8) * 30
    with torch.no_grad():
        expected = model(x)
    engine = compiled(model, x)
    assert "on the inputs of compile" in reasons(engine)["down:aten.linear#0"]
    assert {"up:aten.linear#0", "last:aten.linear#0"} <= set(told(engine)["half"])
    assert error(engine(x), expected) < 2e-3
    # Another signature has the same operators in float32, though nothing was measured for it.
    more = torch.randn(6, 8) * 30
    with torch.no_grad():
        assert error(engine(more), model(more)) < 2e-3
    unmeasured = compiled(model, anabranch.Input((4, 8)))
    assert "down:aten.linear#0" in told(unmeasured)["half"]
    assert not torch.isfinite(unmeasured(x)).all()  # what measuring is for


def test_inputs_are_left_as_they_are_by_the_measurement() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("seen", torch.ones(2, 4))

        def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)
            out.add_(y)
            self.seen.add_(y)
            return self.seen * 2

    model, x, out = Writes().eval(), torch.randn(2, 4), torch.full((2, 4), 0.5)
    engine = compiled(model, x, out)
    assert torch.equal(out, torch.full((2, 4), 0.5))
    assert torch.equal(model.seen, torch.ones(2, 4))
    session = engine.session()
    for turn in (1, 2, 3):
        result = session(x, out)
        with torch.no_grad():
            y = model.layer(x)
        assert error(out, 0.5 + turn * y) < 1e-3
        assert error(result, 2 * (1 + turn * y)) < 1e-3


def test_draws_are_not_moved_by_the_measurement() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x + torch.rand(2, 4))
            return y

    model, x = Draws(), torch.randn(2, 4)
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    compiled(model, x)
    assert torch.equal(torch.rand(3), first)


# -- what stays as it is --------------------------------------------------------------------------------------------


def test_results_share_memory_as_in_eager() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = self.layer(x)
            a, b = y.chunk(2, -1)
            return x, y, y[1:].t(), a, b, torch.relu(y)

    model, x = Shares(), torch.randn(4, 6)
    engine = compiled(model, x)
    same, *results = engine(x)
    assert same is x
    with torch.no_grad():
        _, *expected = model(x)
    for r, e in zip(results, expected, strict=True):
        assert r.dtype is torch.float32
        assert r.stride() == e.stride()
        assert error(r, e) < 1e-3
    whole, part, a, b, other = (r.untyped_storage().data_ptr() for r in results)
    assert whole == part == a == b != other


def test_masks_of_large_negative_numbers_stay_finite() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("mask", torch.eye(5) * 3e38 - 3e38)

        def forward(self, x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            q = self.layer(x).unsqueeze(1)
            a = F.scaled_dot_product_attention(q, q, q, attn_mask=self.mask)
            return (a + F.scaled_dot_product_attention(q, q, q, attn_mask=own)).squeeze(1)

    model, x = Masked(), torch.randn(2, 5, 8)
    own = torch.where(torch.eye(5).bool(), 0.0, float("-inf")) - torch.rand(5, 5)
    for precision in ("mixed", "mixed-bf16"):
        engine = compiled(model, x, own, precision=precision)
        assert sum("scaled_dot_product" in place for place in told(engine)["half"]) == 2
        with torch.no_grad():
            assert error(engine(x, own), model(x, own)) < 1e-2


def test_weights_that_half_cannot_hold_stay_in_float32() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    with torch.no_grad():
        model[0].weight.mul_(1e6)
        model[1].weight.mul_(1e-6)
    engine = compiled(model, anabranch.Input((3, 4)))
    assert "cannot hold its weights" in reasons(engine)["0:aten.linear#0"]
    with torch.no_grad():
        assert error(engine(x), model(x)) < 1e-3
    assert "0:aten.linear#0" in told(compiled(model, anabranch.Input((3, 4)), precision="mixed-bf16"))["half"]


def test_other_types_than_float32_are_left_alone() -> None:
    class Types(nn.Module):
        def forward(self, d: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return d @ d, h @ h, c @ c

    inputs = torch.randn(4, 4).double(), torch.randn(4, 4).bfloat16(), torch.randn(4, 4, dtype=torch.complex64)
    engine = compiled(Types(), *inputs)
    with torch.no_grad():
        expected = Types()(*inputs)
    assert all(torch.equal(r, e) for r, e in zip(engine(*inputs), expected, strict=True))
    assert not told(engine)["half"]


def test_one_engine_serves_many_sizes() -> None:
    model = two()
    engine = compiled(model, torch.randn(2, 5, 16), dynamic=True)
    for n, length in ((2, 5), (3, 9), (7, 4)):
        x = torch.randn(n, length, 16)
        with torch.no_grad():
            assert error(engine(x), model(x)) < 2e-3
    assert engine.stats().specializations <= 2


def test_weights_are_cast_once_for_all_signatures() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scale = nn.Embedding(20, 8), nn.Parameter(torch.rand(8))

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            return F.linear(self.table(i) * self.scale, self.table.weight)

    model = Tied()
    engine = compiled(model, torch.randint(20, (3,)), dynamic=False)
    engine(torch.randint(20, (5,)))
    programs = [s.program for s in engine._table]
    halves = [[w for w in p.weights if w.dtype is torch.float16] for p in programs]
    assert len(halves) == 2
    assert [len(h) for h in halves] == [1, 1]
    assert halves[0][0].data_ptr() == halves[1][0].data_ptr()
    assert not any(n.target is torch.ops.aten._to_copy.default and n.args[0].op == "placeholder"
                   for p in programs for n in p.module.graph.nodes)  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_models_that_mix_types_by_themselves(name: str) -> None:
    make, shape = MIXED[name]
    model, x = make().eval(), torch.randn(shape)
    engine = compiled(model, x)
    for given in (x, torch.cat([x, x * 0.7])):
        with torch.no_grad():
            expected = model(given)
        result = engine(given)
        assert result.dtype is expected.dtype
        assert error(result, expected) < 3e-3


@pytest.mark.parametrize("name", EXACT)
def test_what_is_no_product_of_weights_is_not_rounded(name: str) -> None:
    model, inputs = EXACT[name]
    made, given = model().eval(), inputs()
    with torch.no_grad():
        assert torch.equal(compiled(made, given)(given), made(given))


class _Rotary(nn.Module):
    """Angles of positions, and a line that is no graph before them."""

    def __init__(self, way: str, is_whole: bool) -> None:
        super().__init__()
        self.way, self.is_whole, self.last = way, is_whole, nn.Linear(32, 8)
        self.register_buffer("rates", 1.0 / 10000 ** (torch.arange(0, 32, 2) / 32))
        self.rates: torch.Tensor

    def angles(self, ids: torch.Tensor) -> torch.Tensor:
        if self.way == "autocast turned off":
            with torch.autocast("cpu", enabled=False):
                return (self.rates[None, :, None] @ (ids.float() + 0.25)[:, None]).transpose(1, 2)
        if self.way == "whole numbers":
            return (self.rates[None, :, None] @ ids[:, None].float()).transpose(1, 2)
        return torch.einsum("i,j->ij", torch.arange(ids.shape[1], dtype=torch.float32), self.rates)[None]

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if not self.is_whole and not has_memory(x):
            x = x + 1
        angles = self.angles(ids)
        y: torch.Tensor = self.last(x * torch.cat([angles.cos(), angles.sin()], -1))
        return y


@pytest.mark.parametrize("precision", ["mixed", "mixed-bf16"])
@pytest.mark.parametrize("way", ["autocast turned off", "whole numbers", "a range"])
@pytest.mark.parametrize("is_whole", [True, False], ids=["exported", "in fragments"])
def test_angles_of_positions_keep_their_digits(is_whole: bool, way: str, precision: str) -> None:
    """Half precision has few whole numbers: an angle of position 1,000 is off by half a turn where it is rounded."""
    model = _Rotary(way, is_whole).eval()
    engine = compiled(model, torch.arange(3, 1003)[None], torch.randn(1, 1000, 32), precision=precision)
    assert (engine.summary()["fragments"] is None) == is_whole
    ids, x = torch.arange(1005, 5, -1)[None], torch.randn(1, 1000, 32)
    with torch.no_grad():
        assert error(engine(ids, x), model(ids, x)) < (1e-3 if precision == "mixed" else 1e-2)
    assert told(engine)["half"], "the linear layer's product"
    why = " ".join(reasons(engine).values())
    assert ("turns autocast off" if way == "autocast turned off" else "whole numbers") in why


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "precision.json"
    path.write_text(json.dumps({"dtype": "bfloat16", "keep": ["1"], "half": ["0:aten.matmul#0"]}), encoding="utf-8")
    assert Mixed.load(path) == Mixed(torch.bfloat16, keep=["1"], half=["0:aten.matmul#0"])
    x = torch.randn(2, 5, 16)
    for given in (str(path), path):
        engine = compiled(two(), x, precision=given)
        assert told(engine)["dtype"] == "bfloat16"
        assert "0:aten.matmul#0" in told(engine)["half"]
        assert not any(place.startswith("1") for place in told(engine)["half"])


@pytest.mark.parametrize("content", ["", "[]", '{"keep": []}', '{"dtype": "float8", "keep": [], "half": []}'])
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "precision.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"no mixed precision can be read from it"):
        compiled(two(), torch.randn(2, 5, 16), precision=path)
