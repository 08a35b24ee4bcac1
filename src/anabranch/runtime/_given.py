"""What :func:`~anabranch.compile` is given: the model, its inputs, and where they are."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from anabranch.devices import Device, get_device
from anabranch.errors import EngineClosed, InputError
from anabranch.export import Dim, Input, map_leaves, register_containers
from anabranch.runtime._process import process

#: What can be done where there is no GPU.
_AHEAD = (
    " Without a GPU, TensorRT-RTX can build the engines ahead of time: anabranch build MODEL --backend tensorrt"
    " --shape 1,3,224,224 --dtype float16 --compute-capability 8.9, or anabranch.build(model, inputs,"
    " compute_capability=(8, 9)); see docs/tensorrt.md."
)


def backend_for(given: str | None, device: Device) -> str:
    if given is None:
        return device.backends[0]
    if given == "tensorrt" and device.kind == "cpu":
        raise InputError(
            f"backend='tensorrt' given, and the model and its inputs are on the CPU; expected them on a CUDA"
            f" device.{_AHEAD}"
        )
    if given not in device.backends:
        raise InputError(
            f"backend={given!r} given, which cannot compile for device {device.kind!r}; expected one of"
            f" {', '.join(map(repr, device.backends))}, or None for the device's best"
        )
    return given


def inputs_of(model: Any, inputs: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs, from the ways in which a user may give them."""
    args: Any = () if inputs is None else inputs
    keywords: dict[str, Any] = dict(kwargs or {})
    if isinstance(inputs, torch.Tensor | Input):
        raise InputError(f"inputs is a single {type(inputs).__name__}; expected a list: inputs=[x]")
    if isinstance(inputs, Mapping):
        args, keywords = (), {**inputs, **keywords}
    elif inputs is None and kwargs is None and isinstance(model, ExportedProgram) and model.example_inputs:
        args, keywords = model.example_inputs
    args, keywords = tuple(args), dict(keywords)
    register_containers((args, keywords))
    return args, keywords


def _is_input(x: Any) -> bool:
    return isinstance(x, Input)


def tensors_for(inputs: Any, device: torch.device, fixed: Mapping[str, int] = MappingProxyType({})) -> Any:
    """Tensors in place of each :class:`Input`: zeros, which are valid indices, in case the model has to be tried.

    ``fixed``: sizes that vary, by name, with a value for each. Raises :class:`~anabranch.errors.InputError` where two
    sizes of one name are declared with other bounds.
    """
    sizes = dict(fixed)
    for name, dim in _dims_in(inputs).items():
        if name not in sizes:
            sizes[name] = dim.example(sizes.values())  # ones that differ: equal ones might be taken for one
    return map_leaves(lambda x: x.empty(device, sizes).zero_() if _is_input(x) else x, inputs, _is_input)


def _dims_in(inputs: Any) -> dict[str, Dim]:
    """Sizes that vary, by name."""
    dims: dict[str, Dim] = {}
    for x in pytree.tree_leaves(inputs, is_leaf=_is_input):
        for dim in x.dims.values() if _is_input(x) else ():
            if dims.setdefault(dim.name, dim) != dim:
                raise InputError(
                    f"{dims[dim.name]} and {dim} given; expected one name to have the same bounds everywhere"
                )
    return dims


def with_ones(inputs: Any) -> dict[str, int]:
    """Where one size varies, and may be 1, which compilers treat otherwise than all other sizes: that, by name.

    Nothing where several do: all ways in which some of them are 1 would be too many compiles for sizes that may never
    come.
    """
    dims = _dims_in(inputs)
    return {name: 1 for name, dim in dims.items() if len(dims) == 1 and dim.takes(1)}


def have_values(inputs: Any) -> bool:
    """Whether there are tensors among inputs, and no :class:`Input` that only tells of one."""
    leaves = pytree.tree_leaves(inputs, is_leaf=_is_input)
    return not any(map(_is_input, leaves)) and any(isinstance(x, torch.Tensor) for x in leaves)


def declared_dims(inputs: Any, tensors: Any) -> list[tuple[torch.Tensor, dict[int, Dim]]]:
    """The tensors that :func:`tensors_for` has made of inputs that have sizes which vary, with these."""
    pairs = zip(pytree.tree_leaves(inputs, is_leaf=_is_input), pytree.tree_leaves(tensors), strict=True)
    return [(tensor, x.dims) for x, tensor in pairs if _is_input(x) and x.dims]


def given_model(model: Any) -> tuple[str, torch.nn.Module | ExportedProgram]:
    """A model as :func:`compile` takes it: its name, and itself, what it wraps, or what its file holds."""
    model = _unwrapped(model)
    name = type(model).__name__
    if isinstance(model, str | os.PathLike):
        name, model = Path(model).stem, load_exported(Path(model))
    if isinstance(model, types.MethodType) and isinstance(model.__self__, torch.nn.Module):
        name, model = f"{type(model.__self__).__name__}.{model.__name__}", _Method(model)
    if not isinstance(model, torch.nn.Module | ExportedProgram):
        raise InputError(
            f"model is a {type(model).__name__}; expected an nn.Module, a method of one, an exported program or the"
            " path of a .pt2 file. Call a function in the forward() of an nn.Module, which holds the modules that it"
            " uses."
        )
    return name, model


class _Method(torch.nn.Module):
    """A method of a module as a model: ``encode_image`` of one that has it beside ``forward``."""

    def __init__(self, method: types.MethodType) -> None:
        super().__init__()
        self.owner, self._name = method.__self__, method.__name__
        self.training = self.owner.training  # type: ignore[attr-defined]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.owner, self._name)(*args, **kwargs)


def _unwrapped(model: Any) -> Any:
    """What ``nn.DataParallel`` and ``torch.compile`` wrap: an engine spreads no calls, and compiles by itself."""
    while True:
        if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and isinstance(model, torch.nn.Module):
            model = model._orig_mod
        else:
            return model


def load_exported(path: Path) -> ExportedProgram:
    """Read a ``.pt2`` file; raises :class:`~anabranch.errors.InputError` where it is not one."""
    try:
        # In several threads at once it takes good files for bad ones.
        with process.compiling():
            return torch.export.load(path)
    except EngineClosed:
        raise
    except Exception as e:
        why = (str(e).splitlines() or [""])[0]
        raise InputError(
            f"{path}: cannot be loaded as an exported program ({type(e).__name__}: {why}). Expected a file written by"
            " torch.export.save."
        ) from e


def check_gpu(backend: str | None, inputs: Any) -> None:
    """Raises :class:`~anabranch.errors.InputError` where TensorRT is to have inputs for a GPU that is not there."""
    if backend == "tensorrt" and not torch.cuda.is_available() and any(d.type == "cuda" for d in _devices(inputs)):
        raise InputError(f"backend='tensorrt' given with inputs for CUDA, and PyTorch sees no GPU here.{_AHEAD}")


def _devices(inputs: Any) -> set[torch.device]:
    return {
        torch.device(x.device)
        for x in pytree.tree_leaves(inputs, is_leaf=_is_input)
        if isinstance(x, torch.Tensor | Input) and x.device is not None
    }


def device_of(model: Any, inputs: Any) -> torch.device:
    """The one device of all inputs, but for some on the CPU; or of the model where there are none."""
    given = _devices(inputs)
    if not given:
        state = model.state_dict if isinstance(model, ExportedProgram) else dict(model.state_dict())
        given = {t.device for t in state.values()} or {torch.device("cpu")}
    if any(d.type != "cpu" for d in given):
        given = {d for d in given if d.type != "cpu"}
    seams = {d: get_device(d.type) for d in given}
    devices = {torch.device(d.type, seam.index(d)) if seam.has_streams else d for d, seam in seams.items()}
    if len(devices) > 1:
        raise InputError(
            f"inputs on several devices given ({', '.join(sorted(map(str, devices)))}); an engine runs on one, with"
            " inputs there and on the CPU. Move them to one device."
        )
    return devices.pop()


def on_device(model: Any, device: torch.device) -> torch.nn.Module | ExportedProgram:
    """A program is moved to the inputs' device; a module is the user's to move."""
    if isinstance(model, ExportedProgram):
        if any(t.device != device for t in (*model.state_dict.values(), *_tensors(model.constants.values()))):
            from torch.export.passes import move_to_device_pass

            moved: ExportedProgram = move_to_device_pass(model, device)
            return moved
        return model
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.device != device:
            raise InputError(
                f"the model's {name!r} is on {t.device}, its inputs are on {device}; call model.to({str(device)!r})"
            )
    module: torch.nn.Module = model
    return module


def _tensors(values: Any) -> list[torch.Tensor]:
    return [v for v in values if isinstance(v, torch.Tensor)]


#: By name: their modules are half of the compiler.
_TRACING_MODES = ("FakeTensorMode", "FunctionalTensorMode", "ProxyTorchDispatchMode")


def check_modes() -> None:
    """Refuse a call from inside a trace of the caller's, where operators compute no values."""
    for mode in _get_current_dispatch_mode_stack():
        if type(mode).__name__ in _TRACING_MODES:
            raise InputError(
                f"the call is made under a {type(mode).__name__}, where operators compute no values; engines run on"
                " real tensors. Call the engine outside of it, or trace the model itself."
            )
