"""What is one per process: the build lock, and how calls meet forks and the interpreter's end."""

from __future__ import annotations

import _thread
import atexit
import dis
import functools
import importlib
import itertools
import os
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch

from anabranch import _activity, _sync
from anabranch.devices import Device
from anabranch.errors import EngineClosed, InputError


class _Forked(Protocol):
    """Has state that a forked child must set right before it goes on."""

    def after_fork(self) -> None:
        """In the child, on its only thread. Other threads of the parent may have held its locks."""


class OfOneProcess:
    """What has threads, memory and streams of its process: no copy can be made of it, and no other process have it."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise InputError(
            f"{self!r} was to be copied or pickled, and it belongs to this process. Compile the model where it is"
            " needed; torch.export.save() keeps one in a file, which compile() takes."
        )


@_sync.atomics("is_exiting")
class _Process:
    """Lock order: Dynamo's (see :meth:`alone`), ``build_lock``, then a pool's, then ``Limits``'.

    ``build_lock``: compiling and capturing happen one at a time, because Inductor's autotuning and a library's first
    use are not meant for two threads. A fork makes it anew in the child: another thread of the parent may have held it.
    """

    def __init__(self) -> None:
        self.generation = 0
        #: Whether the interpreter is ending. A call looks here once it can be seen on its thread's stack.
        self.is_exiting = False
        #: The thread that is compiling, with the build lock held. A fork copies it as it was.
        self._compiling: int | None = None
        #: Whether this process was forked in the middle of another thread's compile.
        self._forked_amid = False
        # In the order of their registration, so that a child makes their locks in the same order in every run.
        self._forked: weakref.WeakValueDictionary[int, _Forked] = weakref.WeakValueDictionary()
        self._serial = itertools.count()
        self._watched: list[tuple[Callable[[], None], Callable[[], int]]] = []
        self.renew_locks()

    def renew_locks(self) -> None:
        """Make what threads share here anew. Nothing may be compiling and no call be under way in another thread."""
        self.build_lock = _sync.rlock("build")

    def register(self, owner: _Forked) -> None:
        """Call ``owner.after_fork()`` in each forked child, for as long as ``owner`` lives."""
        self._forked[next(self._serial)] = owner

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the build lock, and the lock under which ``torch.compile`` compiles in any thread of the process.

        PyTorch's compilers keep what they are doing in variables of the process, so two compiles at once fail. A thread
        that compiles a function of its own may come here with PyTorch's lock held, so nobody waits for that lock with
        the build lock in hand.
        """
        # Loads half of the compiler, so not at import.
        theirs = importlib.import_module("torch._dynamo.convert_frame").compile_lock
        _keep_dynamo_out()
        while True:
            taken: list[bool] = []
            with self.build_lock:
                try:
                    # One call, as far as a signal can tell.
                    taken.extend(map(theirs.acquire, (False,)))
                    if taken[0]:
                        yield
                        return
                finally:
                    if taken and taken[0]:
                        theirs.release()
            with theirs:
                pass

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Be :meth:`alone` to run PyTorch's export and compilers, or raise :class:`EngineClosed`.

        A fork in another thread meanwhile leaves the child with their locks held and their work half done, and no
        thread that would go on with it.
        """
        with self.alone():
            if self._forked_amid:
                raise EngineClosed(
                    "this process was forked while another thread of its parent compiled, which leaves PyTorch's"
                    " compilers unusable here. What was compiled before still runs. Call engine.warm(...) for every"
                    " signature before forking, or start children with multiprocessing's 'spawn'."
                )
            before, self._compiling = self._compiling, threading.get_ident()
            try:
                yield
            finally:
                self._compiling = before

    def after_fork(self) -> None:
        self.generation += 1
        if self._compiling not in (None, threading.get_ident()):
            self._forked_amid = True
        self._compiling = None
        dynamo: Any = sys.modules.get("torch._dynamo.convert_frame")
        if dynamo is not None and not dynamo.compile_lock._is_owned():
            dynamo.compile_lock._at_fork_reinit()  # another thread of the parent may have held it
        inductor: Any = sys.modules.get("torch._inductor.async_compile")
        if inductor is not None:
            # Its threads are the parent's; without a new pool the child would wait for them for ever.
            getattr(inductor.AsyncCompile.pool, "cache_clear", bool)()
        self.renew_locks()
        for owner in list(self._forked.values()):
            owner.after_fork()

    def wait_for_exit(self) -> None:
        """At interpreter exit a call of a daemon thread stops here, for good.

        The interpreter ends daemon threads by unwinding them wherever they next want the GIL; inside PyTorch's C++
        code that aborts the process. So the exit waits for calls under way, and no new one starts. A model's call of
        an engine is a part of the call that it is made in.
        """
        if threading.current_thread() is threading.main_thread() or _activity.calls_on(sys._getframe(1)) > 1:
            return
        # Not one that an explorer could observe: those are Python, in which a thread can lose the GIL.
        lock = _thread.allocate_lock()
        lock.acquire()
        _stop(lock)

    def watch(self, close: Callable[[], None], under_way: Callable[[], int]) -> None:
        """Calls that are no engine's in Python: ``close`` sends new ones there, ``under_way`` counts the others."""
        self._watched.append((close, under_way))

    def at_exit(self) -> None:
        self.is_exiting = True
        for close, _ in self._watched:
            close()
        end = time.monotonic() + 10.0  # a call that hangs must not keep the process alive
        while self._others() and time.monotonic() < end:
            time.sleep(0.001)

    def _others(self) -> bool:
        """Whether calls of other threads are under way that have not stopped."""
        here, frames = threading.get_ident(), sys._current_frames().items()
        python = any(_activity.calls_on(f) for thread, f in frames if thread != here and not _has_stopped(f))
        return python or any(under_way() for _, under_way in self._watched)


def _stop(lock: Any) -> None:
    lock.acquire()


#: Where :func:`_stop` calls.
_CALL = next(i.offset for i in dis.get_instructions(_stop) if "CALL" in i.opname)


def _has_stopped(frame: types.FrameType) -> bool:
    """Whether a thread waits in :func:`_stop`, and so wants the GIL no more. One on its way there may have lost it:
    whoever looks has it."""
    return frame.f_code is _stop.__code__ and frame.f_lasti >= _CALL


@functools.cache
def _keep_dynamo_out() -> None:
    """A call of an engine in a function that ``torch.compile`` traces runs as it is: Dynamo is not to look into it."""
    rules = importlib.import_module("torch._dynamo.trace_rules")
    for part in ("_sync", "_activity", "export", "devices", "backends", "runtime"):
        rules.add(f"anabranch.{part}")


process = _Process()
os.register_at_fork(after_in_child=process.after_fork)
atexit.register(process.at_exit)
_sync.on_renew(process.renew_locks)


@contextmanager
def neutral(device: Device, index: int) -> Iterator[None]:
    """The caller's modes off (autograd, inference mode, autocast) and the engine's device current.

    Tensors made here are ordinary ones, and the same operators run whatever the caller is in the middle of.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.kind, enabled=False):
        # A graph may hold numbers as tensors on the CPU, whatever its device.
        with torch.autocast("cpu", enabled=False), device.on_device(index):
            yield


def is_neutral(device: Device, index: int) -> bool:
    """Whether a call may run without :func:`neutral`. Autograd may stay on: no input requires grad, and kernels whose
    weights do turn it off."""
    return not (
        torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled(device.kind)
        or torch.is_autocast_enabled("cpu")
        or device.current_index() != index
    )
