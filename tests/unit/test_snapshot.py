"""An engine is what the model was at compile: later signatures too, whatever becomes of the model."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import anabranch
from anabranch.export import Snapshot

pytestmark = pytest.mark.usefixtures("seeded")


def build(model: nn.Module, *inputs: Any, **options: Any) -> anabranch.Engine:
    return anabranch.compile(model, list(inputs), **{"backend": "eager", **options})


class Net(nn.Module):
    """With a mode, a buffer, an attribute and a container that its result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.9))
        self.register_buffer("shift", torch.randn(3))
        self.gain = 1.5
        self.options = {"powers": [2]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x) * self.gain + self.shift
        return y ** self.options["powers"][0]


def _replace_a_weight(model: Net) -> None:
    model.body[0].weight = nn.Parameter(torch.randn(3, 3))


def _data(model: Net) -> None:
    model.body[0].weight.data = torch.randn(3, 3)


def _fill_state(model: Net) -> None:
    model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()}, assign=True)


def _hook(model: Net) -> None:
    model.body.register_forward_hook(lambda module, args, output: output * 3)


CHANGES: dict[str, Callable[[Net], Any]] = {
    "train": lambda model: model.train(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "weight": _replace_a_weight,
    "data": _data,
    "buffer": lambda model: setattr(model, "shift", torch.randn(3)),
    "attribute": lambda model: setattr(model, "gain", 7.0),
    "container": lambda model: model.options["powers"].__setitem__(0, 3),
    "layer": lambda model: model.body.__setitem__(0, nn.Linear(3, 3)),
    "forward": lambda model: setattr(model.body[0], "forward", lambda x: x),
    "state": _fill_state,
    "hook": _hook,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_becomes_of_the_model_later_does_not_reach_the_engine(change: str, runtime: str) -> None:
    model = Net().eval()
    engine = build(model, torch.randn(2, 3))
    known, new = torch.randn(2, 3), torch.randn(5, 3)
    with torch.no_grad():
        expected = model(known), model(new)
    CHANGES[change](model)
    torch.testing.assert_close(engine(known), expected[0])
    torch.testing.assert_close(engine(new), expected[1])


def test_a_signature_of_inductor_is_compiled_from_the_model_as_it_was() -> None:
    model = Net().eval()
    engine = build(model, torch.randn(2, 3), backend="inductor", runtime="python")
    new = torch.randn(4, 3)
    with torch.no_grad():
        expected = model(new)
    model.train().double()
    model.gain = 0.5
    torch.testing.assert_close(engine(new), expected)


def test_what_is_written_into_the_tensors_is_seen_and_their_memory_is_shared(runtime: str) -> None:
    model = Net().eval()
    engine = build(model, torch.randn(2, 3))
    engine(torch.randn(4, 3))
    held = {w.data_ptr() for s in engine._table for w in s.program.weights}
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert held <= own
    with torch.no_grad():
        model.body[0].weight.mul_(2)
        model.shift.add_(1)
        for n in (2, 4, 6):
            x = torch.randn(n, 3)
            torch.testing.assert_close(engine(x), model(x))


def test_a_parameter_that_is_handed_back_is_the_users_until_it_is_made_another() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.linear(x), self.linear.weight, self.linear.weight.t()

    model = Model().eval()
    engine = build(model, torch.randn(2, 3))
    assert engine(torch.randn(2, 3))[1] is model.linear.weight
    before = model.linear.weight.detach().clone()
    model.half()
    for n in (2, 5):
        _, weight, transposed = engine(torch.randn(n, 3))
        assert weight.dtype is torch.float32
        assert torch.equal(weight, before)
        assert torch.equal(transposed, before.t())


def test_views_of_two_weights_in_one_storage_are_each_others_own() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.randn(10)
            self.a, self.b = nn.Parameter(memory[:6]), nn.Parameter(memory[2:])

        def forward(self, x: torch.Tensor) -> Any:
            return x + self.a.sum() * self.b.sum(), self.a[1:3], self.b[1:3], self.b.view(2, 4)

    model, x = Model(), torch.randn(3)
    engine = build(model, x)
    _, a, b, wide = engine(x)
    assert torch.equal(a, model.a[1:3])
    assert torch.equal(b, model.b[1:3])
    assert torch.equal(wide, model.b.view(2, 4))
    with torch.no_grad():
        model.a[3] = 9.0  # is model.b[1] as well
    torch.testing.assert_close(engine(x)[0], model(x)[0].detach())
    assert b[0] == 9.0


# -- other threads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_other_threads_may_call_the_model_while_it_is_compiled(backend: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.BatchNorm1d(6)).eval().requires_grad_(False)
    x = torch.randn(3, 6)
    expected, stop, wrong = model(x), threading.Event(), list[str]()

    def call() -> None:
        while not stop.is_set():
            try:
                y = model(x)
                if type(y) is not torch.Tensor or not torch.equal(y, expected):
                    wrong.append(f"a {type(y).__name__}")
            except Exception as e:
                wrong.append(f"{type(e).__name__}: {e}")

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        engine = build(model, torch.randn(2, 6), backend=backend, runtime="python")
        for n in (4, 5) if backend == "eager" else ():
            engine(torch.randn(n, 6))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_exported_programs_are_loaded_by_many_threads_at_once(tmp_path: Any) -> None:
    models = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval() for _ in range(5)]
    x = torch.randn(2, 8)
    for i, model in enumerate(models):
        torch.export.save(torch.export.export(model, (x,)), tmp_path / f"{i}.pt2")
    ready, results = threading.Barrier(5), dict[int, Any]()

    def load(i: int) -> None:
        ready.wait()
        try:
            results[i] = build(tmp_path / f"{i}.pt2", x)(x)
        except Exception as e:
            results[i] = e

    threads = [threading.Thread(target=load, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, model in enumerate(models):
        assert isinstance(results[i], torch.Tensor), results[i]
        torch.testing.assert_close(results[i], model(x).detach())


# -- what a copy is made of -------------------------------------------------------------------------------------------


class Helper:
    """A plain object that computes with the module that holds it."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.lock = threading.Lock()

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return x * self.owner.weight


@dataclasses.dataclass
class Options:
    power: int = 2


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Tangled(nn.Module):
    """Reaches its own parts in every way that Python has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.inner = nn.Linear(3, 3)
        self.helper = Helper(self)
        self.shifted = lambda x: x + self.weight
        self.partly = functools.partial(self.helper.scaled)
        self.__dict__["parent"] = weakref.ref(self)
        self.__dict__["proxy"] = weakref.proxy(self)
        self.table = {"inner": [self.inner], "weight": self.weight}
        self.get = self.table.get
        self.options, self.slotted = Options(), Slotted(0.5)
        self.recent = collections.deque([self.weight], maxlen=2)
        self.counts = collections.Counter("aab")
        self.made = collections.defaultdict(list, {1: [self.inner]})
        self.derived = self.weight * 2  # not a leaf: deepcopy refuses it
        self.point = collections.namedtuple("Point", "x y")(self.weight, 1)
        self.instead = types.MethodType(lambda self, x: x * self.slotted.factor, self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shifted(self.partly(x)) + self.parent().weight * self.proxy.options.power
        y = self.table["inner"][0](y) + self.get("weight") + self.recent[0] + self.derived + self.point.x
        return self.instead(y) + self.made[1][0](x) * self.counts["a"]


def test_a_copy_refers_to_its_own_parts() -> None:
    model = Tangled().eval()
    copied = Snapshot.of(model).fresh().module
    assert isinstance(copied, Tangled)
    assert copied.helper.owner is copied
    assert copied.parent() is copied
    assert copied.table["inner"][0] is copied.inner is not model.inner
    assert copied.get("weight") is copied.weight is copied.recent[0] is copied.point.x
    assert copied.helper.lock is not model.helper.lock
    assert type(copied.counts) is collections.Counter
    assert copied.made[9] == []
    assert copied.weight.data_ptr() == model.weight.data_ptr()


def test_a_model_that_reaches_its_parts_in_every_way(runtime: str) -> None:
    model, x, new = Tangled().eval(), torch.randn(2, 3), torch.randn(4, 3)
    engine = build(model, x)
    expected = model(x).detach(), model(new).detach()
    with model.helper.lock:  # its owner waits for the engine, so the engine must not wait for it
        torch.testing.assert_close(engine(new), expected[1])
    model.options.power, model.slotted.factor = 3, 2.0
    model.counts["a"] = 9
    model.table["inner"][0] = nn.Linear(3, 3)
    torch.testing.assert_close(engine(x), expected[0])
    torch.testing.assert_close(engine(torch.cat([new, x])), torch.cat([expected[1], expected[0]]))


@pytest.mark.parametrize("how", ["linear", "nested", "buffer"])
def test_weights_made_in_inference_mode(how: str, runtime: str) -> None:
    with torch.inference_mode():
        model: nn.Module = {"linear": lambda: nn.Linear(3, 2), "nested": Tangled, "buffer": Net}[how]().eval()
        x = torch.randn(2, 3)
    engine = build(model, x)
    with torch.inference_mode():
        expected = model(x), model(x[:1])
    torch.testing.assert_close(engine(x), expected[0])
    torch.testing.assert_close(engine(x[:1]), expected[1])
    assert not engine(x).is_inference()


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda m: nn.utils.weight_norm(m), marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
)
def test_weights_that_are_computed_anew_stay_so_when_the_model_drops_it(wrap: Any) -> None:
    model = nn.Sequential(wrap(nn.Linear(3, 3)), nn.Tanh()).eval()
    engine = build(model, torch.randn(2, 3))
    new = torch.randn(4, 3)
    expected = model(new).detach()
    if parametrize.is_parametrized(model[0]):
        parametrize.remove_parametrizations(model[0], "weight")
    else:
        nn.utils.remove_weight_norm(model[0])
    with torch.no_grad():
        model[0].weight.zero_()
    torch.testing.assert_close(engine(new), expected)


def test_a_traced_module_keeps_its_graph() -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval())
    engine, x = build(model, torch.randn(2, 3)), torch.randn(4, 3)
    expected = model(x).detach()
    output = model.graph.output_node()
    output.args = (output.args[0].args[0],)
    model.recompile()
    assert not torch.equal(model(x), expected)
    torch.testing.assert_close(engine(x), expected)


def test_what_torch_compile_was_given_is_compiled() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    x = torch.randn(2, 3)
    for given in (torch.compile(model), nn.Sequential(torch.compile(model), nn.Identity())):
        torch.testing.assert_close(build(given.eval(), x)(x), model(x).detach())


def test_objects_nested_without_end_are_refused_by_name() -> None:
    model = nn.Linear(3, 3)
    chain: list[Any] = []
    for _ in range(20_000):
        chain = [chain]
    model.history = chain
    with pytest.raises(anabranch.UnsupportedModel, match=r"Linear.*nested too deep"):
        build(model, torch.randn(2, 3))
    while chain:  # freeing it at once would be as deep
        chain = chain.pop()
    model.history = None


def test_handles_are_shared_and_data_is_copied(tmp_path: Any) -> None:
    import logging

    import numpy

    model = nn.Linear(3, 3)
    model.log, model.thread = logging.getLogger("test"), threading.current_thread()
    model.array, model.generator, model.kind = numpy.ones(3), torch.Generator(), Options
    with (tmp_path / "log").open("w") as model.file:
        copied = Snapshot.of(model).fresh().module
        assert copied.log is model.log
        assert copied.thread is model.thread
        assert copied.file is model.file
        assert copied.generator is model.generator
        assert copied.kind is Options
        assert copied.array is not model.array
        assert (copied.array == model.array).all()
    model.file = None
