"""What half precision does to one operator: what it is given is rounded, it is computed in half, nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from anabranch.calibrate._reference import OF_BITS, Reference
from anabranch.export import BATCH_NORMS, packet


@dataclass
class Finding:
    """Of one operator, over all samples. Counts are of elements.

    ``place``: as :class:`anabranch.Mixed` takes it; ``source``: the model's line. ``depth``: its number in the graph.
    """

    place: str
    depth: int
    source: str
    flops: int = 0
    elements: int = 0
    #: Infinite in half, and finite in the reference.
    overflow: int = 0
    nan: int = 0
    #: Infinite in the reference as well.
    infinite: int = 0
    #: Zero in half and not in the reference; and those that are left with fewer digits.
    flushed: int = 0
    subnormal: int = 0
    #: Whether its operands were in range: what it does to the range is its own doing.
    starts: bool = False
    #: Why it cannot be computed in half, if so.
    refused: str = ""
    #: Of its result, relative to the norm; infinite where it is not finite.
    error: float = 0.0
    #: Of the model's results, where it alone is in half.
    effect: float = 0.0
    #: Of the sum of all squared effects.
    share: float = 0.0
    half: bool = False

    @property
    def leaves_the_range(self) -> bool:
        return bool(self.overflow or self.nan)

    @property
    def rank(self) -> tuple[Any, ...]:
        """Worst first: those at which values leave the range, the first of them before those that pass it on; then by
        the error that they cause."""
        if self.leaves_the_range:
            return (0 if self.starts else 1, self.depth)
        return (2, -self.effect, self.depth)


class InHalf:
    """Computes operators in half precision on a reference's operands."""

    def __init__(self, dtype: torch.dtype, reference: Reference) -> None:
        self._dtype, self._reference = dtype, reference
        self._limits = torch.finfo(dtype)

    def compute(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What comes of it, as the reference's again. Raises what an operator raises that knows no half precision."""
        if node.target in OF_BITS:
            raise TypeError("half precision has other bits than float32")
        norms = packet(node) in BATCH_NORMS  # whose statistics stay in float32
        args = [self._rounded(n, x, not norms or i == 0) for i, (n, x) in enumerate(zip(node.args, args, strict=True))]
        kwargs = {k: self._rounded(node.kwargs[k], x, not norms) for k, x in kwargs.items()}
        target: Any = node.target
        return self._reference.widened(target(*args, **kwargs))

    def _rounded(self, argument: Any, value: Any, to_half: bool) -> Any:
        """``value`` of a node's ``argument``: what the model has in float32 in half precision, or in float32."""
        dtype = self._dtype if to_half else torch.float32
        if not isinstance(argument, fx.Node):
            if isinstance(argument, list | tuple):
                return type(value)(self._rounded(n, x, to_half) for n, x in zip(argument, value, strict=True))
            return value
        known = argument.meta.get("val")
        if isinstance(known, torch.Tensor) and known.dtype is not torch.float32:
            return value
        return pytree.tree_map_only(
            torch.Tensor, lambda x: x.to(dtype) if x.dtype is self._reference.dtype else x, value
        )

    def compare(self, finding: Finding, operands: list[torch.Tensor], actual: Any, expected: Any) -> None:
        """Add to ``finding`` what one sample shows."""
        pairs = [
            (a, e)
            for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
            if isinstance(e, torch.Tensor) and e.dtype is self._reference.dtype and e.numel()
        ]
        before = finding.leaves_the_range
        for a, e in pairs:
            finite = e.isfinite()
            finding.elements += e.numel()
            finding.overflow += int((a.isinf() & finite).sum())
            finding.nan += int((a.isnan() & ~e.isnan()).sum())
            finding.infinite += int((a.isinf() & e.isinf()).sum())
            finding.flushed += int(((a == 0) & (e != 0)).sum())
            finding.subnormal += int(((a != 0) & (e.abs() < self._limits.tiny)).sum())
        finding.error = max(finding.error, relative_error([a for a, _ in pairs], [e for _, e in pairs]))
        if finding.leaves_the_range and not before:
            finding.starts = not any(
                bool((x.isfinite() & ~x.to(self._dtype).isfinite()).any())
                for x in operands
                if x.dtype is self._reference.dtype
            )


def relative_error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest of the tensors: the norm of the difference over that of what is expected, where that is finite.
    Infinite where something is not finite that should be."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return float("inf")
        finite = e.isfinite()
        a, e = a.double().where(finite, 0.0), e.double().where(finite, 0.0)
        if not bool(a.isfinite().all()):
            return float("inf")
        off, norm = float((a - e).norm()), float(e.norm())
        worst = max(worst, off / norm if norm else float(off > 0))
    return worst


#: What somebody who waits is told: how many of how many operators are done.
Progress = Callable[[int, int], None]
