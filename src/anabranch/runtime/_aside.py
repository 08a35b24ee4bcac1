"""Work that no call waits for: it is done on a thread of its own, one thing after another, while there is any."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from anabranch import _sync
from anabranch.runtime._process import process

_log = logging.getLogger("anabranch")
#: Threads at work, of all engines.
_at_work: set[int] = _sync.set_("threads that build aside")


@_sync.atomics("_is_closed")
class Aside:
    """Threads: any may :meth:`ask`. A job must not keep alive what it builds for: it looks whether that is still there.

    The thread begins with the first job and ends with the last one, so an engine at rest has none. At the interpreter's
    exit it stops after the job that it is at, for which the exit waits.
    """

    def __init__(self) -> None:
        self._lock = _sync.lock("jobs aside")
        self._jobs = _sync.deque_("jobs aside")
        self._has_thread = False
        self._has_warned = False
        self._is_closed = False
        process.register(self)

    def ask(self, job: Callable[[], None]) -> None:
        """Do ``job`` when those before it are done. What it raises is logged.

        Where no thread can be started, the job waits for the next one that is asked for.
        """
        with self._lock:
            if self._is_closed:
                return
            self._jobs.append(job)
            if self._has_thread:
                return
            self._has_thread = True
        try:
            threading.Thread(target=self._work, name="anabranch builds", daemon=True).start()
        except BaseException as e:
            is_refused = isinstance(e, RuntimeError)
            with self._lock:
                self._has_thread = False  # the next one to ask tries again
                is_news = is_refused and not self._has_warned
                self._has_warned |= is_refused
            if not is_refused:
                raise
            # Too many threads, or the interpreter's exit: the call that asks needs none of this.
            if is_news and not process.is_exiting:
                _log.warning("what calls ask for is not built until a thread can be started: %s", str(e))

    def close(self) -> None:
        """Forget the jobs that are not begun, and all later ones. The job under way is not waited for."""
        self._is_closed = True
        with self._lock:
            self._jobs.clear()

    def wait(self) -> None:
        """Block until nothing is left to do, or nobody is there to do it. Not on the thread that builds."""
        done = _sync.event("jobs aside")
        self.ask(done.set)
        while not self._is_closed and not done.wait(timeout=1.0) and self._is_at_work():
            pass

    def _is_at_work(self) -> bool:
        with self._lock:
            return self._has_thread

    def _work(self) -> None:
        here = threading.get_ident()
        _at_work.add(here)
        try:
            while True:
                with self._lock:
                    if not self._jobs or self._is_closed or process.is_exiting:
                        self._has_thread = False
                        return
                    job = self._jobs.popleft()
                try:
                    job()
                except Exception as e:
                    # Its text: a handler may keep what it is given, and an exception keeps frames.
                    _log.warning("what was to be built aside was not: %s: %s", type(e).__name__, str(e))
                del job
        finally:
            _at_work.discard(here)

    def after_fork(self) -> None:
        _at_work.clear()  # the threads of the parent's are not here
        self._lock = _sync.lock("jobs aside")
        self._jobs.clear()
        self._has_thread = False


process.watch(lambda: None, lambda: len(_at_work))
