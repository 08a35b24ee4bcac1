"""A model that ``torch.export`` refuses, in fragments: Dynamo's graphs as engines, with the model's Python between."""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import fx
from torch.utils import _pytree as pytree

from anabranch import _sync
from anabranch.errors import AnabranchError, InputError, NotCapturable, UnsupportedModel
from anabranch.export import (
    Copies,
    Fresh,
    NotExported,
    Snapshot,
    changed_between,
    copy_of,
    describe,
    first_line,
    generators_kept,
    held_beside,
    map_tensors,
    rehearse,
    state_of,
    storage,
)
from anabranch.runtime._comparison import moved
from anabranch.runtime._cost import measure
from anabranch.runtime._dynamo_settings import dynamo_settings
from anabranch.runtime._fidelity import COMPUTE_THE_SAME, COMPUTES_ELSE, results_unlike
from anabranch.runtime._fragment import Fragment, NotAccepted, trying
from anabranch.runtime._meter import Meter, Timed
from anabranch.runtime._own_code import OwnCode
from anabranch.runtime._ranges import Place, Ranges
from anabranch.runtime._recompiles import keep_entries_in_place, past_limit, watch_limits
from anabranch.runtime._repeats import Inputs, Repeats, kinds_of
from anabranch.runtime._settings import Settings

_log = logging.getLogger("anabranch")

#: At which call a fragment gets an engine. Sizes that depend on data are not the same three times, and by then Dynamo
#: has made symbols of them.
FIRST = 3
#: So many graphs a model may have where each is for single integers.
MOST_FIXED = 32
#: In which a call by graphs is timed against one by operators; and the share of its time that these have to take less.
_ROUNDS, _CLEARLY = 8, 0.95


def _not_accepted(args: Sequence[Any], kwargs: dict[str, Any], error: BaseException) -> InputError:
    return InputError(
        f"the model does not accept these inputs ({describe(args, kwargs)}): {first_line(error)}. Expected inputs that"
        " model(*inputs) runs on; try that first."
    )


class _Traced(NamedTuple):
    """What calls use: they read it once, and a begin replaces it as a whole."""

    #: Whether a graph is for the very integers of Python's that it meets, and never for many.
    fixed: bool
    #: Runs a copy of the model, by the graphs that Dynamo has traced for it.
    run: Callable[..., Any]
    fresh: Fresh
    #: Of the copy's parameters and buffers, by identity, a reference to the user's own.
    originals: dict[int, Callable[[], torch.Tensor | None] | None]

    def given_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """The user's own parameter, where the model returns one."""
        if not isinstance(tensor, torch.nn.Parameter):
            return tensor
        original = self.originals.get(id(tensor))
        found = original() if original is not None else None
        return tensor if found is None else found


def _give_up(*lists: list[Fragment]) -> None:
    for fragments in lists:
        for fragment in fragments:
            fragment.give_up()


@_sync.atomics("_traced", "_is_fixed", "_was_fixed")
class Guarded:
    """Dynamo guards what its graphs assume, and traces again where that does not hold.

    Threads: any number may call it. Streams: each graph and each operator between graphs runs on the calling thread's
    current stream, so that a call as a whole is ordered there. Between graphs nothing is held that another call could
    wait for: an execution context belongs to one graph, from its acquire to its record.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        why: NotExported,
        make_engine: Callable[[torch.nn.Module, Sequence[Any], frozenset[Place]], Any],
        settings: Settings,
        ranges: Ranges,
        precision: Any,
    ) -> None:
        """``why``: what ``torch.export`` had against it. ``make_engine``: see :class:`Fragment`. ``precision``: what
        graphs compute in; None: as the model says."""
        self._dynamic = ranges.may_vary
        self._settings, self._device, self._check_error = settings, settings.torch_device, settings.device.check_error
        #: Whether operators may run the model as it is, where that measures faster.
        self._chooses = settings.is_free_to_choose and precision is None
        self._snapshot, self._why, self._make_engine = snapshot, why, make_engine
        self._meter = Meter()
        self._fragments: list[Fragment] = _sync.list_("fragments")
        #: From before the last begin, for graphs that are the same.
        self._before: list[Fragment] = _sync.list_("fragments from before")
        self._repeats = Repeats(snapshot, self._device)
        self._lock = _sync.lock("a model's begin")
        #: Whether graphs are to be for single integers, since an operator took no symbol; whether they were too many.
        self._is_fixed = self._was_fixed = False
        self._kinds: set[Any] = _sync.set_("kinds of inputs")
        #: Microseconds of a call by graphs and by operators, where they were measured.
        self.measured = ""
        self._begin()
        # Dynamo keeps the code that it has made, and with it fragments, in places that outlive the model.
        weakref.finalize(self, _give_up, self._fragments, self._before)

    def _begin(self, why_plain: str = "", keeps: bool = False) -> None:
        """Nothing is traced so far. ``why_plain``: why nothing will be. ``keeps``: graphs that are as before stay."""
        self._why_plain = why_plain
        self._own = OwnCode()
        fresh = self._copy()
        tensors = (*fresh.module.parameters(), *fresh.module.buffers())
        originals = {id(t): fresh.original(t) for t in tensors}
        for fragment in self._fragments if keeps else ():
            if fragment.carries_integers:
                fragment.retire()
        self._before[:] = [f for f in self._fragments if keeps and not f.carries_integers]
        self._fragments[:] = []
        self._traced = _Traced(self._is_fixed, self._compiled(), fresh, originals)

    def _as_wanted(self) -> _Traced:
        """What calls use, traced anew where integers are to be something else than they were. Calls under way go on
        with what there was."""
        if self._traced.fixed != self._is_fixed and not self._why_plain:
            with self._lock:
                if self._traced.fixed != self._is_fixed:
                    self._begin(keeps=True)
        return self._traced

    def _copy(self, made: Copies | None = None) -> Fresh:
        fresh = self._snapshot.fresh(made)
        for part in fresh.module.modules():
            self._own.give(part)
        return fresh

    def _compiled(self) -> Callable[..., Any]:
        """What runs a copy of the model that it is given, by graphs that all copies have in common."""

        def run(module: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            return module(*args, **kwargs)

        if self._why_plain:
            return run
        dynamo_settings.add_model()
        # Dynamo keeps graphs with a function's code, and counts them there against its limit.
        own = types.FunctionType(run.__code__.replace(), globals(), "run")
        mine = weakref.ref(self)

        def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
            guarded = mine()
            return gm.forward if guarded is None else guarded._fragment(gm, examples)

        compiled: Callable[..., Any] = torch.compile(own, backend=backend)
        return compiled

    def _fragment(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        keep_entries_in_place()
        watch_limits(gm)
        fragment = Fragment(gm, examples, self._make_engine, first=FIRST, in_engine=True, dynamic=self._dynamic)
        if fragment.cut is not None and fragment.cut.is_of_symbol and fragment.carries_integers:
            self._is_fixed = not self._was_fixed
        if self._is_fixed and len(self._fragments) >= MOST_FIXED:
            self._is_fixed, self._was_fixed = False, True
        known = [*self._fragments, *self._before]  # another thread came upon it, too, or it was traced before
        fragment = next((f for f in known if f.key is not None and f.key == fragment.key), fragment)
        if not any(f is fragment for f in list(self._fragments)):
            self._fragments.append(fragment)
        return Timed(fragment, self._meter)

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one call on the calling thread's current stream, with autograd off."""
        traced, given = self._as_wanted(), self._repeats.inputs(args, kwargs)
        try:
            if self._repeats.has(given):
                results = traced.fresh.module(*args, **kwargs)
            else:
                with dynamo_settings.used(traced.fixed):
                    results = traced.run(traced.fresh.module, args, kwargs)
        except Exception as e:
            if not self._repeats.takes(e, given, args, kwargs):
                self._raise(e, args, kwargs)
            results = traced.fresh.module(*args, **kwargs)
        # Containers that the model was given, and returns, are the caller's own.
        if any(isinstance(x, torch.nn.Parameter) for x in pytree.tree_leaves(results)):
            return map_tensors(traced.given_back, results)
        return results

    def _raise(self, error: Exception, args: Sequence[Any], kwargs: dict[str, Any]) -> NoReturn:
        """Raise what a caller is to see of an error in a call."""
        from torch._dynamo.exc import TorchRuntimeError

        # Dynamo's is of an operator that does not take such inputs: nothing was queued.
        of_operator = isinstance(error, NotAccepted | TorchRuntimeError)
        cause = error.error if isinstance(error, NotAccepted) else error
        self._check_error(cause)
        if isinstance(cause, AnabranchError | torch.OutOfMemoryError):
            raise cause
        # Of inputs of other kinds than the model was compiled for; else it is the model that raises.
        if isinstance(cause, RuntimeError | TypeError | ValueError | IndexError):
            of_operator = of_operator or kinds_of(args, kwargs) not in self._kinds
        if of_operator:
            raise _not_accepted(args, kwargs, cause.__cause__ or cause) from cause
        raise cause

    # -- building -----------------------------------------------------------------------------------------------

    def prepare(self, args: Sequence[Any], kwargs: dict[str, Any], others: Sequence[tuple[Any, Any]]) -> None:
        """Call the model until its graphs for such inputs have engines. Blocks the calling thread only. ``others``:
        inputs with other sizes, which calls are to have too.

        It is rehearsed first, and what would write weights is refused. Then a copy is called, whose graphs run by
        operators: what counts in Python's state is refused. Where the rehearsal cannot tell what is written, that copy
        has memory of its own. Raises :class:`~anabranch.errors.UnsupportedModel`, or what the model raises.
        """
        self._kinds.add(kinds_of(args, kwargs))
        is_known = self._rehearse(args, kwargs)
        differences: list[str] = []
        copy = self._copy() if is_known else self._copy(Copies())
        held = held_beside(copy)
        for attempt in range(FIRST - 1):
            expected = self._in_eager(args, kwargs, attempt) if is_known and not self._why_plain else None
            tensors = {n: (t, t._version) for n, t in (*copy.module.named_parameters(), *copy.module.named_buffers())}
            versions = [x._version for x in held]
            before = state_of(copy)
            try:
                results = self._try(copy, args, kwargs, attempt, makes=False)
            except NotExported as e:
                if expected is None:
                    raise
                # It runs in eager, and Dynamo cannot go where it goes: an error that the model catches, say.
                return self._prepare_plain(first_line(e.__cause__ or e), args, kwargs, others)
            differences.append(results_unlike(results, expected))
            if attempt == 0 and differences[0] and results_unlike(self._in_eager(args, kwargs, 0), expected):
                differences[0] = ""  # it is unlike itself, too
            written = [n for n, (t, version) in tensors.items() if t._version != version]
            if written or any(x._version != version for x, version in zip(held, versions, strict=True)):
                self._refuse_write(written)
            changed = changed_between(before, state_of(copy))
            if changed and attempt:  # what the first call changes may be a cache that it fills
                raise UnsupportedModel(
                    f"the model changes {', '.join(changed)} in each call, and torch.export refuses it ({self._why})."
                    " An engine keeps no state of Python's. Make it an input."
                )
            del results, expected
        if all(differences):
            why = f"{COMPUTES_ELSE} ({differences[0]}). {COMPUTE_THE_SAME}"
            return self._prepare_plain(why, args, kwargs, others)
        if others:
            # Dynamo makes a symbol of a size once it has met two values, and remembers that by the place of the code:
            # traced anew, no graph is for a single size but for those that are special.
            for given in others:
                self._try(copy, *given, FIRST, makes=False)
            self._begin(self._why_plain)
        fixed = self._traced.fixed
        self._call_all(copy, args, kwargs, others)
        if self._as_wanted().fixed and not fixed:
            self._call_all(copy, args, kwargs, others)
        if self._chooses and not self._why_plain:
            self._choose(args, kwargs)

    def _choose(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Have operators run the model as it is where that takes less time than its graphs, and Python between them."""
        traced, run, module = self._traced, self._traced.run, self._traced.fresh.module
        ways: list[Any] = [lambda given: run(module, *given), lambda given: module(*given[0], **given[1])]
        examples: list[Any] = [self._given(args, kwargs, 0) for _ in range(2)]
        given, stream = Inputs.of(*examples[0]), self._settings.device.current_stream(self._settings.index)
        try:
            with trying(False), generators_kept(module, examples[0], self._device), dynamo_settings.used(traced.fixed):
                ways[1](examples[0])
                if not given.are_unchanged(*examples[0]):
                    return  # so many calls on the same inputs are not what the model is for
                graphs, operators = measure(ways, examples, stream, _ROUNDS)
        except Exception as e:
            self._check_error(e)
            _log.info("graphs were not timed against operators: %s: %s", type(e).__name__, str(e))
            return
        self.measured = f"measured {graphs} in graphs, {operators} by PyTorch's operators"
        # Where both take as long, many threads do not wait for each other in graphs, as they do for Python's lock.
        if operators.us < _CLEARLY * graphs.us:
            _log.info("PyTorch's operators run the model as it is: %s", self.measured)
            _give_up(self._fragments, self._before)
            self._begin(self.measured)

    def _call_all(
        self, copy: Fresh, args: Sequence[Any], kwargs: dict[str, Any], others: Sequence[tuple[Any, Any]]
    ) -> None:
        """Call it until its graphs have engines. ``copy``: one that Dynamo has traced before."""
        fresh = self._traced.fresh
        # Graphs are for classes, and some copies have classes of their own.
        same = all(type(a) is type(b) for a, b in zip(copy.module.modules(), fresh.module.modules(), strict=True))
        more = 0 if same else 1
        for given in ((args, kwargs), *others):
            for attempt in range(FIRST + more):
                self._try(fresh, *given, FIRST + attempt)
        self._meter.last, self._meter.is_on = None, True
        try:
            self._try(fresh, args, kwargs, 2 * FIRST)
        finally:
            self._meter.last, self._meter.is_on = None, False

    def _prepare_plain(self, why: str, args: Any, kwargs: Any, others: Any) -> None:
        """Have PyTorch's operators run the model as it is: Dynamo has no graphs of it that are right."""
        _log.warning("PyTorch's operators run the model as it is, without graphs: %s", why)
        self._begin(why)
        self.prepare(args, kwargs, others)

    def _rehearse(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Refuse what would write weights in the calls to come; returns whether that is known of all of them."""
        copy, is_known = self._snapshot.fresh(), True
        names = {storage(x): n for n, x in (*copy.module.named_parameters(), *copy.module.named_buffers())}
        for attempt in range(FIRST + 2):
            given = self._given(args, kwargs, attempt)
            with generators_kept(copy.module, given, self._device):
                trial = rehearse(partial(copy.module, *given[0], **given[1]), copy)
            is_known = is_known and trial.finished
            if trial.written:
                self._refuse_write([names[place] for place in map(storage, trial.written) if place in names])
        return is_known

    def _in_eager(self, args: Sequence[Any], kwargs: dict[str, Any], attempt: int) -> Any:
        """What a call of the model returns, which was rehearsed and writes nothing that it holds; None if it raises."""
        copy, given = self._snapshot.fresh(), self._given(args, kwargs, attempt)
        try:
            with generators_kept(copy.module, given, self._device), torch.no_grad():
                return copy.module(*given[0], **given[1])
        except Exception:
            return None

    def _refuse_write(self, names: Sequence[str]) -> NoReturn:
        """``names``: of the parameters and buffers that are written; none: it is another tensor."""
        if names:
            raise UnsupportedModel(
                f"the model changes {names[0]!r} in place, and torch.export refuses it ({self._why}); an engine"
                " is immutable and cannot keep that change from graph to graph. Make it an output of the model"
                " instead. Call model.eval() first?"
            )
        raise UnsupportedModel(
            "the model changes a tensor in place that it holds and that is no buffer of its modules; an engine"
            " is immutable and cannot keep that change. Register it with register_buffer(), and it is state."
        )

    def _given(self, args: Sequence[Any], kwargs: dict[str, Any], attempt: int) -> Any:
        """Copies of these inputs: as they are at first, then with other floating-point values."""
        generator = torch.Generator().manual_seed(attempt)

        def made(x: torch.Tensor) -> torch.Tensor:
            y = copy_of(x)
            if attempt and y.is_floating_point() and y.numel():
                y = moved(y, torch.rand((), generator=generator).item())
            return y

        return map_tensors(made, (tuple(args), kwargs))

    def _try(self, copy: Fresh, args: Sequence[Any], kwargs: dict[str, Any], attempt: int, makes: bool = True) -> Any:
        """Call it on such inputs; returns what it returns. ``makes``: whether graphs may get engines."""
        given = self._given(args, kwargs, attempt)
        settings = dynamo_settings.used(self._traced.fixed)
        try:
            with trying(makes), generators_kept(copy.module, given, self._device), settings:
                return self._traced.run(copy.module, *given)
        except (AnabranchError, torch.OutOfMemoryError):
            raise
        except Exception as e:
            if not attempt:
                raise self._why from e
            _log.info("a trial on other values ended with %s: %s", type(e).__name__, str(e))
            return None

    # -- looking ------------------------------------------------------------------------------------------------

    @property
    def why(self) -> str:
        """What ``torch.export`` had against the model."""
        return str(self._why)

    @property
    def fragments(self) -> list[Fragment]:
        """Those that were ever called, in the order in which Dynamo traced them: it drops some that it has begun."""
        return [f for f in list(self._fragments) if f.is_used]

    def engines(self) -> list[Any]:
        """Those of the fragments, and of those from before."""
        fragments = dict.fromkeys([*self.fragments, *self._before])
        return [engine for fragment in fragments for engine in fragment.engines]

    @property
    def is_captured(self) -> bool:
        """Whether a graph of it is a CUDA graph."""
        return any(engine.is_captured for engine in self.engines())

    def refuse_capture(self) -> None:
        """Raises: nothing was queued so far."""
        raise NotCapturable(
            "this call is inside a CUDA graph capture, and Python runs between the graphs of this model, which"
            f" torch.export refuses ({self._why}). Call the engine outside the capture."
        )

    def summary(self) -> dict[str, Any]:
        """As plain data: see :meth:`anabranch.Engine.summary`."""
        return {
            "why": self.why,
            "by_operators": self._why_plain,
            "graphs": [f.summary() for f in self.fragments],
            "past_limit": past_limit(),
        }

    def explain(self) -> list[str]:
        """What runs as a graph and where it is cut, a line each."""
        fragments = self.fragments
        lines = [f"in {len(fragments)} graphs with Python between them: {self._why}"]
        if self._why_plain:
            lines.append(f"  PyTorch's operators run it as it is: {self._why_plain}")
        elif self.measured:
            lines.append(f"  {self.measured}")
        for number, fragment in enumerate(fragments):
            what = fragment.summary()
            how = f"by PyTorch's operators: {what['by_operators']}" if what["by_operators"] else "an engine"
            if not what["by_operators"] and fragment.was_by_operators:
                how += "; operators ran its first calls, whose results may differ by rounding"
            lines.append(f"  graph {number}: {fragment.operators} operators, {how}")
            if fragment.cut is not None:
                lines.append(f"    cut at {fragment.cut}")
            if fragment.python_us is not None:
                lines.append(f"    then {fragment.python_us:.0f} us of Python until the next graph")
            lines += [f"    {line}" for engine in fragment.engines for line in engine.explain().splitlines()[1:-1]]
        lines += [f"  compiled no more: {name}: {limit}" for name, limit in past_limit().items()]
        return lines
