"""What is checked: a model, and the dtypes, shapes and layouts of its input."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anabranch._exit import described
from anabranch.errors import InputError
from anabranch.models import BUILTIN

LAYOUTS = ("contiguous", "channels_last", "strided", "misaligned")


@dataclass(frozen=True)
class Subject:
    """A model to check: ``make`` gives a new float32 module on the CPU, or an exported program, which keeps its dtype.

    ``shapes`` and ``boundary`` are input shapes to try by default, with and without unusual layouts.
    """

    name: str
    make: Callable[[], Any]
    shapes: tuple[tuple[int, ...], ...] = ()
    boundary: tuple[tuple[int, ...], ...] = ()
    fixed_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Case:
    """One dtype, shape and layout of the input."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str = "contiguous"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape_name(self) -> str:
        size = "x".join(map(str, self.shape)) or "scalar"
        return size if self.layout == "contiguous" else f"{size} {self.layout}"

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def refuse_too_large(self, device: torch.device) -> None:
        """Raise :class:`~anabranch.errors.InputError` where inputs, results and what they are compared with do not fit
        into the memory that is free: the system would end the process, or page for hours."""
        needed = 4 * max(self.nbytes, 4 * math.prod(self.shape))
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory()
        if needed > free:
            raise InputError(
                f"an input of {self.shape_name} {self.dtype_name} is {self.nbytes / 1e9:,.1f} GB; the check needs"
                f" {needed / 1e9:,.1f} GB for it, and {free / 1e9:,.1f} GB are free on {device}; give a smaller --shape"
            )

    def empty(self, device: torch.device) -> torch.Tensor:
        """An uninitialized input of this layout, on the current stream."""
        if self.layout == "channels_last":
            return torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=torch.channels_last)
        if self.layout == "strided":
            return torch.empty((*self.shape[:-1], 2 * self.shape[-1]), dtype=self.dtype, device=device)[..., ::2]
        if self.layout == "misaligned":
            n = self.nbytes // self.dtype.itemsize
            return torch.empty(n + 1, dtype=self.dtype, device=device)[1:].view(self.shape)
        return torch.empty(self.shape, dtype=self.dtype, device=device)


def _available_memory() -> int:
    """Bytes of main memory that can be had."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62  # not Linux: PyTorch's allocator will say


def find_subject(model: str) -> Subject:
    """A built-in's name, ``module:callable`` (which returns a module), or the path of a ``.pt2`` file."""
    if model in BUILTIN:
        builtin = BUILTIN[model]
        return Subject(model, builtin.make, builtin.benchmark, builtin.boundary)
    if model.endswith(".pt2"):
        return _exported(Path(model))
    module_name, _, attribute = model.partition(":")
    if not attribute:
        raise InputError(
            f"model {model!r} given; expected one of {', '.join(BUILTIN)}, module:callable, or a .pt2 file"
        )
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError(
            f"model {model!r}: {module_name!r} is no module's name; expected module:callable, such as"
            " package.module:make, with the module on PYTHONPATH"
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as e:
        raise InputError(f"model {model!r}: {e}. Expected module:callable with the module on PYTHONPATH.") from e
    except (Exception, SystemExit) as e:
        raise InputError(
            f"model {model!r}: importing {module_name} raised {described(e)}. Expected a module that can be imported."
        ) from e
    if not callable(factory):
        raise InputError(
            f"model {model!r} is a {type(factory).__name__}; expected a callable that returns an nn.Module"
        )

    def make() -> torch.nn.Module:
        try:
            made = factory()
        except (Exception, SystemExit) as e:
            raise InputError(
                f"model {model!r}: {attribute}() raised {described(e)}. Expected a call without arguments that"
                " returns an nn.Module."
            ) from e
        if not isinstance(made, torch.nn.Module):
            raise InputError(f"{model} returned a {type(made).__name__}; expected an nn.Module")
        return made.eval().requires_grad_(False)

    return Subject(model, make)


def _exported(path: Path) -> Subject:
    from anabranch.runtime._given import load_exported

    program = load_exported(path)
    example: Sequence[Any] = program.example_inputs[0] if program.example_inputs else ()
    if len(example) != 1 or not isinstance(example[0], torch.Tensor):
        raise InputError(f"{path}: takes {len(example)} inputs; check needs a program of one tensor input")
    x = example[0]
    return Subject(path.stem, lambda: load_exported(path), (tuple(x.shape),), (), x.dtype)


def cases_for(
    subject: Subject,
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, ...]] | None,
    max_elements: int | None = None,
) -> list[Case]:
    """Every dtype with every shape; without ``shapes``, the default ones of at most ``max_elements``: the boundary
    shapes too, some in every layout."""
    if subject.fixed_dtype is not None:
        dtypes = [subject.fixed_dtype]
    if shapes:
        return [Case(d, s) for d in dtypes for s in shapes]
    if not subject.shapes:
        raise InputError(f"model {subject.name!r} has no default shapes; give --shape, for example --shape 1,3,224,224")
    plain = tuple(dict.fromkeys((*subject.shapes, *subject.boundary)))
    if max_elements is not None:
        plain = tuple(s for s in plain if math.prod(s) <= max_elements) or plain
    cases = [Case(d, s) for d in dtypes for s in plain]
    for dtype in dtypes:
        # Layouts differ only where there is more than one row and column; the smallest such image will do.
        images = sorted((s for s in plain if len(s) == 4 and s[0] > 0 and min(s[2:]) > 1), key=math.prod)
        image = images[0] if images else None
        if image is not None and subject.boundary:
            cases += [Case(dtype, image, layout) for layout in LAYOUTS[1:]]
    return cases
