"""The contexts of one specialization, and how they become more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch

from anabranch import _activity
from anabranch.backends import Kernels, Stateful
from anabranch.devices import Scratch
from anabranch.devices._turns import DeviceBusy, at_once
from anabranch.errors import AnabranchError, BuildError
from anabranch.export import first_line
from anabranch.runtime._context import Context
from anabranch.runtime._last_uses import LastUses
from anabranch.runtime._pool import Reservation
from anabranch.runtime._process import neutral, process
from anabranch.runtime._unit import Unit

_log = logging.getLogger("anabranch")
#: Arguments for a lock's acquire(): take it only if it is free.
_AT_ONCE = (False,)

#: ``capture(kernels, fresh, forget, scratch)``: a new context. ``fresh``: in memory that nothing used before;
#: ``forget``: called when it goes; ``scratch``: the build's, if it has one.
Capture = Callable[[Kernels | Stateful, bool, Callable[[], None], Scratch | None], Context]


def refuse_graphs(why: str, cause: Exception | None = None) -> NoReturn:
    """Raise, where graphs were asked for, why there can be none."""
    raise BuildError(
        f"cuda_graphs=True given, and this model cannot be captured: {why}. Leave cuda_graphs out."
    ) from cause


class Pool(Protocol):
    """The contexts of one signature, as whoever builds them sees them; see :class:`ContextPool`."""

    #: Whether calls may build contexts; not after a build failed.
    may_grow: bool

    @property
    def estimate(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def add(self, context: Context) -> None: ...
    def release(self, context: Context) -> None: ...
    def discard(self, context: Context) -> None: ...
    def discard_added(self) -> None: ...
    def drain(self) -> Any: ...
    def events(self) -> set[int]: ...
    def __len__(self) -> int: ...


class Contexts:
    """A pool, and what makes it grow.

    Threads: any. Contexts are built with the process's build lock held, one at a time; the host waits for the lane that
    one is captured on.
    """

    def __init__(self, unit: Unit, pool: Pool, capture: Capture, last_uses: LastUses) -> None:
        self.pool = pool
        self._unit, self._device = unit, unit.device
        self._capture, self._last_uses = capture, last_uses
        #: What is captured. Set while the specialization is built.
        self.kernels: Kernels | Stateful
        #: Asks for one more, which is going to be built aside; None: calls build it themselves.
        self.ask_for_more: Callable[[], None] | None = None

    @property
    def are_shared(self) -> bool:
        """Whether a call that could not build a context takes one that there is, instead of running direct.

        Where kernels have state a direct call would build that, which takes as long.
        """
        return isinstance(self.kernels, Stateful)

    def may_build(self) -> bool:
        # A context captured now would have today's flags baked in, not the engine's.
        return self.pool.may_grow and self._unit.watch.unchanged()

    def first(self, scratch: Scratch) -> Context | str:
        """A first context, or the reason why there can be none and calls run direct."""
        unit = self._unit
        reservation = unit.limits.book(0)
        if reservation is None:
            return f"the limit of {unit.limits.max_contexts} contexts was reached by other signatures"
        try:
            context = self._build(reservation, scratch)
        except torch.OutOfMemoryError:
            return "a context did not fit into the device's memory"
        except Exception as e:
            self._device.check_error(e)
            if unit.settings.cuda_graphs:
                if isinstance(e, AnabranchError):
                    raise
                refuse_graphs(f"{type(e).__name__}: {first_line(e)}", e)
            return f"capture failed: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        if context is None:
            return f"a context exceeds memory_limit ({unit.limits.memory_limit} bytes)"
        self.pool.add(context)
        return context

    def one_more(self, reservation: Reservation) -> Context | None:
        """One more context for a call, not in the pool yet; none where another thread's build had to be waited for."""
        lock, taken, unit = process.build_lock, list[bool](), self._unit
        if self.ask_for_more is not None:
            reservation.cancel()
            self.ask_for_more()
            return None
        try:
            # One call, as far as a signal can tell: it comes before the lock is taken, or when the list says so.
            taken.extend(map(lock.acquire, _AT_ONCE))
            if not taken[0]:
                reservation.cancel()
                return None
            unit.counters.add("waits_for_build")
            with neutral(self._device, unit.index), self._device.relaxed(), _activity.building(), at_once():
                return self._build(reservation)
        except DeviceBusy:
            return None
        except Exception as e:
            # The call can do without: it runs direct. So do later ones, until trim() or warm() ask for contexts again.
            self._device.check_error(e)
            self.pool.may_grow = False
            # Its text: a handler may keep what it is given, and an exception keeps the frames that it came through.
            text = "%s: no further context was built: %s: %s"
            _log.warning(text, unit.settings.name, type(e).__name__, str(e))
            return None
        finally:
            if taken and taken[0]:
                lock.release()

    def warm(self, n: int) -> int:
        """Build until there are ``n`` or a limit is reached; returns how many there are."""
        unit, pool = self._unit, self.pool
        pool.may_grow = True
        with process.build_lock, neutral(self._device, unit.index), self._device.relaxed(), _activity.building():
            unit.watch.check()
            try:
                while len(pool) < n:
                    reservation = unit.limits.book(pool.estimate)
                    if reservation is None:
                        break
                    context = self._build(reservation)
                    if context is None:
                        unit.watch.check()
                        break
                    pool.add(context)
                    pool.release(context)
            except BaseException:
                pool.discard_added()
                raise
        return len(pool)

    def trim(self) -> None:
        """Give up those that are idle; calls in flight keep theirs, and later calls build new ones."""
        self.pool.may_grow = True
        self.pool.drain()

    def _build(self, reservation: Reservation, scratch: Scratch | None = None) -> Context | None:
        """Build the context that there is room for, not in the pool yet; None if it takes more than the limit."""
        unit = self._unit
        try:
            limited = unit.limits.memory_limit is not None
            context = self._capture(self.kernels, limited, reservation.cancel, scratch)
        except BaseException:
            reservation.cancel()  # whoever keeps the exception keeps this frame
            raise
        fits = reservation.confirm(context.nbytes)
        unit.counters.add("captures")
        self._last_uses.add_context(context.done, self.pool.events())
        if not fits:
            self.pool.may_grow = False
            return None
        if not unit.watch.unchanged():
            return None  # captured under somebody's temporary flags
        return context
