"""How a program is cut into pieces: results, draws, what passes between pieces, and when it stays whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import anabranch
from anabranch._judge import differences
from anabranch.export import Cut, Signature, Snapshot, cut, export_program, finisher
from anabranch.export import _pieces as pieces_module
from anabranch.export._uncaptured import direct_only, uncapturable
from contract.numbers import MODELS as NUMBERS
from contract.numbers import inputs_of
from contract.pieces import MODELS
from contract.support import Fn

CPU = torch.device("cpu")


def program_of(model: torch.nn.Module, *args: Any) -> tuple[Any, Any]:
    leaves, structure = pytree.tree_flatten((args, {}))
    program = export_program(Snapshot.of(model.eval(), values=True), args, {})
    return program, Signature.of(leaves, structure)


def cut_of(model: torch.nn.Module, *args: Any) -> tuple[Any, Cut | str]:
    program, signature = program_of(model, *args)
    before = str(program.module.graph)
    made = cut(program, signature.tensors, CPU)
    assert str(program.module.graph) == before
    return program, made


def run(program: Any, made: Cut, inputs: Sequence[torch.Tensor]) -> Any:
    """As the runtime does, with a look at what passes between pieces."""
    values: list[Any] = list(inputs)
    for piece in made.pieces:
        given = [values[i] for i in piece.takes]
        assert all(isinstance(x, torch.Tensor) for x in given), "a number has passed, or what was dropped"
        versions = [x._version for x in given]
        results = piece.program.module(*piece.program.weights, *given)
        assert [x._version for x in given] == versions, "a piece has written to what it was given"
        if piece.is_captured:
            places = {x.untyped_storage()._cdata for x in (*given, *piece.program.weights)}
            assert all(y.untyped_storage()._cdata not in places for y in results), "a view has passed"
            assert not any(spec.is_open for spec in piece.signature.tensors)
        values += results
        for i in piece.drops:
            values[i] = None
    needed = set(made.results) | {i for i in range(len(inputs)) if not any(i in p.takes for p in made.pieces)}
    assert all((v is None) or i in needed for i, v in enumerate(values)), "something was kept that nothing needs"
    with torch.no_grad():
        return finisher(program.outputs, program.structure)(inputs, [values[i] for i in made.results])


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("few", [3, 1])
@pytest.mark.parametrize("name", MODELS)
def test_results_and_draws_are_eagers(name: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "FEW", few)
    model = MODELS[name]().requires_grad_(False)
    program, made = cut_of(model, draw(0, 4, 256))
    assert isinstance(made, Cut)
    kinds = [piece.is_captured for piece in made.pieces]
    assert kinds[:3] == [True, False, True]
    assert all(a != b for a, b in itertools.pairwise(kinds)), "two pieces of a kind could be one"
    for seed in range(3):
        x = draw(10 + seed, 4, 256)
        torch.manual_seed(seed)
        got = run(program, made, [x])
        torch.manual_seed(seed)
        assert not differences(got, model(x), inputs=[x])


@pytest.mark.parametrize("model", NUMBERS, ids=lambda m: type(m).__name__)
def test_numbers_that_depend_on_data_stay_in_a_piece(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "FEW", 1)
    monkeypatch.setattr(pieces_module, "LEAST", 1)
    program, made = cut_of(model, torch.empty(5, 4))
    if isinstance(made, str):
        assert made in ("few operators could be captured", "it is of one kind throughout", _CHECK)
        return
    for x in inputs_of(29):
        assert not differences(run(program, made, [x]), model(x), inputs=[x])


_CHECK = "a check would be a piece by itself"


def test_draws_keep_their_order_where_a_later_one_could_come_first() -> None:
    _, made = cut_of(MODELS["drawn"](), draw(0, 4, 256))
    assert isinstance(made, Cut)
    draws = [
        str(node.target)
        for piece in made.pieces
        for node in piece.program.module.graph.nodes
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    ]
    assert draws == ["aten.bernoulli.default", "aten.rand_like.default", "aten.rand.default"]
    assert all(piece.is_captured or piece.program.direct_only for piece in made.pieces)


def test_what_a_view_is_of_passes_and_the_view_is_made_where_it_is_used() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(x * 2 + 1).sin()
        view = h.view(-1)[2:]
        m = torch.masked_select(view, view > 0.5).sum()
        return (view * m + view).tanh() * 2

    program, made = cut_of(Fn(model), draw(0, 4, 8))
    assert isinstance(made, Cut)
    assert [len(piece.takes) for piece in made.pieces] == [1, 2, 2]
    assert made.pieces[1].takes[0] == made.pieces[2].takes[0]
    assert made.pieces[1].signature.tensors[0].shape == (4, 8)
    x = draw(1, 4, 8)
    assert not differences(run(program, made, [x]), model(x), inputs=[x])


def test_results_that_are_inputs_constants_and_views_of_one_another() -> None:
    def model(x: torch.Tensor) -> Any:
        h = torch.relu(x * 2 + 1).sin()
        y = (h + torch.rand_like(h)).cos() * 2 + 1
        y = y.tanh()
        return x, x[1:], "name", y, y.t(), y.view(-1)[3:], h, None, torch.arange(3)

    program, made = cut_of(Fn(model), draw(0, 4, 8))
    assert isinstance(made, Cut)
    x = draw(1, 4, 8)
    torch.manual_seed(1)
    got = run(program, made, [x])
    torch.manual_seed(1)
    assert not differences(got, model(x), inputs=[x])
    assert got[0] is x
    assert got[3].untyped_storage()._cdata == got[4].untyped_storage()._cdata == got[5].untyped_storage()._cdata


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda x: torch.rand_like(x) * 2, "few operators could be captured"),
        (lambda x: x.sin().cos().tanh().exp(), "it is of one kind throughout"),
        (lambda x: torch.nonzero(x > 0) * 2 + 1, "few operators could be captured"),
    ],
)
def test_what_is_not_worth_it_stays_whole(model: Any, why: str) -> None:
    _, made = cut_of(Fn(model), draw(0, 4, 8))
    assert made == why


def test_a_lone_operator_between_draws_is_no_piece() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        h = F.dropout(torch.tanh(x * 2 + 1) * 3, 0.5, training=True)
        h = F.dropout(h.sin(), 0.5, training=True)
        return torch.tanh(h * 2 + 1) * 3

    program, made = cut_of(Fn(model), draw(0, 4, 8))
    assert isinstance(made, Cut)
    assert [piece.is_captured for piece in made.pieces] == [True, False, True]
    assert "aten.sin.default" in made.pieces[1].program.module.code
    x = draw(1, 4, 8)
    torch.manual_seed(1)
    got = run(program, made, [x])
    torch.manual_seed(1)
    assert not differences(got, model(x), inputs=[x])


def test_many_pieces_become_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "MOST", 48)

    def model(x: torch.Tensor) -> torch.Tensor:
        for i in range(60):
            x = F.dropout(torch.tanh(x * 2 + i), 0.1, training=True)
        for _ in range(40):
            x = torch.sin(x * 2)
        return x

    _, made = cut_of(Fn(model), draw(0, 4, 8))
    assert isinstance(made, Cut)
    assert len(made.pieces) <= pieces_module.MOST
    assert sum(piece.operators for piece in made.pieces if piece.is_captured) == 80


@pytest.mark.parametrize(
    ("index", "is_captured"),
    [
        (lambda h: (1 / h).long().view(-1), False),  # any integer at all, where h is made up
        (lambda h: (h * 3).to(torch.int64).abs().view(-1) + 1, False),
        (lambda h: (1 / h).long().clamp(0, 3).view(-1), True),
        (lambda h: h.argmax(0), True),
        (lambda h: h.topk(2, 0)[1].view(-1), True),
        (lambda h: (h > 0).long().view(-1), True),
    ],
)
def test_no_index_made_of_floating_values_is_captured_that_could_be_out_of_range(index: Any, is_captured: bool) -> None:
    def model(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x * 2 + 1) * 0.9
        h = h + torch.rand_like(h)
        return torch.relu(table.index_select(0, index(h)) * 2 + 1) * 3

    _, made = cut_of(Fn(model), draw(0, 4, 8), draw(1, 9, 8))
    assert isinstance(made, Cut)
    where = [piece.is_captured for piece in made.pieces if "aten.index_select" in piece.program.module.code]
    assert where == [is_captured]


@pytest.mark.parametrize("name", MODELS)
def test_the_cpu_runs_everything_in_one_piece(name: str, runtime: str) -> None:
    model = MODELS[name]().requires_grad_(False).eval()
    engine = anabranch.compile(model, [draw(0, 4, 256)], backend="eager", runtime=runtime)
    assert engine.summary()["signatures"][0]["pieces"] == []
    assert engine.plan.pieces == ()
    assert "piece" not in engine.explain()
    for seed in range(2):
        x = draw(10 + seed, 4, 256)
        torch.manual_seed(seed)
        got = engine(x)
        torch.manual_seed(seed)
        assert not differences(got, model(x), inputs=[x])
    assert engine.stats().direct_calls == engine.stats().calls == 2


def _grouped(dtype: torch.dtype, device: str) -> tuple[torch.fx.GraphModule, torch.fx.Node]:
    """A graph with a grouped product, on a device that need not be there."""
    with FakeTensorMode():
        x, w = torch.empty(16, 8, dtype=dtype, device=device), torch.empty(2, 8, 8, dtype=dtype, device=device)
        ends = torch.empty(2, dtype=torch.int32, device=device)
        graph = torch.fx.Graph()
        given = []
        for name, value in (("x", x), ("w", w), ("ends", ends)):
            given.append(graph.placeholder(name))
            given[-1].meta["val"] = value
        node = graph.call_function(torch.ops.aten._grouped_mm.default, (*given[:2],), {"offs": given[2]})
        node.meta["val"] = torch.empty(16, 8, dtype=dtype, device=device)
        graph.output((node,))
    return torch.fx.GraphModule(torch.nn.Module(), graph), node


@pytest.mark.parametrize(
    ("dtype", "device", "capability", "reads"),
    [
        (torch.float16, "cuda", (9, 0), True),
        (torch.float32, "cuda", (9, 0), True),
        (torch.bfloat16, "cuda", (9, 0), False),  # a kernel of its own reads the offsets on the device
        (torch.bfloat16, "cuda", (8, 0), True),
        (torch.float16, "cpu", (9, 0), False),  # nothing is captured there
    ],
)
def test_a_grouped_product_reads_on_the_host_and_is_not_called_data_dependent(
    dtype: torch.dtype, device: str, capability: tuple[int, int], reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, _ = _grouped(dtype, device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    found = uncapturable(gm.graph.nodes)
    assert [u.why for u in found] == ["reads on the host"] * reads
    if reads:
        assert direct_only(found) == "reads on the host: aten._grouped_mm.default"
