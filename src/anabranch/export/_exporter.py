"""The exporter: traces copies of a model with ``torch.export``, after a trial where a trace alone would not do."""

from __future__ import annotations

import functools
import importlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from anabranch.errors import UnsupportedModel
from anabranch.export import _functional, _packed
from anabranch.export._assignments import storage
from anabranch.export._bystanders import undisturbed
from anabranch.export._diagnosis import NotExported, copy_of, diagnose, first_line
from anabranch.export._fast_paths import as_on_fast_paths
from anabranch.export._forward import TENSOR, Forward, Seen
from anabranch.export._generators import generators_kept
from anabranch.export._isolation import run_in_eager
from anabranch.export._leaks import Watch
from anabranch.export._masks import masks_as_in_eager
from anabranch.export._modes import inline_modes
from anabranch.export._numbers import NotCarried
from anabranch.export._recurrent import weights_apart
from anabranch.export._signature import CONSTANTS, TensorSpec
from anabranch.export._sizes import noting_lines
from anabranch.export._snapshot import Fresh, Snapshot
from anabranch.export._tree import has_sizes, map_tensors
from anabranch.export._trial import Trial, needs_trial, try_out
from anabranch.export._uncaptured import source_of
from anabranch.export._writes import Recorded

# torch.export copies tree specs of its own in a way that PyTorch deprecates; whoever sees it can do nothing about it.
warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning, module="copyreg")
# Of recurrent layers: it replaces their list of weights while it traces, and takes that for a change by the model.
warnings.filterwarnings("ignore", message=".*_flat_weights.* assigned during export", category=UserWarning)

#: Inputs that ``torch.export`` does not take; each value is a part of the signature.
_UNSEEN = (*CONSTANTS, complex)
#: So many more traces tell whether a draw matters. Of one between two equally likely ways 1 in 256 is missed.
_TRACES = 8


class Exporter:
    """Exports copies of a model for one signature."""

    def __init__(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        given: Any,
        aside: Callable[..., Any],
        numbers: frozenset[int],
        free: frozenset[tuple[int, int]],
    ) -> None:
        self._numbers, self._free = numbers, free
        self._args = tuple(args)
        self._kwargs = dict(kwargs)
        self._given = given[0], {name: given[1][name] for name in kwargs}
        self._aside = aside
        self.specs = [TensorSpec.of(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        #: Of sizes that were to vary, at which of the model's lines they became numbers.
        self.lines: dict[Any, str] = {}
        self._state: dict[str, None] = {}
        self._watches: list[Watch | None] = []

    def export(self, snapshot: Snapshot, *options: Any, decompose: bool = True) -> tuple[ExportedProgram, Fresh, Seen]:
        """And the copy that was traced, with what was seen. ``options``: of :class:`Forward`."""
        traced = snapshot.fresh()
        if not needs_trial(traced.module):
            exported, seen = self._trace(traced, options, decompose)
            return exported, traced, seen
        first = self._try(traced, options)
        if first.seeds:
            raise NotExported(
                f"the model sets the state of a random generator ({first.seeds}), which is no part of a graph. Seed"
                " before the call instead."
            )
        if not first.finished:
            traced = snapshot.fresh()  # the call may have left it in any state
        # What the first call changes may be a cache that it fills.
        later = self._try(traced, options) if first.changes else first
        try:
            exported, seen = self._trace(traced, options, decompose)
        except NotExported as e:
            _advise(e, traced, first.written)
            raise
        if first.finished and first.changes and first.written:
            # The first call did not write what it said by its changes to have written.
            begun = self._trace_begun(snapshot, options, decompose)
            if begun is not None and not _alike(begun, exported):
                _refuse_state(first.changes)
        state = [*first.draws, *later.changes]
        if state:
            # Does it matter? What was drawn is drawn anew by another copy; what is counted goes on.
            other = snapshot.fresh() if first.draws else traced
            draws = any(not what.startswith("reads the clock") for what in first.draws)
            for _ in range(_TRACES if draws else 1):
                for _ in range(3 if other is not traced else 1):
                    self._try(other, options)
                again, _ = self._trace(other, options, decompose)
                if not _alike(exported, again):
                    _refuse_state(state)
            self._state.update(dict.fromkeys(state))
        return exported, traced, seen

    def _trace(self, traced: Fresh, options: Any, decompose: bool) -> tuple[ExportedProgram, Seen]:
        rest, tensors = None, list[torch.Tensor]()
        leaves, structure = pytree.tree_flatten((self._args, self._kwargs))
        if self._free or has_sizes(structure) or any(isinstance(x, _UNSEEN) for x in leaves):
            tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
            rest = [TENSOR if isinstance(x, torch.Tensor) else x for x in leaves], structure
        forward = Forward(traced.module, self.specs, *options, numbers=self._numbers, rest=rest)
        known = self.specs, traced
        try:
            if rest is None:
                exported = _export(forward, self._args, self._kwargs, self._given, *known, decompose)
            else:
                with noting_lines(self.lines):
                    given = None if self._free else self._given
                    exported = _export(forward, tensors, {}, given, *known, decompose, self._free)
        finally:
            if forward.seen.recorder is not None:
                forward.seen.recorder.is_over = True
        self._watches.append(forward.seen.watch)
        return exported, forward.seen

    def _trace_begun(self, snapshot: Snapshot, options: Any, decompose: bool) -> ExportedProgram | None:
        """As the model's very first call is; None where that cannot be traced."""
        try:
            return self._trace(snapshot.fresh(), options, decompose)[0]
        except NotExported:
            return None

    def _try(self, traced: Fresh, options: Any) -> Trial:
        """One real call on inputs like these, with made-up values; on the CPU with the values that were given."""
        forward = Forward(traced.module, self.specs, *options)

        def made(x: torch.Tensor) -> torch.Tensor:
            spec = TensorSpec.of(x)
            return copy_of(spec.in_memory(x)) if x.device.type == "cpu" else spec.synthesize(x.device)

        def attempt() -> Trial:
            args, kwargs = map_tensors(made, self._given)
            return try_out(functools.partial(forward, *args, **kwargs), traced)

        result = [Trial(False)]
        try:
            self._aside(lambda: result.append(attempt()))
        except Exception:
            return Trial(False)  # what the device found wrong later, with values that were made up
        return result[-1]

    def notes(self) -> tuple[str, ...]:
        """What a user should know. With everything dropped that was traced."""
        notes = []
        if self._state:
            notes.append(f"the model {', '.join(self._state)}; calls do not, and its results did not depend on it")
        cleared = dict.fromkeys(where for w in self._watches if w is not None for where in w.clear())
        if cleared:
            notes.append(f"the model puts tensors into {', '.join(cleared)}; calls do not")
        return tuple(notes)


def _advise(error: NotExported, traced: Fresh, written: Sequence[torch.Tensor]) -> None:
    """Raise ``error`` with what to do, where the model writes tensors that are no state: PyTorch's words vary."""
    known = {storage(x) for x in (*traced.module.parameters(), *traced.module.buffers())}
    if any(storage(x) not in known for x in written):
        raise NotExported(
            "the model changes a tensor in place that it holds and that is no buffer of its modules; expected state in"
            f" buffers. Register it with register_buffer(), and it is state ({error})."
        ) from error


def _refuse_state(state: Sequence[str]) -> NoReturn:
    raise UnsupportedModel(
        f"the model's results depend on state of Python's: a call {', '.join(state)}. An engine would repeat what it"
        " was at compile. Make it an input, or draw with torch.rand and the like; or call the model once before"
        " compile, if only the first call is another."
    )


def _alike(a: ExportedProgram, b: ExportedProgram) -> bool:
    """Whether two traces of a model are the same computation."""

    def codes(exported: ExportedProgram) -> list[str]:
        return [m.code for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]

    def same(x: Any, y: Any) -> bool:
        if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
            return type(x) is type(y)
        return x.shape == y.shape and x.dtype is y.dtype and torch.equal(x, y)

    return (
        codes(a) == codes(b)
        and a.constants.keys() == b.constants.keys()
        and all(same(x, b.constants[name]) for name, x in a.constants.items())
    )


def _export(
    module: Forward,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    given: Any,
    specs: Sequence[TensorSpec],
    traced: Fresh,
    decompose: bool = True,
    free: frozenset[tuple[int, int]] = frozenset(),
) -> ExportedProgram:
    """``given``: positional and keyword inputs with values, to find out by whose fault it fails; None: nobody asks.
    ``specs``: of the inputs; ``traced``: the model's copy. ``free``: of ``args``, input and dimension of each
    size that becomes a symbol, if it can be one."""
    exported: ExportedProgram | None = None
    try:
        with torch.no_grad():
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: TensorSpec.of(x).in_memory(x), (args, kwargs))
            # The graph's inputs follow the order of keywords given here.
            with (
                undisturbed(),
                _refusals_unsaid(),
                weights_apart(module.model),
                _packed.traced(module.model),
                as_on_fast_paths(module.model),
                nullcontext() if free else masks_as_in_eager(),
            ):
                sizes = ([{d: torch.export.Dim.AUTO for j, d in free if j == i} for i in range(len(args))],)
                dynamic = tuple(map(tuple, sizes)) if free else None
                exported = torch.export.export(module, tuple(args), dict(kwargs), dynamic_shapes=dynamic, strict=False)
                if module.seen.returned.refusal:
                    raise UnsupportedModel(module.seen.returned.refusal)
                if module.seen.changes_containers:
                    raise NotExported(
                        "the model changes a list or a dict that it is given, which no graph does. Have it return the"
                        " new items instead."
                    )
                inline_modes(exported)
                recorded = Recorded(exported, module, module.seen.assignments)
                module.seen.writes = recorded.writes(specs, traced)
                if decompose:
                    _functional.prepare(exported, source_of)
                    recorded.note_views(module.seen.writes, module.seen.recorder, source_of)
                    if not _functional.is_functional(exported):
                        with _functional.kept_whole():
                            exported = exported.run_decompositions({})
    except Exception as e:
        if module.seen.recorder is not None:
            module.seen.recorder.check(e)
        if isinstance(e, UnsupportedModel | NotCarried) and exported is not None:
            raise
        refusal = getattr(module.seen, "returned", None) and module.seen.returned.refusal
        if refusal or given is None:
            raise UnsupportedModel(refusal or first_line(e)) from e
        with generators_kept(module.model, given):  # it may be run, to find out
            run = functools.partial(run_in_eager, traced.snapshot, given[0], given[1], module.around)
            diagnose(e, run, given[0], given[1], _transform(exported))
    if module.seen.returned.refusal:
        raise UnsupportedModel(module.seen.returned.refusal)
    return exported


@contextmanager
def _refusals_unsaid() -> Iterator[None]:
    """Keep PyTorch from logging, with a traceback, an operator's refusal of its inputs that we raise by name anyway.
    And from printing the graph so far where it cannot go on: other ways may be left.

    It is not for the eye only: whatever keeps log records would keep the traceback's frames, and with them the memory
    of the tensors that were exported on. Other threads' records and prints pass.
    """
    here = threading.get_ident()
    names = "_subclasses.fake_tensor", "fx.experimental.symbolic_shapes"
    loggers = [logging.getLogger(f"torch.{name}") for name in names]
    trace: Any = importlib.import_module("torch.export._trace")

    def by_others(record: logging.LogRecord) -> bool:
        return threading.get_ident() != here or record.levelno < logging.WARNING

    def print_of_others(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != here:
            print(*args, **kwargs)

    before = trace.__dict__.get("print", print)
    for logger in loggers:
        logger.addFilter(by_others)
    trace.print = print_of_others
    try:
        yield
    finally:
        trace.print = before
        for logger in loggers:
            logger.removeFilter(by_others)


def _transform(exported: ExportedProgram | None) -> str:
    """The model's line with the first transform of torch.func in a program that could not be decomposed."""
    nodes = exported.graph_module.graph.nodes if exported is not None else ()
    return next((source_of(n) for n in nodes if "functorch" in str(n.target)), "")
