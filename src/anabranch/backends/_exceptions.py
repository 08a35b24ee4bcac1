"""Operators whose compiled kernels give other values than eager at the ends of the range, and nothing is done about it.

Each is pinned by ``tests/unit/test_boundary_values.py`` and listed in ``docs/use.md``. A new one goes into both; there
are twelve at most.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

_aten = torch.ops.aten


class Difference(NamedTuple):
    """``devices``: of which kinds it is known; all, if there are none."""

    operators: tuple[Any, ...]
    text: str
    devices: tuple[str, ...] = ()


EXCEPTIONS = (
    Difference(
        (_aten.gelu,),
        "gelu of a subnormal, or of the smallest normal number, in half precision: eager's CPU kernel and compiled ones"
        " do not round the same ones to 0",
        ("cpu",),
    ),
    Difference(
        (_aten.var, _aten.std, _aten.var_mean, _aten.std_mean),
        "the variance of infinities, or of numbers so large that their sum or squares overflow: eager sums in float64,"
        " compiled inf or NaN",
    ),
    Difference(
        (
            *(_aten.layer_norm, _aten.native_layer_norm, _aten.group_norm, _aten.native_group_norm),
            *(_aten.instance_norm, _aten.batch_norm, _aten._native_batch_norm_legit),
        ),
        "the norm of numbers so large that their squares overflow: eager 0 or NaN, compiled NaN; of equal ones,"
        " rounding is left, and other rounding",
    ),
    Difference(
        (_aten.expm1,),
        "expm1 of a subnormal, or of the smallest normal number, is 0 (pytorch#189801)",
        ("cuda",),
    ),
    Difference(
        (_aten.erf,),
        "erf of a number near 0: compiled kernels on the CPU are off by up to 1e-7, and a subnormal is 0"
        " (pytorch#189801)",
    ),
    Difference((_aten.elu, _aten.celu, _aten.selu), "elu of a negative subnormal number is 0 (pytorch#189801)"),
    Difference(
        (_aten.asinh, _aten.atanh),
        "asinh and atanh of a subnormal, or of the smallest normal number, are 0",
        ("cuda",),
    ),
    Difference((_aten.acosh,), "acosh of a number whose square overflows: eager a number, compiled inf", ("cuda",)),
    Difference(
        (_aten.fmod, _aten.remainder),
        "fmod and remainder where the quotient is too large for a number: NaN; eager's CPU kernel gives NaN in its"
        " vectors, and a number for the elements that are left over",
        ("cpu",),
    ),
    Difference(
        (_aten.upsample_linear1d, _aten.upsample_bilinear2d, _aten.upsample_trilinear3d, _aten.upsample_bicubic2d),
        "interpolation of infinities: infinities and NaN at other places than eager's",
    ),
)


def exceptions(graph: fx.Graph, device: str) -> list[str]:
    """The texts of those that a graph meets on a kind of device."""
    packets = {getattr(n.target, "overloadpacket", None) for n in graph.nodes if n.op == "call_function"}
    return [e.text for e in EXCEPTIONS if packets.intersection(e.operators) and (not e.devices or device in e.devices)]
