"""``torch.compile(backend="anabranch")`` over small programs of the kinds that break graphs, guards and mutation.

Each program runs twice, by eager and compiled, in two worlds of its own that start alike. Whatever a caller could tell
them apart by is compared bit for bit after each call: the result, what it shares memory with, which input it is, the
inputs themselves, the program's own state, the generators and the modes of the process, and results of earlier calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import random
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import anabranch
from anabranch import dynamo
from anabranch._judge import Rounding, differences
from anabranch.runtime._fragment import STEADY
from contract.support import on_threads

ROOT = Path(__file__).resolve().parents[2]

#: PyTorch's operators in an engine: bits are eager's, and nothing is compiled.
EAGER = {"backend": "eager"}


class Draw:
    """Random tensors of one call: the same for both worlds, others in the next call, and no element is zero."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        real = dtype.to_real() if dtype.is_complex else torch.float32
        x = torch.randn(shape, generator=self._generator, dtype=real)
        x = x + 0.1 * x.sign()
        if dtype.is_complex:
            return torch.complex(x, x.flip(-1) + 0.5)
        return x.to(dtype)

    def whole(self, *shape: int, high: int = 9) -> torch.Tensor:
        return torch.randint(1, high, shape, generator=self._generator)

    def number(self) -> float:
        return float(torch.rand((), generator=self._generator, dtype=torch.float64)) + 0.25

    def integer(self, high: int = 100) -> int:
        return int(torch.randint(2, high, (), generator=self._generator))


class Given(NamedTuple):
    """What a call passes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012  # nobody writes it


#: Changes the world, if that is what the program is about, and draws the arguments of one call.
Call = Callable[[Draw], "Given | tuple[Any, ...]"]


class World(NamedTuple):
    """A program, and all that it can reach: eager has one, and the compiled program has another."""

    run: Callable[..., Any]
    calls: Sequence[Call]
    #: What the program itself keeps, beside the parameters and buffers of a module.
    state: Callable[[], Any] = lambda: None


@dataclasses.dataclass
class Program:
    name: str
    make: Callable[[], World]
    #: So many engines have to be there in the end; zero where PyTorch's operators are to run all of it.
    engines: int


PROGRAMS: list[Program] = []


def program(engines: int = 1) -> Callable[[Callable[[], World]], Callable[[], World]]:
    def enter(make: Callable[[], World]) -> Callable[[], World]:
        PROGRAMS.append(Program(make.__name__, make, engines))
        return make

    return enter


def emptied(log: list[Any], *args: Any) -> tuple[Any, ...]:
    """Arguments of a call before which the program's log is emptied: Dynamo compiles for each length of a list."""
    log.clear()
    return args


def frozen(module: nn.Module) -> Any:
    return module.eval().requires_grad_(False)


# -- what cuts a graph ------------------------------------------------------------------------------------------------


@program(engines=3)
def branch_on_a_value() -> World:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = x * 2 + 1
        if y.sum() > 0:
            return y.relu() - x
        return y * x - 3

    return World(run, [lambda d: (d(4, 5).abs(),), lambda d: (-d(4, 5).abs() - 1,)])


@program(engines=3)
def branch_on_two_values() -> World:
    """As RIFE does: a comparison, and what it decides goes on with both sides' results."""

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        flow = (x - y) * 16
        if flow.abs().max() > 32:
            flow = flow / 2
        elif bool((flow < 0).all()):
            flow = -flow
        return flow.tanh() + x

    return World(
        run,
        [
            lambda d: (d(3, 4) + 9, d(3, 4)),
            lambda d: (d(3, 4).clamp(-0.5, 0.5), d(3, 4).abs().clamp(0.5, 1) + 0.1),
            lambda d: (d(3, 4).clamp(-0.9, 0.9), d(3, 4).clamp(-0.9, 0.9)),
        ],
    )


@program(engines=1)
def item_in_arithmetic() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, float]:
        top = x.max().item()
        return (x * top).relu() + top, top * 2

    return World(run, [lambda d: (d(6),), lambda d: (d(2, 3) * 100,)])


@program(engines=2)
def loop_until_large() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        rounds = 0
        while x.sum() < 50:
            x = x * 1.5 + 0.5
            rounds += 1
        return x.sqrt(), rounds

    return World(run, [lambda d: (d(8).abs(),), lambda d: (d(8).abs() + 20,), lambda d: (d(8).abs() * 3,)])


@program(engines=2)
def callback_in_the_middle() -> World:
    seen: list[float] = []

    @torch._dynamo.disable
    def report(y: torch.Tensor) -> None:
        seen.append(float(y.mean()))

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x.cos() + 1
        report(y)
        return y.exp() * x

    return World(run, [lambda d: (d(3, 3),), lambda d: (d(3, 3) * 4,)], lambda: list(seen))


@program()
def logging_in_the_middle() -> World:
    lines: list[Any] = []

    def run(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x.sigmoid()
        lines.append((name, tuple(y.shape)))
        y = y - 0.5
        lines.append(y.dim())
        return y * x

    return World(
        run,
        [
            lambda d: emptied(lines, d(3, 2), "first"),
            lambda d: emptied(lines, d(5, 2), "second"),
            lambda d: emptied(lines, d(4), "third"),
        ],
        lambda: lines,
    )


@program(engines=2)
def explicit_graph_break() -> World:
    def run(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = x @ y
        torch._dynamo.graph_break()
        return z.softmax(-1), x + 1

    return World(run, [lambda d: (d(2, 3), d(3, 2)), lambda d: (d(2, 3), d(3, 4))])


@program(engines=2)
def c_function_in_the_middle() -> World:
    @torch._dynamo.disable  # or it would compile for each value of the bytes
    def checksum(y: torch.Tensor) -> int:
        return zlib.crc32(y.numpy().tobytes()) % 2

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x.floor() * 3
        return y + checksum(y)

    return World(run, [lambda d: (d(2, 4),), lambda d: (d(2, 4) * 9,)])


@program()
def numpy_in_the_middle() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        a = (x * 2).numpy()
        b = a[::2] + 1
        return torch.from_numpy(b) - 3, b.shape

    return World(run, [lambda d: (d(6),), lambda d: (d(9, 2),)])


@program()
def try_around_an_operator() -> World:
    @torch._dynamo.disable
    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    def prepared(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    def run(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, str]:
        x = prepared(x)
        try:
            # Where Dynamo traces it, with any backend, the error of wrong shapes goes past the handler.
            return product(x, w).relu(), "product"
        except RuntimeError:
            return x.sum(1) * w.sum(), "sum"

    return World(run, [lambda d: (d(4, 5), d(5, 3)), lambda d: (d(4, 5), d(4, 3))])


@program()
def try_around_a_raise() -> World:
    def check(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 3:
            raise ValueError("too many")
        return x.exp()

    def run(x: torch.Tensor) -> torch.Tensor:
        try:
            return check(x) + 1
        except ValueError as e:
            return x[:3] * len(str(e))

    return World(run, [lambda d: (d(2, 3),), lambda d: (d(5, 3),)])


@program(engines=2)
def no_grad_around_a_break() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, bool, bool]:
        with torch.no_grad():
            y = x.sin()
            torch._dynamo.graph_break()
            inside = torch.is_grad_enabled()
            y = y * 2
        return y + x, inside, torch.is_grad_enabled()

    return World(run, [lambda d: (d(4),), lambda d: (d(4) * 2,)])


@program(engines=2)
def autocast_around_a_break() -> World:
    def run(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ w
            torch._dynamo.graph_break()
            z = y @ w
        return y, z, x @ w

    return World(run, [lambda d: (d(4, 4), d(4, 4)), lambda d: (d(2, 4), d(4, 4))])


@program()
def autocast_around_the_call() -> World:
    """The mode is the caller's, and changes between calls."""
    on = False

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ w) + 1

    def called(mode: bool) -> Call:
        def call(d: Draw) -> Any:
            nonlocal on
            on = mode
            return d(3, 4), d(4, 5)

        return call

    def within() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)

    run.within = within  # type: ignore[attr-defined]
    return World(run, [called(False), called(True)])


class _Scope:
    """A context manager that Dynamo has never heard of."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __enter__(self) -> _Scope:
        self.log.append("in")
        return self

    def __exit__(self, *error: Any) -> None:
        self.log.append("out" if error[0] is None else error[0].__name__)


@program(engines=1)
def own_context_manager_around_a_break() -> World:
    log: list[str] = []

    def root(x: torch.Tensor) -> torch.Tensor:  # a frame of its own: Dynamo runs the other one in eager
        return x.abs().sqrt()

    def run(x: torch.Tensor) -> torch.Tensor:
        with _Scope(log):
            y = root(x)
            torch._dynamo.graph_break()
            y = root(y - 0.5)
        return y - x

    return World(run, [lambda d: emptied(log, d(5)), lambda d: emptied(log, d(2, 2))], lambda: log)


@program(engines=3)
def nested_function_with_a_break() -> World:
    def run(x: torch.Tensor, k: int) -> torch.Tensor:
        def inner(y: torch.Tensor) -> torch.Tensor:
            y = y + k
            torch._dynamo.graph_break()
            return y * x

        return inner(x.relu()) + inner(x.neg())

    return World(run, [lambda d: (d(3), 2), lambda d: (d(3), 5)])


# -- what guards are for ----------------------------------------------------------------------------------------------


@program(engines=2)
def closure_variable() -> World:
    scale = 1.5

    def run(x: torch.Tensor) -> torch.Tensor:
        return x * scale + 1

    def at(value: float) -> Call:
        def call(d: Draw) -> Any:
            nonlocal scale
            scale = value
            return (d(3, 4),)

        return call

    return World(run, [at(1.5), at(-2.25)])


@program()
def closure_tensor() -> World:
    """No parameter of anything: what it holds, and which it is, may change."""
    held = torch.ones(4)

    def run(x: torch.Tensor) -> torch.Tensor:
        return x * held

    def replaced(d: Draw) -> Any:
        nonlocal held
        held = d(4)
        return (d(3, 4),)

    def written(d: Draw) -> Any:
        held.add_(1.5)
        return (d(3, 4),)

    return World(run, [lambda d: (d(3, 4),), written, replaced])


_factor: Any = 2.0


@program(engines=2)
def global_variable() -> World:
    def run(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * _factor

    def at(value: Any) -> Call:
        def call(d: Draw) -> Any:
            global _factor
            _factor = value
            return (d(3, 4),)

        return call

    return World(run, [at(2.0), at(3), at(torch.tensor(1.25)), at(-0.5)])


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.scale: float = 1.0
        self.activation: Any = torch.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.linear(x)) * self.scale


@program(engines=3)
def attribute_of_the_module() -> World:
    model = frozen(_Scaled())

    def at(scale: float, activation: Any) -> Call:
        def call(d: Draw) -> Any:
            model.scale, model.activation = scale, activation
            return (d(2, 4),)

        return call

    return World(model, [at(1.0, torch.relu), at(3.5, torch.relu), at(3.5, torch.sigmoid)])


@program(engines=2)
def replaced_parameter() -> World:
    model = frozen(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))

    def replaced(d: Draw) -> Any:
        model[0].weight = nn.Parameter(d(4, 4), requires_grad=False)
        return (d(3, 4),)

    return World(model, [lambda d: (d(3, 4),), replaced])


@program(engines=1)
def written_parameter() -> World:
    model = frozen(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))

    def scaled(d: Draw) -> Any:
        model[0].weight.data.mul_(-1.25)
        return (d(3, 4),)

    def copied(d: Draw) -> Any:
        model[2].bias.copy_(d(2))
        return (d(3, 4),)

    def loaded(d: Draw) -> Any:
        model.load_state_dict({name: d(*value.shape) for name, value in model.state_dict().items()})
        return (d(3, 4),)

    return World(model, [lambda d: (d(3, 4),), scaled, copied, loaded])


@program(engines=1)
def two_modules_with_one_code() -> World:
    """Dynamo may have one graph for both."""
    models = [frozen(nn.Linear(4, 3)) for _ in range(3)]

    def run(which: int, x: torch.Tensor) -> torch.Tensor:
        return models[which](x).relu()

    return World(run, [lambda d: (0, d(2, 4)), lambda d: (1, d(2, 4)), lambda d: (2, d(2, 4))])


@program()
def module_as_an_argument() -> World:
    models = [frozen(nn.Linear(4, 3)), frozen(nn.Linear(4, 3, bias=False)), frozen(nn.Linear(4, 3))]

    def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x) - 1

    def state() -> Any:
        return [list(model.parameters()) for model in models]

    def passing(which: int) -> Call:
        return lambda d: Given((_Opaque(models[which]), d(2, 4)))

    return World(lambda m, x: run(m.value, x), [passing(0), passing(1), passing(2)], state)


@program(engines=1)
def training_flag() -> World:
    model = frozen(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))

    def in_mode(training: bool) -> Call:
        def call(d: Draw) -> Any:
            model.train(training)
            return (d(3, 4),)

        return call

    return World(model, [in_mode(False), in_mode(True)])


@program(engines=2)
def string_flag() -> World:
    def run(x: torch.Tensor, how: str = "mean") -> torch.Tensor:
        x = x * 3
        return x.mean(0) if how == "mean" else x.amax(0) if how == "max" else x

    return World(
        run, [lambda d: (d(3, 4), "max"), lambda d: (d(3, 4),), lambda d: Given((d(3, 4),), {"how": "nothing"})]
    )


@program(engines=1)
def integers_that_vary() -> World:
    def run(x: torch.Tensor, k: int) -> tuple[torch.Tensor, int]:
        return x * k + k // 2, k % 5

    return World(run, [lambda d: (d(4), 3), lambda d: (d(4), d.integer()), lambda d: (d(4), 0), lambda d: (d(4), 1)])


@program(engines=1)
def floats_that_vary() -> World:
    def run(x: torch.Tensor, a: float) -> tuple[torch.Tensor, float]:
        return x / a + a, a * 0.5

    return World(
        run,
        [
            lambda d: (d(4), 0.5),
            lambda d: (d(4), d.number()),
            lambda d: (d(4), -0.0),
            lambda d: (d(4), math.inf),
            lambda d: (d(4), True),
        ],
    )


@program(engines=1)
def shape_dependent_branch() -> World:
    def run(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] > 4:
            return x[..., :4] + x.shape[-1]
        return x.repeat(2, 1) * x.numel()

    return World(run, [lambda d: (d(2, 3),), lambda d: (d(2, 8),), lambda d: (d(3, 5),)])


@program(engines=1)
def batch_sizes() -> World:
    model = frozen(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    return World(model, [lambda d: (d(2, 4),), lambda d: (d(7, 4),), lambda d: (d(3, 4),), lambda d: (d(5, 4),)])


@program(engines=1)
def sizes_zero_and_one() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        y = torch.cat([x, x * 2])
        return y.sum(0), y.unsqueeze(1), y.numel()

    return World(run, [lambda d: (d(3, 2),), lambda d: (d(0, 2),), lambda d: (d(1, 2),), lambda d: (d(3, 1),)])


@program(engines=3)
def dtypes() -> World:
    def run(x: torch.Tensor) -> torch.Tensor:
        return (x + 2) * 3 - x

    return World(
        run,
        [
            lambda d: (d(4),),
            lambda d: (d(4, dtype=torch.float64),),
            lambda d: (d.whole(4),),
            lambda d: (d(4, dtype=torch.bfloat16),),
            lambda d: (d.whole(4) > 4,),
        ],
    )


@program(engines=2)
def layouts() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
        return x * 2 + 1, x.flatten() - 1, x.is_contiguous()

    return World(
        run,
        [
            lambda d: (d(4, 6),),
            lambda d: (d(6, 4).t(),),
            lambda d: (d(4, 12)[:, ::2],),
            lambda d: (d(4, 1).expand(4, 6),),
            lambda d: (d(9, 6)[3:7],),
        ],
    )


@program(engines=1)
def offsets_of_storage() -> World:
    """A program that looks at them, which Dynamo leaves to eager."""

    def after(x: torch.Tensor) -> torch.Tensor:
        return x * 3 + 1

    def run(x: torch.Tensor) -> torch.Tensor:
        return after(x.as_strided((2, 2), (2, 1), x.storage_offset()))

    return World(run, [lambda d: (d(4),), lambda d: (d(8)[4:],), lambda d: (d(7)[3:],)])


@program(engines=2)
def lists_of_several_lengths() -> World:
    def run(xs: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
        total = xs[0] * 0.5
        for x in xs[1:]:
            total = total + x.square()
        return total, len(xs)

    return World(
        run,
        [
            lambda d: ([d(3)],),
            lambda d: ([d(3), d(3), d(3)],),
            lambda d: ([d(3), d(1)],),
        ],
    )


@program(engines=1)
def keys_of_a_dict() -> World:
    def run(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: x * len(name) for name, x in tensors.items() if name != "mask"}

    return World(
        run,
        [
            lambda d: Given((), {"a": d(3), "mask": d(3)}),
            lambda d: Given((), {"long": d(3), "a": d(2)}),
            lambda d: Given((), {"a": d(2), "long": d(3)}),
        ],
    )


@program(engines=2)
def args_and_kwargs() -> World:
    def run(*xs: torch.Tensor, bias: torch.Tensor | None = None, **rest: Any) -> tuple[Any, ...]:
        ys = [x + 1 for x in xs]
        if bias is not None:
            ys = [y * bias for y in ys]
        return (*ys, sorted(rest), rest.get("k"))

    return World(
        run,
        [
            lambda d: (d(2), d(3)),
            lambda d: Given((d(2),), {"bias": d(1), "k": 3}),
            lambda d: Given((d(2), d(2), d(2)), {"bias": d(2), "name": "x"}),
        ],
    )


@program(engines=1)
def default_arguments() -> World:
    def run(x: torch.Tensor, kept: list[Any] = [], *, offset: float = 0.5) -> tuple[torch.Tensor, int]:  # noqa: B006
        kept.append(x.shape[0])
        return x + offset, len(kept)

    defaults = run.__defaults__ or ()
    return World(
        run,
        [
            lambda d: emptied(defaults[0], d(3)),
            lambda d: Given((d(3),), {"offset": 1.5}),
            lambda d: (d(3), [1, 2]),
        ],
        lambda: list(defaults),
    )


@program(engines=2)
def tensors_that_are_none() -> World:
    def run(x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor | None, Any]:
        y = x.exp()
        return (None, y) if mask is None else (y.masked_fill(mask, -1.0), None)

    return World(run, [lambda d: (d(3, 3), None), lambda d: (d(3, 3), d(3, 3) > 0)])


@program(engines=2)
def default_dtype() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.full((3,), 0.1) + torch.arange(3) / 7
        return y, x.double() * y

    dtype = torch.float32

    def under(given: torch.dtype) -> Call:
        def call(d: Draw) -> Any:
            nonlocal dtype
            dtype = given
            return (d(3),)

        return call

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    run.within = within  # type: ignore[attr-defined]
    return World(run, [under(torch.float32), under(torch.float64)])


@program(engines=2)
def inference_mode_of_the_caller() -> World:
    """Results made there are inference tensors, others are not."""
    on = False

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y.sin()

    def called(mode: bool) -> Call:
        def call(d: Draw) -> Any:
            nonlocal on
            on = mode
            return (d(3),)

        return call

    run.within = lambda: torch.inference_mode(on)  # type: ignore[attr-defined]
    return World(run, [called(False), called(True)])


# -- what changes, and what is the same -------------------------------------------------------------------------------


class _Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.calls = 1 - self.calls  # a number that grows is compiled for each time
        self.mean.mul_(0.5).add_(x.sum(0))
        return x - self.mean * self.count


@program(engines=0)
def buffer_that_counts() -> World:
    model = frozen(_Counter())
    return World(model, [lambda d: (d(3, 4),), lambda d: (d(5, 4),)], lambda: model.calls)


class _Replacing(nn.Module):
    """Keeps its last result, as a cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x.sum(0) + self.last * 0.5
        return x * self.last


@program(engines=1)
def buffer_that_is_replaced() -> World:
    return World(frozen(_Replacing()), [lambda d: (d(3, 4),), lambda d: (d(3, 4) * 2,)])


@program(engines=0)
def statistics_of_a_batch() -> World:
    """BatchNorm in training mode: its results depend on the batch, and its buffers change."""
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU()).train().requires_grad_(False)
    return World(model, [lambda d: (d(2, 3, 5),), lambda d: (d(2, 3, 5) * 3,)])


@program(engines=1)
def input_changed_in_place() -> World:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(y)
        return x * 2

    return World(run, [lambda d: (d(3), d(3)), lambda d: (d(3, 3), d(3))])


@program(engines=1)
def input_changed_behind_a_break() -> World:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if y.sum() > 0:
            x.mul_(3)
        return y + x

    return World(run, [lambda d: (d(4).abs(),), lambda d: (-d(4).abs(),)])


@program(engines=1)
def view_of_an_input_changed() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        row = x[1]
        row.mul_(5)
        x[:, 0] = -1
        return row, x.sum(0)

    return World(run, [lambda d: (d(3, 4),), lambda d: (d(4, 3).t(),)])


@program(engines=1)
def input_returned_as_it_is() -> World:
    def run(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return y, x + 1, x

    return World(run, [lambda d: (d(3), d(4)), lambda d: (d(3).view(3, 1), d(2))])


@program(engines=1)
def two_views_of_one() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = x * 2
        return y[0], y.t(), y[0]

    return World(run, [lambda d: (d(3, 4),), lambda d: (d(2, 2),)])


@program(engines=1)
def views_of_an_input() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x.view(-1), *x.unbind(0), x.detach(), x + 0)

    return World(run, [lambda d: (d(3, 4),), lambda d: (d(3, 2, 2),)])


@program(engines=2)
def aliased_inputs() -> World:
    def run(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
        return x * y, y + 1, x is y

    def same(d: Draw) -> Any:
        x = d(4)
        return x, x

    def overlapping(d: Draw) -> Any:
        x = d(5)
        return x[:-1], x[1:]

    return World(run, [lambda d: (d(4), d(4)), same, overlapping])


@program(engines=2)
def aliased_inputs_changed() -> World:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        z = y + 1
        y.add_(3)
        return z * x

    def same(d: Draw) -> Any:
        x = d(4)
        return x, x

    def overlapping(d: Draw) -> Any:
        x = d(6)
        return x[:4], x[2:]

    return World(run, [lambda d: (d(4), d(4)), same, overlapping])


@program(engines=1)
def list_appended_to() -> World:
    def run(xs: list[torch.Tensor], x: torch.Tensor) -> int:
        xs.append(x * 2)
        xs[0] = xs[-1] + 1
        return len(xs)

    return World(run, [lambda d: ([d(3)], d(3)), lambda d: ([d(3), d(2)], d(3))])


@program(engines=2)
def dict_written_to() -> World:
    def run(store: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
        y = x.relu()
        store["y"] = y
        torch._dynamo.graph_break()
        store.setdefault("sum", y.sum())
        return store.pop("old") if "old" in store else y + 1

    return World(run, [lambda d: ({}, d(3)), lambda d: ({"old": d(2), "sum": 1}, d(3)), lambda d: ({"y": 3}, d(3))])


@program(engines=1)
def constant_as_the_result() -> World:
    """The caller owns each result, also where the program makes the same one each time."""

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.ones(3), torch.arange(4, dtype=torch.float32) * 2, x + torch.tensor([1.0, 2.0, 3.0])

    return World(run, [lambda d: (d(3),), lambda d: (d(2, 3),)])


class _Keeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(12.0).view(3, 4))
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.table[1], self.weight, x * self.weight, self.table


@program(engines=1)
def buffer_as_the_result() -> World:
    """It is the module's own, and whoever writes it writes the module's."""
    return World(frozen(_Keeper()), [lambda d: (d(2, 4),), lambda d: (d(3, 4),)])


@program(engines=2)
def operator_with_out() -> World:
    def run(x: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        torch.mul(x, 2, out=into)
        return into + 1

    return World(run, [lambda d: (d(3), d(3)), lambda d: (d(4), d(4))])


@program(engines=1)
def in_place_on_its_own() -> World:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[0] = 7
        y.view(-1)[1:3] *= 2
        y.clamp_(max=5)
        return y

    return World(run, [lambda d: (d(3, 4),), lambda d: (d(2, 6),)])


# -- what Python is like ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Boxes:
    boxes: torch.Tensor
    scores: torch.Tensor
    label: str = "none"


class _Pair(NamedTuple):
    first: torch.Tensor
    second: Any


@dataclasses.dataclass
class _Opaque:
    """Passes through the harness's copies what is to be seen as it is."""

    value: Any


@program(engines=1)
def dataclass_as_the_result() -> World:
    def run(x: torch.Tensor) -> _Boxes:
        return _Boxes(x.clamp(0, 1), x.mean(-1), label=f"{x.shape[0]} boxes")

    return World(run, [lambda d: (d(3, 4),), lambda d: (d(2, 4),)])


@program(engines=2)
def named_tuple_as_the_result() -> World:
    def run(x: torch.Tensor, more: bool) -> _Pair:
        first = x.sort().values
        return _Pair(first, second=x.topk(2) if more else None)

    return World(run, [lambda d: (d(5), False), lambda d: (d(5), True)])


@program(engines=1)
def nothing_as_the_result() -> World:
    def run(x: torch.Tensor) -> Any:
        y = x + 1
        if x.shape[0] == 2:
            return None
        return [None, {"y": y, "none": None}, ()]

    return World(run, [lambda d: (d(3),), lambda d: (d(2),)])


@program(engines=1)
def generator_function() -> World:
    def parts(x: torch.Tensor) -> Iterator[torch.Tensor]:
        for i, row in enumerate(x):
            yield row * (i + 1)
        yield x.sum(0)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        it = parts(x)
        first = next(it)
        return first, torch.stack(list(it)) + sum(a * b for a, b in zip(x, x.flip(0), strict=True))

    return World(run, [lambda d: (d(3, 4),), lambda d: (d(2, 4),)])


@program(engines=1)
def iterator_across_a_break() -> World:
    def part(x: torch.Tensor, i: int) -> torch.Tensor:
        return x * 2 - i

    def run(x: torch.Tensor, names: list[str]) -> list[tuple[str, torch.Tensor]]:
        found = []
        for i, name in enumerate(names):
            found.append((name, part(x, i)))
            torch._dynamo.graph_break()
        return found

    return World(run, [lambda d: (d(3), ["a", "bc"]), lambda d: (d(3), ["a", "bcd", "e"])])


@program(engines=1)
def recursion() -> World:
    def halves(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 1:
            return x * 3
        middle = x.shape[0] // 2
        return torch.cat([halves(x[middle:]), halves(x[:middle]) + 1])

    return World(halves, [lambda d: (d(4, 2),), lambda d: (d(5, 2),), lambda d: (d(1, 2),)])


@program(engines=2)
def recursion_with_a_break() -> World:
    def run(x: torch.Tensor, depth: int) -> torch.Tensor:
        if depth == 0:
            return x.cos()
        y = x * 1.5
        torch._dynamo.graph_break()
        return run(y, depth - 1) + x

    return World(run, [lambda d: (d(3), 1), lambda d: (d(3), 2)])


class _Mover:
    """No module: an object whose method is compiled."""

    def __init__(self) -> None:
        self.position = torch.zeros(3)
        self.steps = 0
        self.history: list[int] = []

    def step(self, x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
        self.position = self.position + x * by
        self.steps = 1 - self.steps
        self.history.append(x.shape[0])
        return self.position * 2


@program(engines=1)
def object_with_state() -> World:
    mover = _Mover()
    return World(
        mover.step,
        [lambda d: emptied(mover.history, d(3)), lambda d: Given(emptied(mover.history, d(3)), {"by": 0.5})],
        lambda: [mover.position, mover.steps, mover.history],
    )


@program(engines=1)
def partial_and_lambda() -> World:
    def run(x: torch.Tensor, how: Any) -> torch.Tensor:
        return functools.reduce(lambda a, f: f(a), [how.value, torch.neg, functools.partial(torch.clamp, max=1)], x)

    choices = [functools.partial(torch.add, other=2), torch.exp]
    return World(run, [lambda d: (d(3), _Opaque(choices[0])), lambda d: (d(3), _Opaque(choices[1]))])


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)})

    def forward(self, x: torch.Tensor, head: str) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x) + x if i % 2 else torch.relu(block(x))
        return self.heads[head](x)


@program(engines=2)
def module_list() -> World:
    return World(frozen(_Blocks()), [lambda d: (d(2, 4), "a"), lambda d: (d(2, 4), "b")])


@program(engines=1)
def module_hooks() -> World:
    model = frozen(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    seen: list[Any] = []

    def before(module: nn.Module, args: Any) -> Any:
        return (args[0] * 2,)

    def after(module: nn.Module, args: Any, result: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(result.shape))
        return result - 1

    model[0].register_forward_pre_hook(before)
    model[1].register_forward_hook(after)
    return World(model, [lambda d: emptied(seen, d(2, 4)), lambda d: emptied(seen, d(3, 4))], lambda: list(seen))


class _Wrapper(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x * 2 + 1).sigmoid()


@program(engines=1)
def hook_with_a_break() -> World:
    """As feature extractors have them: a dict of what the layers gave."""
    model = frozen(_Wrapper(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))))
    features: dict[str, torch.Tensor] = {}

    @torch._dynamo.disable
    def keep(module: nn.Module, args: Any, result: torch.Tensor) -> None:
        features["linear"] = result

    model.net[0].register_forward_hook(keep)
    return World(model, [lambda d: (d(2, 4),), lambda d: (d(2, 4) * 2,)], lambda: dict(features))


# -- other kinds of operators -----------------------------------------------------------------------------------------


@program(engines=1)
def nonzero() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        where = (x > 0).nonzero()
        return where * 2, x.relu(), where.shape[0]

    return World(run, [lambda d: (d(9),), lambda d: (d(3, 4),), lambda d: (-d(5).abs(),)])


@program(engines=1)
def masked_select_and_unique() -> World:
    def run(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x + 1
        kept = y[y > 0.5]
        found, counts = ids.unique(return_counts=True)
        return kept * 2, found, counts, kept.sum() + found.sum()

    return World(run, [lambda d: (d(12), d.whole(12)), lambda d: (d(3, 4), d.whole(5))])


@program(engines=1)
def size_from_a_value() -> World:
    def run(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        x = x.exp()
        return torch.cat([x[: int(n)], torch.zeros(int(n.item()))])

    return World(run, [lambda d: (d(9), d.whole()), lambda d: (d(9), torch.tensor(0)), lambda d: (d(9), d.whole())])


@program(engines=1)
def dropout() -> World:
    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.dropout(x * 2, 0.5, train=True) + 1

    return World(run, [lambda d: (d(6, 5),), lambda d: (d(6, 5) * 2,)])


@program(engines=1)
def random_tensors() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        noise = torch.rand(4) + torch.randn_like(x)
        torch._dynamo.graph_break()
        return noise * x, torch.randint(0, 9, (3,)), torch.bernoulli(x.sigmoid()), torch.randperm(5)

    return World(run, [lambda d: (d(4),), lambda d: (d(2, 4),)])


@program(engines=1)
def random_of_python() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, float]:
        chance = random.random()
        return x * chance + random.randint(0, 9), chance

    return World(run, [lambda d: (d(4),), lambda d: (d(2, 4),)])


@program(engines=0)
def vmap() -> World:
    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(lambda row: (row @ w).relu() + row.sum())(x)

    return World(run, [lambda d: (d(3, 4), d(4, 2)), lambda d: (d(5, 4), d(4, 2))])


@program(engines=1)
def complex_numbers() -> World:
    def run(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z = x * y + 1j
        return z, z.real * 2, z.conj()

    return World(
        run,
        [
            lambda d: (d(4, dtype=torch.complex64), d(4)),
            lambda d: (d(3, dtype=torch.complex128), d(3, dtype=torch.complex64)),
        ],
    )


@program(engines=1)
def inference_mode_inside() -> World:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            y = x.sin() * 2
        return y, x + 1

    return World(run, [lambda d: (d(4),), lambda d: (d(2, 3),)])


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.after = nn.GRUCell(4, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        results = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            results.append(self.after(state))
        assert state is not None
        return torch.stack(results, 1), state


@program(engines=2)
def recurrent_network() -> World:
    return World(frozen(_Recurrent()), [lambda d: (d(2, 3, 4),), lambda d: (d(2, 3, 4), d(2, 5))])


# -- errors -----------------------------------------------------------------------------------------------------------


class _Refused(Exception):
    pass


@program(engines=2)
def error_for_some_values() -> World:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if y.min() < -100:
            raise _Refused(f"too small: {x.shape[0]}")
        return y.sqrt() + 1

    return World(run, [lambda d: (d(4).abs(),), lambda d: (d(4) - 1000,)])


@program(engines=1)
def error_after_a_change() -> World:
    """What was changed before the error stays changed."""
    log: list[int] = []

    def run(x: torch.Tensor, k: int) -> torch.Tensor:
        x.add_(1)
        log.append(k)
        y = x * 2
        if k > 2:
            raise KeyError(k)
        return y

    return World(run, [lambda d: emptied(log, d(3), 1), lambda d: emptied(log, d(3), 5)], lambda: log)


@program(engines=1)
def error_of_an_operator() -> World:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.relu()
        torch._dynamo.graph_break()
        return x[y] + 1

    return World(run, [lambda d: (d(12), d.whole(3)), lambda d: (d(3), d.whole(4) + 90)])


@program(engines=1)
def assertion_on_a_value() -> World:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = x + 3
        if not (x > -50).all():  # an assert raises RuntimeError under Dynamo, with any backend
            raise AssertionError("too small")
        return y.log2()

    return World(run, [lambda d: (d(4).abs(),), lambda d: (d(4) - 99,)])


# -- the harness ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def from_the_start() -> Iterator[None]:
    """Dynamo knows no function; nothing that a test does to the process stays."""
    torch._dynamo.reset()
    gc.collect()
    with torch.random.fork_rng(devices=[]):
        yield
    torch._dynamo.reset()


def _plain(nest: Any) -> Any:
    """The nest for a comparison: what tensors cannot be in is named."""
    if isinstance(nest, _Opaque):
        return "opaque"
    if isinstance(nest, list | tuple) and not hasattr(nest, "_fields"):
        return type(nest)(map(_plain, nest)) if type(nest) in (list, tuple) else nest
    return nest


def _leaves(nest: Any) -> list[torch.Tensor]:
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        nest = [getattr(nest, field.name) for field in dataclasses.fields(nest)]
    return [x for x in pytree.tree_leaves(nest) if isinstance(x, torch.Tensor)]


class _Side:
    """One world and the calls made in it."""

    def __init__(self, program: Program, compiler: Callable[[Any], Any]) -> None:
        torch.manual_seed(zlib.crc32(program.name.encode()))
        self.world = program.make()
        self.run = compiler(self.world.run)
        self.kept: list[Any] = []

    def call(self, which: int, seed: int) -> Any:
        """All that can be told of a call afterwards."""
        given = self.world.calls[which](Draw(seed))
        given = given if isinstance(given, Given) else Given(given)
        own = _leaves([*given.args, given.kwargs])
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            with getattr(self.world.run, "within", contextlib.nullcontext)():
                result = self.run(*given.args, **given.kwargs)
        except Exception as e:
            # A loop of references would keep tensors alive.
            result = (type(e).__name__, type(e).__module__)
        self.kept.append(result)
        module = getattr(self.world.run, "__self__", self.world.run)
        tensors = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
        return {
            "result": result,
            "arguments": _plain([*given.args, given.kwargs]),
            "state": [tensors, self.world.state()],
            "which input or parameter": [
                next((i for i, own_tensor in enumerate([*own, *tensors]) if own_tensor is x), None)
                for x in _leaves(result)
            ],
            "generators": [torch.get_rng_state(), random.getstate()],
            "modes": [
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_default_dtype(),
            ],
        }

    def scribble(self) -> None:
        """Write over the last result, as a caller may: nothing else of the program may be there."""
        done: set[int] = set()
        for x in _leaves(self.kept[-1]):
            if id(x) in done or x.dtype == torch.bool or x.is_conj() or 0 in x.stride():
                continue
            done.add(id(x))
            with torch.inference_mode(x.is_inference()), torch.no_grad():
                x.mul_(-2).add_(5)


def check_program(
    program: Program, compiler: Callable[[Any], Any], rounding: Rounding | None = None, rounds: int = 3
) -> int:
    """Compare both worlds; how many engines there are in the end."""
    before = set(dynamo._fragments)  # Dynamo keeps some of other tests, and the set itself lets go of them
    expected, actual = _Side(program, lambda f: f), _Side(program, compiler)
    count = len(expected.world.calls)
    there = list(range(count))
    # Earlier ones again: first in the opposite order, so that each comes after each of its neighbours.
    order = [which for turn in range(rounds) for which in (there if turn % 2 == 0 else reversed(there))]
    order += [0] * (STEADY + 1) + there  # sizes that are the same so often get an engine, whatever they were before
    for step, which in enumerate(order):
        about = f"call {step}, of arguments {which}"
        wanted, found = expected.call(which, 1000 + step), actual.call(which, 1000 + step)
        different = differences(found, wanted, rounding=rounding)
        assert not different, "\n".join([about, *different])
        expected.scribble()
        actual.scribble()
    different = differences(actual.kept, expected.kept, rounding=rounding)
    assert not different, "\n".join(["all results in the end", *different])
    return sum(len(fragment.engines) for fragment in set(dynamo._fragments) - before)


def _named(*names: str, slow: tuple[str, ...] = ()) -> Any:
    """Those of the programs, or all; ``slow`` ones are too long for a push."""
    assert len({p.name for p in PROGRAMS}) == len(PROGRAMS)
    found = [p for p in PROGRAMS if p.name in names or not names]
    marked = [pytest.param(p, marks=pytest.mark.slow if p.name in slow else ()) for p in found]
    return pytest.mark.parametrize("program", marked, ids=lambda p: p.name)


@_named()
def test_program_gives_what_eager_gives(program: Program) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", anabranch.RecompileLimit)
        engines = check_program(program, lambda f: torch.compile(f, backend="anabranch", options=EAGER))
    assert engines >= program.engines
    assert engines == 0 or program.engines


@_named("branch_on_a_value", "replaced_parameter", "two_views_of_one", slow=("branch_on_a_value", "two_views_of_one"))
def test_program_gives_what_eager_gives_with_inductor(program: Program) -> None:
    """Kernels that a compiler makes, within rounding."""
    options = {"backend": "inductor"}
    engines = check_program(
        program, lambda f: torch.compile(f, backend="anabranch", options=options), Rounding(), rounds=2
    )
    assert engines >= program.engines


@_named("branch_on_two_values", "batch_sizes", "aliased_inputs_changed", "in_place_on_its_own", "buffer_as_the_result")
@pytest.mark.parametrize(
    ("dynamic", "runtime"),
    [
        pytest.param(None, "python", id="runtime in Python"),
        pytest.param(True, "auto", id="all sizes symbols", marks=pytest.mark.slow),
    ],
)
def test_program_gives_what_eager_gives_in_other_ways(program: Program, dynamic: bool | None, runtime: str) -> None:
    options = {**EAGER, "runtime": runtime}
    engines = check_program(
        program, lambda f: torch.compile(f, backend="anabranch", dynamic=dynamic, options=options), rounds=2
    )
    assert engines > 0 or not program.engines


def test_summary_names_the_break_and_the_engines() -> None:
    """What the test of the programs counts engines by is what a user sees."""

    def summed_up_here(x: torch.Tensor) -> torch.Tensor:
        y = x * 2 + 1
        if y.sum() > 0:
            y = y - x
        return y.relu()

    compiled = torch.compile(summed_up_here, backend="anabranch", options=EAGER)
    compiled(torch.ones(3))
    line = f"{Path(__file__).name}:{summed_up_here.__code__.co_firstlineno + 2}"
    ours = [g for g in dynamo.summary()["graphs"] if g["ends"] and g["ends"]["source"] == line]
    assert [g["operators"] for g in ours] == [4]
    assert "branch on the value of a tensor" in ours[0]["ends"]["reason"]
    assert len(ours[0]["engines"]) == 1
    assert ours[0]["engines"][0]["backend"] == "eager"
    assert not ours[0]["by_operators"]


def test_summary_says_why_operators_run_a_graph() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.kept.add_(x).cumsum(0).flip(0)

    model = Kept().eval()
    compiled = torch.compile(model, backend="anabranch", options=EAGER)
    for n in (2, 3):
        expected = (model.kept + n).cumsum(0).flip(0)
        assert torch.equal(compiled(torch.full((3,), float(n))), expected)
    reasons = [g["by_operators"] for g in dynamo.summary()["graphs"] if not g["engines"] and g["operators"] == 3]
    assert any("it writes a buffer" in reason for reason in reasons), reasons


def test_a_graph_writes_into_what_it_is_given() -> None:
    def changed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(y).mul_(3)
        return x.cumsum(0) - y

    compiled = torch.compile(changed, backend="anabranch", options=EAGER)
    for n in range(4):
        x, y = torch.randn(5) + n, torch.randn(5)
        own = x.clone()
        assert torch.equal(compiled(x, y), changed(own, y))
        assert torch.equal(x, own)
    x = torch.randn(5)
    own = x.clone()
    assert torch.equal(compiled(x, x), changed(own, own)), "one tensor twice, as eager takes it"
    assert torch.equal(x, own)


# -- threads ----------------------------------------------------------------------------------------------------------


def _call_while_others_compile(calls: int, functions: int) -> None:
    """8 threads call one function that has a break; 2 others compile and call new ones meanwhile."""
    model = frozen(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        if y.sum() > 0:
            return y * 2 + x
        return (y - x).relu()

    def new(constant: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """A code object of its own, which Dynamo has not seen."""
        names: dict[str, Any] = {}
        exec(f"def made(x):\n    y = x * {constant} + 1\n    if y.sum() > 0: y = y - x\n    return y.cos()", names)
        return names["made"]

    # Some versions of PyTorch crash where the first calls of a process are made by several threads at once.
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    compiled = torch.compile(broken, backend="anabranch", options=EAGER)
    before = set(dynamo._fragments)
    results: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(10)]
    grad = torch.is_grad_enabled()

    def work(i: int) -> None:
        draw = Draw(i)
        if i < 8:
            for call in range(calls):
                x = draw(1 + i % 2, 8) + (-1) ** call
                results[i].append((x, compiled(x)))
                assert torch.is_grad_enabled() == grad
        else:
            for number in range(functions):
                f = new(2 + 2 * number + i % 2)
                g = torch.compile(f, backend="anabranch", options=EAGER)
                for _ in range(4):
                    x = draw(3)
                    results[i].append((f(x), g(x)))

    on_threads(10, work)
    for i, pairs in enumerate(results):
        assert len(pairs) == (calls if i < 8 else functions * 4)
        expected = [broken(x) if i < 8 else x for x, _ in pairs]
        different = differences([y for _, y in pairs], expected)
        assert not different, "\n".join([f"thread {i}", *different[:5]])
    assert sum(len(f.engines) for f in set(dynamo._fragments) - before) >= 3


def test_threads_call_while_others_compile() -> None:
    _call_while_others_compile(calls=150, functions=6)


@pytest.mark.slow
def test_threads_call_while_others_compile_for_long() -> None:
    _call_while_others_compile(calls=1000, functions=30)


#: Looks the backend up in 6 threads at once, and has each of them compile and call. Prints what all did.
_LOOK_UP = """
import threading
import torch

def call(f, x):
    return torch.compile(f, backend="anabranch", options={"backend": "eager"})(x)

def functions():
    names = {}
    for i in range(6):
        exec(f"def f{i}(x): return x.sin() * {i} + 2", names)
    return [names[f"f{i}"] for i in range(6)]

# Some versions of PyTorch crash where the first calls of a process are made by several threads at once.
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
barrier, results = threading.Barrier(6), [None] * 6

def work(i, f):
    x = torch.arange(4.0) - i
    barrier.wait()
    try:
        results[i] = torch.equal(call(f, x), f(x))
    except BaseException as e:
        results[i] = repr(e)

threads = [threading.Thread(target=work, args=(i, f)) for i, f in enumerate(functions())]
for t in threads: t.start()
for t in threads: t.join()
import anabranch.dynamo
print(results, sum(len(g["engines"]) for g in anabranch.dynamo.summary()["graphs"]))
"""


def _entry_points() -> str:
    """What an installation would write, from what the project declares."""
    wanted = "torch_dynamo_backends"
    lines = (ROOT / "pyproject.toml").read_text().split(f"[project.entry-points.{wanted}]")[1].splitlines()[1:]
    entries = [line.replace('"', "") for line in lines[: lines.index("")]]
    assert entries
    return "\n".join([f"[{wanted}]", *entries, ""])


@pytest.mark.parametrize(
    "before",
    [
        pytest.param("import anabranch", id="imported before Dynamo"),
        pytest.param("import torch; torch._dynamo.list_backends(); import anabranch", id="imported after the look"),
        pytest.param("", id="installed and never imported"),
    ],
)
def test_threads_look_the_backend_up_at_once(before: str, run_python: Any, tmp_path: Path) -> None:
    """PyTorch alone fails with "duplicate name" there."""
    if not before:
        folder = tmp_path / "anabranch-0.1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: anabranch\nVersion: 0.1.0\n")
        (folder / "entry_points.txt").write_text(_entry_points())
        # In front of everything, as PYTHONPATH is; only the package's own folder was there so far.
        before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    else:
        before += "\nimport sys"
    script = f"{before}\nknown = 'anabranch' in sys.modules\n{_LOOK_UP}\nprint(known)"
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [f"{[True] * 6} 6", str("import anabranch" in before)], done.stderr


# -- what is refused, and limits --------------------------------------------------------------------------------------


def _scaled(x: torch.Tensor) -> torch.Tensor:
    return x * 3 - 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"options": {"bakend": "eager"}}, "bakend"),
        ({"options": {**EAGER, "triton.cudagraphs": True}}, "triton.cudagraphs"),
        ({"mode": "reduce-overhead"}, "reduce-overhead"),
    ],
    ids=["misspelled", "of Inductor", "mode"],
)
def test_unknown_option_is_named(given: dict[str, Any], named: str) -> None:
    compiled = torch.compile(_scaled, backend="anabranch", **given)
    for _ in range(2):  # the second call as well
        with pytest.raises(anabranch.InputError, match=named) as error:
            compiled(torch.ones(3))
        assert "cuda_graphs" in str(error.value)  # what there is instead


def test_bad_value_of_an_option_is_named() -> None:
    compiled = torch.compile(_scaled, backend="anabranch", options={"backend": "unheard-of"})
    with pytest.raises(anabranch.InputError, match="unheard-of"):
        compiled(torch.ones(3))


def test_grad_is_refused_where_parameters_require_it() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    x = Draw(1)(2, 4)
    before = set(dynamo._fragments)
    compiled = torch.compile(model, backend="anabranch", options=EAGER)
    with pytest.raises(anabranch.InputError, match="no_grad"):
        compiled(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not differences(compiled(x), model(x))
            assert not differences(compiled(x + 1), model(x + 1))
    with pytest.raises(anabranch.InputError, match="no_grad"):
        compiled(x)
    assert sum(len(f.engines) for f in set(dynamo._fragments) - before) >= 2
    model.requires_grad_(False)
    assert not differences(compiled(x), model(x))


def test_input_that_requires_grad() -> None:
    x = Draw(2)(3).requires_grad_()
    compiled = torch.compile(_scaled, backend="anabranch", options=EAGER)
    with pytest.raises(anabranch.InputError, match="no_grad"):
        compiled(x)
    with torch.no_grad():
        y = compiled(x)
        assert not differences(y, _scaled(x))
        assert not y.requires_grad
    assert not differences(compiled(x.detach()), _scaled(x.detach()))


def test_recompile_limit_is_told_and_results_are_right() -> None:
    def limited(x: torch.Tensor, how: str) -> torch.Tensor:
        return x.sin() * len(how) + (x if how.startswith("a") else 1)

    compiled = torch.compile(limited, backend="anabranch", options=EAGER)
    names = ["a", "bb", "ac", "ddd", "eeee", "a"]
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 2}):
        for i, name in enumerate(names[:2]):
            x = Draw(i)(4)
            with warnings.catch_warnings():
                warnings.simplefilter("error", anabranch.RecompileLimit)
                assert not differences(compiled(x, name), limited(x, name))

        def rest() -> None:
            for i, name in enumerate(names):
                x = Draw(10 + i)(4)
                assert not differences(compiled(x, name), limited(x, name))

        with pytest.warns(anabranch.RecompileLimit, match="limited") as told:
            rest()
    assert len([w for w in told if w.category is anabranch.RecompileLimit]) == 1
    past = {name: why for name, why in dynamo.summary()["past_limit"].items() if "'limited'" in name}
    assert len(past) == 1
    assert Path(__file__).name in next(iter(past))
    assert "(2)" in next(iter(past.values()))
