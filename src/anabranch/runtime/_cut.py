"""Where a graph of Dynamo's ended before its function did, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Cut:
    """A cut between two graphs of a function."""

    #: Dynamo's reason, in a line.
    reason: str
    #: ``file.py:12``, the model's line, or nothing.
    source: str
    #: Whether an operator did not take a symbol in the place of a number.
    is_of_symbol: bool

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Cut | None:
        """Where this graph was cut; None where the function ended there."""
        why: Any = getattr(gm, "compile_subgraph_reason", None)
        if why is None or not why.graph_break:
            return None
        stack = [frame for frame in why.user_stack or () if frame.filename]
        line = f"{stack[-1].filename.rsplit('/', 1)[-1]}:{stack[-1].lineno}" if stack else ""
        whole = str(why.reason)
        reason = (whole.splitlines() or [""])[0]
        # What the operator was given is among what Dynamo says.
        is_of_symbol = "making fake tensor call" in reason and ("SymInt" in whole or "SymFloat" in whole)
        # Dynamo's name for it is that of an instruction of Python's.
        branch = "a branch on the value of a tensor"
        return cls(branch if reason.startswith("generic_jump") else reason, line, is_of_symbol)

    def data(self) -> dict[str, Any]:
        return {"reason": self.reason, "source": self.source}

    def __str__(self) -> str:
        return f"{self.source or 'unknown line'}: {self.reason}"
