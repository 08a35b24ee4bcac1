"""A model with outputs of every kind, and ways in which each of them can be wrong: what tools are tested with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


class Everything(torch.nn.Module):
    """Outputs of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((6,), 1.5), requires_grad=False)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {
            "float": x * self.weight,
            "nan": x.sqrt(),
            "inf": x / x.relu(),
            "zero": x.clamp(max=0.0) * 0.5,
            "int": x.argmax(-1),
            "bool": x > 0,
            "complex": torch.view_as_complex(torch.stack([x, x + 1], -1)),
            "wide": x.double() + 1,
            "column": (x + 2).t(),
            "given": x,
            "view": x[1:],
            "parameter": self.weight,
            "empty": x[:0] + 1,
            "pair": (x - 1, [x - 3]),
            "number": 3,
        }


Change = Callable[[dict[str, Any]], Any]


def to(key: str, change: Callable[[Any], Any]) -> Change:
    def changed(nest: dict[str, Any]) -> dict[str, Any]:
        return {k: change(v) if k == key else v for k, v in nest.items()}

    return changed


def at(index: Any, value: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[index] = value(y[index]) if callable(value) else value
        return y

    return changed


#: Wrong whether it comes in every call or in some.
PLANTED: dict[str, Change] = {
    "a float": to("float", at((0, 1), lambda v: v + 0.1)),
    "all zeros": to("float", torch.zeros_like),
    "NaN for a number": to("float", at((0, 1), math.nan)),
    "all NaN": to("float", lambda x: x * math.nan),
    "a number for NaN": to("nan", lambda x: x.nan_to_num(0.5)),
    "an infinity for a number": to("float", at((1, 1), math.inf)),
    "a number for an infinity": to("inf", lambda x: x.nan_to_num(nan=math.nan, posinf=3e38, neginf=-3e38)),
    "the other infinity": to("inf", lambda x: torch.where(x.isinf(), -x, x)),
    "an integer": to("int", at(0, lambda v: v + 1)),
    "a boolean": to("bool", at((0, 0), lambda v: ~v)),
    "an imaginary part": to("complex", lambda z: z.conj()),
    "a real part": to("complex", at((0, 0), lambda v: v + 0.5)),
    "a double": to("wide", at((1, 2), lambda v: v * 1.5)),
    "a dtype": to("wide", torch.Tensor.float),
    "a shape": to("float", lambda x: x[:1]),
    "strides": to("column", torch.Tensor.contiguous),
    "an input that is a copy": to("given", torch.Tensor.clone),
    "a view that is a copy": to("view", torch.Tensor.clone),
    "a fresh output that is shared": lambda n: (
        {**n, "wide": n["wide"], "pair": (n["pair"][0], [n["pair"][0] - 2][:1])}
        | {"float": n["given"] * 1.5, "nan": n["nan"]}
        | {"column": n["float"].expand(2, 6).t()}
    ),
    "an empty shape": to("empty", lambda x: x.reshape(6, 0)),
    "a nested output": to("pair", lambda p: (p[0], [p[1][0] + 1])),
    "a list for a tuple": to("pair", list),
    "a constant": to("number", lambda n: n + 1),
    "a type": to("number", float),
    "None": to("int", lambda x: None),
    "an output less": lambda n: {k: v for k, v in n.items() if k != "bool"},
    "the order of outputs": lambda n: dict(reversed(n.items())),
}
#: Wrong only beside the engine's own result.
BITS: dict[str, Change] = {
    "the last bit": to("float", at((0, 0), lambda v: v * (1 + 2**-22))),
    "the sign of a zero": to("zero", lambda x: torch.where(x == 0, -x, x)),
    "a double's last bit": to("wide", at((0, 0), lambda v: v * (1 + 2**-51))),
    "an imaginary part's last bit": to("complex", lambda z: torch.complex(z.real, z.imag * (1 + 2**-22))),
}
