"""Whichever TensorRT is installed: ``tensorrt``, or ``tensorrt_rtx``, which builds engines without a GPU as well."""

from __future__ import annotations

import importlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from anabranch.errors import BuildError, InputError

PACKAGES = ("tensorrt", "tensorrt_rtx")
_log = logging.getLogger("anabranch.tensorrt")


@dataclass(frozen=True)
class Library:
    """An installed TensorRT. ``api`` is its module; ``logger`` the one that all its objects report to."""

    name: str
    version: str
    api: Any
    logger: Any

    @property
    def builds_ahead(self) -> bool:
        """Whether it can build for a GPU that is not there."""
        return hasattr(self.api, "ComputeCapability")

    @property
    def keeps_float32(self) -> bool:
        """Whether it computes in float32 where TF32 is not allowed.

        TensorRT-RTX 1.4 was seen to compute products and convolutions in TF32 nevertheless, on an H200
        (``benchmarks/results/tensorrt_float32_h200.json``). Other versions of it were not looked at.
        """
        return self.name != "tensorrt_rtx"

    @contextmanager
    def complaints(self) -> Iterator[list[str]]:
        """The errors that it reports to this thread meanwhile, which are then whoever asked's to pass on."""
        before = getattr(self.logger.heard, "errors", None)
        self.logger.heard.errors = mine = list[str]()
        try:
            yield mine
        finally:
            self.logger.heard.errors = before


@cache
def library() -> Library:
    """The TensorRT of this process.

    ``ANABRANCH_TENSORRT`` names the package to take; otherwise it is the first of ``tensorrt`` and ``tensorrt_rtx``
    that can be imported. Raises :class:`~anabranch.errors.BuildError` where there is none.
    """
    wanted = os.environ.get("ANABRANCH_TENSORRT", "")
    if wanted and wanted not in PACKAGES:
        raise InputError(f"ANABRANCH_TENSORRT={wanted!r} is set; expected one of {', '.join(PACKAGES)}, or nothing")
    reasons = []
    for name in [wanted] if wanted else PACKAGES:
        try:
            api = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as e:
            reasons.append(f"import {name}: {(str(e).splitlines() or [type(e).__name__])[0]}")
            continue
        return Library(name, str(api.__version__), api, _logger(api))
    raise BuildError(
        f"backend='tensorrt' needs TensorRT, which cannot be imported here ({'; '.join(reasons)})."
        " Do: pip install 'anabranch[tensorrt]'"
    )


#: Warnings of what is done on purpose, or comes with an error.
_KNOWN = re.compile(r"Make sure (in|out)put \S+ has Int64 binding|first input has type \S+ but second")


def _logger(api: Any) -> Any:
    """TensorRT's messages go to Python's ``logging``, under the name ``anabranch.tensorrt``."""
    severity = api.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.CRITICAL,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
        severity.VERBOSE: logging.DEBUG - 5,
    }

    class Logger(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            #: Of each thread: where its errors go instead.
            self.heard = threading.local()

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            errors = getattr(self.heard, "errors", None)
            if errors is not None and level >= logging.ERROR:
                errors.append(message)
                level = logging.DEBUG
            elif level == logging.WARNING and _KNOWN.search(message):
                level = logging.DEBUG
            # An exception must not go back through the library's C++.
            try:
                _log.log(level, "%s", message)
            except Exception:
                logging.raiseExceptions = False

    return Logger()
