"""Captures of callers: what their graphs have baked in, and when it may go."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from anabranch import _sync
from anabranch.devices._device import Lane
from anabranch.devices._stream import Stream
from anabranch.devices.cuda._calls import checked, rt
from anabranch.devices.cuda._graph import capture_on


class _CallerCapture:
    """One capture of a caller's: what its graph has baked in."""

    def __init__(self) -> None:
        self.semaphore = (ctypes.c_char * 64)()  # sizeof(sem_t) is 32 on 64-bit Linux
        self.kept: list[Any] = _sync.list_("kept")
        self.lanes: dict[int, Lane] = _sync.dict_("lanes of a capture")


class CallerCaptures:
    """What callers' own graphs have baked in, kept until CUDA says that the graph is gone.

    A CUDA *user object* is retained by the graph under capture and by every executable made of it. Its destructor runs
    on a thread of the driver, where Python must not run (at interpreter exit least of all), so it is libc's own
    ``sem_post``: it raises a semaphore here, and :meth:`collect` looks at the semaphores later.
    """

    def __init__(self, release_lane: Callable[[Lane], None]) -> None:
        self._libc = ctypes.CDLL(None)
        self._sem_post = ctypes.cast(self._libc.sem_post, ctypes.c_void_p).value
        self._release_lane = release_lane
        #: By CUDA's id of the capture, unique in the process.
        self._captures: dict[int, _CallerCapture] = _sync.dict_("captures of callers")

    def of(self, stream: Stream) -> _CallerCapture:
        """The capture under way on ``stream``."""
        identity, graph = capture_on(stream)
        capture = self._captures.get(int(identity))
        if capture is not None:
            return capture
        capture = _CallerCapture()
        self._libc.sem_init(ctypes.byref(capture.semaphore), 0, 0)
        user_object = checked(
            "cudaUserObjectCreate",
            rt.cudaUserObjectCreate(
                ctypes.addressof(capture.semaphore),
                self._sem_post,
                1,
                rt.cudaUserObjectFlags.cudaUserObjectNoDestructorSync,
            ),
        )
        # From here on the driver may write to the semaphore: it has to be kept before anything else can fail.
        self._captures[int(identity)] = capture
        move = rt.cudaUserObjectRetainFlags.cudaGraphUserObjectMove
        checked("cudaGraphRetainUserObject", rt.cudaGraphRetainUserObject(graph, user_object, 1, move))
        return capture

    def collect(self) -> None:
        """Let go of what dead graphs kept. Runs in garbage collections: no locks."""
        for identity, capture in list(self._captures.items()):
            if self._libc.sem_trywait(ctypes.byref(capture.semaphore)) == 0:
                self._captures.pop(identity, None)
                for lane in capture.lanes.values():
                    self._release_lane(lane)
