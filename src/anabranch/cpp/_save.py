"""Program files: a model as a flat list of operator calls with its weights, for C++ to run without Python.

A file is what ``torch.save`` makes of dicts, lists, tuples, strings, numbers and tensors, so that nothing in it can be
executed by whoever reads it. ``file.cpp`` reads it. It is not the engine file to come: nothing in it is promised to the
next version, which refuses it by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from anabranch._version import __version__
from anabranch.errors import InputError, UnsupportedModel
from anabranch.export import AliasOutput, ComputedOutput, ConstantOutput, Program, TensorSpec
from anabranch.runtime import Engine, Precision, compile
from anabranch.runtime._flat import Argument, Call, FlatProgram, Pick, flatten

FORMAT = "anabranch program"
VERSION = 2

#: What ``file.cpp`` knows.
_DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
}
_HINT = " Engines in Python run it; docs/cpp.md says what C++ lacks."


def save_program(
    model: torch.nn.Module | ExportedProgram | str | os.PathLike[str] | Engine,
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    path: str | os.PathLike[str] = "",
    *,
    kwargs: Mapping[str, Any] | None = None,
    precision: Precision = None,
) -> None:
    """Write ``model`` to ``path`` for ``anabranch::Engine::load``.

    :param model: as for :func:`anabranch.compile`; or an engine of the backend ``"eager"``, of which the signature is
        saved that it was compiled for (then leave ``inputs`` out).
    :param inputs: as for :func:`anabranch.compile`. The engine in C++ takes the tensors among them, in their order, and
        has the other values built in; its results are the tensors that the model returns, in pytree's order. Inputs
        that the model writes are written there, too; buffers that it writes are the state of ``Session``.
    :param path: the file, which is replaced once the new one is whole.
    :param kwargs: keyword inputs; their tensors come after the positional ones, by name.
    :param precision: as for :func:`anabranch.compile`.

    The file holds operators, not kernels: it can be loaded on any device, whatever this one is. A version of PyTorch
    that has the operators can run it; only the same anabranch can read it.

    Raises :class:`~anabranch.errors.InputError` as ``compile`` does, and :class:`~anabranch.errors.UnsupportedModel`
    for what needs Python at every call, naming the operator and its line.
    """
    if not os.fspath(path):
        raise InputError("no path given; expected save_program(model, inputs, path)")
    if isinstance(model, Engine):
        engine = model
        if inputs is not None or kwargs is not None or precision is not None:
            raise InputError(
                "inputs, kwargs or precision given with an engine, which has its own; leave them out, or give the model"
            )
    else:
        options: Any = {"backend": "eager", "runtime": "python", "cuda_graphs": False}
        engine = compile(model, inputs, kwargs=kwargs, precision=precision, **options)
    first = engine._first()
    backend = first.choice.backend
    if backend != "eager":
        raise UnsupportedModel(
            f"{engine!r} runs kernels of {backend}, which only Python can launch so far; give save_program the"
            " model itself, or an engine compiled with backend='eager': PyTorch's own operators run instead."
        )
    content = describe(first.program, first.signature.tensors, engine.device)
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        torch.save(content, partial)
        os.replace(partial, target)
    except (OSError, RuntimeError) as e:
        raise InputError(f"{target} cannot be written ({e}); give a path that can") from e
    finally:
        partial.unlink(missing_ok=True)


def describe(program: Program, inputs: Sequence[TensorSpec], device: torch.device) -> dict[str, Any]:
    """What is in the file. Raises :class:`UnsupportedModel`."""
    flat = flatten(program)
    why = flat if isinstance(flat, str) else flat.depends
    if any(x.on_cpu for x in inputs):
        why = "an input is on the CPU, and an engine in C++ takes all on its device"
    if program.state and program.numbers is not None:
        why = "it keeps state and takes numbers that vary; compile it with one value of each"
    if why:
        raise UnsupportedModel(f"the model cannot be saved for C++: {why}.{_HINT}")
    assert isinstance(flat, FlatProgram)
    weights = zip(program.weights_for_eager(), program.weight_names, strict=True)
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_by": f"anabranch {__version__}, torch {torch.__version__}",
        "weights": [_weight(w, name) for w, name in weights],
        "inputs": [
            (_dtype(x.dtype, f"input {i}"), list(x.shape), [] if x.is_contiguous else list(x.strides))
            for i, x in enumerate(inputs)
        ],
        "written": sorted(i for i in program.written if i < len(inputs)),
        "state": [
            (s.name, _weight(s.initial, s.name), len(inputs) + i in program.written)
            for i, s in enumerate(program.state)
        ],
        "steps": [_step(step, device) for step in flat.steps],
        "results": [_result(output, i, program, flat) for i, output in enumerate(program.outputs)],
    }


def _weight(weight: torch.Tensor, name: str) -> torch.Tensor:
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.layout is not torch.strided:
        what = weight.layout if type(weight) is torch.Tensor else type(weight).__name__
        raise UnsupportedModel(f"the model's {name!r} is a {what}; files hold plain tensors.{_HINT}")
    _dtype(weight.dtype, f"the model's {name!r}")
    plain = weight.detach().resolve_conj().resolve_neg().cpu()
    # A view would bring its whole storage along.
    plain = plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()
    return plain.requires_grad_(weight.requires_grad)


def _dtype(dtype: torch.dtype, what: str) -> str:
    if dtype not in _DTYPES:
        raise UnsupportedModel(f"{what} is {dtype}, which program files do not know.{_HINT}")
    return str(dtype).removeprefix("torch.")


def _result(output: Any, position: int, program: Program, flat: FlatProgram) -> int:
    """Its slot."""
    if isinstance(output, ComputedOutput):
        if output.is_lazy:
            raise UnsupportedModel(
                f"output {position} is a lazy conjugate or negative; return .resolve_conj().resolve_neg() of it.{_HINT}"
            )
        return flat.results[output.index]
    if not isinstance(output, AliasOutput):
        value = output.value if isinstance(output, ConstantOutput) else "a number or a torch.Size that varies"
        raise UnsupportedModel(f"output {position} is {value!r}; in C++ results are tensors.{_HINT}")
    if output.view is not None:
        whose = "an input" if output.weight is None else "a parameter"
        raise UnsupportedModel(f"output {position} is a view of {whose}; return a copy of it (.clone()).{_HINT}")
    if output.weight is None:
        return len(program.weights) + output.position
    for slot, weight in enumerate(program.weights):
        if weight.is_set_to(output.weight):
            return slot
    raise UnsupportedModel(f"output {position} is a parameter that nothing else uses; return a copy of it.{_HINT}")


def _step(step: Any, device: torch.device) -> tuple[str, str, list[Argument]]:
    if isinstance(step, Pick):
        return "", "", [("slot", step.slot), ("constant", step.position)]
    assert isinstance(step, Call), step  # of others nothing would be left without numbers
    return _call(step, device)


def _call(step: Call, device: torch.device) -> tuple[str, str, list[Argument]]:
    if not step.name.startswith("aten::"):
        raise UnsupportedModel(
            f"the model calls {step.name} ({step.source or 'its line is not known'}), which is no operator of PyTorch"
            f" itself: a program in C++ need not have it.{_HINT}"
        )
    try:
        return step.name, step.overload, [_encode(*argument, device) for argument in step.arguments]
    except ValueError as e:
        raise UnsupportedModel(f"{step.name} ({step.source or 'its line is not known'}) takes {e}.{_HINT}") from None


def _encode(kind: str, value: Any, device: torch.device) -> Argument:
    """An argument without Python's own types in it; see ``argument_of`` in ``file.cpp``."""
    if kind == "list":
        return kind, [-1 if k == "constant" else v for k, v in value]  # of tensors; -1: none
    if kind != "constant" or value is None or type(value) in (bool, int, float, str):
        return kind, value
    if type(value) is complex:
        return "complex", (value.real, value.imag)
    if isinstance(value, torch.dtype):
        if value not in _DTYPES:
            raise ValueError(f"{value}, which program files do not know")
        return "dtype", str(value).removeprefix("torch.")
    if isinstance(value, torch.memory_format):
        return "memory_format", str(value).removeprefix("torch.")
    if value is torch.strided:
        return "layout", "strided"
    if isinstance(value, torch.device):
        # The one that the model is on stands for the one that its engine will be on.
        return "device", "" if value.type == device.type else str(value)
    if isinstance(value, list | tuple) and all(type(v) in (bool, int, float, str) for v in value):
        return "constant", list(value)
    raise ValueError(f"{value!r}, which is a {type(value).__name__}")
