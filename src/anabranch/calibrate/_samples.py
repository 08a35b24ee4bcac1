"""Samples: inputs of a model with real values, from a file or from a function."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from anabranch._exit import described
from anabranch.errors import InputError

_EXPECTED = "expected a tensor, a tuple of positional inputs or a dict of keyword inputs for each sample"

#: Positional and keyword inputs of a call.
Sample = tuple[tuple[Any, ...], dict[str, Any]]


def load_samples(data: str, most: int, device: torch.device) -> list[Sample]:
    """The first ``most`` samples of ``data``, on ``device``, all of the same shapes.

    ``data``: a file of ``torch.save`` with a list of samples (read with ``weights_only=True``), or ``module:callable``,
    which returns an iterable of them. A sample is a tensor, a tuple of positional inputs, or a dict of keyword inputs.
    Raises :class:`~anabranch.errors.InputError`.
    """
    given = _called(data) if _is_callable(data) else _read(Path(data))
    if isinstance(given, torch.Tensor | Mapping) or not isinstance(given, Iterable):
        raise InputError(f"{data} gives a {type(given).__name__}; {_EXPECTED}, in a list")
    samples = [_sample(data, x, device) for x in itertools.islice(given, most)]
    if not samples:
        raise InputError(f"{data} gives no samples; {_EXPECTED}, and at least one")
    shapes = [_shapes(s) for s in samples]
    other = next((s for s in shapes if s != shapes[0]), None)
    if other is not None:
        raise InputError(
            f"{data} gives samples of several shapes or types ({shapes[0]} and {other}); expected one. Calibrate for"
            " one shape at a time: the result serves all."
        )
    return samples


def _is_callable(data: str) -> bool:
    module, colon, name = data.rpartition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _called(data: str) -> Any:
    module, _, name = data.partition(":")
    try:
        return getattr(importlib.import_module(module), name)()
    except (Exception, SystemExit) as e:
        raise InputError(
            f"--data {data}: raised {described(e)}. Expected module:callable, with the module on PYTHONPATH and a"
            " callable without arguments that returns samples."
        ) from e


def _read(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as e:
        why = (str(e).splitlines() or [""])[0]
        raise InputError(
            f"--data {path}: cannot be read ({type(e).__name__}: {why}). Expected a file of torch.save with a list of"
            " samples, or module:callable."
        ) from e


def _sample(data: str, x: Any, device: torch.device) -> Sample:
    args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else (tuple(x) if isinstance(x, tuple | list) else (x,), {})
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise InputError(f"{data} gives a sample that is a {type(x).__name__} without tensors; {_EXPECTED}")
    moved: Sample = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to(device), (args, kwargs))
    return moved


def _shapes(sample: Sample) -> list[str]:
    leaves = pytree.tree_leaves(sample)
    return [f"{x.dtype}{list(x.shape)}" if isinstance(x, torch.Tensor) else repr(x) for x in leaves]
