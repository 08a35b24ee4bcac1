"""Calls of several pieces: captured graphs, and operators that cannot be captured between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from anabranch.backends import Stateful
from anabranch.errors import DeviceLost, FlagsChanged
from anabranch.export import Cut, Piece, cut
from anabranch.runtime._builder import Builder, Choice
from anabranch.runtime._calls import Calls
from anabranch.runtime._cost import Way, measure
from anabranch.runtime._phases import Clock
from anabranch.runtime._process import neutral
from anabranch.runtime._unit import Unit

_log = logging.getLogger("anabranch")

#: Microseconds that a piece may cost besides its own work, for what Python does between two.
_BETWEEN_US = 8.0


@dataclass(frozen=True)
class Part:
    """A piece with what runs it."""

    piece: Piece
    unit: Unit
    calls: Calls
    choice: Choice

    @property
    def why_direct(self) -> str:
        """Why it runs direct, or nothing."""
        program = self.piece.program
        return "" if self.choice.uses_graphs else str(program.direct_only or self.choice.reason)


class Pieces:
    """The calls of one signature, piece by piece.

    Threads: any. Streams: a call queues its pieces on the caller's stream, one after another, so each sees what those
    before it have computed. What passes between them are tensors of the caller's stream, dropped as soon as the last
    piece that reads them was queued. A piece that has a graph holds a context for as long as it queues its own work:
    no call has one in hand while the host waits for the device in a direct piece. Inside a caller's capture a call
    runs the whole program at once, or raises before anything is queued.
    """

    #: Its calls come by Python.
    takes_plain_tensors = False

    def __init__(self, unit: Unit, whole: Calls, made: Cut, parts: Sequence[Part]) -> None:
        """``whole``: what runs the program in one piece."""
        self.parts, self.whole = tuple(parts), whole
        #: Why a call runs in pieces, where that was measured.
        self.measured = ""
        #: Which values the program's results are.
        self.results = made.results
        self._unit, self._device = unit, unit.device
        self._steps = [(part.calls, part.piece.takes, part.piece.drops) for part in parts]
        #: Of what may turn a call down in the middle of it.
        self._watches = [p.unit.watch for p in parts if not p.choice.uses_graphs and p.unit.watch.reads_any]

    def __call__(self, leaves: Sequence[Any], state: Sequence[torch.Tensor] = ()) -> Any:
        """As :meth:`Calls.__call__`."""
        unit, device = self._unit, self._device
        if device.is_capturing(device.current_stream(unit.index)):
            return self.whole(leaves, state)
        given, inputs = unit.inputs(leaves, state)
        return unit.finish(given, self.run(inputs))

    def run(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """The program's results. ``inputs`` are what lies in memory of a call's."""
        for watch in self._watches:
            watch.check()
        values: list[Any] = list(inputs)
        try:
            for calls, takes, drops in self._steps:
                values += calls([values[i] for i in takes])
                for i in drops:
                    values[i] = None
        except FlagsChanged as e:
            e.wrote = bool(self._unit.written)  # in a piece before, perhaps
            raise
        return [values[i] for i in self.results]

    @property
    def captured(self) -> list[Part]:
        """Those that have graphs."""
        return [part for part in self.parts if part.choice.uses_graphs]

    def warm(self, contexts: int) -> int:
        """Build until each piece has ``contexts`` of them or a limit is reached; returns how many calls have one."""
        captured = self.captured
        for n in range(1, contexts + 1):  # in turn: the limits are for all of them
            for part in captured:
                part.calls.contexts.warm(max(n, len(part.calls.contexts.pool)))
        return min(len(part.calls.contexts.pool) for part in captured)

    def trim(self) -> None:
        """Give up the contexts that are idle."""
        for part in self.parts:
            part.calls.contexts.trim()

    def explain(self) -> list[str]:
        """How each piece runs, a line each."""
        lines = []
        for k, part in enumerate(self.parts):
            how = f"captured, {part.choice.backend}" if part.choice.uses_graphs else "direct"
            why = f": {part.why_direct}" if part.why_direct else ""
            lines.append(f"piece {k}: {how}, {part.piece.operators} operators{why}")
            lines += [f"  {line}" for line in part.calls.explain()]
        if self.measured:
            lines.append(f"pieces: {self.measured}")
        return lines


def build_pieces(
    unit: Unit, whole: Calls, choice: Choice, make_calls: Callable[[Unit], Calls], clock: Clock
) -> Pieces | str:
    """The calls of a program that cannot be captured as a whole, in pieces; or why they stay in one, or nothing.

    ``choice``: what runs it in one piece, which calls go on doing where anything goes wrong here. Called with the build
    lock held; the host waits for lanes of its own.
    """
    program, settings = unit.program, unit.settings
    if not unit.device.has_streams or program.is_empty or not program.uncaptured or program.takes_numbers:
        return ""
    if settings.cuda_graphs is False:
        return ""
    if isinstance(choice.kernels, Stateful) or settings.backend == "tensorrt":
        return "not in pieces: TensorRT's engines are not cut"
    if settings.require_full and settings.backend != "eager":
        return "not in pieces: require_full=True was given, and operators between graphs are PyTorch's"
    made = cut(program, unit.specs, unit.torch_device)
    if isinstance(made, str):
        return f"not in pieces: {made}"
    try:
        return _build(unit, whole, choice, made, make_calls, clock)
    except (FlagsChanged, DeviceLost):
        raise
    except Exception as e:  # values that were made up between pieces may be at fault
        unit.device.check_error(e)
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        _log.info("%s: not in pieces: %s", settings.name, why)
        return f"not in pieces: {why}"


def _build(
    unit: Unit, whole: Calls, choice: Choice, made: Cut, make_calls: Callable[[Unit], Calls], clock: Clock
) -> Pieces | str:
    parts = [_part(unit, piece, make_calls, clock, not piece.is_captured) for piece in made.pieces]
    captured = [part for part in parts if part.choice.uses_graphs]
    if not captured:
        return f"not in pieces: {next(part.choice.reason for part in parts if part.piece.is_captured)}"
    others = [part for part in parts if part is not captured[0]]
    pieces = Pieces(unit, whole, made, parts)
    if unit.settings.cuda_graphs is None and unit.device.has_time:
        with clock.phase("measuring"):
            ours, direct = _measure(unit, pieces, make_calls, clock)
        choice.measured |= {"pieces": ours, "direct": direct}
        pieces.measured = f"measured {ours:.0f} us in pieces, {direct:.0f} us direct"
        if ours > direct:
            return f"not in pieces: {pieces.measured}"
    unit.counters.include([part.unit.counters for part in (captured[0], *others)])
    return pieces


def _part(unit: Unit, piece: Piece, make_calls: Callable[[Unit], Calls], clock: Clock, direct: bool) -> Part:
    settings = replace(unit.settings, backend="eager", cuda_graphs=False) if direct else unit.settings
    # Each counts for itself: a user's call is one, however many pieces it has.
    own = Unit(settings, piece.program, piece.signature, unit.limits, type(unit.counters)(), is_part=True)
    calls = make_calls(own)
    return Part(piece, own, calls, Builder(own, calls, clock).build(()))


def _measure(unit: Unit, pieces: Pieces, make_calls: Callable[[Unit], Calls], clock: Clock) -> tuple[float, float]:
    """Microseconds of a call in pieces and in one.

    What depends on data cannot run on made-up values. It costs the same either way, so what counts is each captured
    piece, by its graph and by the operators that would run it in one direct program, and what is between pieces.
    """
    if not unit.program.data_dependent:
        with pieces.whole.trying_direct() as direct:
            return _race(unit, pieces.run, direct)
    ours, theirs = _BETWEEN_US * len(pieces.parts), 0.0
    for part in pieces.captured:
        twin = _part(unit, part.piece, make_calls, clock, True)
        with twin.calls.trying_direct() as direct:
            graph, operators = _race(part.unit, part.calls, direct)
        ours, theirs = ours + graph, theirs + operators
    return ours, theirs


def _race(unit: Unit, first: Way, second: Way) -> tuple[float, float]:
    """Microseconds of two ways to run a call of ``unit``."""
    device = unit.device
    examples: list[Any] = []
    with neutral(device, unit.index), device.relaxed():
        scratch = device.scratch(unit.index)
        try:
            if unit.workspaces:
                scratch.lane.load_workspaces()  # first of all, as in Builder
            with scratch.using():
                examples = [unit.examples(), unit.examples()]
                ways = [unit.resetting(way) for way in (first, second)]
                costs = measure(ways, examples, scratch.stream)
        finally:
            scratch.stream.synchronize()
            examples = []
            device.release_scratch(scratch)
    return costs[0].us, costs[1].us
