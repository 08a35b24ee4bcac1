"""Engines that were built before, by the hash of all that they depend on.

An entry is one file: a line of JSON (what it is for, the SHA-256 of the rest), then the bytes. An engine is machine
code, so an entry is used only if nobody but this user can have written it (:mod:`anabranch._trust`), it says that it is
for exactly what is wanted, and it is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from anabranch import _trust
from anabranch._toolchain import cache_root

_log = logging.getLogger("anabranch.tensorrt")
_FORMAT = "anabranch-tensorrt 1"


def folder() -> Path:
    """``$ANABRANCH_TENSORRT_CACHE``, or ``$XDG_CACHE_HOME/anabranch/tensorrt``, by default under ``~/.cache``."""
    given = os.environ.get("ANABRANCH_TENSORRT_CACHE", "")
    return Path(given) if given else cache_root() / "anabranch" / "tensorrt"


class Cache:
    """A folder of entries. Any number of processes may share it: an entry appears whole or not at all."""

    def __init__(self, where: Path | None = None) -> None:
        self.folder = where or folder()

    def path(self, kind: str, key: Mapping[str, object]) -> Path:
        return self.folder / f"{kind}-{_digest(_canonical(key).encode())[:32]}.bin"

    def load(self, kind: str, key: Mapping[str, object]) -> bytes | None:
        """The bytes stored for ``key``; None, with a warning where there is something else, if there are none."""
        path = self.path(kind, key)
        try:
            why = _trust.objection(path, self._root())
            if why:
                self._refuse(path, why)
                return None
            with path.open("rb") as file:
                header, content = file.readline(), file.read()
        except FileNotFoundError:
            return None
        except OSError as e:
            self._refuse(path, f"it cannot be read: {e}")
            return None
        try:
            said = json.loads(header)
            form, stored, digest = said["format"], said["key"], said["sha256"]
        except (ValueError, KeyError, TypeError):
            self._refuse(path, "it is damaged, or no entry of this cache")
            return None
        if form != _FORMAT or stored != json.loads(_canonical(key)):
            self._refuse(path, "it is for something else")
            return None
        if digest != _digest(content):
            self._refuse(path, "it is damaged")
            return None
        return content

    def store(self, kind: str, key: Mapping[str, object], content: bytes) -> None:
        """Keep ``content``. A cache that cannot be written to costs a warning, and the next process a build."""
        header = {"format": _FORMAT, "key": json.loads(_canonical(key)), "sha256": _digest(content)}
        path = self.path(kind, key)
        try:
            _trust.make_folders(self.folder, self._root())
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".new-", delete=False) as file:
                try:
                    file.write(json.dumps(header, sort_keys=True).encode() + b"\n" + content)
                    file.flush()
                    os.replace(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as e:
            _log.warning("the engine is not kept for the next time: %s", e)

    def forget(self, kind: str, key: Mapping[str, object], why: str) -> None:
        """The entry cannot be used after all."""
        self._refuse(self.path(kind, key), why)

    def _root(self) -> Path:
        """Up to where folders are looked at: a folder that was named is looked at alone."""
        return cache_root() if self.folder.is_relative_to(cache_root()) else self.folder

    def _refuse(self, path: Path, why: str) -> None:
        _log.warning("%s: not used, and made anew: %s", path, why)


def _canonical(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
