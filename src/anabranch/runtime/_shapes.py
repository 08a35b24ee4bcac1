"""The shapes that calls repeat of those that a range serves: each gets graphs of its own, captured aside."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from anabranch import _activity, _sync
from anabranch.export import Signature
from anabranch.runtime._aside import Aside
from anabranch.runtime._compiler import Compiler
from anabranch.runtime._contexts import Contexts
from anabranch.runtime._process import process
from anabranch.runtime._specialization import Specialization
from anabranch.runtime._table import Table

#: Calls of a shape before it is captured.
_REPEATS = 2
#: How many times as often a shape has to be called as the one whose graph it takes. With less, shapes that come in turn
#: would take it from each other.
_AHEAD = 2
#: Calls without a graph after which what was counted before counts half.
_WINDOW = 256
#: A graph is not worth more: what was called much, and is not any more, is given up in time.
_MOST_COUNTED_USES = 64
#: Where graphs are taken from other shapes, the time between two such builds, in times of the one before: a build takes
#: from calls what it needs of the host.
_PAUSE = 10
#: Shapes of which the calls are counted.
_MOST_COUNTED = 4096


@_sync.atomics("_compiler")
class Shapes:
    """Threads: any may say :meth:`met`; :meth:`capture` and :meth:`grow` with the build lock held.

    A call of a shape that has no graph runs direct, at once. Where there is room for no more contexts, the shape that
    was called least of late gives them up to one that is called more; a call that is about to use one then runs direct.
    """

    def __init__(
        self,
        table: Table,
        limits: Any,
        compiler: Compiler,
        added: weakref.WeakMethod[Any],
        removed: weakref.WeakMethod[Any],
    ) -> None:
        """``added``, ``removed``: of the engine, told what is in its table and what is there no more."""
        self._table, self._limits = table, limits
        self._compiler: Compiler | None = compiler
        self._added, self._removed = added, removed
        self._aside = Aside()
        #: Calls of late, by key, of shapes without graphs.
        self._calls: dict[Any, int] = _sync.dict_("calls of shapes")
        #: How many calls have run without a graph, about; and when what was counted was last halved.
        self._direct_calls = 0
        self._halved_at = 0
        #: Calls of late that a shape needs to get a graph, as far as is known; and when there may be a next build.
        self._needed = _REPEATS
        self._not_before = 0.0
        #: Those that have graphs, and how often each was called of late. With the build lock held.
        self._captured: dict[Any, tuple[Specialization, int]] = _sync.dict_("captured shapes")
        #: Shapes that are faster without a graph, or can have none; their names, and why.
        self._direct: dict[Any, tuple[str, str]] = _sync.dict_("shapes without graphs")

    def met(self, key: Any, leaves: Sequence[Any], structure: Callable[[], Any], found: Specialization) -> None:
        """A call of this key is about to run direct by ``found``, which serves a range."""
        if found.why_no_graphs or key in self._direct:
            return
        self._direct_calls += 1
        if self._direct_calls % _WINDOW == 0:
            self._needed = _REPEATS  # what has graphs may not be called any more: ask anew
        if len(self._calls) >= _MOST_COUNTED:
            self._calls.clear()
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls < self._needed or (self._not_before and time.monotonic() < self._not_before):
            return
        self._needed = calls + 1  # one at a time; the job sets it to what is needed
        device = found.unit.torch_device
        signature = Signature.of(leaves, structure(), device)
        mine, range_ = weakref.ref(self), weakref.ref(found)

        def job() -> None:
            shapes, of_range = mine(), range_()
            if shapes is not None and of_range is not None:
                with process.build_lock, _activity.building():
                    shapes._needed = _REPEATS
                    shapes.capture(key, signature, of_range)

        self._aside.ask(job)

    def capture(
        self, key: Any, signature: Signature, of_range: Specialization, wanted: bool = False
    ) -> Specialization | None:
        """The specialization for one shape of a range, with a first graph; None where calls of it stay direct.

        ``wanted``: by the user, so that any other shape gives up its graph for it.
        """
        compiler = self._compiler
        if compiler is None:
            return None
        if key in self._captured:
            return self._captured[key][0]
        is_full = not self._limits.has_room(0)
        if is_full and not self._give_up_one(self._calls.get(key, 0), wanted):
            return None
        began = time.monotonic()
        made = compiler.make_at(signature, of_range)
        if is_full and not wanted and of_range.unit.device.has_time:
            self._not_before = time.monotonic() + _PAUSE * (time.monotonic() - began)
        self._needed = _REPEATS
        self._calls.pop(key, None)
        if not made.choice.uses_graphs:
            self._direct[key] = str(signature), made.choice.reason
            return None
        self._attend(made)
        self._captured[key] = made, _REPEATS
        place = self._table.add(key, signature, made)
        if (added := self._added()) is not None:
            added(place, made)
        return made

    def _give_up_one(self, calls: int, wanted: bool) -> bool:
        """Whether there is room for another context, now that the shape that was called least has given up its own.

        No more than one: a call may have its context in hand, which then goes a little later. ``calls``: of the shape
        that is to have a graph.
        """
        windows = (self._direct_calls - self._halved_at) // _WINDOW
        self._halved_at += windows * _WINDOW
        for key, (made, uses) in list(self._captured.items()):
            self._captured[key] = made, min((uses >> windows) + made.calls.take_uses(), _MOST_COUNTED_USES)
        if windows:
            for key, n in list(self._calls.items()):
                self._calls[key] = n >> windows
        least = min(self._captured, key=lambda key: self._captured[key][1], default=None)
        if least is None:
            self._needed = _MOST_COUNTED_USES * _AHEAD  # others have all contexts: asked anew after a window
            return False
        made, uses = self._captured[least]
        self._needed = max(_REPEATS, _AHEAD * uses)
        if not wanted and (calls >> windows) < self._needed:
            return False
        del self._captured[least]
        self._table.give_up(made)
        if (removed := self._removed()) is not None:
            removed(made)
        made.retire()
        return bool(self._limits.has_room(0))

    def attend(self) -> None:
        """Once there is a range, no call waits for a context: those of other specializations are built aside, too. With
        the build lock held."""
        if any(True for _ in self._table.ranges):
            for made in self._table:
                self._attend(made)

    def _attend(self, made: Specialization) -> None:
        pieces = made.pieces
        for calls in [made.calls] if pieces is None else [part.calls for part in pieces.captured]:
            contexts = calls.contexts
            about = weakref.ref(self), weakref.ref(made), weakref.ref(contexts)
            contexts.ask_for_more = functools.partial(_ask_for_more, *about)

    def ask_to_grow(self, made: Specialization, contexts: Contexts) -> None:
        """A call has found all contexts in use, and room for more."""
        contexts.pool.may_grow = False  # one at a time; building it sets this back
        self._aside.ask(functools.partial(_grow, weakref.ref(self), weakref.ref(made), weakref.ref(contexts)))

    def grow(self, made: Specialization, contexts: Contexts) -> None:
        """One more context of what has graphs, if there is room without giving up others."""
        if self._compiler is not None and any(made is m for m in self._table):
            contexts.warm(len(contexts.pool) + 1)

    def explain(self) -> list[str]:
        """Why shapes of ranges have no graphs, a line each."""
        return [f"{name}: calls run direct: {why}" for name, why in list(self._direct.values())]

    def wait(self) -> None:
        """Block until what calls have asked for is built. For tests and tools."""
        self._aside.wait()

    def close(self) -> None:
        """With the build lock held: nothing is built any more."""
        self._aside.close()
        self._compiler = None
        self._captured.clear()


def _ask_for_more(
    shapes: weakref.ref[Shapes], made: weakref.ref[Specialization], contexts: weakref.ref[Contexts]
) -> None:
    mine, specialization, own = shapes(), made(), contexts()
    if mine is not None and specialization is not None and own is not None:
        mine.ask_to_grow(specialization, own)


def _grow(shapes: weakref.ref[Shapes], made: weakref.ref[Specialization], contexts: weakref.ref[Contexts]) -> None:
    mine, specialization, own = shapes(), made(), contexts()
    if mine is not None and specialization is not None and own is not None:
        with process.build_lock, _activity.building():
            mine.grow(specialization, own)
