"""``anabranch.compile``: what it is asked for, and the engine that it makes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from anabranch.backends import BACKENDS
from anabranch.devices import get_device
from anabranch.errors import InputError, NotCapturable
from anabranch.export import Mixed, precision_of, unflatten
from anabranch.runtime._engine import Engine
from anabranch.runtime._flags import Flags
from anabranch.runtime._given import (
    backend_for,
    check_gpu,
    declared_dims,
    device_of,
    given_model,
    have_values,
    inputs_of,
    on_device,
    tensors_for,
    with_ones,
)
from anabranch.runtime._padding import Padding
from anabranch.runtime._phases import Clock
from anabranch.runtime._process import process
from anabranch.runtime._ranges import Place
from anabranch.runtime._settings import DEFAULT_MAX_CONTEXTS, Settings
from anabranch.runtime._specialization import Specialization

#: What ``precision`` may be given as.
Precision = torch.dtype | str | os.PathLike[str] | Mixed | None
RUNTIMES = ("native", "python")


def compile(
    model: torch.nn.Module | ExportedProgram | str | os.PathLike[str],
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    backend: str | None = None,
    runtime: str = "auto",
    precision: Precision = None,
    max_contexts: int = DEFAULT_MAX_CONTEXTS,
    memory_limit: int | None = None,
    cuda_graphs: bool | None = None,
    require_full: bool = False,
    dynamic: bool | None = None,
) -> Engine:
    """Compile ``model`` for inference and return an engine that any thread may call on any stream.

    :param model: a module in ``eval()`` mode on the device of the inputs, a method of one (``model.encode_image``), an
        exported program, or the path of a ``.pt2`` file (which is read with ``torch.export.load``: load only files that
        you trust). What
        ``nn.DataParallel`` or ``torch.compile`` made is taken for the module that it wraps. The engine is what
        the model is now, whatever becomes of it later; it shares the memory of its weights. Other threads may call the
        model meanwhile. ``docs/contract.md`` says what is copied, what is shared and what is refused.
    :param inputs: positional inputs, each a tensor, an :class:`Input`, a number, or a pytree of them; a mapping is
        taken as keyword inputs. Of tensors only shape, dtype, strides and device count. Exported programs default to
        their own example inputs. Further signatures are compiled at their first call, or by :meth:`Engine.warm`. A
        float or an integer is a part of the signature until it has a second value; then one more specialization is
        compiled that serves all its values, unless the model needs to know the value (``docs/contract.md``).
    :param kwargs: keyword inputs, likewise.
    :param backend: ``"inductor"``, ``"eager"``, ``"tensorrt"`` (on a GPU, with ``tensorrt`` or ``tensorrt_rtx``
        installed), or None for the device's best: ``"inductor"``, and on ``sim``, which
        Inductor cannot compile for, ``"eager"``. With None, a signature whose calls run direct on a GPU has PyTorch's
        operators instead of compiled kernels where they measured faster; :meth:`Engine.explain` says so.
    :param runtime: ``"native"`` (C++, compiled at the first use), ``"python"``, or ``"auto"``: native, or, where there
        is no compiler, Python with a warning that says so. Both keep one contract; native calls cost less, and many
        threads' calls do not wait for each other.
    :param precision: ``torch.float16`` or ``torch.bfloat16``: run products and convolutions in that type (parameters
        are cast to it); inputs and outputs keep the types that the model has, and so do buffers and what would lose
        by it: :meth:`Engine.explain` lists what is cast and what is kept. None computes as the model says.
        ``"mixed"`` (float16), ``"mixed-bf16"``, a :class:`Mixed` or a file of ``anabranch calibrate``: float32
        operators of the model are put into half precision one by one, those that would overflow or lose digits are
        not; where tensors are given as inputs, the model runs once on them to see which would. ``explain()`` says
        which and why.
    :param max_contexts: how many execution contexts (calls in flight on different streams, each with its own memory)
        the engine may hold over all signatures. Beyond it calls share: the later one waits on the device. Of a model
        that ``torch.export`` refuses, the default is for each of its graphs.
    :param memory_limit: bytes of device memory that contexts may hold. Beyond it calls share as above; a signature
        whose first context does not fit runs direct.
    :param cuda_graphs: True: always, False: never, None: where it measured faster.
    :param require_full: raise where an operator would have to run in another backend than the one asked for, and
        where ``torch.export`` refuses the model. Otherwise :meth:`Engine.explain` lists such operators; a model that
        ``torch.export`` refuses runs in several graphs, as Dynamo cuts it, with its Python between them.
    :param dynamic: of sizes of inputs. None: when a size has a second value, one more specialization is compiled that
        serves all its values but 0 and 1, and what else the model or a compiler treats otherwise.
        True: from the first call on all sizes may vary. False: each shape is compiled by itself. A :class:`Dim` in an
        :class:`Input`'s shape declares a size that varies, with its bounds.

    The host blocks until everything is built, and until the calling thread's current stream is done, so that
    parameters written just before are seen by every stream. Nothing may be under capture on that stream.

    Raises :class:`~anabranch.errors.InputError`, :class:`~anabranch.errors.UnsupportedModel`,
    :class:`~anabranch.errors.BuildError`, :class:`~anabranch.errors.DeviceLost`.
    """
    return _compile(
        model,
        inputs,
        kwargs=kwargs,
        backend=backend,
        runtime=runtime,
        precision=precision,
        max_contexts=max_contexts,
        memory_limit=memory_limit,
        cuda_graphs=cuda_graphs,
        require_full=require_full,
        dynamic=dynamic,
        in_fragments=True,
    )


def compile_graph(model: torch.nn.Module, inputs: Sequence[Any], free: frozenset[Place], **options: Any) -> Engine:
    """As :func:`compile`, for a graph that Dynamo has made: what ``torch.export`` refuses is not traced once more.

    ``free``: the sizes that vary from call to call, by input and dimension. Where there are any, the engine serves
    ranges of them alone, and raises :class:`~anabranch.runtime._ranges.NotInRange` where there are none.
    """
    defaults = {n: p.default for n, p in inspect.signature(compile).parameters.items() if n not in ("model", "inputs")}
    if not free:
        defaults["dynamic"] = False  # Dynamo looks at the other sizes itself
    return _compile(model, inputs, **{**defaults, **options}, in_fragments=False, free=free)


def _compile(
    model: Any,
    inputs: Sequence[Any] | Mapping[str, Any] | None,
    *,
    kwargs: Mapping[str, Any] | None,
    backend: str | None,
    runtime: str,
    precision: Precision,
    max_contexts: int,
    memory_limit: int | None,
    cuda_graphs: bool | None,
    require_full: bool,
    dynamic: bool | None,
    in_fragments: bool,
    free: frozenset[Place] = frozenset(),
) -> Engine:
    """``in_fragments``: whether Dynamo takes a model apart that ``torch.export`` refuses. ``free``: see
    :func:`compile_graph`."""
    check_options(backend, runtime, precision, max_contexts, memory_limit)
    name, model = given_model(model)
    args, keywords = inputs_of(model, inputs, kwargs)
    kind = _engine_class(runtime)
    with process.compiling():
        clock = Clock()
        check_gpu(backend, (args, keywords))
        device = device_of(model, (args, keywords))
        placed = on_device(model, device)
        wanted = precision_of(precision)
        if isinstance(wanted, Mixed) and in_fragments:
            # Traced anew, an exported program's operators are in no module.
            wanted.check(placed if isinstance(placed, torch.nn.Module) else torch.nn.Module())
        given = args, keywords
        args, keywords = tensors_for(given, device)
        dims = declared_dims(given, (args, keywords))
        seam = get_device(device.type)
        index = seam.index(device)
        if seam.has_streams and seam.is_capturing(seam.current_stream(index)):
            raise NotCapturable("compile was called inside a CUDA graph capture; compile first, then capture")
        flags, compile_flags = Flags(device.type), Flags(device.type, export=True)
        settings = Settings(
            *(name, seam, index, backend_for(backend, seam), cuda_graphs, flags, compile_flags, require_full),
            backend_is_given=backend is not None,
        )
        limits = kind._runtime.make_limits(max_contexts, memory_limit)
        engine = kind(settings, placed, wanted, limits, in_fragments and not require_full, dynamic)
        engine._table.keep_on_cpu(args, keywords)
        engine._table.declare(args, keywords, dims)
        engine._table.vary(args, free)
        if seam.has_streams:
            # Parameters that were written just before are there for the lane that warms up, and for every later caller.
            with seam.relaxed():
                seam.current_stream(index).synchronize()
        if in_fragments and have_values(given):
            engine._compiler.measure_on(args, keywords)  # type: ignore[union-attr]
        made = engine._specialization(args, keywords, clock)
        if made is not None and not dims and not free:
            made = engine._of_one_shape(args, keywords, made)  # for inputs that were given, it is made at once
        engine._table.primary = made
        if any(dim.pad_to for own in dims for dim in own[1].values()):
            _pad(engine, args, keywords)
        ones = with_ones(given)
        if made is not None and made.is_range and ones:
            engine._try_to_serve(*tensors_for(given, device, ones))  # now, so that no call has to wait for it
    return engine


def _pad(engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Round declared sizes up from now on. With the build lock held. Raises where that is not right."""
    table, compiler = engine._table, engine._compiler
    leaves, key = table.key(args, kwargs)
    if engine._guarded is not None:
        table.ranges.check_declared(key, f"pad_to is for models in one graph, and {engine._guarded.why}")
    structure = table.flatten(args, kwargs)[1]
    padding = Padding(table.ranges.declared(key))
    assert compiler is not None

    def serve(given: Sequence[Any]) -> Specialization | None:
        arguments: Any = unflatten(given, structure)
        return engine._specialization(*arguments)

    padding.prove(leaves, serve, compiler.aside)
    table.padding = padding


def check_options(
    backend: str | None = None,
    runtime: str = "auto",
    precision: Precision = None,
    max_contexts: int = DEFAULT_MAX_CONTEXTS,
    memory_limit: int | None = None,
    **others: Any,
) -> None:
    """Raises :class:`~anabranch.errors.InputError` where an option of :func:`compile` has no right value."""
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"backend={backend!r} given; expected None or one of {', '.join(map(repr, BACKENDS))}")
    if runtime not in ("auto", *RUNTIMES):
        raise InputError(f"runtime={runtime!r} given; expected 'auto', {' or '.join(map(repr, RUNTIMES))}")
    precision_of(precision)
    if max_contexts < 1:
        raise InputError(f"max_contexts={max_contexts} given; expected at least 1 (cuda_graphs=False needs none)")
    if memory_limit is not None and memory_limit < 0:
        raise InputError(f"memory_limit={memory_limit} given; expected bytes, 0 or more, or None")


def _engine_class(runtime: str) -> type[Engine]:
    from anabranch.runtime import _library

    if runtime == "python" or (runtime == "auto" and not _library.is_available()):
        return Engine
    from anabranch.runtime._native import NativeEngine

    return NativeEngine
