"""Random operators draw what eager would draw under the same seed, whatever thread calls, and never the same twice.

On one thread, results and the generator's state afterwards are eager's, by bits. On eight threads that share PyTorch's
default generator, the draws of all calls together are eager's of as many calls, in some order. On eight threads with a
generator each, every thread's draws are eager's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import anabranch
from anabranch._judge import Rounding, differences
from contract.draws import (
    NETWORKS,
    WIDTH,
    Given,
    Held,
    as_bytes,
    assert_all_differ,
    assert_drawn_as_in_eager,
)
from contract.support import has_memory, on_threads

pytestmark = pytest.mark.usefixtures("seeded", "one_thread_each")

THREADS, CALLS, ROWS = 8, 6, 16


@pytest.fixture(scope="module")
def one_thread_each() -> Iterator[None]:
    """Of PyTorch's own: those of eight callers would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def given(rows: int = ROWS) -> torch.Tensor:
    """Another input at every call, and nowhere zero."""
    x = torch.randn(rows, WIDTH)
    return x + x.sign() * 0.1


def entered(door: str, model: torch.nn.Module, inputs: list[Any], runtime: str, backend: str = "eager") -> Any:
    """What calls an engine of the model, by one of two doors. Nothing is left to build for such calls."""
    if door == "compile":
        return anabranch.compile(model.eval(), inputs, backend=backend, runtime=runtime)
    options = {"backend": backend, "runtime": runtime}
    compiled = torch.compile(model.eval(), backend="anabranch", options=options)
    with torch.random.fork_rng(devices=[]):
        compiled(*inputs)
    return compiled


@functools.cache
def network(name: str, door: str, runtime: str, backend: str) -> tuple[torch.nn.Module, Any]:
    """One of the networks, and what calls its engine."""
    model = NETWORKS[name]()
    return model, entered(door, model, [given()], runtime, backend)


@pytest.fixture
def afresh() -> Iterator[None]:
    """Dynamo remembers of each code whether sizes have varied, and of other tests' models whose code it is."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


#: The door and the runtime. A push has the reference behind one of the doors only: what is behind them is the same.
WAYS = [("compile", "native"), ("compile", "python"), ("torch.compile", "native"), _slow("torch.compile", "python")]
#: For models in fragments, which take seconds to build.
FEW_WAYS = [("compile", "native"), ("torch.compile", "native"), _slow("compile", "python")]
ways = functools.partial(pytest.mark.parametrize, ("door", "runtime"))

# Inductor's own kernels may round what is computed of a draw; the draws themselves are integers here.
ROUNDED = Rounding(1e-5, 1e-5)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "eager") for name in NETWORKS),
        ("between", "inductor"),
        *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in NETWORKS if name != "between"),
    ],
)
@ways(WAYS)
def test_consecutive_calls_draw_what_eager_draws(door: str, name: str, backend: str, runtime: str) -> None:
    model, engine = network(name, door, runtime, backend)
    inputs = [given() for _ in range(5)]

    def session(call: Callable[..., Any]) -> Any:
        """Calls, with draws of the user's own between them, and what would be drawn next."""
        torch.manual_seed(2991)
        made = []
        for x in inputs:
            made.append((call(x), torch.rand(3)))
        return made, torch.get_rng_state()

    got, state = session(engine)
    expected, expected_state = session(model)
    assert not differences(got, expected, rounding=ROUNDED if backend == "inductor" else None)
    assert torch.equal(state, expected_state)
    assert_all_differ(drawn for (_, drawn), _ in got)


@ways(FEW_WAYS)
def test_a_signature_that_is_compiled_under_a_seed_moves_no_draw(door: str, runtime: str) -> None:
    """The third call has a shape that was not seen before: it is compiled in between."""
    model = NETWORKS["between"]()
    engine = entered(door, model, [given()], runtime)
    assert_as_in_eager(engine, model, [given(), given(), given(7), given(), given(7), given(5)], 5)


def assert_as_in_eager(engine: Any, model: torch.nn.Module, inputs: list[torch.Tensor], seed: int) -> None:
    """Calls under a seed draw what eager draws, and leave the generator as eager does."""
    torch.manual_seed(seed)
    got = [engine(x) for x in inputs]
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    assert not differences(got, [model(x) for x in inputs])
    assert torch.equal(state, torch.get_rng_state())


# -- eight threads -----------------------------------------------------------------------------------------------------


def rounds(engine: Callable[..., Any], inputs: list[list[Any]]) -> list[list[Any]]:
    """Each thread's results for its own list of inputs. A barrier holds all threads before each of their calls."""
    barrier = threading.Barrier(len(inputs))
    results: list[list[Any]] = [[] for _ in inputs]

    def work(i: int) -> None:
        for args in inputs[i]:
            barrier.wait(timeout=60)
            results[i].append(engine(*args))

    on_threads(len(inputs), work)
    return results


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "eager") for name in NETWORKS),
        *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in ("dropout", "between", "sampler")),
    ],
)
@ways(WAYS)
def test_threads_that_share_the_default_generator_never_draw_the_same(
    door: str, name: str, backend: str, runtime: str
) -> None:
    model, engine = network(name, door, runtime, backend)
    inputs = [[(given(),) for _ in range(CALLS)] for _ in range(THREADS)]
    torch.manual_seed(11)
    drawn = [made[1] for results in rounds(engine, inputs) for made in results]
    state = torch.get_rng_state()
    assert len(drawn) == THREADS * CALLS
    if assert_drawn_as_in_eager(name, drawn, model, inputs, 11):
        assert torch.equal(state, torch.get_rng_state())


def own_generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@ways(FEW_WAYS)
@pytest.mark.usefixtures("afresh")
def test_threads_with_a_generator_each_draw_what_eager_draws(door: str, runtime: str) -> None:
    """One engine, given the calling thread's generator. Two threads have the same seed, and so the same draws."""
    model = Given()
    engine = entered(door, model, [given(), torch.Generator()], runtime)
    inputs = [[given() for _ in range(CALLS)] for _ in range(THREADS)]
    seeds = [*range(20, 20 + THREADS - 1), 20]
    before = torch.get_rng_state()
    generators = own_generators(seeds)
    got = rounds(engine, [[(x, g) for x in xs] for xs, g in zip(inputs, generators, strict=True)])
    fresh = own_generators(seeds)
    expected = [[model(x, g) for x in xs] for xs, g in zip(inputs, fresh, strict=True)]
    assert not differences(got, expected)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, fresh, strict=True))
    assert torch.equal(torch.get_rng_state(), before), "nobody drew from the default generator"
    assert_all_differ(drawn for results in got[:-1] for _, drawn in results)
    assert [as_bytes(drawn) for _, drawn in got[-1]] == [as_bytes(drawn) for _, drawn in got[0]]


@pytest.mark.parametrize("threads", [2, _slow(THREADS)])
@ways(FEW_WAYS)
@pytest.mark.usefixtures("afresh")
def test_engines_whose_models_hold_a_generator_draw_what_eager_draws(door: str, runtime: str, threads: int) -> None:
    """An engine for each thread."""
    seeds = list(range(30, 30 + threads))
    models, references = [Held(seed) for seed in seeds], [Held(seed) for seed in seeds]
    engines = [entered(door, model, [given()], runtime) for model in models]
    for model, seed in zip(models, seeds, strict=True):
        model.generator.manual_seed(seed)
    inputs = [[(i, given()) for _ in range(CALLS)] for i in range(threads)]
    got = rounds(lambda i, x: engines[i](x), inputs)
    expected = [[reference(x) for _, x in xs] for reference, xs in zip(references, inputs, strict=True)]
    assert not differences(got, expected)
    for model, reference in zip(models, references, strict=True):
        assert torch.equal(model.generator.get_state(), reference.generator.get_state())
    assert_all_differ(drawn for results in got for _, drawn in results)


# -- generators that have a name ---------------------------------------------------------------------------------------

#: A generator in the global variables of a model's code.
GLOBAL = torch.Generator()


class DrawsFromGlobal(Given):
    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, GLOBAL)


class Nested(Held):
    """Holds its generator in a container of a container, and cannot be exported for another reason either."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.parts = {"generators": [self.generator]}
        del self.generator

    def forward(self, x: torch.Tensor) -> Any:
        x = x if has_memory(x) else x + 1
        return Given.forward(self, x, self.parts["generators"][0])


@pytest.mark.parametrize("kind", [_slow("held"), "nested", _slow("global"), "given"])
@pytest.mark.usefixtures("afresh")
def test_a_build_moves_no_generator(kind: str) -> None:
    model: Any = {"held": Held, "nested": Nested}[kind](1) if kind in ("held", "nested") else Given()
    model = DrawsFromGlobal() if kind == "global" else model
    generator: torch.Generator = {
        "held": lambda: model.generator,
        "nested": lambda: model.parts["generators"][0],
        "global": lambda: GLOBAL,
        "given": torch.Generator,
    }[kind]()
    generator.manual_seed(1)
    more = [generator] if kind == "given" else []
    example = given()
    before, default = generator.get_state(), torch.get_rng_state()
    engine = anabranch.compile(model.eval(), [example, *more], backend="eager", runtime="native")
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), default)
    inputs = [given(), given(), given(5), given()]  # of which one has a size that is traced anew
    default = torch.get_rng_state()
    got = [engine(x, *more) for x in inputs]
    state = generator.get_state()
    generator.manual_seed(1)
    assert not differences(got, [model(x, *more) for x in inputs])
    assert torch.equal(state, generator.get_state())
    assert torch.equal(torch.get_rng_state(), default)
    assert "torch.Generator" in engine.explain() or kind == "nested"


@pytest.mark.usefixtures("afresh")
def test_with_and_without_a_generator() -> None:
    """Without one it is a single graph, which a call with one leaves as it is. A new one compiles nothing new."""
    model = Given()
    engine = anabranch.compile(model, [given()], backend="eager", runtime="native")
    graphs: list[int] = []
    for seed in range(12):
        x = given()
        torch.manual_seed(seed)
        got = engine(x), engine(x, generator=torch.Generator().manual_seed(seed + 9)), engine(x, None)
        torch.manual_seed(seed)
        expected = model(x), model(x, generator=torch.Generator().manual_seed(seed + 9)), model(x, None)
        assert not differences(got, expected)
        graphs.append(len(engine.summary()["fragments"]["graphs"]))
    assert len(set(graphs)) == 1
    past = engine.summary()["fragments"]["past_limit"]  # of the process: other tests' functions may be among them
    assert not [function for function in past if Path(__file__).name in function]


@pytest.mark.parametrize(
    ("make", "more", "words"),
    [
        # Before or after what it says, with the line: PyTorch 2.11 refuses it itself.
        (lambda: Held(1), 0, r"(?=.*a torch\.Generator of its own)(?=.*\(draws\.py:\d+\))"),
        (Given, 1, r"is given a torch\.Generator.* torch\.manual_seed"),
    ],
    ids=["held", "given"],
)
def test_require_full_refuses_a_generator_by_name(make: Any, more: int, words: str) -> None:
    with pytest.raises(anabranch.UnsupportedModel, match=words):
        anabranch.compile(make(), [given(), *[torch.Generator()] * more], require_full=True)


# -- models that seed --------------------------------------------------------------------------------------------------


def seeds(x: torch.Tensor) -> Any:
    torch.manual_seed(3)
    return torch.relu(x) * torch.bernoulli(torch.full_like(x, 0.5))


def seeds_in_the_middle(x: torch.Tensor) -> Any:
    first = torch.rand_like(x)
    torch.default_generator.manual_seed(4)
    return x + first, torch.rand_like(x)


def forks(x: torch.Tensor) -> Any:
    """The same noise in each call, and nobody else's draws are moved by it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        noise = torch.rand_like(x)
    return x * 2 + noise, torch.rand_like(x)


def draws_again(x: torch.Tensor) -> Any:
    state = torch.get_rng_state()
    first = torch.rand_like(x)
    torch.set_rng_state(state)
    return x + first, torch.rand_like(x)


def makes_a_generator(x: torch.Tensor) -> Any:
    generator = torch.Generator().manual_seed(6)
    return torch.relu(x) + torch.rand(x.shape, generator=generator), torch.rand_like(x)


class Calls(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize("function", [seeds, seeds_in_the_middle, forks, draws_again, makes_a_generator])
@ways(FEW_WAYS)
@pytest.mark.usefixtures("afresh")
def test_a_model_that_seeds_does_so_in_each_call(
    door: str, function: Callable[[torch.Tensor], Any], runtime: str
) -> None:
    model = Calls(function)
    example, before = given(), torch.get_rng_state()
    engine = entered(door, model, [example], runtime)
    assert torch.equal(torch.get_rng_state(), before), "the build moved it"
    assert_as_in_eager(engine, model, [given() for _ in range(3)], 8)


def test_require_full_refuses_a_model_that_seeds_by_its_line() -> None:
    with pytest.raises(anabranch.UnsupportedModel, match=r"sets the state of .*\(test_draws\.py:\d+\).* Seed before"):
        anabranch.compile(Calls(seeds), [given()], require_full=True)


def test_checkpointing_which_only_looks_at_the_state_stays_one_graph() -> None:
    model = Calls(lambda x: torch.utils.checkpoint.checkpoint(lambda y: torch.relu(y) * 2, x, use_reentrant=False))
    engine = anabranch.compile(model, [given()], backend="eager", require_full=True)
    x = given()
    assert torch.equal(engine(x), model(x))


# -- draws of other threads while something is built -------------------------------------------------------------------


def in_another_thread(call: Callable[[], Any]) -> Any:
    """What a call gives in a thread that is done when this returns."""
    results: list[Any] = []
    on_threads(1, lambda i: results.append(call()))
    return results[0]


def test_what_compilers_set_back_is_not_what_others_have_drawn() -> None:
    from torch._dynamo.utils import preserve_rng_state

    from anabranch.export import undisturbed

    drawn = []
    with undisturbed():
        for _ in range(3):
            with preserve_rng_state():
                drawn.append(in_another_thread(lambda: torch.rand(64)))
        state = torch.get_rng_state()
        drawn.append(torch.rand(64))
        in_another_thread(lambda: torch.random.set_rng_state(state))  # its own wish
        assert torch.equal(torch.rand(64), drawn[-1])
    assert_all_differ(drawn)


class DrawsElsewhere(torch.nn.Module):
    """In the middle of each call another thread draws, in Python between two graphs."""

    #: What was drawn there.
    drawn: ClassVar[list[torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(x) * torch.rand_like(x)
        h = h if has_memory(h) else h + 1
        self.elsewhere()
        return h + torch.rand_like(x)

    @torch.compiler.disable
    def elsewhere(self) -> None:
        self.drawn.append(in_another_thread(lambda: torch.rand(64)))


@pytest.mark.usefixtures("afresh")
def test_what_others_draw_while_a_model_in_fragments_is_built_is_not_drawn_again() -> None:
    model, x = DrawsElsewhere(), given()
    model.drawn.clear()
    engine = anabranch.compile(model, [x], backend="eager", runtime="native")
    assert len(engine.summary()["fragments"]["graphs"]) == 2
    assert len(model.drawn) > 3
    assert_all_differ([*model.drawn, torch.rand(64)])
