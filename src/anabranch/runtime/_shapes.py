"""The shapes that calls repeat of those that a range serves: each gets graphs of its own, captured aside."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from anabranch import _activity, _sync
from anabranch.export import Signature
from anabranch.runtime._aside import Aside
from anabranch.runtime._compiler import Compiler
from anabranch.runtime._process import process
from anabranch.runtime._specialization import Specialization
from anabranch.runtime._table import Table

#: Calls of a shape before it is captured, and then each time that they have doubled: there may be no room at first.
_REPEATS = 2
#: Calls without a graph for which a shape keeps its graph that nobody calls: else shapes that come in turn would take
#: it from each other.
_SHELTER = 32
#: Shapes of which the calls are counted.
_MOST_COUNTED = 4096


@_sync.atomics("_compiler")
class Shapes:
    """Threads: any may say :meth:`met`; :meth:`capture` and :meth:`grow` with the build lock held.

    A call of a shape that has no graph runs direct, at once. Where there is room for no more contexts, the shape gives
    them up that was not called for longest; a call that is about to use one then runs direct.
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
        #: Calls, by key.
        self._calls: dict[Any, int] = _sync.dict_("calls of shapes")
        #: How many calls have run without a graph, about.
        self._direct_calls = 0
        #: Those that have graphs, and how many such calls there had been when one was last seen to be called. With the
        #: build lock held.
        self._captured: dict[Any, tuple[Specialization, int]] = _sync.dict_("captured shapes")
        #: Shapes that are faster without a graph, or can have none; their names, and why.
        self._direct: dict[Any, tuple[str, str]] = _sync.dict_("shapes without graphs")

    def met(self, key: Any, leaves: Sequence[Any], structure: Callable[[], Any], found: Specialization) -> None:
        """A call of this key is about to run direct by ``found``, which serves a range."""
        if found.why_no_graphs or key in self._direct:
            return
        self._direct_calls += 1
        if len(self._calls) >= _MOST_COUNTED:
            self._calls.clear()
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls < _REPEATS or calls & (calls - 1):
            return
        device = found.unit.torch_device
        signature = Signature.of(leaves, structure(), device)
        mine, range_ = weakref.ref(self), weakref.ref(found)

        def job() -> None:
            shapes, of_range = mine(), range_()
            if shapes is not None and of_range is not None:
                with process.build_lock, _activity.building():
                    shapes.capture(key, signature, of_range)

        self._aside.ask(job)

    def capture(
        self, key: Any, signature: Signature, of_range: Specialization, shelter: int = _SHELTER
    ) -> Specialization | None:
        """The specialization for one shape of a range, with a first graph; None where calls of it stay direct.

        ``shelter``: other shapes keep their graphs, without being called, for so many calls that have none.
        """
        compiler = self._compiler
        if compiler is None:
            return None
        if key in self._captured:
            return self._captured[key][0]
        if not self._has_room(shelter):
            return None
        made = compiler.make_at(signature, of_range)
        if not made.choice.uses_graphs:
            self._direct[key] = str(signature), made.choice.reason
            return None
        made.calls.contexts.ask_for_more = functools.partial(_ask_for_more, weakref.ref(self), weakref.ref(made))
        self._captured[key] = made, self._direct_calls
        place = self._table.add(key, signature, made)
        if (added := self._added()) is not None:
            added(place, made)
        return made

    def _has_room(self, shelter: int) -> bool:
        """Whether there is room for another context; a shape that is not called any more is given up for it.

        No more than one: a call may have its context in hand, which then goes a little later.
        """
        if self._limits.has_room(0):
            return True
        now = self._direct_calls
        for key, (made, _) in list(self._captured.items()):
            if made.calls.take_used():
                self._captured[key] = made, now
        oldest = min(self._captured, key=lambda key: self._captured[key][1], default=None)
        if oldest is None or now - self._captured[oldest][1] < shelter:
            return False
        made, _ = self._captured.pop(oldest)
        self._table.give_up(made)
        if (removed := self._removed()) is not None:
            removed(made)
        made.retire()
        self._calls.pop(oldest, None)
        return bool(self._limits.has_room(0))

    def ask_to_grow(self, made: Specialization) -> None:
        """A call has found all contexts in use, and room for more."""
        made.calls.contexts.pool.may_grow = False  # one at a time; building it sets this back
        self._aside.ask(functools.partial(_grow, weakref.ref(self), weakref.ref(made)))

    def grow(self, made: Specialization) -> None:
        """One more context of a shape that has graphs, if there is room without giving up others."""
        contexts = made.calls.contexts
        if self._compiler is not None and any(made is m for m, _ in self._captured.values()):
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


def _ask_for_more(shapes: weakref.ref[Shapes], made: weakref.ref[Specialization]) -> None:
    mine, specialization = shapes(), made()
    if mine is not None and specialization is not None:
        mine.ask_to_grow(specialization)


def _grow(shapes: weakref.ref[Shapes], made: weakref.ref[Specialization]) -> None:
    mine, specialization = shapes(), made()
    if mine is not None and specialization is not None:
        with process.build_lock, _activity.building():
            mine.grow(specialization)
