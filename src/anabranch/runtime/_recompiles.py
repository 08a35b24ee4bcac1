"""What Dynamo compiles for nothing, and what it compiles no more: functions past its limit, which it runs in eager,
with a line in the log only."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

from torch import fx

from anabranch import _sync
from anabranch.errors import RecompileLimit

#: Functions that our backends have graphs of, as Dynamo names them in its messages.
_ours: dict[str, None] = _sync.dict_("functions of ours")
_past: dict[str, str] = _sync.dict_("functions past the limit")


def name_of(code: Any) -> str:
    """A function as Dynamo names it."""
    return f"'{code.co_name}' ({code.co_filename}:{code.co_firstlineno})"


class _Limits(logging.Handler):
    """Hears of each function that reaches a limit. The message is Dynamo's own, and nobody else says it."""

    def emit(self, record: logging.LogRecord) -> None:
        args = record.args
        if not str(record.msg).startswith("torch._dynamo hit config.") or not isinstance(args, tuple) or len(args) < 4:
            return
        limit, most, function, reason = args[:4]
        reason = (str(reason).splitlines() or [""])[0].strip()
        if function not in _ours or function in _past:
            return
        _past[str(function)] = f"config.{limit} ({most}): {reason}"
        warnings.warn(
            f"{function} was compiled {most} times (torch._dynamo.config.{limit}), and is compiled no more: calls that"
            f" need another graph run in eager. The last reason was: {reason}. Have it vary less, or raise the limit.",
            RecompileLimit,
            stacklevel=2,
        )


def watch_limits(gm: fx.GraphModule) -> None:
    """Warn of the function that this graph of Dynamo's is a part of, should it reach a limit. Called by a backend."""
    from torch._dynamo import convert_frame

    if not any(isinstance(handler, _Limits) for handler in convert_frame.log.handlers):
        convert_frame.log.addHandler(_Limits())
    code = _code_in_compilation()
    if code is not None:
        _ours[name_of(code)] = None


def keep_entries_in_place() -> None:
    """Have Dynamo look through a function's graphs in one order, from now on, in the whole process.

    It moves the graph that it has found to the front of their list. A check of guards lets other threads run: one of
    them moves a graph that this thread has not come to before the place where it is, so that this thread finds none,
    compiles what is there already, and at last is past the limit (pytorch#123177, also without this package).
    """
    from torch._C._dynamo import eval_frame

    eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]


def past_limit() -> dict[str, str]:
    """By function, which limit it is past, and the last reason for another compile."""
    return dict(_past)


def _code_in_compilation() -> Any:
    """The function that this thread's Dynamo is at: its compiler's frame has it."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in ("_compile", "_compile_inner") and frame.f_globals.get("__name__", "").endswith(
            "_dynamo.convert_frame"
        ):
            return frame.f_locals.get("code")
        frame = frame.f_back
    return None
