"""The parent's end of a worker: starts it, talks to it, and tells how it ended."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from anabranch.bench._worker import serve

#: Last lines of a crashed worker's stderr that are kept.
_LINES = 6


class Crashed(Exception):
    """The worker's process ended by itself. ``how``: its signal or exit status; ``lines``: its last words."""

    def __init__(self, how: str, lines: list[str]) -> None:
        super().__init__(how)
        self.how, self.lines = how, lines


class Hung(Exception):
    """No answer in time; the process was killed."""


def context() -> Any:
    """The fork server that workers come from."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["anabranch.bench._preload"])
    return made


class Worker:
    """One process. Owned by the thread that made it; nothing here is shared between threads."""

    def __init__(self, job: dict[str, Any], log: Path) -> None:
        self.log = log
        ours, theirs = multiprocessing.Pipe()
        self.connection: Connection = ours
        self.process = context().Process(target=serve, args=(theirs, str(log), job), daemon=False)
        self.process.start()
        theirs.close()
        self.since = time.monotonic()

    def send(self, **command: Any) -> None:
        self.since = time.monotonic()
        try:
            self.connection.send_bytes(json.dumps(command).encode())
        except OSError as e:
            raise self._crashed() from e

    def receive(self, timeout: float) -> dict[str, Any]:
        """The answer to the last command. Raises :class:`Crashed`, or :class:`Hung` after ``timeout`` seconds."""
        if not wait([self.connection, self.process.sentinel], max(0.0, timeout)):
            self.kill()
            raise Hung
        try:
            answer: dict[str, Any] = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as e:
            raise self._crashed() from e
        return answer

    def ask(self, timeout: float, **command: Any) -> dict[str, Any]:
        self.send(**command)
        return self.receive(timeout)

    def _crashed(self) -> Crashed:
        self.process.join(10.0)
        code = self.process.exitcode
        if code is None:
            self.kill()
            return Crashed("closed its pipe and went on", self.last_lines())
        how = f"exit status {code}"
        if code < 0:
            try:
                how = signal.Signals(-code).name
            except ValueError:
                how = f"signal {-code}"
        return Crashed(how, self.last_lines())

    def gone(self, error: str) -> Crashed:
        """A process that answers, but whose device no longer does: it is ended."""
        self.kill()
        return Crashed(error, self.last_lines())

    def last_lines(self) -> list[str]:
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        lines = [line.rstrip()[:200] for line in text.splitlines() if line.strip()]
        return lines[-_LINES:]

    def stop(self) -> None:
        """Let it end; does not wait."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(b'{"do": "stop"}')

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10.0)
