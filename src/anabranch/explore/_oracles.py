"""What is wrong with a run: each oracle looks at a finished one, in the process that made it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from anabranch import _judge
from anabranch.explore._run import Failure
from anabranch.race import Detector

ORACLES = ("values", "race", "poison", "deadlock", "host-wait")
"""What `oracles=` may name. ``error`` (an exception), ``crash`` and ``hang`` are always on."""


class Result(NamedTuple):
    """What the program returned, on the CPU, and how many poisoned elements each leaf held."""

    leaves: list[Any]
    structure: str
    poisoned: list[int]


def collect(value: Any, core: Any) -> Result:
    """Fetch the returned pytree; every queue is empty by now.

    Raises :class:`~anabranch.errors.CannotJudge` for a tensor that cannot be compared."""
    leaves, spec = pytree.tree_flatten(value)
    _judge.tensors([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    poisoned = [_poisoned(leaf, core) for leaf in leaves]
    return Result(
        [leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], str(spec), poisoned
    )


def _poisoned(leaf: Any, core: Any) -> int:
    if core is None or not isinstance(leaf, torch.Tensor) or leaf.device.type == "cpu":
        return 0
    return int(core.poisoned(leaf))


def outcome(result: Result | None, failures: Sequence[Failure], end: str) -> str:
    """A digest: equal for equal values, in any process."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr([end, *((f.oracle, f.message) for f in failures if f.oracle != "race")]).encode())
    if result is not None:
        digest.update(result.structure.encode())
        for leaf in result.leaves:
            if isinstance(leaf, torch.Tensor):
                digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
                digest.update(_bytes(leaf))
            else:
                text = repr(leaf)
                digest.update((type(leaf).__qualname__ if " at 0x" in text else text).encode())
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.resolve_conj().resolve_neg().contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def values(result: Result, reference: Result) -> Failure | None:
    """Compare bit for bit: -0.0 is not 0.0; NaN equals NaN, whatever its payload."""
    if result.structure != reference.structure:
        return Failure("values", f"returned {result.structure}, the reference is {reference.structure}")
    for index, (got, wanted) in enumerate(zip(result.leaves, reference.leaves, strict=True)):
        where = f"output {index}" if len(result.leaves) > 1 else "the output"
        if not isinstance(wanted, torch.Tensor) or not isinstance(got, torch.Tensor):
            same = isinstance(got, float | complex) and isinstance(wanted, float | complex)
            if got is not wanted and got != wanted and not (same and not _judge.differences(got, wanted)):
                return Failure("values", f"{where} is {got!r}, the reference is {wanted!r}")
            continue
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return Failure(
                "values",
                f"{where} is {got.dtype} {tuple(got.shape)}, the reference is {wanted.dtype} {tuple(wanted.shape)}",
            )
        different = _judge.unequal(got, wanted)
        if bool(different.any()):
            at = tuple(int(n) for n in different.nonzero()[0][: got.dim()])
            detail = "" if bool(_judge.unequal(got, torch.zeros_like(got)).any()) else "; all zeros"
            return Failure(
                "values",
                f"{where} differs from the reference in {int(different.sum())} of {different.numel()}"
                f" {'parts' if got.is_complex() else 'elements'}{detail};"
                f" the first is {at}: {got[at].item()!r}, not {wanted[at].item()!r}",
            )
    return None


def poison(result: Result, reference: Result | None) -> Failure | None:
    """Memory that was never written, or was freed, reached what the program returned."""
    for index, count in enumerate(result.poisoned):
        if count:
            return Failure("poison", f"output {index} holds {count} poisoned elements: fresh or freed memory was read")
    if reference is not None and reference.structure == result.structure:
        for index, (got, wanted) in enumerate(zip(result.leaves, reference.leaves, strict=True)):
            if isinstance(got, torch.Tensor) and isinstance(wanted, torch.Tensor) and got.is_floating_point():
                count = int(got.isnan().sum())
                if count and not bool(wanted.isnan().any()):
                    return Failure("poison", f"output {index} has {count} NaN, the reference none")
    return None


def race(trace: bytes, captures: Sequence[bytes] = ()) -> Failure | None:
    """Judge the trace, and what each capture recorded (the order between its lanes) by itself."""
    for number, data in enumerate([trace, *captures]):
        if not data:
            continue
        detector = Detector()
        detector.feed_bytes(data)
        result = detector.finish()
        if result.verdict != "clean":
            first = result.reports[0]
            where = f" inside capture {number}" if number else ""
            found = f"{len(result.reports)} distinct findings" if len(result.reports) > 1 else "1 finding"
            return Failure(
                "race",
                f"{first.verdict} on {first.subject}{where}: {first.missing} ({found})",
                "\n\n".join(str(report) for report in result.reports[:5]),
            )
    return None
