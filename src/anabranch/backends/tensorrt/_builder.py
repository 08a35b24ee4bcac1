"""An ONNX file becomes a serialized engine."""

from __future__ import annotations

import re
import signal
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from anabranch.backends._backend import TF32
from anabranch.backends.tensorrt._layout import Layout
from anabranch.backends.tensorrt._library import Library
from anabranch.errors import BuildError, InputError


class Rejected(BuildError):
    """The parser or the builder does not take the network; the message is its own."""


@dataclass(frozen=True)
class Target:
    """What an engine is built for. ``compute_capability``: of the GPU; it need not be there if ``ahead``."""

    compute_capability: tuple[int, int]
    ahead: bool
    #: What may be computed in TF32.
    tf32: TF32 = field(default_factory=TF32)


def check_target(library: Library, target: Target) -> None:
    """Raise :class:`~anabranch.errors.InputError` where ``library`` cannot build for ``target`` from here."""
    if not target.ahead:
        return
    if not library.builds_ahead:
        raise InputError(
            f"{library.name} {library.version} builds engines only for a GPU that is there; building ahead of time"
            " needs TensorRT-RTX: pip install tensorrt-rtx, and set ANABRANCH_TENSORRT=tensorrt_rtx"
        )
    if _member(library, target.compute_capability) is None:
        known = sorted((n[2:] for n in library.api.ComputeCapability.__members__ if n.startswith("SM")), key=int)
        raise InputError(
            f"compute capability {'.'.join(map(str, target.compute_capability))} given;"
            f" {library.name} {library.version} builds ahead of time for"
            f" {', '.join(f'{n[:-1]}.{n[-1]}' for n in known)}. On a machine with that GPU, compile() builds for it."
        )


def _member(library: Library, capability: tuple[int, int]) -> Any:
    return library.api.ComputeCapability.__members__.get(f"SM{capability[0]}{capability[1]}")


#: By an input's name, the least shape, the one to be fastest for, and the largest.
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def build(
    library: Library,
    onnx: Path,
    wanted: Mapping[str, Layout],
    name: str,
    target: Target,
    show: bool,
    shapes: Shapes | None = None,
) -> bytes:
    """Build. The host waits; on the main thread Ctrl-C stops it, with :class:`KeyboardInterrupt`.

    ``wanted``: what each input and output has to be, by its name. ``show``: with a progress bar on a terminal's
    standard error. ``shapes``: of the inputs whose sizes vary; they make one optimization profile. Raises
    :class:`Rejected`.
    """
    api = library.api
    with library.complaints() as complaints:
        builder = api.Builder(library.logger)
        flags = api.NetworkDefinitionCreationFlag
        network = builder.create_network(1 << int(flags.STRONGLY_TYPED))
        parser = api.OnnxParser(network, library.logger)
        if not parser.parse_from_file(str(onnx)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            text = "; ".join(
                dict.fromkeys(f"{e.node_operator() or 'the file'}: {said([e.desc()], target.ahead)}" for e in errors)
            )
            raise Rejected(f"TensorRT's parser does not take it: {text or said(complaints, target.ahead)}")
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        check_tensors(library, wanted, {t.name: (tuple(t.shape), t.dtype) for t in (*inputs, *outputs)})
        config = builder.create_builder_config()
        if target.ahead:
            config.num_compute_capabilities = 1
            config.set_compute_capability(_member(library, target.compute_capability), 0)
        # One flag for all of an engine.
        allowed = target.tf32.products and target.tf32.convolutions
        (config.set_flag if allowed else config.clear_flag)(api.BuilderFlag.TF32)
        # Without it 0 * x is 0 and x - x is 0, also where x is NaN or infinite and PyTorch's result is NaN.
        if hasattr(api.BuilderFlag, "STRICT_NANS"):
            config.set_flag(api.BuilderFlag.STRICT_NANS)
        varied = [t for t in inputs if -1 in tuple(t.shape)]
        if varied:
            profile = builder.create_optimization_profile()
            for t in varied:
                profile.set_shape(t.name, *(shapes or {})[t.name])
            if config.add_optimization_profile(profile) != 0:
                raise Rejected(f"TensorRT takes no such profile: {said(complaints, target.ahead)}")
        with _interruptible() as interrupted, _progress(name, show) as progress:
            monitor = _monitor(api, progress, interrupted)
            config.progress_monitor = monitor
            serialized = builder.build_serialized_network(network, config)
        if interrupted.is_set():
            raise KeyboardInterrupt
        if serialized is None:
            raise Rejected(f"TensorRT does not build it: {said(complaints, target.ahead)}")
        return bytes(serialized)


def check_tensors(library: Library, wanted: Mapping[str, Layout], found: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise :class:`Rejected` unless ``found`` (shape and TensorRT's type, by name) is what is ``wanted``.

    Inputs may be missing, as those are that nothing depends on. The exporter leaves some results in another type than
    PyTorch's, and the parser would take float64 and compute in float32. Of a result it need not know that a size does
    not vary: -1.
    """
    types = dtypes(library)
    for name, (shape, dtype) in found.items():
        layout = wanted.get(name)
        bound = layout.bound if layout is not None else ()
        if name.startswith("output") and len(shape) == len(bound):
            bound = tuple(-1 if n == -1 else size for n, size in zip(shape, bound, strict=True))
        if layout is None or shape != bound or types.get(dtype) is not layout.dtype:
            expected = "nothing" if layout is None else f"{layout.dtype}{list(layout.bound)}"
            raise Rejected(f"TensorRT makes {types.get(dtype, dtype)}{list(shape)} of {name}; expected {expected}")
    missing = [n for n in wanted if n.startswith("output") and n not in found]
    if missing:
        raise Rejected(f"TensorRT leaves out {', '.join(missing)}")


def dtypes(library: Library) -> dict[Any, torch.dtype]:
    """PyTorch's types by TensorRT's, of those that an engine may take and return."""
    t = library.api.DataType
    return {
        t.FLOAT: torch.float32,
        t.HALF: torch.float16,
        t.BF16: torch.bfloat16,
        t.INT32: torch.int32,
        t.INT64: torch.int64,
        t.BOOL: torch.bool,
        t.INT8: torch.int8,
        t.FP8: torch.float8_e4m3fn,
    }


#: What it says of a machine without a GPU or a driver, mostly beside what is the matter.
_NO_GPU = re.compile(
    r"cudaError (35|100)\b|CUDA driver version is insufficient|no CUDA-capable device"
    r"|Cuda Runtime \(In (catchCudaError|generateForCurrent) at [^()]*\)$"
)
#: Lines of its own sources, names of nodes that the exporter made up, and lines that say nothing else.
_INTERNAL = re.compile(r"^\[[^\]]*\] *|\.? In \w+ at \S+:\d+|\bnode_\w+: |^Invalid Node - .*$|^false$")
_FRAME = re.compile(r"^\S+: Error Code \d+: [\w ]+ \((.*)\)\.?$")


def said(messages: Iterable[str], ahead: bool = False) -> str:
    """What the library says, in one line: each thing once, without what only its developers can use.

    ``ahead``: it built for a GPU that is not there, and what it says of that is no news.
    """
    lines = [line.strip() for message in messages for line in message.splitlines()]
    kept = [line for line in lines if not (ahead and _NO_GPU.search(line))]
    if lines and not kept:
        return "this version needs a GPU to build it"
    text = "; ".join(dict.fromkeys(filter(None, (_FRAME.sub(r"\1", _INTERNAL.sub("", line)).strip() for line in kept))))
    return textwrap.shorten(text, 400, placeholder=" ...") or "no reason given"


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event meanwhile: an exception must not come up inside the library's callbacks."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.getsignal(signal.SIGINT)
    if before is None:  # it is not Python's, and could not be put back
        yield interrupted
        return
    signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(name: str, show: bool) -> Iterator[Progress]:
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        progress.add_task(f"TensorRT builds {name}", total=None)
        yield progress


def _monitor(api: Any, progress: Progress, interrupted: threading.Event) -> Any:
    """The builder's own phases, as bars. The library may call it from any thread."""

    class Monitor(api.IProgressMonitor):
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self._tasks: dict[str, TaskID] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tasks[phase_name] = progress.add_task(f"  {phase_name}", total=num_steps)

        def phase_finish(self, phase_name: str) -> None:
            task = self._tasks.pop(phase_name, None)
            if task is not None:
                progress.remove_task(task)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._tasks:
                progress.update(self._tasks[phase_name], completed=step + 1)
            return not interrupted.is_set()

    return Monitor()
