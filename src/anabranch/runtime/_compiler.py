"""Makes the specializations of one engine: exports the model for a signature, and has it built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from anabranch import _sync
from anabranch.devices import Device
from anabranch.errors import (
    AnabranchError,
    BuildError,
    DeviceLost,
    EngineClosed,
    FlagsChanged,
    InputError,
    UnsupportedModel,
)
from anabranch.export import (
    Mixed,
    Mixing,
    NotCarried,
    NotExported,
    Program,
    Signature,
    Snapshot,
    TensorSpec,
    Uncaptured,
    alias,
    cast_of,
    export_program,
    first_line,
    generators_kept,
    is_integer,
    run_in_eager,
    same_computation,
    source_of,
    tensorize,
    told_as_in_eager,
    unflatten,
)
from anabranch.runtime._calls import Runtime
from anabranch.runtime._comparison import near, redrawn
from anabranch.runtime._fidelity import ASKS, COMPUTE_THE_SAME, why_unlike
from anabranch.runtime._phases import Clock
from anabranch.runtime._process import neutral, process
from anabranch.runtime._ranges import NotInRange, Place
from anabranch.runtime._settings import Settings
from anabranch.runtime._specialization import Specialization
from anabranch.runtime._table import Table
from anabranch.runtime._unit import Unit

_log = logging.getLogger("anabranch")


class Compiler:
    """The model as it was at compile, and what makes engines of it. Its methods are called with the build lock held."""

    def __init__(
        self,
        settings: Settings,
        model: torch.nn.Module | ExportedProgram,
        precision: torch.dtype | Mixed | None,
        runtime: Runtime,
        limits: Any,
        counters: Any,
        table: Table,
    ) -> None:
        """``table``: where what is made goes; ``limits``, ``counters``: of ``runtime``."""
        self._settings, self._runtime, self._limits, self._counters = settings, runtime, limits, counters
        self._device: Device = settings.device
        self._index, self._torch_device = settings.index, settings.torch_device
        self._table, self._varying = table, table.varying
        self._default_device = torch.get_default_device()
        #: Copies of buffers that the model writes, by name, as they were when that was first known.
        self.initial: dict[str, torch.Tensor] = _sync.dict_("initial state")
        #: Those of them that are single integers.
        self.counts: dict[str, int] = _sync.dict_("initial counts")
        # Once for all signatures: what happens to the model later is nothing to the engine, and the caller of a later
        # signature need not wait until a copy of the weights is written.
        with neutral(settings.device, settings.index):
            self.snapshot = Snapshot.of(model)
            self.cast = cast_of(self.snapshot, precision)

    def measure_on(self, args: Any, kwargs: Any) -> None:
        """In mixed precision, see on these inputs of the first call how large the values in the model are. They are
        there: nothing that writes them is in flight any more."""
        if isinstance(self.cast, Mixing):
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.cast.measure_on([TensorSpec.of(x).in_memory(x) for x in tensors])

    def make(
        self, key: Any, signature: Signature, given: Any, leaves: Sequence[Any], clock: Clock
    ) -> tuple[Any, Specialization]:
        """A specialization for a call, in the table, and its key there. Blocks until it is built."""
        self._check_flags()
        for_all = self._compile_for_all(key, signature, given, leaves, clock)
        if for_all is not None:
            return for_all
        free = self._table.ranges.to_free(key)
        made: Any = self._compile_range(key, signature, given, leaves, free, clock) if free else ""
        if isinstance(made, str):
            if made and not len(self._table) and self._table.ranges.is_declared(key):
                with self._compiling():
                    self._export(signature, given, clock)  # raises where the model is refused whatever its sizes
                self._table.ranges.check_declared(key, made)
            if self._table.ranges.is_strict:
                self._table.ranges.add(key, None, made)
                raise NotInRange(made or "a size means more than a number, or inputs are not dense")
            alone = self._compile(key, signature, given, leaves, clock)
            self._table.ranges.add(key, None, made)
            return alone
        self._table.ranges.add(key, made)
        return key, made

    def _add(self, key: Any, signature: Signature, made: Specialization) -> tuple[Any, Specialization]:
        place = self._table.add(key, signature, made)
        for old in self._varying.add(key, made):
            if self._table.give_up(old) and old.loads_code:
                del old
                self._device.free_code()
        return place, made

    def _compile(
        self, key: Any, signature: Signature, given: Any, leaves: Sequence[Any], clock: Clock
    ) -> tuple[Any, Specialization]:
        """A specialization for these very numbers."""
        program = None
        try:
            self._device.collect()
            with self._compiling():
                program = self._export(signature, given, clock)
                unit = self._unit(program, signature)
                if self._why_unlike(unit, leaves, clock):
                    with told_as_in_eager():
                        program = self._export(signature, given, clock)
                    unit = self._unit(program, signature)
                    if why := self._why_unlike(unit, leaves, clock):
                        raise NotExported(f"{why}. {COMPUTE_THE_SAME}")
                    program.notes = (*program.notes, ASKS)
                made = self._build(unit, leaves, clock)
        except InputError as e:
            if program is not None and self._runs_in_eager(given):
                raise BuildError(
                    f"the model runs in eager on these inputs ({signature}), and its graph does not run with"
                    f" backend {self._settings.backend!r}: {e.__cause__ or e}. Try another backend."
                ) from e.__cause__
            if len(self._table):
                raise InputError(f"{e} Compiled so far: {self._table}") from e.__cause__
            raise
        except AnabranchError:
            raise
        except Exception as e:
            self._device.check_error(e)
            raise
        return self._add(key, signature, made)

    def _compile_range(
        self, key: Any, signature: Signature, given: Any, leaves: Sequence[Any], free: frozenset[Place], clock: Clock
    ) -> Specialization | str:
        """A specialization for many values of these sizes; or why there can be none."""
        if signature.layouts is not None:
            return ""  # this call's alone
        places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        tensors = frozenset((places.index(i), d) for i, d in free)
        try:
            self._device.collect()
            with self._compiling():
                program = self._export(signature, given, clock, free=tensors)
                sizes = program.sizes
                assert sizes is not None
                declared = self._table.ranges.declared(key)
                sizes.declared = {(places.index(i), d): dim for (i, d), dim in declared.items()}
                if not sizes.free or (sizes.free != tensors and self._table.ranges.is_declared(key)):
                    return sizes.why_fixed(tensors)
                why = program.why_not_by_shape
                if self._settings.cuda_graphs and self._device.has_streams and why:
                    return f"cuda_graphs=True was given, and no shape of a range can be captured: {why}"
                unit = self._unit(program, signature.with_free(sizes.free))
                if why := self._why_unlike(unit, leaves, clock):
                    return why
                made = self._build(unit, leaves, clock)
        except (FlagsChanged, DeviceLost, EngineClosed, torch.OutOfMemoryError):
            raise
        except Exception as e:
            self._device.check_error(e)
            why = f"{type(e).__name__}: {first_line(e)}"
            _log.info("%s: not for many sizes: %s", self._settings.name, why)
            return why
        return sizes.refuses([tuple(leaves[i].shape) for i in places]) or made

    def make_at(self, signature: Signature, of_range: Specialization) -> Specialization:
        """A specialization for one shape of a range, by its kernels, which are captured if that is faster. Not in the
        table. Blocks until it is built; nothing is compiled."""
        self._check_flags()
        self._device.collect()
        with _disable_current_modes(), neutral(self._device, self._index), self._device.relaxed():
            program = of_range.program.at([spec.shape for spec in signature.given])
            return Specialization(self._unit(program, signature), self._runtime.make_calls, (), Clock(), of_range)

    def _compile_for_all(
        self, key: Any, signature: Signature, given: Any, leaves: Sequence[Any], clock: Clock
    ) -> tuple[Any, Specialization] | None:
        """A specialization for all values of the numbers that have varied; None where there is, or can be, none.

        Whatever goes wrong, the numbers' values become a part of the signature.
        """
        while positions := self._varying.to_carry(key):
            any_value = self._varying.key_of(key)
            if self._table.look_up(any_value, leaves) is not None:
                return None  # it is not right for this value
            try:
                self._device.collect()
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
                    made = self._build(self._unit(program, of_all), leaves, clock)
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
                return self._add(any_value, of_all, made)
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
            if self._torch_device.type != "cpu":
                program.find_work_on_cpu()
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
            self._device.relaxed(),
            self._on_default_device(),
        ):
            yield

    def _export(
        self,
        signature: Signature,
        given: Any,
        clock: Clock,
        numbers: frozenset[int] = frozenset(),
        free: frozenset[tuple[int, int]] = frozenset(),
    ) -> Program:
        # Not on the caller's own tensors: one that is passed twice, or two that share memory, would be taken for one
        # input by this call and by all later ones.
        args, kwargs = unflatten(signature.examples(self._torch_device), signature.structure)
        with clock.phase("export"):
            state = frozenset(self.initial)
            program = export_program(self.snapshot, args, kwargs, self.cast, given, self.aside, numbers, free, state)
        self._check_flags()  # another thread may have set one meanwhile
        return self._with_initial(program)

    def _with_initial(self, program: Program) -> Program:
        """``program``, whose state begins as the model's buffers were when they were first known to be written."""
        new = {s.name: s.initial for s in program.state if s.name not in self.initial}
        for made in self._table:
            taken = new.keys() & set(made.program.weight_names)
            if taken:
                raise UnsupportedModel(
                    f"with these inputs the model writes {min(taken)!r}, and calls of other inputs ({made.signature})"
                    " were compiled for what it held at first. Compile for inputs first with which the model writes it."
                )
        kept: dict[str, torch.Tensor] = {}
        if new:
            self.aside(lambda: kept.update((name, alias(x).clone()) for name, x in new.items()), lasting=True)
        self.initial.update(kept)
        counters = {name: x for name, x in kept.items() if x.numel() == 1 and _counts(x.dtype)}
        self.counts.update((name, int(x)) for name, x in counters.items())
        begin = [replace(s, initial=self.initial[s.name], count=self.counts.get(s.name)) for s in program.state]
        return replace(program, state=tuple(begin))

    def _unit(self, program: Program, signature: Signature) -> Unit:
        return Unit(self._settings, program, signature, self._limits, self._counters)

    def _build(self, unit: Unit, leaves: Sequence[Any], clock: Clock) -> Specialization:
        given = () if self._device.has_streams else [x for x in leaves if isinstance(x, torch.Tensor)]
        return Specialization(unit, self._runtime.make_calls, given, clock)

    def _why_unlike(self, unit: Unit, leaves: Sequence[Any], clock: Clock) -> str:
        """Why a program is of another computation than the model, or nothing; nothing where that cannot be seen."""
        # In a forked child operators may wait for ever for OpenMP's threads, which are its parent's.
        if process.generation:
            return ""
        found: list[str] = []
        has_streams, depends = self._device.has_streams, unit.program.data_dependent
        if has_streams and depends:
            return ""  # made-up values may be none that go together, and of those given nobody knows either
        # Else nobody knows when they will be written, and a call's stream may be held up.
        are_there = not has_streams or self._device.current_stream(self._index).query()

        def compare() -> None:
            tensors = [x for x in leaves if isinstance(x, torch.Tensor)] if are_there else []
            given = [spec.in_memory(x) for spec, x in zip(unit.signature.given, tensors, strict=are_there)]
            if not has_streams and (depends or any(bool(x.any()) for x in given)):
                found.append(why_unlike(unit.program, given, lambda seed: None if depends else near(given, seed)))
                return
            # Made-up ones, where those given tell of shapes only. And on a GPU, where a wrong index is the end of the
            # process: whoever compiles need not give values from which right ones are computed. Masks are none.
            made = unit.examples()
            made[: len(given)] = [x if x.dtype is torch.bool else y for x, y in zip(given, made, strict=False)]
            found.append(why_unlike(unit.program, made, partial(redrawn, made)))

        try:
            with clock.phase("warm-up"):
                self.aside(compare)
        except Exception as e:  # made-up values may be at fault, or memory is short
            self._device.check_error(e)
            _log.info("%s: not compared with the model: %s: %s", self._settings.name, type(e).__name__, str(e))
        return "".join(found)

    def aside(self, call: Callable[[], Any], lasting: bool = False) -> None:
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
        snapshot = self.cast.snapshot if self.cast is not None else self.snapshot
        with neutral(self._device, self._index), generators_kept(snapshot.module, given):
            return run_in_eager(snapshot, *given) is None

    def _check_flags(self) -> None:
        """Raises :class:`~anabranch.errors.FlagsChanged` where what is compiled now would not be as what is there."""
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


def _counts(dtype: torch.dtype) -> bool:
    """Whether numbers of this type count something."""
    return is_integer(dtype) and dtype is not torch.bool
