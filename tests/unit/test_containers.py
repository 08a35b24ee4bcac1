"""What calls bring beside tensors in lists and dicts: dicts of the user's classes, dataclasses, numpy's numbers."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding, BatchFeature

import anabranch
from anabranch._judge import differences
from contract.support import Fn, on_threads

pytestmark = pytest.mark.usefixtures("seeded", "runtime")


class Named(dict[str, Any]):
    """Items are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Itself(dict[str, Any]):
    """Items are the attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self

    def __deepcopy__(self, memo: Any) -> Itself:
        return Itself({name: copy.deepcopy(x, memo) for name, x in self.items()})


class Loud(dict[str, Any]):
    """Tells whoever makes one, or looks, something else."""

    def __init__(self, items: Any, *, scale: float) -> None:
        super().__init__(items)
        self.scale = scale
        self.offset = items["offset"]

    def __iter__(self) -> Any:
        return iter(("nothing",))


class Ordered(collections.OrderedDict[str, Any]):
    pass


class Wrapped(collections.UserDict[str, Any]):
    pass


class Encoded(collections.UserDict[str, Any]):
    """Keeps what was read beside what was made of it."""

    def __init__(self, data: Any = None, source: str = "") -> None:
        super().__init__(data)
        self.source = source


def moved_to_the_end(x: Ordered) -> Ordered:
    made = Ordered(x)
    made.move_to_end("a")
    return made


def plain(x: Any) -> Any:
    """A result in Python's own containers, with what its attributes hold."""
    if isinstance(x, collections.UserDict):
        return type(x).__name__, list(x.data.items()), getattr(x, "source", None)
    if isinstance(x, dict):
        items = list(x.items()) if isinstance(x, collections.OrderedDict) else list(dict.items(x))
        return type(x).__name__, items, {} if vars(x) is x else dict(vars(x))
    return x


#: A kind's values, and a function of one that makes another one.
DICTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "attributes that are items": (lambda: Named(x=torch.rand(3)), lambda d: Named(y=d.x * 2, n=3)),
    "items that are attributes": (lambda: Itself(x=torch.rand(3)), lambda d: Itself(y=d.x * 2)),
    "attributes beside items": (
        lambda: Loud({"x": torch.rand(3), "offset": torch.rand(3)}, scale=1.5),
        lambda d: Loud({"y": d["x"] * d.scale + d.offset, "offset": d.offset - 1}, scale=2.5),
    ),
    "an order": (
        lambda: Ordered(a=torch.rand(3), b=torch.rand(3)),
        lambda d: moved_to_the_end(Ordered((name, x + 1) for name, x in d.items())),
    ),
    "UserDict": (lambda: Wrapped(x=torch.rand(3)), lambda d: Wrapped(y=d["x"] * 2)),
    "UserDict with an attribute": (
        lambda: Encoded({"x": torch.rand(3)}, "a text"),
        lambda d: Encoded({"y": d["x"] * len(d.source)}, d.source + "!"),
    ),
    "BatchEncoding": (
        lambda: BatchEncoding({"x": torch.rand(3), "mask": torch.ones(3)}),
        lambda d: BatchEncoding({"y": d.x * d["mask"]}),
    ),
    "BatchFeature": (lambda: BatchFeature({"x": torch.rand(3)}), lambda d: BatchFeature({"y": d["x"] * 2})),
    "Counter": (lambda: collections.Counter({"x": 3}), lambda d: (collections.Counter({"n": 2}), torch.ones(d["x"]))),
}


@pytest.mark.parametrize("name", DICTS)
def test_dicts_of_the_users_classes(name: str) -> None:
    made, fn = DICTS[name]
    engine = anabranch.compile(Fn(fn), [made()], backend="eager")
    pairs = [(given, fn(given)) for given in (made() for _ in range(4))]

    def work(number: int) -> None:
        for i in range(8):
            given, expected = pairs[(number + i) % 4]
            result = engine(given)
            assert type(result) is type(expected)
            assert not differences(plain(result), plain(expected))

    on_threads(4, work)
    assert engine.stats().specializations == 1


def test_an_attribute_that_nobody_can_compare_is_refused() -> None:
    made = Named(x=torch.rand(3))
    vars(made)["callback"] = object()
    with pytest.raises(anabranch.InputError, match="object"):
        anabranch.compile(Fn(lambda d: d.x * 2), [made], backend="eager")


class Slotted(dict[str, Any]):
    __slots__ = ("scale",)


class Default(collections.defaultdict[str, Any]):
    pass


@pytest.mark.parametrize("value", [Slotted(x=torch.ones(3)), Default(list, x=torch.ones(3))])
def test_a_dict_that_its_items_do_not_tell_is_refused(value: Any) -> None:
    with pytest.raises(anabranch.InputError, match=f"{type(value).__name__}.*register_pytree_node"):
        anabranch.compile(Fn(lambda d: d["x"] * 2), [value], backend="eager")


@dataclasses.dataclass
class Graph:
    x: torch.Tensor
    hidden: torch.Tensor | None = None


class Writes(nn.Module):
    """Leaves what it has computed in what it was given, as networks over graphs do."""

    def forward(self, graph: Any) -> Any:
        if isinstance(graph, Graph):
            graph.hidden = graph.x * 2
        elif isinstance(graph, dict | collections.UserDict):
            graph["hidden"] = graph["x"] * 2
        return graph


@pytest.mark.parametrize("kind", [Graph, Named, Ordered, Wrapped])
def test_what_a_model_leaves_in_its_inputs_is_there(kind: Any) -> None:
    engine = anabranch.compile(Writes(), [kind(x=torch.rand(3))], backend="eager")
    for _ in range(6):
        given = kind(x=torch.rand(3))
        result = engine(given)
        assert result is given
        hidden = given.hidden if kind is Graph else given["hidden"]
        assert torch.equal(hidden, (given.x if kind is Graph else given["x"]) * 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [(np.ones(3), r"ndarray; expected a tensor. Pass torch.from_numpy\(x\)")]
    + [
        (n, rf"{type(n).__name__}; expected one of Python's numbers. Pass x.item\(\)")
        for n in (np.float64(0.5), np.float32(0.5), np.int64(2), np.bool_(True))
    ],
)
def test_what_is_numpys_is_refused_with_what_to_do(value: Any, text: str) -> None:
    """``torch.tensor(n)`` has another dtype of one than of Python's numbers, and ``x * n`` may."""
    with pytest.raises(anabranch.InputError, match=f"input 1 is numpy's {text}"):
        anabranch.compile(Fn(lambda x, n: x * n), [torch.rand(3), value], backend="eager")


def test_ranges_and_ellipses_are_inputs() -> None:
    engine = anabranch.compile(Fn(lambda x, r, d: x[d, 0] * r.stop), [torch.rand(3, 4), range(0, 4, 2), ...])
    for stop in (3, 4, 5, 3):  # the first two have the same numbers
        x = torch.rand(3, 4)
        assert torch.equal(engine(x, range(0, stop, 2), ...), x[..., 0] * stop)
