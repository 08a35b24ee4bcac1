"""The engine: what :func:`compile` returns and what user threads call."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from anabranch import _activity, _sync
from anabranch.backends import BACKENDS
from anabranch.devices import Device, get_device
from anabranch.errors import (
    AnabranchError,
    BuildError,
    DeviceLost,
    EngineClosed,
    FlagsChanged,
    InputError,
    NotCapturable,
)
from anabranch.export import (
    Cast,
    Input,
    NotCarried,
    Program,
    Signature,
    Snapshot,
    Uncaptured,
    export_program,
    flatten_call,
    hooks_of,
    keyword_order_matters,
    layouts_of,
    leaf_key,
    name_of,
    register_dataclasses,
    run_in_eager,
    same_computation,
    source_of,
    tensorize,
)
from anabranch.plan import Plan
from anabranch.runtime import _phases
from anabranch.runtime._calls import Runtime
from anabranch.runtime._flags import Flags
from anabranch.runtime._phases import Clock
from anabranch.runtime._pool import Limits
from anabranch.runtime._process import is_neutral, neutral, process
from anabranch.runtime._python import PythonCalls
from anabranch.runtime._settings import Settings
from anabranch.runtime._specialization import Specialization
from anabranch.runtime._stats import Counters, Stats
from anabranch.runtime._varying import Varying, has_numbers, used

_log = logging.getLogger("anabranch")
RUNTIMES = ("native", "python")
#: What can be done where there is no GPU.
_AHEAD = (
    " Without a GPU, TensorRT-RTX can build the engines ahead of time: anabranch build MODEL --backend tensorrt"
    " --shape 1,3,224,224 --dtype float16 --compute-capability 8.9, or anabranch.build(model, inputs,"
    " compute_capability=(8, 9)); see docs/tensorrt.md."
)
DEFAULT_MAX_CONTEXTS = 16


def compile(
    model: torch.nn.Module | ExportedProgram | str | os.PathLike[str],
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    backend: str | None = None,
    runtime: str = "auto",
    precision: torch.dtype | None = None,
    max_contexts: int = DEFAULT_MAX_CONTEXTS,
    memory_limit: int | None = None,
    cuda_graphs: bool | None = None,
    require_full: bool = False,
) -> Engine:
    """Compile ``model`` for inference and return an engine that any thread may call on any stream.

    :param model: a module in ``eval()`` mode on the device of the inputs, an exported program, or the path of a
        ``.pt2`` file (which is read with ``torch.export.load``: load only files that you trust). What
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
    :param max_contexts: how many execution contexts (calls in flight on different streams, each with its own memory)
        the engine may hold over all signatures. Beyond it calls share: the later one waits on the device.
    :param memory_limit: bytes of device memory that contexts may hold. Beyond it calls share as above; a signature
        whose first context does not fit runs direct.
    :param cuda_graphs: True: always, False: never, None: where it measured faster.
    :param require_full: raise where an operator would have to run in another backend than the one asked for.
        Otherwise :meth:`Engine.explain` lists those that do.

    The host blocks until everything is built, and until the calling thread's current stream is done, so that
    parameters written just before are seen by every stream. Nothing may be under capture on that stream.

    Raises :class:`~anabranch.errors.InputError`, :class:`~anabranch.errors.UnsupportedModel`,
    :class:`~anabranch.errors.BuildError`, :class:`~anabranch.errors.DeviceLost`.
    """
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"backend={backend!r} given; expected None or one of {', '.join(map(repr, BACKENDS))}")
    if runtime not in ("auto", *RUNTIMES):
        raise InputError(f"runtime={runtime!r} given; expected 'auto', {' or '.join(map(repr, RUNTIMES))}")
    if precision not in (None, torch.float16, torch.bfloat16):
        raise InputError(f"precision={precision} given; expected None, torch.float16 or torch.bfloat16")
    if max_contexts < 1:
        raise InputError(f"max_contexts={max_contexts} given; expected at least 1 (cuda_graphs=False needs none)")
    if memory_limit is not None and memory_limit < 0:
        raise InputError(f"memory_limit={memory_limit} given; expected bytes, 0 or more, or None")
    name, model = given_model(model)
    args, keywords = _inputs(model, inputs, kwargs)
    kind = _engine_class(runtime)
    with process.compiling():
        clock = Clock()
        if (
            backend == "tensorrt"
            and not torch.cuda.is_available()
            and any(d.type == "cuda" for d in _given_devices((args, keywords)))
        ):
            raise InputError(f"backend='tensorrt' given with inputs for CUDA, and PyTorch sees no GPU here.{_AHEAD}")
        device = _device(model, (args, keywords))
        placed = _on_device(model, device)
        args, keywords = _tensors_for((args, keywords), device)
        seam = get_device(device.type)
        index = seam.index(device)
        if seam.has_streams and seam.is_capturing(seam.current_stream(index)):
            raise NotCapturable("compile was called inside a CUDA graph capture; compile first, then capture")
        flags, compile_flags = Flags(device.type), Flags(device.type, export=True)
        settings = Settings(
            *(name, seam, index, _backend(backend, seam), cuda_graphs, flags, compile_flags, require_full),
            backend_is_given=backend is not None,
        )
        engine = kind(settings, placed, precision, max_contexts, memory_limit)
        engine._keep_on_cpu(args, keywords)
        if seam.has_streams:
            # Parameters that were written just before are there for the lane that warms up, and for every later caller.
            with seam.building():
                seam.current_stream(index).synchronize()
        engine._primary = engine._specialization(args, keywords, clock)
    return engine


def _engine_class(runtime: str) -> type[Engine]:
    from anabranch.runtime import _library

    if runtime == "python" or (runtime == "auto" and not _library.is_available()):
        return Engine
    from anabranch.runtime._native import NativeEngine

    return NativeEngine


def _backend(given: str | None, device: Device) -> str:
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


def _inputs(model: Any, inputs: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
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
    register_dataclasses((args, keywords))
    return args, keywords


def _is_input(x: Any) -> bool:
    return isinstance(x, Input)


def _tensors_for(inputs: Any, device: torch.device) -> Any:
    """Tensors in place of each :class:`Input`: zeros, which are valid indices, in case the model has to be tried."""
    return pytree.tree_map(lambda x: x.empty(device).zero_() if _is_input(x) else x, inputs, is_leaf=_is_input)


def given_model(model: Any) -> tuple[str, torch.nn.Module | ExportedProgram]:
    """A model as :func:`compile` takes it: its name, and itself, what it wraps, or what its file holds."""
    model = _unwrapped(model)
    name = type(model).__name__
    if isinstance(model, str | os.PathLike):
        name, model = Path(model).stem, load_exported(Path(model))
    if not isinstance(model, torch.nn.Module | ExportedProgram):
        raise InputError(
            f"model is a {type(model).__name__}; expected an nn.Module, an exported program or the path of a .pt2 file"
        )
    return name, model


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


def _given_devices(inputs: Any) -> set[torch.device]:
    return {
        torch.device(x.device)
        for x in pytree.tree_leaves(inputs, is_leaf=_is_input)
        if isinstance(x, torch.Tensor | Input) and x.device is not None
    }


def _device(model: Any, inputs: Any) -> torch.device:
    """The one device of all inputs, but for some on the CPU; or of the model where there are none."""
    given = _given_devices(inputs)
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


def _on_device(model: Any, device: torch.device) -> torch.nn.Module | ExportedProgram:
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


def _check_modes() -> None:
    """Refuse a call from inside a trace of the caller's, where operators compute no values."""
    for mode in _get_current_dispatch_mode_stack():
        if type(mode).__name__ in _TRACING_MODES:
            raise InputError(
                f"the call is made under a {type(mode).__name__}, where operators compute no values; engines run on"
                " real tensors. Call the engine outside of it, or trace the model itself."
            )


@_sync.atomics("_closed", "_primary")
class Engine:
    """A compiled model. Made by :func:`compile`; immutable to its callers.

    Threads: any number may call it at once. Streams: each call is ordered on the calling thread's current stream of
    the engine's device, looked up at every call, exactly as one built-in PyTorch operator would be; see
    ``docs/contract.md`` for what else a call promises.
    """

    _runtime = Runtime("python", Limits, Counters, PythonCalls)

    def __init__(
        self,
        settings: Settings,
        model: torch.nn.Module | ExportedProgram,
        precision: torch.dtype | None,
        max_contexts: int,
        memory_limit: int | None,
    ) -> None:
        self._settings = settings
        self._device: Device = settings.device
        self._index = settings.index
        self._torch_device = settings.torch_device
        self._in_order = keyword_order_matters(model)
        self._default_device = torch.get_default_device()
        # Once for all signatures: what happens to the model later is nothing to the engine, and the caller of a later
        # signature need not wait until a copy of the weights is written.
        with neutral(settings.device, settings.index):
            self._snapshot: Snapshot | None = Snapshot.of(model)
            self._cast = Cast(self._snapshot, precision) if precision is not None else None
        self._hooks = [f"{name_of(hook)} on {name!r}" for name, hook in hooks_of(self._snapshot.module)]
        if self._hooks:
            warnings.warn(f"{settings.name} is compiled {self._about_hooks()}", stacklevel=3)
        self._limits: Limits = self._runtime.make_limits(max_contexts, memory_limit)
        self._counters: Counters = self._runtime.make_counters()
        #: By signature. Written with the build lock held; read without, which a dict allows.
        self._specializations: dict[Any, Specialization] = _sync.dict_("specializations")
        self._primary: Specialization | None = None
        self._varying = Varying()
        #: Positions among a call's leaves.
        self._on_cpu: frozenset[int] = frozenset()
        #: By structure of a call, what stands for it in keys.
        self._structures: dict[pytree.TreeSpec, object] = _sync.dict_("structures")
        self._closed = False
        self._generation = process.generation
        process.register(self)

    # -- calling ------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on these inputs and return what it returns.

        Output tensors are new, ordinary tensors of the current stream; an output that is an input or a parameter of
        the model is that tensor itself. Inputs may be freed, and the engine dropped, as soon as this returns.

        A signature that was not seen before is compiled first. Raises before any device work is queued:
        :class:`~anabranch.errors.InputError`, :class:`~anabranch.errors.EngineClosed`,
        :class:`~anabranch.errors.FlagsChanged`, :class:`~anabranch.errors.NotCapturable`; and
        :class:`~anabranch.errors.DeviceLost` after a CUDA error that lasts.
        """
        process.enter()
        try:
            if self._closed or self._generation != process.generation or self._device.lost():
                self._check_usable()
            if torch._C._len_torch_dispatch_stack():
                _check_modes()
            leaves, key = self._key(args, kwargs)
            specialization = self._find(key, leaves) or self._specialization(args, kwargs)
            if is_neutral(self._device, self._index):
                with self._device.range(self._settings.name):
                    return specialization.calls(leaves)
            with neutral(self._device, self._index), self._device.range(self._settings.name):
                return specialization.calls(leaves)
        finally:
            process.leave()

    def _keep_on_cpu(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Inputs that are on the CPU now, beside an engine of another device, are to be there in every call."""
        if self._torch_device.type != "cpu":
            leaves, _ = flatten_call(args, kwargs, self._in_order)
            tensors = ((i, x) for i, x in enumerate(leaves) if isinstance(x, torch.Tensor))
            self._on_cpu = frozenset(i for i, x in tensors if x.device.type == "cpu")

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Any], Any]:
        """Leaves of a call, validated, and the key of its specialization."""
        device = self._torch_device
        if not kwargs and all(type(x) is torch.Tensor for x in args):
            return args, tuple([leaf_key(x, i, device, i in self._on_cpu) for i, x in enumerate(args)])
        leaves, structure = flatten_call(args, kwargs, self._in_order)
        # A structure's hash is slow, and a call with numbers is looked up several times.
        token = self._structures.get(structure) or self._structures.setdefault(structure, object())
        return leaves, (token, *[leaf_key(x, i, device, i in self._on_cpu) for i, x in enumerate(leaves)])

    def _find(self, key: Any, leaves: Sequence[Any]) -> Specialization | None:
        """The specialization for a call, if there is one: for its very numbers, or for all."""
        found = self._look_up(key, leaves)
        if has_numbers(key):
            if found is None:
                any_value = self._varying.key_of(key)
                found = self._look_up(any_value, leaves) if any_value is not None else None
                if found is not None and not found.unit.takes(leaves):
                    return None
            if found is not None:
                used(found)
        return found

    def _look_up(self, key: Any, leaves: Sequence[Any]) -> Specialization | None:
        found = self._specializations.get(key)
        if found is not None and not found.program.reads_layout:
            return found
        # The model looks at how its inputs lie in memory, or may: nothing was compiled so far.
        layouts = layouts_of(leaves)
        return found if layouts is None else self._specializations.get((key, layouts))

    def _specialization(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], clock: Clock | None = None
    ) -> Specialization:
        """The specialization for these inputs, compiled if need be. Blocks while another thread builds.

        ``clock``: of the build, if it has begun.
        """
        leaves, key = self._key(args, kwargs)
        device, index = self._device, self._index
        if device.has_streams and device.is_capturing(device.current_stream(index)):
            raise NotCapturable(
                "this call is inside a CUDA graph capture, and its input signature was not compiled before, which"
                f" cannot be done there. Call engine.warm(...) first. Compiled: {self._known()}"
            )
        with process.alone(), _activity.building():
            found = self._find(key, leaves)
            if found is not None:
                return found
            self._check_usable()
            self._check_compile_flags()
            leaves, structure = flatten_call(args, kwargs, self._in_order)
            signature = Signature.of(leaves, structure, self._torch_device)
            clock = clock or Clock()
            made = self._compile_for_all(key, signature, (args, kwargs), leaves, clock)
            made = made or self._compile(key, signature, (args, kwargs), leaves, clock)
            _log.info("%s(%s): %s", self._settings.name, made.signature, _phases.describe(made.seconds))
            return made

    def _compile(
        self, key: Any, signature: Signature, given: Any, leaves: Sequence[Any], clock: Clock
    ) -> Specialization:
        """A specialization for these very numbers. With the build lock held."""
        program = None
        try:
            self._device.reap()
            with self._compiling():
                program = self._export(signature, given, clock)
                made = self._build(program, signature, leaves, clock)
        except InputError as e:
            if program is not None and self._runs_in_eager(given):
                raise BuildError(
                    f"the model runs in eager on these inputs ({signature}), and its graph does not run with"
                    f" backend {self._settings.backend!r}: {e.__cause__ or e}. Try another backend."
                ) from e.__cause__
            if self._specializations:
                raise InputError(f"{e} Compiled so far: {self._known()}") from e.__cause__
            raise
        except AnabranchError:
            raise
        except Exception as e:
            self._device.check_error(e)
            raise
        self._keep(key, signature, made)
        for old in self._varying.add(key, made):
            self._give_up(old)
        return made

    def _compile_for_all(
        self, key: Any, signature: Signature, given: Any, leaves: Sequence[Any], clock: Clock
    ) -> Specialization | None:
        """A specialization for all values of the numbers that have varied; None where there is, or can be, none.

        Whatever goes wrong, the numbers' values become a part of the signature. With the build lock held.
        """
        while positions := self._varying.to_carry(key):
            any_value = self._varying.key_of(key)
            if self._look_up(any_value, leaves) is not None:
                return None  # it is not right for this value
            try:
                self._device.reap()
                with self._compiling():
                    program = self._export(signature, given, clock, positions)
                    reference = self._reference(key, signature, given, clock)
                    if not same_computation(program, reference[0], reference[1]):
                        raise NotCarried(
                            dict.fromkeys(positions, "the model computes otherwise where it cannot know the value")
                        )
                    self._choose_numbers(program)
                    numbers = program.numbers
                    assert numbers is not None
                    if numbers.values(leaves) is None:
                        return None
                    tensors = [x.spec for x in numbers.inputs if x.dtype is not None]
                    of_all = signature.with_numbers(numbers.positions, tensors)
                    made = self._build(program, of_all, leaves, clock)
            except NotCarried as e:
                known = {p: why for p, why in e.reasons.items() if p in positions}
                self._varying.pin(key, known or dict.fromkeys(positions, str(e)))
            except (FlagsChanged, DeviceLost, EngineClosed):
                raise
            except Exception as e:
                self._device.check_error(e)
                why = (str(e).splitlines() or [""])[0]
                self._varying.pin(key, dict.fromkeys(positions, f"{type(e).__name__}: {why}"))
            else:
                self._keep(any_value, of_all, made)
                for old in self._varying.add(any_value, made):
                    self._give_up(old)
                return made
        return None

    def _choose_numbers(self, program: Program) -> None:
        """Whether a program takes its numbers as tensors or as they are."""
        assert program.numbers is not None
        device, backend = self._device, self._settings.backend
        at = None
        if not program.numbers.inputs:
            why = ""
        elif backend == "eager" and not device.has_streams:
            why = "nothing is captured or compiled, and so the bits are eager's"
        elif program.data_dependent:
            why = "the model depends on data"
        else:
            why, at = tensorize(program, self._torch_device, exact=backend == "eager")
        if not why:
            return
        if self._settings.require_full and backend != "eager":
            raise NotCarried(dict.fromkeys(program.numbers.positions, f"require_full=True was given, and {why}"))
        program.numbers = replace(program.numbers, as_numbers=why)
        if at is not None:
            program.uncaptured = (*program.uncaptured, Uncaptured("number", str(at.target), source_of(at)))
        if device.has_streams or backend != "eager":
            program.direct_only = program.direct_only or f"a number of the call is no tensor: {why}"

    def _reference(self, key: Any, signature: Signature, given: Any, clock: Clock) -> tuple[Program, Sequence[Any]]:
        """A program that has the numbers of a call written into it, and the call's leaves."""
        for made in self._varying.values_of(key):
            if made.signature.given == signature.given:
                return made.program, made.signature.values
        return self._export(signature, given, clock), signature.values

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        with (
            process.compiling(),
            _disable_current_modes(),
            neutral(self._device, self._index),
            self._device.building(),
            self._on_default_device(),
        ):
            yield

    def _export(self, signature: Signature, given: Any, clock: Clock, numbers: frozenset[int] = frozenset()) -> Program:
        # Not on the caller's own tensors: one that is passed twice, or two that share memory, would be taken for one
        # input by this call and by all later ones.
        args, kwargs = pytree.tree_unflatten(signature.examples(self._torch_device), signature.structure)
        assert self._snapshot is not None  # it is usable, and this thread has the lock
        with clock.phase("export"):
            program = export_program(self._snapshot, args, kwargs, self._cast, given, self._aside, numbers)
        self._check_compile_flags()  # another thread may have set one meanwhile
        return program

    def _build(self, program: Program, signature: Signature, leaves: Sequence[Any], clock: Clock) -> Specialization:
        given = () if self._device.has_streams else [x for x in leaves if isinstance(x, torch.Tensor)]
        make_calls = self._runtime.make_calls
        return Specialization(
            self._settings, program, signature, self._limits, self._counters, make_calls, given, clock
        )

    def _keep(self, key: Any, signature: Signature, made: Specialization) -> None:
        if made.program.reads_layout and signature.layouts is not None:
            key = (key, signature.layouts)
        self._add(key, made)

    def _give_up(self, made: Specialization) -> None:
        """Calls under way keep it alive. With the build lock held."""
        if made is self._primary:
            return  # what the engine shows of itself
        for key in [k for k, other in self._specializations.items() if other is made]:
            self._specializations.pop(key)
        if made.loads_code:
            del made
            self._device.free_code()

    def _aside(self, call: Callable[[], Any], lasting: bool = False) -> None:
        """Make a call on a stream of our own: the caller's may be held up. The host blocks until it is done.

        ``lasting``: tensors that it makes are kept.
        """
        device = self._device
        if not device.has_streams:
            call()
            return
        scratch = device.scratch(self._index)
        try:
            # First of all: a product would make them in other memory, which not only this lane allocates from.
            scratch.lane.load_workspaces()
            with device.on_stream(scratch.stream) if lasting else scratch.using():
                call()
        finally:
            scratch.stream.synchronize()
            device.release_scratch(scratch)

    def _runs_in_eager(self, given: Any) -> bool:
        assert self._snapshot is not None
        module = (self._cast.snapshot if self._cast is not None else self._snapshot).fresh().module
        with neutral(self._device, self._index):
            return run_in_eager(module, *given) is None

    def _check_compile_flags(self) -> None:
        flags = self._settings.compile_flags
        if not flags.unchanged():
            raise FlagsChanged(
                f"flags changed since compile: {flags.changes()}; a new input signature cannot be compiled under the"
                " engine's flags. Set them back first."
            )

    def _on_default_device(self) -> AbstractContextManager[Any]:
        """This thread's default device as it was at compile in the thread that compiled."""
        same = torch.get_default_device() == self._default_device
        return nullcontext() if same else self._default_device

    def _add(self, key: Any, made: Specialization) -> None:
        """A specialization is ready for calls. With the build lock held."""
        self._specializations[key] = made

    def _known(self) -> str:
        return "; ".join(str(s.signature) for s in list(self._specializations.values())) or "nothing"

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineClosed(f"{self!r} was closed; compile a new one")
        if self._generation != process.generation:
            raise EngineClosed(
                f"{self!r} belongs to the parent of this forked process, whose device memory this process cannot use."
                " Compile in the child, or start children with multiprocessing's 'spawn'."
            )
        lost = self._device.lost()
        if lost:
            raise DeviceLost(f"the device was lost earlier in this process: {lost}. Start a new process.")

    def after_fork(self) -> None:
        if self._device.survives_fork:
            self._generation = process.generation

    def _first(self) -> Specialization:
        """The specialization that the engine was compiled for."""
        primary = self._primary
        if primary is None:  # closed, perhaps by another thread at this moment
            raise EngineClosed(f"{self!r} was closed; compile a new one")
        return primary

    # -- building ahead, giving back ----------------------------------------------------------------------------

    def warm(
        self,
        inputs: Sequence[Any] | None = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
        contexts: int = 1,
        captures: int = 1,
    ) -> int:
        """Compile a signature ahead (default: the one that the engine was compiled for) and build its contexts.

        :param contexts: how many execution contexts there shall be; the engine's limits hold.
        :param captures: of TensorRT, in how many CUDA graphs of your own you are going to capture calls: each keeps
            an execution context (of each stream that calls come from in it), which cannot be made inside a capture.
            One is there to begin with. They come on top of ``max_contexts``, and direct calls do not use them.
        :returns: how many contexts there are; 0 where calls run direct and need none.
        """
        self._check_usable()
        if inputs is None and kwargs is None:
            return self._first().warm(contexts, captures)
        args, keywords = _inputs(None, inputs, kwargs)
        args, keywords = _tensors_for((args, keywords), self._torch_device)
        leaves, key = self._key(args, keywords)
        specialization = self._find(key, leaves) or self._specialization(args, keywords)
        return specialization.warm(contexts, captures)

    def trim(self) -> None:
        """Give the memory of idle contexts back to the driver. Later calls build contexts anew.

        The host may wait for the device, because freeing memory does, and for a build under way. PyTorch's allocator
        does not allow it while other code in the process captures a CUDA graph or allocates from a pool of its own.
        """
        self._check_usable()
        with process.build_lock, self._device.building(), _activity.building():
            for specialization in list(self._specializations.values()):
                specialization.trim()
            try:
                self._device.trim()
            except Exception as e:
                self._device.check_error(e)
                raise

    def close(self) -> None:
        """Free everything; calls that are in flight finish, later ones raise ``EngineClosed``. May be repeated.

        With the backend ``tensorrt`` the host waits for the device, because freeing TensorRT's code does.
        """
        self._closed = True
        with process.build_lock, _activity.building():
            loads_code = any(s.loads_code for s in self._specializations.values())
            self._specializations.clear()
            self._varying.clear()
            self._primary = None
            self._snapshot = self._cast = None
            if loads_code:
                self._device.free_code()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- looking ------------------------------------------------------------------------------------------------

    @property
    def runtime(self) -> str:
        """Which runtime its calls run on: ``"native"`` or ``"python"``."""
        return self._runtime.name

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self._torch_device

    @property
    def seam(self) -> Device:
        """The device's implementation, for tools."""
        return self._device

    @property
    def plan(self) -> Plan:
        """The plan for the signature that the engine was compiled for."""
        return self._first().plan()

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of each signature compiled so far."""
        return tuple(s.plan() for s in list(self._specializations.values()))

    def explain(self) -> str:
        """What runs captured, what direct, and why; one paragraph a signature."""
        cast = self._cast
        lines = [f"{self!r}", *(cast.explain() if cast is not None else ())]
        if self._hooks:
            lines.append(self._about_hooks())
        for specialization in list(self._specializations.values()):
            lines += specialization.explain()
        lines += self._varying.explain()
        limit = self._limits.memory_limit
        memory = "no limit on memory" if limit is None else f"{limit} bytes"
        lines.append(
            f"limits: {self._limits.max_contexts} contexts, {memory}; beyond them a call waits on the device for the"
            " least recently used context"
        )
        return "\n".join(lines)

    def _about_hooks(self) -> str:
        return (
            f"with hooks of yours ({', '.join(self._hooks)}): they run while compiling, on copies of what they refer"
            " to. The values that they change are changed in calls too; nothing else of them happens in a call"
        )

    def summary(self) -> dict[str, Any]:
        """What the engine consists of, for tools: dicts, lists, strings, numbers and None; ``json.dumps`` takes it.

        ``signatures`` has an entry for each signature compiled so far: its ``backend``; whether it is ``captured``, and
        the ``reason``; ``reasons``, the operators that forbid it, each with ``why``, ``operator`` and ``source`` (the
        model's line); how many ``operators`` and ``flops`` (floating-point operations a call) run ``captured`` and
        ``direct``, with ``share_captured`` from 0 to 1 (None where there are none); ``seconds`` of the build by phase
        and in ``total``; how many ``contexts`` there are, ``bytes_per_context``, and ``bytes``, all that they hold now.
        ``measured_us`` has the microseconds of a call as a ``graph`` and ``direct`` where both were measured, and of a
        direct one by ``compiled`` kernels and by PyTorch's ``operators``.

        Any thread. Nothing is queued on a device. Floating-point operations are counted, from shapes, the first time.
        """
        stats = self.stats()
        return {
            "model": self._settings.name,
            "device": str(self._torch_device),
            "backend": self._settings.backend,
            "runtime": self.runtime,
            "contexts": stats.contexts,
            "bytes": stats.bytes,
            "max_contexts": self._limits.max_contexts,
            "memory_limit": self._limits.memory_limit,
            "signatures": [s.summary().data() for s in list(self._specializations.values())],
        }

    def stats(self) -> Stats:
        """Counters since compile."""
        stats = self._counters.snapshot()
        stats.contexts, stats.bytes = self._limits.held()
        return stats

    def __repr__(self) -> str:
        how = f"{self._settings.backend}, {self.runtime}"
        return f"<anabranch engine {self._settings.name} on {self._torch_device}, {how}>"
