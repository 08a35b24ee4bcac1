"""precision=: computed in half, handed back as it came; what would lose by it is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import anabranch
from anabranch import UnsupportedModel

pytestmark = pytest.mark.usefixtures("seeded")
HALVES = [torch.float16, torch.bfloat16]


class _Scale(torch.nn.Module):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x, n, x * 3 + n


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_inputs_come_back_unrounded_and_results_in_the_models_types(precision: torch.dtype) -> None:
    x, n = torch.randn(4, 5), torch.arange(5)
    engine = anabranch.compile(_Scale(), [x, n], backend="eager", precision=precision)
    for scale in (1.0, 1.7):
        z = x * scale
        same, count, y = engine(z, n)
        assert same is z
        assert count is n
        assert y.dtype is torch.float32
        assert torch.equal(y, (z.to(precision) * 3 + n).float())
        assert not torch.equal(y, z * 3 + n)


class Model(nn.Module):
    """A function of a module with these parameters and buffers, and the inputs."""

    def __init__(self, function: Callable[..., Any], **tensors: Any) -> None:
        super().__init__()
        self.function = function
        for name, t in tensors.items():
            if isinstance(t, nn.Parameter | nn.Module):
                setattr(self, name, t)
            else:
                self.register_buffer(name, t)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def _p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def compiled(model: nn.Module, *inputs: torch.Tensor, precision: torch.dtype = torch.float16, **options: Any) -> Any:
    options = {"backend": "eager", "runtime": "python", **options}
    return anabranch.compile(model.eval(), list(inputs), precision=precision, **options)


def assert_right(model: nn.Module, *inputs: torch.Tensor, tolerance: float, **options: Any) -> None:
    """As in float32, within ``tolerance`` of the largest value; another signature too."""
    engine = compiled(model, *inputs, **options)
    for given in (inputs, [torch.cat([x, x]) for x in inputs]):
        with torch.no_grad():
            expected = model(*given)
        result = engine(*given)
        assert result.dtype is expected.dtype
        assert torch.isfinite(torch.view_as_real(result) if result.is_complex() else result).all()
        assert (result - expected).abs().max() <= tolerance * expected.abs().max()


FREQUENCIES = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
#: Angles of float32 frequencies times positions; complex rotations; tables of positions.
EXACT: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "positions times frequencies": (
        lambda: Model(lambda m, p: (p[:, None] * m.inv).sin(), inv=FREQUENCIES),
        lambda: torch.arange(3000, 4000),
    ),
    "explicitly float": (
        lambda: Model(lambda m, p: (p.float()[:, None] * m.inv.float()).cos(), inv=FREQUENCIES),
        lambda: torch.arange(3000, 4000),
    ),
    "a frequency parameter, computed with in float": (
        lambda: Model(lambda m, p: (p.float()[:, None] * m.inv.float()).cos(), inv=nn.Parameter(FREQUENCIES)),
        lambda: torch.arange(3000, 4000),
    ),
    "a table looked up": (
        lambda: Model(lambda m, i: m.table[i].cos(), table=torch.arange(5000.0)),
        lambda: torch.arange(4000, 4900),
    ),
    "float64": (
        lambda: Model(lambda m, i: m.table[i], table=torch.rand(50, dtype=torch.float64)),
        torch.arange(9).clone,
    ),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("precision", HALVES)
def test_float32_buffers_are_not_rounded(name: str, precision: torch.dtype) -> None:
    model, inputs = EXACT[name]
    assert_right(model(), inputs(), tolerance=1e-5, precision=precision)


def _attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q = m.layer(x).unsqueeze(1)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=m.mask).squeeze(1)


def _grid(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.grid_sample(m.layer(x), m.grid.expand(x.shape[0], -1, -1, -1))


def _spectrum(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfft(torch.fft.rfft(m.layer(x)) * m.turn)


def _inverse(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(m.layer(x) + m.eye * 9)


def _turns(n: int) -> torch.Tensor:
    return torch.polar(torch.ones(n), torch.arange(n) * 1.0)


def _add_at(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(8, dtype=x.dtype).index_add(0, torch.tensor([1, 3, 5]), (m.layer(x)[0, :3] * m.scale).view(3))


#: Models whose float32 buffers, or values that the model makes float32, meet half precision.
MIXED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "buffer, then product": (lambda: Model(lambda m, x: F.linear(x * m.b, m.w), b=torch.randn(8), w=_p(4, 8)), (2, 8)),
    "float(), then @": (lambda: Model(lambda m, x: x.float() @ m.w, w=_p(8, 4)), (2, 8)),
    "a buffer as kernel": (lambda: Model(lambda m, x: F.conv1d(x, m.k), k=torch.randn(3, 2, 3)), (2, 2, 9)),
    "batch norm": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)), (2, 2, 9)),
    "batch norm of one's own": (
        lambda: Model(
            lambda m, x: F.batch_norm(x, m.mean, m.var, m.w, m.b),
            mean=torch.randn(4),
            var=torch.rand(4) + 1,
            w=_p(4),
            b=_p(4),
        ),
        (2, 4, 3),
    ),
    "norms": (
        lambda: nn.Sequential(
            Model(lambda m, x: x + m.b, b=torch.randn(8)),
            *(nn.LayerNorm(8), nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.PReLU()),
        ),
        (3, 8),
    ),
    "a table of positions, then an encoder": (
        lambda: nn.Sequential(
            Model(lambda m, x: x + m.table, table=torch.randn(5, 8)),
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        ),
        (2, 5, 8),
    ),
    "recurrent": (
        lambda: nn.Sequential(Model(lambda m, x: x * m.b, b=torch.randn(8)), nn.GRU(8, 4), Model(lambda m, x: x[0])),
        (3, 2, 8),
    ),
    "a mask": (lambda: Model(_attention, layer=nn.Linear(8, 8), mask=torch.eye(5) * 3e38 - 3e38), (2, 5, 8)),
    "grid": (lambda: Model(_grid, layer=nn.Conv2d(1, 2, 1), grid=torch.rand(1, 4, 4, 2)), (1, 1, 4, 4)),
    "index_add": (lambda: Model(_add_at, layer=nn.Linear(8, 8), scale=torch.rand(3)), (2, 8)),
    "fft": (lambda: Model(_spectrum, layer=nn.Linear(8, 8), turn=_turns(5)), (2, 8)),
    "complex": (
        lambda: Model(
            lambda m, x: torch.view_as_real(torch.view_as_complex(x.reshape(-1, 4, 2)) * m.turn).flatten(1),
            turn=_turns(4),
        ),
        (2, 8),
    ),
    "linear algebra": (lambda: Model(_inverse, layer=nn.Linear(4, 4), eye=torch.eye(4)), (2, 4, 4)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv1d(2, 4, 3)), (2, 2, 9)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 4)), (2, 8)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), (2, 8)),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(8, 4), "weight", 0.5), (2, 8)),
}


@pytest.mark.parametrize("name", MIXED)
def test_half_meets_float32(name: str) -> None:
    model, shape = MIXED[name]
    assert_right(model(), torch.randn(shape), tolerance=0.02)


@pytest.mark.parametrize("name", ["batch norm", "a table of positions, then an encoder", "complex"])
def test_half_meets_float32_in_inductor(name: str) -> None:
    model, shape = MIXED[name]
    engine = compiled(model := model(), x := torch.randn(shape), backend="inductor", precision=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
    assert (engine(x) - expected).abs().max() <= 0.1 * expected.abs().max()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_the_older_norms_of_weights(wrap: Any) -> None:
    assert_right(
        nn.Sequential(wrap(nn.Conv1d(3, 4, 3)), wrap(nn.ConvTranspose1d(4, 2, 3))), torch.randn(2, 3, 9), tolerance=0.02
    )


def test_running_statistics_beyond_half_are_kept() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    with torch.no_grad():
        model[0].running_mean.fill_(3e3)
        model[0].running_var.fill_(1e6)
    assert_right(model, torch.randn(3, 4) * 1e3, tolerance=0.01)


# -- what runs in half ------------------------------------------------------------------------------------------------


def test_products_run_in_half_on_parameters_that_were_cast_once() -> None:
    model = Model(
        lambda m, x: F.linear((x * m.scale).float(), m.w) + m.b.float(), scale=torch.rand(8), w=_p(4, 8), b=_p(4)
    )
    engine = compiled(model, torch.randn(2, 8))
    engine(torch.randn(3, 8))
    programs = [s.program for s in engine._table]
    for program in programs:
        products = [n for n in program.module.graph.nodes if "linear" in str(n.target)]
        assert [n.meta["val"].dtype for n in products] == [torch.float16]
        dtypes = {name: w.dtype for name, w in zip(program.weight_names, program.weights, strict=True)}
        assert dtypes == {"scale": torch.float32, "w": torch.float16, "b": torch.float32}
        weights = {n for n in program.module.graph.nodes if n.op == "placeholder"}
        casts = [n for n in program.module.graph.nodes if "_to_copy" in str(n.target)]
        assert not [n for n in casts if n.args[0] in weights and n.args[0].name != weights_input(program)]
    first, second = (dict(zip(p.weight_names, p.weights, strict=True)) for p in programs)
    for name in first:
        assert first[name].data_ptr() == second[name].data_ptr(), "made once for all signatures"
    assert first["b"].data_ptr() == model.b.data_ptr(), "what is kept is shared with the model"


def weights_input(program: Any) -> str:
    """The name of the placeholder of the program's only input."""
    return str([n for n in program.module.graph.nodes if n.op == "placeholder"][-1].name)


def test_tied_weights_and_weights_in_one_storage_stay_so() -> None:
    embed, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embed.weight
    memory = torch.randn(20)
    model = Model(
        lambda m, i: m.head(m.embed(i) * m.a[:4]) + m.b[1:],
        embed=embed,
        head=head,
        a=nn.Parameter(memory[:12]),
        b=nn.Parameter(memory[4:12]),
    )
    assert_right(model, torch.arange(6), tolerance=0.02)
    module = compiled(model, torch.arange(6))._compiler.cast.snapshot.module
    assert module.head.weight is module.embed.weight
    assert module.a.dtype is torch.float16
    assert module.a.untyped_storage().data_ptr() == module.b.untyped_storage().data_ptr()


def test_explain_names_what_is_cast_and_what_is_kept() -> None:
    model = Model(
        lambda m, x: m.norm(m.conv(x)) * m.big / 1e7 + m.table[m.index] + torch.view_as_real(m.turn)[:, 0],
        conv=nn.Conv1d(2, 4, 3), norm=nn.BatchNorm1d(4), big=nn.Parameter(torch.full((7,), 1e6)), table=torch.randn(9),
        index=torch.arange(7), turn=torch.polar(torch.ones(7), torch.arange(7.0)),
    )  # fmt: skip
    lines = compiled(model, torch.randn(2, 2, 9)).explain().splitlines()
    cast, *kept = [line for line in lines if line.startswith("precision float16")]
    assert cast == "precision float16: cast: conv.weight, conv.bias"
    assert kept == [
        "precision float16: kept, beyond 65504: big",
        "precision float16: kept, with running statistics: norm.weight, norm.bias",
        "precision float16: kept, buffers: table, norm.running_mean, norm.running_var",
        "precision float16: kept, int64: index, norm.num_batches_tracked",
        "precision float16: kept, complex64: turn",
    ]


# -- values that half cannot hold -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "value", "precision"),
    [
        (lambda m, x: x @ m.p, torch.full((8, 3), 1e5), torch.float16),
        (lambda m, x: x @ m.p.t(), torch.full((3, 8), 1e-8), torch.float16),
        (lambda m, x: x * m.p, torch.tensor(2e5), torch.float16),
        (lambda m, x: x * m.p, torch.tensor(1e300, dtype=torch.float64), torch.bfloat16),
    ],
)
def test_a_value_that_does_not_survive_and_is_needed_in_half_is_refused_by_name(
    function: Any, value: torch.Tensor, precision: torch.dtype
) -> None:
    model = Model(function, p=nn.Parameter(value))
    with pytest.raises(UnsupportedModel, match=r"computes in it with 'p', whose values it cannot hold"):
        compiled(model, torch.randn(2, 8), precision=precision)


@pytest.mark.parametrize("value", [1e6, 1e-9])
def test_a_value_that_does_not_survive_is_kept_where_float32_will_do(value: float) -> None:
    model = Model(lambda m, x: F.linear(x, m.w) * m.p / value, w=_p(4, 8), p=nn.Parameter(torch.full((4,), value)))
    assert_right(model, torch.randn(2, 8), tolerance=0.01)
