"""A graph of Dynamo's as a function: an engine where one can be had, PyTorch's operators where none can.

Dynamo (what ``torch.compile`` traces with) cuts a function where it meets what is no graph: a branch on a tensor's
value, a call that it cannot look into. Each graph between two cuts is a *fragment*; Python runs between them.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from anabranch import _activity, _sync
from anabranch.errors import AnabranchError, DeviceLost, FlagsChanged, InputError, NotCapturable
from anabranch.runtime._cut import Cut
from anabranch.runtime._graph_key import key_of
from anabranch.runtime._integers import Integers, picker
from anabranch.runtime._process import process
from anabranch.runtime._ranges import NotInRange, Place
from anabranch.runtime._unit import CannotWrite

_log = logging.getLogger("anabranch")

#: So many sets of parameters have an engine of their own at a time: of modules that share their code.
MOST_SETS = 8
#: So many sets of sizes have one, where Dynamo has made symbols of them.
MOST_SIZES = 4
#: So many calls with the same sizes, one after another, show that these do not depend on data.
STEADY = 8
#: What computes nothing.
_FREE = (operator.getitem,)


class _Engine(Protocol):
    #: What state of its model begins as, by name.
    states: Mapping[str, torch.Tensor]

    def __call__(self, *args: Any) -> Any: ...

    def summary(self) -> dict[str, Any]: ...

    def explain(self) -> str: ...

    def close(self) -> None: ...


class _Graph(torch.nn.Module):
    """A fragment's graph as a model: parameters and buffers are its own, the other inputs are those of its calls."""

    def __init__(
        self, gm: fx.GraphModule, own: Mapping[int, Any], integers: Integers, autocasts: Sequence[Any]
    ) -> None:
        """``own``: inputs of the graph that are no inputs of the model, by position."""
        super().__init__()
        self.graph_module = gm
        self._integers, self._autocasts = integers, tuple(autocasts)
        placeholders = [n.name.strip("_") for n in gm.graph.find_nodes(op="placeholder")]
        self._names = {position: placeholders[position] for position in sorted(own)}
        for position, name in self._names.items():
            value = own[position]
            if isinstance(value, torch.nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._given = [i for i in range(len(placeholders)) if i not in own and i not in integers.read]
        self.eval()

    def forward(self, *given: Any) -> Any:
        everything = {position: getattr(self, name) for position, name in self._names.items()}
        everything.update(zip(self._given, given, strict=False))
        everything.update(self._integers.of(given))
        with contextlib.ExitStack() as modes:
            for autocast in self._autocasts:
                modes.enter_context(torch.autocast(**autocast))
            return self.graph_module(*(everything[position] for position in range(len(everything))))


class _Frozen:
    """An engine with the parameters that it was made of, which it does not keep from being freed, and the numbers."""

    def __init__(self, tensors: Sequence[torch.Tensor], numbers: Sequence[Any], engine: _Engine) -> None:
        self._references = [weakref.ref(t) for t in tensors]
        self.numbers = numbers
        self.engine = engine

    def is_of(self, tensors: Sequence[torch.Tensor], numbers: Sequence[Any]) -> bool:
        return numbers == self.numbers and all(ref() is t for ref, t in zip(self._references, tensors, strict=True))

    @property
    def is_alive(self) -> bool:
        return all(ref() is not None for ref in self._references)


class _Trying(threading.local):
    """Whether the calling thread calls to have engines made: with other values each time, but not with other sizes."""

    is_on = False
    #: Whether engines may be made.
    makes = True


_trying = _Trying()


@contextlib.contextmanager
def trying(makes: bool = True) -> Iterator[None]:
    """Calls in here are by whoever builds, and few of them show that sizes do not depend on data. ``makes``: whether
    they may make engines."""
    before = _trying.is_on, _trying.makes
    _trying.is_on, _trying.makes = True, makes
    try:
        yield
    finally:
        _trying.is_on, _trying.makes = before


@_sync.atomics("last", "row", "why_none")
class _Way:
    """Engines of a fragment, of which each takes some of its numbers as they were when it was made."""

    def __init__(self, fixed: Sequence[int], integers: Integers, needed: int = 1, needed_trying: int = 1) -> None:
        """``fixed``: positions of numbers that an engine is for; ``integers``: the others. ``needed``: at the how
        manieth call in a row with the same fixed ones an engine is made; ``needed_trying``: of who builds."""
        self.fixed, self.integers = fixed, integers
        self._needed, self._needed_trying = needed, needed_trying
        self.numbers_of = picker(fixed)
        #: How many calls in a row had the same numbers, and these.
        self.row: tuple[int, Sequence[Any]] = (0, ())
        self.made: list[_Frozen] = _sync.list_("made")
        self.last: _Frozen | None = None
        #: Why there can be no engine of this kind, or nothing.
        self.why_none = ""

    def find(self, frozen: Sequence[torch.Tensor], numbers: Sequence[Any]) -> _Frozen | None:
        for made in list(self.made):
            if made.is_of(frozen, numbers):
                self.last = made
                return made
        return None

    def is_due(self, numbers: Sequence[Any]) -> bool:
        """Whether an engine is to be made in this call, which has none."""
        times, last = self.row  # several threads at once may count too few
        times = times + 1 if numbers == last else 1
        self.row = times, numbers
        return _trying.makes and times >= (self._needed_trying if _trying.is_on else self._needed)

    def add(self, found: _Frozen) -> None:
        # The oldest is dropped, and with it those whose parameters are gone; calls under way keep theirs.
        self.made[:] = [*[m for m in self.made if m.is_alive][-MOST_SETS + 1 :], found]
        self.last = found

    def clear(self) -> None:
        self.made[:] = []
        self.last = None


class NotAccepted(Exception):
    """An operator of a graph did not take what it was given."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@_sync.atomics("_ran", "was_by_operators", "why_operators")
class Fragment:
    """Called with what Dynamo's generated code passes: the graph's inputs, parameters and buffers among them.

    Threads: any. Streams: a call is ordered on the calling thread's current stream, as the engine's or the operators'
    are. Parameters and buffers are written into the engine; they are compared by identity at each call, and others get
    an engine of their own. What is written *into* one later is seen where no compiler has computed with it before.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        examples: Sequence[Any],
        make_engine: Callable[[torch.nn.Module, Sequence[Any], frozenset[Place]], _Engine],
        *,
        first: int = 1,
        in_engine: bool = False,
        dynamic: bool = True,
    ) -> None:
        """Called by Dynamo, in the middle of a trace: nothing is compiled here.

        ``make_engine``: of a model, its inputs, and which sizes of these vary; raises
        :class:`~anabranch.errors.AnabranchError` where there can be none, and :class:`NotInRange` where there can be
        none for sizes that vary. ``first``: at the how manieth call an engine is made; operators run the calls before.
        ``in_engine``: calls come by an engine, with grad off but where the model turns it on; what operators raise is
        raised as :class:`NotAccepted`. ``dynamic``: whether an engine may be for many sizes, where Dynamo has made
        symbols of them.
        """
        self._gm = gm
        self._make_engine = make_engine
        placeholders = gm.graph.find_nodes(op="placeholder")
        frozen = [i for i, (n, x) in enumerate(zip(placeholders, examples, strict=True)) if _is_frozen(n, x)]
        numbers = [i for i, n in enumerate(placeholders) if _is_number(n.meta.get("example_value"))]
        others = [i for i in range(len(placeholders)) if i not in frozen and i not in numbers]
        self._frozen, self._frozen_of = frozen, picker(frozen)
        self._in_engine = in_engine
        #: How engines are found for a call, in this order: for all its sizes, and then for its very numbers.
        self._ways = [_Way(numbers, Integers(others), max(first, STEADY if numbers else 0), first)]
        integers = Integers.among(placeholders, others)
        self.carries_integers = integers.of_python
        if dynamic and integers.free:
            fixed = [i for i in numbers if i not in integers.read]
            self._ways.insert(0, _Way(fixed, integers))
        #: Why PyTorch's operators run it, or nothing.
        self.why_operators = _why_operators(gm, [examples[i] for i in others])
        if in_engine or not torch.is_grad_enabled():
            self.why_operators = self.why_operators or _why_autograd(gm)
        #: Where Dynamo's graph ended, and why; None where the function ended there.
        self.cut = Cut.of(gm)
        #: Microseconds of Python from its end to the next graph's begin, where they were measured.
        self.python_us: float | None = None
        self.operators = sum(n.op.startswith("call") and n.target not in _FREE for n in gm.graph.nodes)
        self._autocasts = _autocasts(examples)
        #: Equal for graphs that are the same; None: nobody can tell.
        self.key = key_of(gm, examples, self._autocasts)
        results = _results(gm)
        #: Which inputs required grad while grad was enabled, and whether a result then did. Not every version of Dynamo
        #: guards it.
        self._traced_with = torch.is_grad_enabled(), [_requires_grad(x) for x in examples]
        self._result_requires = any(map(_requires_grad, results))
        self._may_require = any(isinstance(x, torch.Tensor) and _may_require(x) for x in results)
        #: Whether operators ran calls of users'.
        self.was_by_operators = False
        self._ran = False

    def __call__(self, *given: Any) -> Any:
        needs_grad = torch.is_grad_enabled() and self._needs_grad(given)
        if needs_grad and not self._in_engine:
            raise InputError(
                "grad is enabled, and results of this function require it (its parameters or inputs do); engines run"
                " inference. Call it under torch.no_grad() or torch.inference_mode(), call"
                " model.requires_grad_(False), or train with another backend."
            )
        if needs_grad or self.why_operators:
            return self._by_operators(given)
        frozen = self._frozen_of(given)
        for way in self._ways:
            if way.why_none or (others := way.integers.inputs(given)) is None:
                continue
            numbers = way.numbers_of(given)
            last = way.last
            if last is None or not last.is_of(frozen, numbers):
                last = self._find(way, frozen, numbers, others)
                if last is None:
                    continue
            try:
                if any(isinstance(x, torch.Tensor) and x.requires_grad for x in others):
                    return self._without_grad(last.engine, others)
                return last.engine(*others)
            except NotInRange:  # nothing was queued
                continue
            except CannotWrite:  # nothing was queued, and operators do with it what eager does
                return self._by_operators(given)
        self.was_by_operators = self.was_by_operators or not _trying.is_on
        return self._by_operators(given)

    def _needs_grad(self, given: Sequence[Any]) -> bool:
        """Whether a result requires grad, with grad enabled."""
        required = [_requires_grad(x) for x in given]
        if not any(required):
            return self._result_requires and self._traced_with == (True, required)  # of what it makes itself
        return self._result_requires if self._traced_with == (True, required) else self._may_require

    def _by_operators(self, given: Sequence[Any]) -> Any:
        self._ran = True
        try:
            return self._gm(*given)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, IndexError) as e:
            if not self._in_engine:
                raise
            raise NotAccepted(e) from e

    def _without_grad(self, engine: _Engine, given: Sequence[Any]) -> Any:
        """No result requires grad: it is off here, or nothing that is computed has one."""
        plain = [x.detach() if isinstance(x, torch.Tensor) and x.requires_grad else x for x in given]
        back = {id(p): x for p, x in zip(plain, given, strict=True)}
        return tuple(back.get(id(y), y) for y in engine(*plain))

    def _find(
        self, way: _Way, frozen: Sequence[torch.Tensor], numbers: Sequence[Any], others: Sequence[Any]
    ) -> _Frozen | None:
        """The engine for these parameters and numbers, made if need be; None: there is none for this call."""
        found = way.find(frozen, numbers)
        if found is not None:
            return found
        if not way.is_due(numbers) or torch._C._len_torch_dispatch_stack():
            return None  # and where the caller traces or counts operators, those are what it is to see
        with process.alone(), _activity.building():
            found = way.find(frozen, numbers)
            if found is not None:
                return found
            if self.why_operators or way.why_none or len({m.numbers for m in way.made} - {numbers}) >= MOST_SIZES:
                return None
            return self._make(way, frozen, numbers, others)

    def _make(
        self, way: _Way, frozen: Sequence[torch.Tensor], numbers: Sequence[Any], others: Sequence[Any]
    ) -> _Frozen | None:
        given = [x.detach() if isinstance(x, torch.Tensor) else x for x in others]
        own = dict(zip((*self._frozen, *way.fixed), (*frozen, *numbers), strict=True))
        try:
            engine = self._make_engine(_Graph(self._gm, own, way.integers, self._autocasts), given, way.integers.free)
        except (DeviceLost, NotCapturable, FlagsChanged):
            raise
        except NotInRange as e:
            way.why_none = str(e)
            _log.info("a graph of torch.compile's has no engine for many sizes: %s", e)
            return None
        except AnabranchError as e:
            self.why_operators = str(e)
            _log.info("a graph of torch.compile's runs by PyTorch's operators: %s", e)
            return None
        if engine.states:
            written = ", ".join(map(repr, engine.states))
            engine.close()
            self.why_operators = f"it writes a buffer of its module's: {written}"
            return None
        made = _Frozen(frozen, numbers, engine)
        way.add(made)
        return made

    def retire(self) -> None:
        """The model was traced anew: calls that are under way are the last ones, and operators run them."""
        self.why_operators = "the model was traced anew"
        self.give_up()

    def give_up(self) -> None:
        """Its model is gone: so are its engines, and nothing will call it."""
        for way in self._ways:
            way.clear()

    @property
    def is_used(self) -> bool:
        """Whether it was ever called."""
        return self._ran or any(way.made for way in self._ways)

    @property
    def engines(self) -> list[_Engine]:
        """Those that there are now; None of a fragment that runs by operators."""
        return [m.engine for way in self._ways for m in list(way.made)]

    def summary(self) -> dict[str, Any]:
        """What it consists of, as plain data: see :meth:`anabranch.Engine.summary`."""
        return {
            "operators": self.operators,
            "by_operators": self.why_operators or ("" if self.engines else self._why_none()),
            "ends": self.cut.data() if self.cut is not None else None,
            "python_us": self.python_us,
            "engines": [e.summary() for e in self.engines],
        }

    def _why_none(self) -> str:
        """Why it has no engine so far."""
        why = next((f" ({way.why_none})" for way in self._ways if way.why_none), "")
        return f"its sizes have not been the same often enough{why}"


def _is_frozen(node: fx.Node, example: Any) -> bool:
    """Whether an input is a parameter or a buffer of the module, which Dynamo does not guard."""
    if not isinstance(example, torch.Tensor):
        return False
    marked = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return marked is not None or isinstance(example, torch.nn.Parameter)


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def _why_operators(gm: fx.GraphModule, others: Sequence[Any]) -> str:
    """Why there can be no engine for these inputs, parameters and sizes aside; or nothing."""
    # It enters and leaves levels of the process. A trace that fails in between leaves it there.
    if any("functorch" in f"{getattr(n.target, '__module__', '')}{n.target}" for n in gm.graph.nodes):
        return "it uses a transform of torch.func"
    if not any(isinstance(x, torch.Tensor) for x in others):
        return "it takes no tensor"
    if any(not isinstance(x, torch.Tensor) for x in others):
        return "it takes what is no tensor"
    return ""


def _why_autograd(gm: fx.GraphModule) -> str:
    """Why there can be no engine, or nothing, where the caller has grad off, and the model has turned it on."""
    given: Any = gm.graph.output_node().args[0]
    computed = [n.meta.get("example_value") for n in given if isinstance(n, fx.Node) and n.op != "placeholder"]
    if not any(map(_requires_grad, computed)):
        return ""
    return "the model may ask for gradients of its results, which it computes with grad enabled"


def _results(gm: fx.GraphModule) -> list[Any]:
    given: Any = gm.graph.output_node().args[0]
    return [n.meta.get("example_value") for n in given if isinstance(n, fx.Node)]


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _may_require(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _autocasts(examples: Sequence[Any]) -> list[dict[str, Any]]:
    """What autocast the caller is in, for the devices of the graph: calls of engines turn it off."""
    kinds = {"cpu", *(x.device.type for x in examples if isinstance(x, torch.Tensor))}
    return [
        {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": True}
        for kind in sorted(kinds)
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    ]
