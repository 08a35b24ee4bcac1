"""Why a model could not be exported: the inputs are at fault, or a line of the model, or neither."""

from __future__ import annotations

import re
import reprlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from anabranch.errors import AnabranchError, InputError, UnsupportedModel

#: Frames in here are nobody's model.
_NOT_A_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")

#: Characters of somebody else's error that are passed on.
_MOST_READ = 400
#: (words in an error's text, what to do)
_ADVICE = (
    (
        (
            *("functorch", "vmapped", "tensorwrapper", "that doesn't have storage", "has no attribute 'constant'"),
            "expected faketensor, got <class 'torch.tensor'>",  # PyTorch 2.11, of what a transform has wrapped
        ),
        "It uses a transform of torch.func (vmap, grad, jacrev, ...) that torch.export does not know; write that step"
        " without it, or leave it out of the engine.",
    ),
    (
        ("require grad", "requires grad", "autograd", "backward"),
        "It computes gradients of its inputs or parameters; engines run inference. Compute them outside of the engine.",
    ),
    (
        ("torch._c.generator",),  # PyTorch 2.11; later ones take it for a constant
        "It draws from a torch.Generator of its own, which is no part of a graph. In one graph it must draw from"
        " PyTorch's default generator, which torch.manual_seed seeds.",
    ),
    (
        ("torchscript", "scriptfunction", "scriptmodule"),
        "TorchScript cannot be looked into; use the Python function or module that it was made from.",
    ),
    (
        ("numpy", "data pointer", "access storage", "data_ptr"),
        "That line needs the values or the memory of a tensor, and there are none while a model is exported; use"
        " PyTorch's operators.",
    ),
)


class NotExported(UnsupportedModel):
    """``torch.export`` refuses the model, which may run in fragments all the same."""


def check_parts(model: torch.nn.Module, *, values: bool = True) -> None:
    """Refuse a model with parts that cannot be exported, by their names. Raises :class:`UnsupportedModel`.

    ``values=False``: FakeTensors pass.
    """
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            what = f"the model's part {name!r}" if name else "the model"
            raise UnsupportedModel(
                f"{what} is a TorchScript module ({type(part).__name__}: torch.jit.script, trace or load), which"
                " torch.export cannot look into. Give compile the Python module that it was made from."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found = _kind(tensor)
        if found and (values or not isinstance(tensor, FakeTensor)):
            kind, instead = found
            raise UnsupportedModel(
                f"the model's {name!r} is {kind}; engines compute with plain, dense tensors. {instead}"
            )


def _kind(x: torch.Tensor) -> tuple[str, str] | None:
    """What else it is than a plain, dense tensor, and what to do; None: nothing else."""
    if isinstance(x, FakeTensor):
        return "a FakeTensor, which has no values", "Build or load the model outside of FakeTensorMode."
    if isinstance(x, torch.nn.UninitializedParameter | torch.nn.UninitializedBuffer):
        return "not initialized yet", "Run the model once on inputs like these."
    if x.is_nested:
        return "a nested tensor", "Keep its tensors one by one."
    if x.is_quantized:
        return f"quantized ({x.dtype})", "Use the model as it was before it was converted."
    if x.layout is not torch.strided:
        return f"of layout {x.layout}", "Keep its to_dense()."
    return None


def line_of(error: BaseException) -> str:
    """``file.py:12`` of the model's own line that raised, or nothing."""
    found = ""
    # Of an operator that failed when a graph was run, its text has the line.
    for name, line in re.findall(r'File "([^"]+)", line (\d+)', str(error)):
        if not name.startswith(_NOT_A_MODEL):
            found = f"{Path(name).name}:{line}"
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if not name.startswith(_NOT_A_MODEL):
            found = f"{Path(name).name}:{line}"
    return found


def line_on(frame: FrameType | None, others: tuple[str, ...] = ()) -> str:
    """``file.py:12`` of the model's own code that is innermost on a stack, or nothing.

    ``others``: files, or folders, that are no model's either.
    """
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((*_NOT_A_MODEL, *others)):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def first_line(error: BaseException) -> str:
    """Of its text, or as much of it as one can read; its type where it has none."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    # PyTorch writes out expressions of hundreds of symbols.
    return line.rstrip(".") if len(line) <= _MOST_READ else f"{line[:_MOST_READ]} [...]"


#: So many leaves of a call are in a message: one of a list of numbers would have thousands.
_MOST_TOLD = 16


def describe(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The leaves of a call, for messages."""

    def leaf(x: Any) -> str:
        if isinstance(x, torch.Tensor):
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
        return reprlib.repr(x)

    items = [leaf(x) for x in pytree.tree_leaves(tuple(args))]
    items += [f"{name}={leaf(x)}" for name, v in kwargs.items() for x in pytree.tree_leaves(v)]
    if len(items) > _MOST_TOLD:
        items[_MOST_TOLD:] = [f"and {len(items) - _MOST_TOLD} more"]
    return ", ".join(items) or "none"


def diagnose(
    error: Exception,
    run: Callable[[], Exception | None],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    line: str = "",
) -> NoReturn:
    """Raise what says why ``torch.export`` of a model on these inputs ended with ``error``.

    ``run``: runs the model on them by PyTorch's operators; returns what that raises. ``line``: the model's line that is
    suspected if the error does not say.
    """
    text, line = first_line(error), line_of(error) or line
    where = f" ({line})" if line else ""
    if isinstance(error, AnabranchError):
        raise NotExported(
            f"the model calls an engine{where}: {text}. Engines run on real tensors only: compile a model without it."
        ) from error
    if type(error).__module__.startswith(("torch._dynamo", "torch.fx.experimental")) or "data-dependent" in str(error):
        raise NotExported(
            f"torch.export cannot capture this model{where}: {text}. An engine needs a graph whose control flow does"
            " not depend on the values of tensors; torch.cond expresses a branch that does."
        ) from error
    devices = {str(x.device) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
    if len(devices) > 1 and "same device" in str(error):
        raise InputError(
            f"the model does not accept inputs on several devices ({describe(args, kwargs)}){where}: {text}. Expected"
            " inputs on one device; or have the model move them to one."
        ) from error
    if run() is not None:
        raise InputError(
            f"the model does not accept these inputs ({describe(args, kwargs)}): {type(error).__name__}: {text}."
            " Expected inputs that model(*inputs) runs on; try that first."
        ) from error
    lowered = f"{type(error).__name__} {error}".lower()
    advice = next((what for words, what in _ADVICE if any(w in lowered for w in words)), None)
    advice = advice or "Write that step otherwise, or leave it out of the engine."
    raise NotExported(
        f"torch.export cannot capture this model, which runs in eager{where}: {type(error).__name__}: {text}. {advice}"
    ) from error


def copy_of(x: torch.Tensor) -> torch.Tensor:
    """A copy that lies in memory as ``x`` does, of its own memory."""
    once = [d for d in range(x.ndim) if x.shape[d] > 1 and not x.stride(d)]
    own = x
    for d in once:
        own = own.narrow(d, 0, 1)
    return torch.empty_strided(own.shape, own.stride(), dtype=x.dtype, device=x.device).copy_(own).expand(x.shape)
