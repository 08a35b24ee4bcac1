"""Recordings are tried before anybody relies on them: on fresh inputs at other addresses, into poisoned outputs between
guards, bit for bit against a direct run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from anabranch.devices._device import Scratch
from anabranch.devices.cuda._captured import BLOCK, GUARD, POISON, Captured, place
from anabranch.devices.cuda._recording import Computation, Recording
from anabranch.export import TensorSpec


def prove(
    recording: Recording,
    scratch: Scratch,
    kernels: Computation,
    specs: Sequence[TensorSpec],
    workspaces: bool,
    captured: Sequence[Captured],
    rounds: int,
) -> str:
    """Run it bound to fresh tensors and compare bits with ``kernels``; why it is wrong, or nothing. The host waits.

    Meanwhile the tensors of all that was ``captured`` are poison: who has an address of theirs left reads NaN or is
    seen writing. Noise is tried as every capture had it. (Not with bits of our own: if they were an address after all,
    a kernel would fault, which no process survives. The captures' are addresses of memory that is there.)
    """
    table = recording.table
    launches = [("graph", recording.launch)]
    if not table.why_not_direct:
        launches.append(("kernels", recording.launch_kernels))
    # Every kernel is patched here: what the graph ends up with is the noise that the recording says.
    noises = [recording.with_other_noise(), recording.patches] if recording.noise else [recording.patches]
    ways = [(way, launch, patches) for patches in noises for way, launch in launches]
    alive: list[Any] = []  # so that every round has other addresses
    index = scratch.lane.index

    def made(alignment: int, seed: int) -> list[torch.Tensor]:
        # Other values in each: of two inputs with the same ones nobody sees that one was taken for the other.
        return [place(spec, index, alignment, seed + rounds * i) for i, spec in enumerate(specs)]

    if workspaces:
        scratch.lane.load_workspaces()
    with scratch.using():
        for c in captured:
            c.poison(table)
        for seed in range(1, rounds + 1):
            values, others = made(0, seed), made(0, seed)
            wanted = kernels(values)
            again = kernels(others)  # not the same: a run may write into what it is given
            if not _equal(wanted, again) or not _equal(values, others):
                return "two direct runs on the same inputs differ, so that nothing can be compared with them"
            for way, launch, patches in ways:
                inputs = made(recording.alignment, seed)
                outputs = [_guarded(nbytes, index) for nbytes in recording.storages]
                alive += [values, others, wanted, inputs, outputs]
                launch(inputs, [raw.data_ptr() + GUARD for raw in outputs], scratch.stream, patches)
                got = [
                    view.on(outputs[view.storage], GUARD) if table.bound[view.storage] else static
                    for view, static in zip(recording.views, recording.results, strict=True)
                ]
                if not _equal(wanted, got):
                    return f"bound to other tensors, its {way} gave other bits than a direct run"
                for j, (raw, nbytes) in enumerate(zip(outputs, recording.storages, strict=True)):
                    stop = GUARD + -(-nbytes // BLOCK) * BLOCK
                    if not bool((raw[:GUARD] == POISON).all() and (raw[stop:] == POISON).all()):
                        return f"bound to other tensors, its {way} wrote outside output {j}"
                if not _equal(inputs, values):
                    return f"bound to other tensors, its {way} left other values in an input than a direct run"
                if not all(c.is_poisoned(table) for c in captured):
                    return f"bound to other tensors, its {way} wrote to the old ones"
    return ""


def _equal(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(_bits(x), _bits(y)) for x, y in zip(xs, ys, strict=True))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _guarded(nbytes: int, index: int) -> torch.Tensor:
    """Poison, with room for an output storage after the first guard."""
    rounded = -(-nbytes // BLOCK) * BLOCK
    return torch.full((rounded + 2 * GUARD,), POISON, dtype=torch.uint8, device=f"cuda:{index}")
