"""Results are eager's: their values, their types, how they lie in memory, and what they share it with."""

from __future__ import annotations

import enum
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import anabranch
from anabranch._judge import Rounding, differences
from anabranch.export import export_program
from contract.support import Fn

pytestmark = pytest.mark.usefixtures("seeded")


def build(fn: Callable[..., Any], *inputs: Any, backend: str = "eager", **options: Any) -> anabranch.Engine:
    return anabranch.compile(Fn(fn).eval(), list(inputs), backend=backend, **options)


def check(engine: anabranch.Engine, fn: Callable[..., Any], *inputs: Any, backend: str = "eager") -> Any:
    given = engine(*inputs)
    if backend == "eager":
        assert not differences(given, fn(*inputs), inputs=inputs)
    else:  # Inductor copies what is a view of a complex result
        leaves = (torch.utils._pytree.tree_leaves(x) for x in (given, fn(*inputs)))
        for y, wanted in zip(*leaves, strict=True):
            assert not differences(y, wanted, rounding=Rounding(), inputs=inputs)
    bits = [(x.is_conj(), x.is_neg()) for x in torch.utils._pytree.tree_leaves(given) if isinstance(x, torch.Tensor)]
    wanted = torch.utils._pytree.tree_leaves(fn(*inputs))
    assert bits == [(x.is_conj(), x.is_neg()) for x in wanted if isinstance(x, torch.Tensor)]
    return given


def a_complex(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex64)


# -- lazy conjugates and negatives ------------------------------------------------------------------------------------

LAZY_OUTPUTS: dict[str, Callable[..., Any]] = {
    "conjugates": lambda z: (z * 2).conj(),
    "of one value": lambda z: (lambda y: (y, y.conj(), y.conj(), y.mH, y.conj().imag))(z + 1),
    "adjoint": lambda z: {"h": (z @ z.mT).mH, "t": (z * 1j).conj()[0]},
    "imaginary part": lambda z: ((z * z).conj().imag[:, 1:], (z - 1).real),
    "of a spectrum": lambda z: [torch.fft.ifft(z).conj().t()],
    "undone": lambda z: ((z * 2).conj().conj(), (z * 2).conj().resolve_conj(), torch.view_as_real(z * 3)),
    "of the input": lambda z: (z.conj(), z.mH, z.conj().imag, z),
}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_lazy_bits_of_results(backend: str, runtime: str) -> None:
    def fn(z: torch.Tensor) -> Any:
        return {name: part(z) for name, part in LAZY_OUTPUTS.items()}

    z = a_complex(3, 4)
    engine = build(fn, z, backend=backend)
    for x in (z, a_complex(3, 4)):
        check(engine, fn, x, backend=backend)


def test_a_result_that_is_returned_twice_is_one_object(runtime: str) -> None:
    def fn(z: torch.Tensor) -> Any:
        y = (z + 1).conj()
        return y, z * 2, y

    first, _, last = build(fn, a_complex(3))(a_complex(3))
    assert first is last


LAZY_INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "conjugate": lambda: a_complex(3, 4).conj(),
    "transposed": lambda: a_complex(4, 3).mH,
    "strided": lambda: a_complex(3, 8)[:, ::2].conj(),
    "negative": lambda: a_complex(3, 4).conj().imag,
    "negative row": lambda: a_complex(2, 3, 4).conj().imag[1],
}


@pytest.mark.parametrize("name", LAZY_INPUTS)
def test_lazy_bits_of_inputs(name: str, runtime: str) -> None:
    def fn(x: torch.Tensor) -> Any:
        return x * 2, x, x.t(), x.conj(), x.resolve_conj().resolve_neg(), x.contiguous(), x + x.real, x.is_conj()

    x = LAZY_INPUTS[name]()
    engine = build(fn, x)
    check(engine, fn, LAZY_INPUTS[name]())
    # The same memory without the bits is another input.
    plain = x.resolve_conj().resolve_neg().contiguous()
    check(engine, fn, plain)
    check(engine, fn, x)
    assert engine.stats().specializations == 2


def test_lazy_bits_of_buffers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            z = a_complex(3)
            self.register_buffer("c", z.conj())
            self.register_buffer("n", z.conj().imag)

        def forward(self, x: torch.Tensor) -> Any:
            return x * self.c, x.real * self.n, self.n, self.c.conj()

    model, x = Model(), a_complex(3)
    for backend in ("eager", "inductor"):
        given = anabranch.compile(model, [x], backend=backend)(x)
        assert not differences(given, model(x), rounding=Rounding())


# -- how inputs lie in memory -----------------------------------------------------------------------------------------

STRIDED: dict[str, Callable[[], torch.Tensor]] = {
    "columns": lambda: torch.randn(4, 9)[:, 2:7],
    "every other": lambda: torch.randn(4, 10)[:, ::2],
    "rows": lambda: torch.randn(8, 5)[::2],
    "expanded": lambda: torch.randn(1, 5).expand(4, 5),
    "one for all": lambda: torch.randn(()).expand(4, 5),
    "sliding": lambda: torch.randn(8).unfold(0, 5, 1),
    "transposed": lambda: torch.randn(5, 4).t(),
    "transposed rows": lambda: torch.randn(5, 8).t()[::2],
    "misaligned": lambda: torch.randn(21)[1:].view(4, 5),
    "dense": lambda: torch.randn(4, 5),
}


def packs(x: torch.Tensor) -> Any:
    return x.contiguous(), x.contiguous()[1], x.reshape(20), x.flatten()[3:], x.is_contiguous(), x + 1, x.t(), x.clone()


@pytest.mark.parametrize("name", STRIDED)
def test_contiguous_is_the_input_or_a_copy_as_in_eager(name: str, runtime: str) -> None:
    engine = build(packs, STRIDED[name]())
    for x in (STRIDED[name](), torch.randn(4, 5), STRIDED[name]()):
        check(engine, packs, x)


def test_contiguous_of_a_strided_input_compiled() -> None:
    for name in ("columns", "expanded", "dense"):
        x = STRIDED[name]()
        check(build(packs, x, backend="inductor"), packs, x, backend="inductor")


def test_a_copy_may_be_written_to_where_the_input_may_not() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x.contiguous()
        y += 1
        return y

    frame = torch.randn(4, 9)
    x = frame[:, 2:7]
    before = frame.clone()
    check(build(fn, x), fn, x)
    assert torch.equal(frame, before)
    assert not export_program(Fn(fn), [x], {}).written
    assert export_program(Fn(fn), [torch.randn(4, 5)], {}).written == {0}


def test_crops_of_frames_of_all_sizes_share_what_is_compiled() -> None:
    engine = build(packs, torch.randn(1, 9, 9)[0, :4, :5])
    for height, width in ((7, 8), (30, 40), (5, 6)):
        x = torch.randn(height, width)[1:5, 1:6]
        check(engine, packs, x)
    assert engine.stats().specializations == 1
    # A model that does not look at its inputs' layout shares one for all of them.
    engine = build(lambda x: x * 2, torch.randn(4, 5))
    for make in STRIDED.values():
        check(engine, lambda x: x * 2, make())
    assert engine.stats().specializations == 3, "dense, not dense, and transposed"


def test_as_strided_on_an_input() -> None:
    def windows(x: torch.Tensor) -> torch.Tensor:
        return x.as_strided((3, 4), (2, 1)) * 2

    def absolute(x: torch.Tensor) -> torch.Tensor:
        return x.as_strided((4,), (1,), 2) * 2

    x = torch.randn(20)
    for fn in (windows, absolute):
        engine = build(fn, torch.randn(8))
        check(engine, fn, torch.randn(8))
    check(build(windows, torch.randn(8)), windows, x[5:13])
    with pytest.raises(anabranch.InputError, match=r"5 elements into its storage.*as_strided"):
        engine(x[5:13])
    with pytest.raises(anabranch.UnsupportedModel, match=r"not dense"):
        build(windows, x[::2][:8])


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1, 1, 1)])
def test_small_inputs(shape: tuple[int, ...], runtime: str) -> None:
    def fn(x: torch.Tensor) -> Any:
        return x + 1, x.sum(), x.reshape(-1), x.unsqueeze(0), torch.cat([x.flatten(), x.flatten()])

    engine = build(fn, torch.randn(shape))
    check(engine, fn, torch.randn(shape))


# -- types ------------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "left right")

TYPES: dict[str, Callable[..., Any]] = {
    "size": lambda x: (x + 1, x.shape, {"inner": [x.t().size(), x[0].shape]}),
    "dtype and device": lambda x: {"y": x * 2, "dtype": x.dtype, "half": torch.float16, "device": x.device},
    "formats": lambda x: [x + 1, torch.channels_last, x.layout, torch.finfo(torch.float16).max],
    "numbers": lambda x: (x * 2, 1, 2.5, -0.0, 3 + 4j, True, x.ndim, x.shape[0], x.numel()),
    "text and none": lambda x: {"name": "cat", "raw": b"\x00", "none": None, "y": x, "...": ...},
    "containers": lambda x: OrderedDict(b=Pair(x + 1, None), a=[(), [], {}, (x,)]),
    "named result": lambda x: (torch.max(x, 1), torch.sort(x, 0)),
    "a slice": lambda x: (x.sum(), slice(1, 4, 2), range(3)),
    "no tensor": lambda x: (x.shape, x.dtype),
}


@pytest.mark.parametrize("name", TYPES)
def test_types_of_results(name: str) -> None:
    fn = TYPES[name]
    engine = build(fn, torch.randn(3, 4))
    for x in (torch.randn(3, 4), torch.randn(3, 4)):
        given, wanted = engine(x), fn(x)
        if name != "formats" and name != "a slice":
            assert not differences(given, wanted, inputs=[x])
        else:
            assert not differences(given[0], wanted[0])
            assert list(given)[1:] == list(wanted)[1:]
            assert [type(v) for v in given] == [type(v) for v in wanted]


def test_a_size_that_depends_on_data() -> None:
    def fn(x: torch.Tensor) -> Any:
        found = (x > 0).nonzero()
        return found.shape, found.shape[0], x.shape

    engine = build(fn, torch.randn(5, 4))
    for x in (torch.randn(5, 4), torch.ones(5, 4), -torch.ones(5, 4)):
        given, wanted = engine(x), fn(x)
        assert given == wanted
        assert [type(v) for v in given] == [type(v) for v in wanted]


class Reduction(enum.Enum):
    SUM, MEAN = "sum", "mean"


class Reduces(nn.Module):
    def forward(self, x: torch.Tensor, how: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        y = x.sum(1) if how is Reduction.SUM else x.mean(1)
        return y.to(dtype=dtype, **options), how, dtype


def test_dtypes_devices_and_members_of_enumerations_are_inputs(runtime: str) -> None:
    x = torch.randn(5, 4)
    model = Reduces()
    engine = anabranch.compile(model, [x, Reduction.SUM], backend="eager", runtime=runtime)
    calls: list[tuple[list[Any], dict[str, Any]]] = [
        ([Reduction.SUM], {}),
        ([Reduction.MEAN], {}),
        ([Reduction.MEAN, torch.float64], {"device": torch.device("cpu")}),
        ([Reduction.SUM], {"dtype": torch.int32, "memory_format": torch.preserve_format}),
    ]
    for _ in range(2):
        for rest, options in calls:
            y = torch.randn(5, 4) * 9
            assert not differences(engine(y, *rest, **options), model(y, *rest, **options), inputs=[y])
    assert engine.stats().specializations == len(calls)


def test_they_are_inputs_of_models_in_fragments_too() -> None:
    def branches(x: torch.Tensor, how: Reduction, dtype: torch.dtype) -> Any:
        y = x if x.sum() > 0 else x * 2
        return (y.sum(1) if how is Reduction.SUM else y.mean(1)).to(dtype), x.shape

    engine = build(branches, torch.randn(5, 4), Reduction.SUM, torch.float64)
    for how in Reduction:
        for x in (torch.rand(5, 4), -torch.rand(5, 4)):
            assert not differences(engine(x, how, torch.float64), branches(x, how, torch.float64), inputs=[x])


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["as it is", "bfloat16"])
def test_a_size_as_an_input_stays_one(precision: torch.dtype | None, runtime: str) -> None:
    def resized(x: torch.Tensor, options: dict[str, Any]) -> Any:
        size = options["size"]
        return functional.interpolate(x, size=size[-2:]) * size.numel(), size, options

    x, sizes = torch.randn(1, 2, 4, 6), [torch.Size([1, 8, 6]), torch.Size([3, 2, 9]), torch.Size([1, 5, 5])]
    engine = build(resized, x, {"size": sizes[0]}, runtime=runtime, precision=precision)
    for size in sizes:
        given, wanted = engine(x, {"size": size}), resized(x.to(precision or x.dtype), {"size": size})
        assert not differences(given, (wanted[0].float(), *wanted[1:]) if precision else wanted, inputs=[x])
        assert [type(y) for y in given] == [torch.Tensor, torch.Size, dict]


# -- keywords ---------------------------------------------------------------------------------------------------------


class Joins(nn.Module):
    def forward(self, scale: torch.Tensor, /, first: Any = None, **rest: Any) -> Any:
        parts = list(rest.values())
        return torch.cat([p * scale for p in parts]), list(rest), first


def test_keywords_come_in_the_callers_order() -> None:
    scale, a, b, c = torch.randn(1), torch.randn(2), torch.randn(3), torch.randn(2)
    model = Joins()
    engine = anabranch.compile(model, [scale], kwargs={"zeta": a, "alpha": b}, backend="eager")
    for given in ({"zeta": a, "alpha": b}, {"alpha": b, "zeta": a}, {"m": c, "first": 2, "b": a}, {"b": a, "m": c}):
        assert not differences(engine(scale, **given), model(scale, **given)), list(given)


# -- what belongs to the process or the thread ------------------------------------------------------------------------

INTEGERS = torch.tensor([[3, 0, 2], [5, 1, 2049]])

ASK_DEFAULT: dict[str, Callable[..., Any]] = {
    "where": lambda x: (torch.where(x > 1, 0.0, -1e9), torch.where(x > 1, x, 0.1), torch.where(x > 1, 1.5, x)),
    "division": lambda x: (x // 0.7, x / 3, x % 2.5, torch.floor_divide(x, 1.5), x.remainder(0.3)),
    "comparison": lambda x: (x > 2048.5, x == 2049.0, torch.isclose(x, x + 1), x.clamp(0.5, 2000.5)),
    "functions": lambda x: (x.exp2(), x.log(), x.sigmoid(), torch.rsqrt(x + 1), torch.special.entr(x), x.erf()),
    "powers": lambda x: (x**0.5, 2.0 ** x.clamp(max=3), torch.pow(x, -0.5), torch.hypot(x.float(), x)),
    "spectra": lambda x: (torch.fft.fft(x).real, torch.fft.rfft(x).abs(), torch.fft.ifft(x).imag),
    "complex numbers": lambda x: (torch.view_as_real(x * 1j), torch.angle(x)),
    "reductions": lambda x: (torch.logsumexp(x, 1), x.float().mean(), torch.logsumexp(x > 1, 0)),
    "booleans": lambda x: ((x > 1) * 0.5, (x > 1) / 2, torch.where(x > 1, x > 2, 0.5)),
    "made": lambda x: (torch.full((2,), 0.1), torch.linspace(0, 1, 3), torch.tensor(0.1), torch.eye(2) * 0.1),
    "filled": lambda x: (torch.full_like(x, 1.9), x.new_full((2,), 2.9), x.new_zeros(2), torch.ones_like(x)),
    "lerp": lambda x: (torch.addcmul(x * 0.1, x, x), torch.lerp(x * 0.1, x * 0.2, 0.3)),
}


def while_set(value: Any) -> Any:
    """Another thread has set the default dtype, as one does that loads a model, and has not yet set it back."""
    loading, done = threading.Event(), threading.Event()
    default = torch.get_default_dtype()

    def load() -> None:
        torch.set_default_dtype(value)
        loading.set()
        done.wait()
        torch.set_default_dtype(default)

    thread = threading.Thread(target=load)

    class While:
        def __enter__(self) -> None:
            thread.start()
            loading.wait()

        def __exit__(self, *exc: object) -> None:
            done.set()
            thread.join()

    return While()


@pytest.mark.parametrize("name", ASK_DEFAULT)
def test_the_default_dtype_of_another_thread(name: str, runtime: str) -> None:
    fn = ASK_DEFAULT[name]
    wanted = fn(INTEGERS)
    engine = build(fn, INTEGERS)
    assert not differences(engine(INTEGERS), wanted)
    for dtype in (torch.float16, torch.float64):
        with while_set(dtype):
            given = engine(INTEGERS)
        assert not differences(given, wanted)


def test_the_default_dtype_compiled() -> None:
    def fn(x: torch.Tensor) -> Any:
        return [ASK_DEFAULT[name](x) for name in ("where", "comparison", "powers", "booleans", "made")]

    wanted = fn(INTEGERS)
    engine = build(fn, INTEGERS, backend="inductor")
    with while_set(torch.bfloat16):
        given = engine(INTEGERS)
    assert not differences(given, wanted, rounding=Rounding())


def test_an_operator_that_cannot_be_pinned_raises(runtime: str) -> None:
    @torch.library.custom_op("anabranch_tests::in_default", mutates_args=())
    def in_default(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.get_default_dtype()) / 3

    @in_default.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x, dtype=torch.float32)

    engine = build(lambda x: in_default(x), INTEGERS)
    wanted = engine(INTEGERS)
    with while_set(torch.float64), pytest.raises(anabranch.FlagsChanged, match=r"set_default_dtype.*float32.*float64"):
        engine(INTEGERS)
    assert not differences(engine(INTEGERS), wanted)


def test_a_later_signature_is_not_compiled_under_other_flags() -> None:
    engine = build(lambda x: torch.ones(3) + x, torch.randn(3))
    with while_set(torch.float64), pytest.raises(anabranch.FlagsChanged, match="set_default_dtype"):
        engine(torch.randn(2, 3))
    x = torch.randn(2, 3)
    assert not differences(engine(x), torch.ones(3) + x)


class Folded(nn.Module):
    """Products that PyTorch computes in one way where a weight requires a gradient, and else in another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(37, 41)
        self.attention = nn.MultiheadAttention(37, 1)
        self.weight = nn.Parameter(torch.randn(37, 41))

    def forward(self, x: torch.Tensor) -> Any:
        attended, weights = self.attention(x.mT, x.mT, x.mT)
        return self.linear(x.mT), x.mT @ self.weight, self.weight.t() @ x, attended, weights, self.weight.t()


def test_bits_are_eagers_whether_weights_require_a_gradient_or_not(runtime: str) -> None:
    model = Folded().eval()
    held = lambda x: x.mT @ model.weight  # noqa: E731
    x, results = torch.randn(2, 37, 5), []
    for required in (True, False):
        model.requires_grad_(required)
        with torch.no_grad():
            results.append((*model(x), held(x)))
        engine = anabranch.compile(model, [x], backend="eager", runtime=runtime)
        of_closure = build(held, x, runtime=runtime)
        for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode():
                given = (*engine(x), of_closure(x))
            assert not differences(given, results[-1])
            assert [y.requires_grad for y in given[:5]] == [False] * 5
    assert differences(*results)  # or PyTorch makes no difference any more


CALLERS_MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", CALLERS_MODES)
def test_the_callers_modes_change_nothing(name: str, runtime: str) -> None:
    model = nn.Linear(3, 4).eval()

    def fn(x: torch.Tensor) -> Any:
        return model(x) @ torch.ones(4, 2), torch.arange(3) + x, x.t()

    x = torch.randn(2, 3)
    wanted = fn(x)
    engine = build(fn, x)
    with CALLERS_MODES[name]():
        given = engine(x)
        # Compiled in here, a later signature is what it would be outside.
        later = engine(x[:1])
    assert not differences(given, wanted)
    assert not any(y.requires_grad or y.is_inference() for y in (*given, *later) if y is not given[2])
    assert not differences(later, fn(x[:1]))
