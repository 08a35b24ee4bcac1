"""`controlled`: one schedule in this very process, for programs that are to be run rather than explored."""

from __future__ import annotations

import gc
import threading
from _thread import allocate_lock
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from anabranch.explore import _conductor
from anabranch.explore._actor import local
from anabranch.explore._conductor import Conductor
from anabranch.explore._device import device
from anabranch.explore._errors import ExploreError
from anabranch.explore._explore import observed
from anabranch.explore._run import End
from anabranch.explore._schedulers import Scheduler


@contextmanager
def controlled(scheduler: Scheduler) -> Iterator[Conductor]:
    """Control the calling thread, and the threads that it starts, by ``scheduler``; waits for these at the end.

    Work that is still queued on the device then stays queued. Threads: one such block at a time in a process, not
    inside an exploration. Raises :class:`~anabranch.explore.ExploreError` where nothing can go on any more; the threads
    that are stuck stay so, as daemons. Where the calling thread is itself stuck in the device, through which nothing
    can be raised, the process ends with that line on stderr and exit status 2; with 130 where it was interrupted there.
    """
    if _conductor.active is not None:
        raise ExploreError("controlled() was called inside another controlled block or an exploration; call it outside")
    main = threading.current_thread()

    def finish(end: End) -> NoReturn:
        conductor.broken = f"nothing can go on:\n{conductor.stuck()}" if end == "deadlock" else f"ended by {end}"
        if threading.current_thread() is not main:
            conductor.wake_main()
            never = allocate_lock()
            while True:
                never.acquire()
        raise ExploreError(conductor.broken)

    # A garbage collection would come at a moment of its own, in the middle of a decision too, and what it drops asks
    # the device about events: the run would not be the same twice.
    collecting = gc.isenabled()
    gc.disable()
    with observed():
        conductor = Conductor(scheduler, core=device(), max_steps=1 << 62, finish=finish, in_process=True)
        conductor.enter()
        try:
            yield conductor
        finally:
            try:
                if conductor.broken is None:
                    conductor.wait_for_all()
            finally:
                conductor.leave()
                local.actor = None
                if collecting:
                    gc.enable()
