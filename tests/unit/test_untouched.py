"""``compile`` leaves what a model holds as it was: whether it accepts the model or not, and wherever it runs it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import anabranch

pytestmark = pytest.mark.usefixtures("seeded")


class Box:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Slots:
    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _of_function(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


#: Where a tensor is kept: what becomes the attribute, and what the tensor is of it.
HELD: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "attribute": (lambda t: t, lambda h: h),
    "view": (lambda t: t.view(3, 1), lambda h: h.view(3)),
    "list": (lambda t: [t], lambda h: h[0]),
    "dict": (lambda t: {"a": t}, lambda h: h["a"]),
    "deep": (lambda t: {"a": [(t, 1)]}, lambda h: h["a"][0][0]),
    "object": (Box, lambda h: h.tensor),
    "slots": (Slots, lambda h: h.tensor),
    "function": (_of_function, lambda h: h()),
    "parameter": (lambda t: nn.Parameter(t, False), lambda h: h),
    "buffer": (nn.Buffer, lambda h: h),
}
EVERYWHERE = [*HELD, "closure", "class"]


def _into_memory(h: torch.Tensor) -> None:
    h.detach().numpy()[:] = 7


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "add_": lambda h: h.add_(1),
    "data": lambda h: h.data.add_(1),
    "part": lambda h: h[1:].fill_(5),
    "numpy": _into_memory,
}


def _looks_at_values(y: torch.Tensor) -> torch.Tensor:
    return y + 1 if y.sum() > 100 else y


#: What else the model does, which decides how it is compiled.
ROUTES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a graph": lambda y: y,
    "no graph": lambda y: y + torch.from_numpy(y.detach().numpy().copy()),
    "several graphs": _looks_at_values,
    "wrong inputs": lambda y: y @ torch.ones(7, 2),
}


def model_of(where: str, write: str, route: str) -> tuple[nn.Module, torch.Tensor]:
    """A model that writes a tensor that it holds, and the tensor."""
    tensor = torch.arange(1.0, 4.0)
    do, finish = WRITES[write], ROUTES[route]

    class Model(nn.Module):
        def __init__(self, held: Any) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.held = held

        def get(self) -> torch.Tensor:
            return HELD[where][1](self.held)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.get()
            do(h)
            return finish(self.linear(x) + h)

    class OfClosure(Model):
        def get(self) -> torch.Tensor:
            return tensor

    class OfClass(Model):
        of_class: torch.Tensor

        def get(self) -> torch.Tensor:
            return self.of_class

    if where in HELD:
        return Model(HELD[where][0](tensor)).eval(), tensor
    if where == "closure":
        return OfClosure(None).eval(), tensor
    OfClass.of_class = tensor
    return OfClass(None).eval(), tensor


def check(where: str, write: str, route: str, **options: Any) -> None:
    torch._dynamo.reset()
    model, tensor = model_of(where, write, route)
    before = tensor.clone()
    held = {name: x.clone() for name, x in model.state_dict().items()}
    with contextlib.suppress(anabranch.AnabranchError):
        anabranch.compile(model, [torch.rand(2, 3)], **{"backend": "eager", "runtime": "python", **options})
    assert torch.equal(tensor, before)
    assert all(torch.equal(x, held[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("where", EVERYWHERE)
def test_a_tensor_that_a_model_writes_is_left_as_it_was(where: str, route: str) -> None:
    check(where, "add_", route)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("write", ["data", "part", "numpy"])
@pytest.mark.parametrize("where", ["list", "parameter", "closure"])
def test_however_it_is_written(where: str, write: str, route: str) -> None:
    check(where, write, route)


@pytest.mark.parametrize("route", ROUTES)
def test_in_mixed_precision(route: str) -> None:
    check("list", "add_", route, precision="mixed")


@pytest.mark.parametrize("where", ["list", "parameter", "closure", "class"])
@pytest.mark.parametrize("write", WRITES)
def test_what_runs_in_several_graphs_is_refused_by_name(where: str, write: str) -> None:
    model, tensor = model_of(where, write, "several graphs")
    before = tensor.clone()
    with pytest.raises(anabranch.UnsupportedModel, match=r"in place"):
        anabranch.compile(model, [torch.rand(2, 3)], backend="eager")
    assert torch.equal(tensor, before)


class Counts(nn.Module):
    """Counts in places of its own, and cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.by_name = {"calls": 0}
        self.box = Box(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.by_name["calls"] += 1
        self.box.tensor = self.box.tensor + 1
        return x + torch.from_numpy(x.numpy().copy())


def test_counters_of_the_model_are_left_as_they_were() -> None:
    model = Counts().eval()
    with contextlib.suppress(anabranch.UnsupportedModel):
        anabranch.compile(model, [torch.rand(2, 3)], backend="eager")
    assert (model.calls, model.by_name, model.box.tensor.tolist()) == (0, {"calls": 0}, [1, 1, 1])


def test_no_other_thread_sees_a_write() -> None:
    """Another thread may call the model meanwhile: nothing is written and then put back."""
    model, tensor = model_of("list", "add_", "no graph")
    before, seen, is_over = tensor.clone(), list[torch.Tensor](), threading.Event()

    def look() -> None:
        while not is_over.is_set():
            if not torch.equal(tensor, before):
                seen.append(tensor.clone())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        with pytest.raises(anabranch.UnsupportedModel):
            anabranch.compile(model, [torch.rand(2, 3)], backend="eager")
    finally:
        is_over.set()
        thread.join()
    assert not seen


class FilledAtFirst(nn.Module):
    """Its first call begins a buffer, and later ones go on from what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(3))
        self.has_begun = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.has_begun:
            self.mean.lerp_(x, 0.25)
        else:
            self.mean.copy_(x)
            self.has_begun = True
        return self.mean * 2


def test_a_buffer_that_the_first_call_begins_is_refused() -> None:
    """What the call before the trace writes is not kept, so what it sets must not be, either."""
    model = FilledAtFirst().eval()
    with pytest.raises(anabranch.UnsupportedModel, match=r"changes self.has_begun.*call the model once before"):
        anabranch.compile(model, [torch.rand(3)], backend="eager")
    assert not model.has_begun
    assert torch.equal(model.mean, torch.zeros(3))


def test_a_buffer_that_was_begun_before_compile_goes_on() -> None:
    model = FilledAtFirst().eval()
    model(torch.rand(3))
    session = anabranch.compile(model, [torch.rand(3)], backend="eager").session()
    for x in torch.rand(3, 3):
        assert torch.equal(session(x), model(x))
