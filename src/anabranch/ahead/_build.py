"""A model's engines, built into the cache for a GPU that need not be there."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from anabranch.backends import BACKENDS, RESULTS_ONLY
from anabranch.devices import get_device
from anabranch.errors import BuildError, InputError
from anabranch.export import (
    Input,
    Program,
    Signature,
    Snapshot,
    cast_of,
    export_program,
    flatten_call,
    leaf_key,
    map_leaves,
    precision_of,
    unflatten,
)
from anabranch.runtime._flags import Flags
from anabranch.runtime._given import given_model, inputs_of
from anabranch.runtime._process import neutral, process


@dataclass(frozen=True)
class BuiltEngine:
    """One engine in the cache. ``operators``: how many of the model's it runs; ``path``: the cache's file."""

    name: str
    operators: int
    nbytes: int
    path: Path


@dataclass(frozen=True)
class Build:
    """What :func:`build` made: plain data; ``print`` shows it.

    ``operators`` and ``flops`` (of products and convolutions) are pairs: in engines, and in all. ``fallbacks`` has a
    line for each reason why PyTorch will run operators instead: the operators, their source lines, the reason.
    ``reused`` counts engines that were in the cache already.
    """

    model: str
    signature: str
    library: str
    compute_capability: tuple[int, int]
    cache: Path
    engines: tuple[BuiltEngine, ...]
    operators: tuple[int, int]
    flops: tuple[int, int]
    fallbacks: tuple[str, ...]
    reused: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all engines."""
        return sum(e.nbytes for e in self.engines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "cache": str(self.cache), "nbytes": self.nbytes} | {
            "engines": [{**dataclasses.asdict(e), "path": str(e.path)} for e in self.engines]
        }

    def __str__(self) -> str:
        (inside, everything), (done, total) = self.operators, self.flops
        share = f", {100 * done / total:.1f}% of FLOPs" if total else ""
        n = len(self.engines)
        lines = [
            f"{self.model}({self.signature}) for compute capability {'.'.join(map(str, self.compute_capability))}",
            f"  {self.library}: {inside} of {everything} operators{share}, in {n} engine{'s' * (n != 1)}",
        ]
        lines += [f"  not in TensorRT: {f}" for f in self.fallbacks]
        for e in self.engines:
            lines.append(f"  {e.name}: {e.operators} operators, {size(e.nbytes)}, {e.path.name}")
        if n:
            known = f", {self.reused} of them there before" if self.reused else ""
            lines.append(f"  {size(self.nbytes)} in {self.cache}{known}")
        return "\n".join(lines)


def build(
    model: torch.nn.Module | ExportedProgram | str | os.PathLike[str],
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    compute_capability: tuple[int, int] | str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    backend: str = "tensorrt",
    precision: Any = None,
    require_full: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> Build:
    """Build the engines of ``model`` into the cache, where ``compile(..., backend="tensorrt")`` will find them.

    No GPU is needed where TensorRT-RTX is installed, and the model and its inputs may be on the CPU. What counts is
    what will be compiled: the same weights, shapes, dtypes and memory formats, ``precision``, and TF32 flags (what
    ``torch.set_float32_matmul_precision`` sets is read here as compile reads it), under the same versions of
    anabranch, PyTorch, ONNX and TensorRT. ``docs/tensorrt.md`` says how to take the cache to another machine.

    :param model: as :func:`~anabranch.compile` takes it.
    :param inputs: as :func:`~anabranch.compile` takes them; their devices do not matter.
    :param compute_capability: of the GPU: ``(8, 9)`` or ``"8.9"``. None: that of this machine's GPU.
    :param kwargs: keyword inputs.
    :param backend: ``"tensorrt"``; the other backends compile where their engines run.
    :param precision: as :func:`~anabranch.compile` takes it.
    :param require_full: raise where an operator would have to run in PyTorch.
    :param cache: the folder to put engines into; made if need be. None: ``$ANABRANCH_TENSORRT_CACHE``, or
        ``$XDG_CACHE_HOME/anabranch/tensorrt``, by default under ``~/.cache``.

    The host blocks until everything is built; other threads that compile wait meanwhile. On the main thread Ctrl-C
    stops a build with ``KeyboardInterrupt``; engines finished before stay in the cache. Any thread. Nothing is queued
    on a stream that the caller could see, but for the copies that read weights which are on a GPU.

    Raises :class:`~anabranch.errors.InputError`, :class:`~anabranch.errors.UnsupportedModel`,
    :class:`~anabranch.errors.BuildError`.
    """
    if backend != "tensorrt":
        which = "compiles where its engines run" if backend in BACKENDS else "is unknown"
        raise InputError(f"backend={backend!r} given, which {which}; expected 'tensorrt'")
    precision_of(precision)
    from anabranch.backends.tensorrt import Target, library
    from anabranch.backends.tensorrt._builder import check_target
    from anabranch.backends.tensorrt._cache import Cache

    capability, ahead = _capability(compute_capability)
    target = Target(capability, ahead, Flags("cuda").tf32)
    check_target(library(), target)
    kept = Cache(Path(cache) if cache is not None else None)
    _check_writable(kept.folder)
    name, model = given_model(model)
    args, keywords = inputs_of(model, inputs, kwargs)
    with process.compiling():
        signature, program = _export(model, args, keywords, precision)
        return _build(name, signature, program, target, require_full, kept)


def _export(
    model: torch.nn.Module | ExportedProgram, args: Any, kwargs: Any, precision: Any
) -> tuple[Signature, Program]:
    """As an engine exports it, on the device of the model's weights."""
    state = model.state_dict if isinstance(model, ExportedProgram) else dict(model.state_dict())
    devices = {t.device for t in state.values()} or {torch.device("cpu")}
    if len(devices) > 1:
        raise InputError(
            f"the model's parameters are on several devices ({', '.join(sorted(map(str, devices)))}); expected one."
            " Call model.to('cpu')."
        )
    device = devices.pop()
    seam = get_device(device.type)

    def tensor(x: Any) -> Any:
        if isinstance(x, Input) and x.dims:
            raise InputError(
                f"Input shape {tuple(map(str, x.shape))} given; TensorRT's engines are for one shape. Give numbers, and"
                " build once for each shape."
            )
        return dataclasses.replace(x, device=None).empty(device) if isinstance(x, Input) else x

    args, kwargs = map_leaves(tensor, (args, kwargs), lambda x: isinstance(x, Input))
    leaves, structure = flatten_call(args, kwargs)
    signature = Signature.of(leaves, structure)
    leaves = signature.examples(device)
    for i, x in enumerate(leaves):
        leaf_key(x, i, device)
    with neutral(seam, seam.index(device)):
        snapshot = Snapshot.of(model)
        cast = cast_of(snapshot, precision_of(precision))
        args, kwargs = unflatten(leaves, structure)
        return signature, export_program(snapshot, args, kwargs, cast)


def _build(name: str, signature: Signature, program: Program, target: Any, require_full: bool, cache: Any) -> Build:
    from anabranch.backends.tensorrt import compile_program, library
    from anabranch.backends.tensorrt._partition import by_reason

    common = (name, str(signature), f"{library().name} {library().version}", target.compute_capability, cache.folder)
    why = program.direct_only if program.data_dependent else RESULTS_ONLY if program.written else ""
    if why:
        # compile() runs such a model as PyTorch's operators.
        if require_full:
            raise BuildError(
                f"require_full=True given, and backend 'tensorrt' does not run this model: {why}. Leave require_full"
                " out to have PyTorch run it."
            )
        count = sum(n.op == "call_function" for n in program.module.graph.nodes)
        return Build(*common, (), (0, count), (0, 0), (f"the whole model: {why}",))
    compiled = compile_program(library(), program, target, require_full=require_full, cache=cache)
    engines = []
    for part, content in compiled.engines.items():
        path = cache.path("engine", compiled.keys[part])
        engines.append(BuiltEngine(part.strip("_"), len(compiled.partition.segments[part].nodes), len(content), path))
    missing = [e.path for e in engines if not e.path.is_file()]
    if missing:
        raise BuildError(
            f"engines were built, and {len(missing)} of {len(engines)} could not be kept in {cache.folder} (the warning"
            " before this says why). Make room there, or give another folder as cache."
        )
    fallbacks = tuple(by_reason(compiled.fallbacks))
    return Build(*common, tuple(engines), compiled.operators, compiled.flops, fallbacks, compiled.reused)


def _capability(given: tuple[int, int] | str | None) -> tuple[tuple[int, int], bool]:
    """A compute capability, and whether it is of a GPU that is not this machine's."""
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if given is None:
        if here is None:
            raise InputError(
                "no compute capability given, and PyTorch sees no GPU here that could have one. Give the one of the GPU"
                " that engines are for: compute_capability=(8, 9), or on the command line --compute-capability 8.9"
            )
        return here, False
    match = re.fullmatch(r"(\d+)\.(\d)", given) if isinstance(given, str) else None
    pair = tuple(map(int, match.groups())) if match else given
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(type(n) is int for n in pair):
        raise InputError(f"compute capability {given!r} given; expected one such as 8.9: (8, 9) or '8.9'")
    return (pair[0], pair[1]), pair != here


def _check_writable(folder: Path) -> None:
    """Before minutes are spent on building."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        writable, why = os.access(folder, os.W_OK | os.X_OK), "permission denied"
    except OSError as e:
        writable, why = False, str(e.strerror)
    if not writable:
        raise InputError(
            f"engines cannot be kept in {folder}: {why}. Give a folder that you can write to: cache=, or on the command"
            " line --cache; ANABRANCH_TENSORRT_CACHE names it for compile()"
        )


def size(n: int) -> str:
    """Bytes, for people."""
    return f"{n / 1e6:,.1f} MB" if n >= 1e5 else f"{n / 1e3:,.1f} kB"
