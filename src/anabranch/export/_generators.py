"""PyTorch's random generators that a build may draw from, and what keeps a build from moving them."""

from __future__ import annotations

import contextlib
import functools
import random
import secrets
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from anabranch.export._bystanders import draws_stay_drawn
from anabranch.export._snapshot import Copier


@contextlib.contextmanager
def generators_kept(module: torch.nn.Module, inputs: Any, device: torch.device | None = None) -> Iterator[None]:
    """What is drawn in here is drawn again afterwards: nobody's draws depend on whether something was built.

    From PyTorch's default generators of the CPU and of ``device``, from Python's, and from those that a model holds,
    has in the global variables of its code, or is given. In here they give numbers of a seed that nobody has: what
    other threads draw in the meantime is not drawn again.
    """
    kept = {id(generator): generator for generator in _generators_of(module, inputs, device)}.values()
    states = [(generator, _exchanged(generator)) for generator in kept]
    of_python = random.getstate()
    random.seed()
    try:
        with draws_stay_drawn():
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        random.setstate(of_python)


_call: Any = functools.partial.__call__


def _exchanged(generator: torch.Generator) -> Any:
    """Its state, which is that of a new seed from now on.

    Both are calls of C functions that one C function makes: between bytecodes another thread may get the GIL, and draw
    what is then drawn again.
    """
    calls: list[Any] = [
        functools.partial(generator.get_state),
        functools.partial(generator.manual_seed, secrets.randbits(63)),
    ]
    state, _ = map(_call, calls)
    return state


def _generators_of(module: torch.nn.Module, inputs: Any, device: torch.device | None) -> list[torch.Generator]:
    names = {type(part).__module__ for part in module.modules()}
    spaces = [vars(sys.modules[name]) for name in names if not name.startswith("torch.") and name in sys.modules]
    copier = Copier()
    copier(module)
    found = [
        *pytree.tree_leaves(inputs),
        *copier.torch_generators,
        *(x for space in spaces for x in list(space.values())),
    ]
    default = [torch.default_generator]
    if device is not None and device.type == "cuda":
        default.append(torch.cuda.default_generators[device.index])
    return [*default, *(x for x in found if isinstance(x, torch.Generator))]
