"""The process of one system: obeys commands, one JSON object a message, until told to stop. The first is ``start``.

Started by a fork server that has imported PyTorch but touched no device, so that many of them cost few imports.
Whatever the system does to its process (abort, fault, hang, leak) ends with it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

#: Seconds in which a device has to answer after an error, or it counts as lost.
_ALIVE = 10.0


def serve(connection: Connection, log: str, job: dict[str, Any]) -> None:
    """One answer for each command. An error is an answer too."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.enable(file=sys.stderr)
    os.environ.update(job["environment"])
    signal.signal(signal.SIGALRM, _ring)
    meters: dict[str, Any] = {}
    started = 0.0
    while True:
        try:
            command = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            break
        if command["do"] == "stop":
            break
        if command["do"] == "start":
            try:
                started = _start(job)
            except Exception as e:
                # A second try in this process would hang.
                connection.send_bytes(json.dumps({"error": _one_line(e)}).encode())
                break
            connection.send_bytes(b"{}")
            continue
        try:
            before = _memory(job) if meters else started
            if command["do"] == "build":
                # Again and again: a library that calls back may swallow the first.
                signal.setitimer(signal.ITIMER_REAL, command["seconds"], 5.0)
                meters[command["work"]] = meter = _meter(job, command)
                answer = meter.build()
            elif command["do"] == "warm":
                answer = meters[command["work"]].warm(command["streams"], command["seconds"])
            elif command["do"] == "latency":
                answer = meters[command["work"]].latency(command["seconds"])
            else:
                answer = meters[command["work"]].throughput(
                    command["streams"], command["seconds"], command["patience"], command["checked"]
                )
            signal.setitimer(signal.ITIMER_REAL, 0)
            # What is only cached goes back, or the processes of all systems would not fit onto the device together.
            _release(job)
            # A process may hold several works; what it grew by is this one's, and so is what it had for a while.
            held = _memory(job)
            answer["grew_mb"] = max(0.0, held - before)
            answer["passing_mb"] = max(0.0, answer.pop("peak_mb", held) - held)
        except BaseException as e:
            signal.setitimer(signal.ITIMER_REAL, 0)
            from anabranch.bench._system import NotReady

            # What cannot serve or takes too long is no fault and needs no traceback.
            if not isinstance(e, NotReady | _TooSlow):
                traceback.print_exc()
            answer = {"error": _one_line(e), "slow": isinstance(e, _TooSlow), "seconds": command.get("seconds")}
            answer["lost"] = _lost(job)
            if command["do"] == "build":
                meters.pop(command["work"], None)
        try:
            connection.send_bytes(json.dumps(answer).encode())
        except OSError:
            break
    sys.stderr.flush()
    # Not a normal exit: destructors of half-dead engines can hang, and all is said.
    os._exit(0)


class _TooSlow(BaseException):
    """A build that ran out of time. No ``Exception``, which compilers catch and work around."""


def _ring(*_: Any) -> None:
    raise _TooSlow("out of time")


def _meter(job: dict[str, Any], command: dict[str, Any]) -> Any:
    import torch
    import torch._inductor.config as inductor

    from anabranch.bench._measure import Meter
    from anabranch.bench._system import find_system
    from anabranch.bench._work import find_work

    # Set here, as importing PyTorch may have read the environment already.
    inductor.compile_threads = job["cores"]
    if job["torch_threads"]:
        torch.set_num_threads(job["torch_threads"])
    work, system = find_work(command["work"]), find_system(job["system"])
    dtype = getattr(torch, job["dtype"])
    deadline = time.monotonic() + command["seconds"]
    return Meter(work, system, job["device"], dtype, command["streams"], deadline)


def _start(job: dict[str, Any]) -> float:
    """Create the device's context, which is nobody's. Megabytes before the first build: the context, or on a CPU none.

    Whoever commands several processes lets them do this one at a time: of twenty contexts that are created at once,
    most fail for want of memory that is there.
    """
    import torch

    if job["device"] != "cuda":
        return 0.0
    torch.zeros(1, device="cuda")
    return _memory(job)


def _lost(job: dict[str, Any]) -> bool:
    """Whether nothing more can come from this process: after a device's fault every call on it fails, or hangs."""
    import torch

    if job["device"] != "cuda":
        return False
    failed: list[bool] = []

    def synchronize() -> None:
        try:
            torch.cuda.synchronize()
        except Exception:
            failed.append(True)
        else:
            failed.append(False)

    thread = threading.Thread(target=synchronize, daemon=True)
    thread.start()
    thread.join(_ALIVE)
    return failed != [False]


def _release(job: dict[str, Any]) -> None:
    import torch

    if job["device"] == "cuda":
        torch.cuda.empty_cache()


def _memory(job: dict[str, Any]) -> float:
    from anabranch.bench._host import memory_mb

    return memory_mb(job["device"] == "cuda")


def _one_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {' '.join(lines)}"[:300]
