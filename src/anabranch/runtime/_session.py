"""Sessions: state that a model writes and keeps, apart from the engine that all of them share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from anabranch import _activity, _sync
from anabranch.devices import Device
from anabranch.errors import (
    EngineClosed,
    FlagsChanged,
    InputError,
    NeedsSession,
    NotCapturable,
    SessionBroken,
    SessionBusy,
    SessionClosed,
    SessionFull,
)
from anabranch.export import Room, State
from anabranch.runtime._process import neutral

if TYPE_CHECKING:
    from anabranch.runtime._engine import Engine
    from anabranch.runtime._specialization import Specialization

_Result = TypeVar("_Result")
#: Arguments for a lock's acquire(): take it only if it is free.
_AT_ONCE = (False,)
#: What copies of counters hold that sessions have given, each with its version then.
_counted: Any = WeakTensorKeyDictionary()
#: Raised before anything is queued: the state is what it was.
_HARMLESS = (InputError, NotCapturable, EngineClosed, SessionFull)


def _is_harmless(e: BaseException) -> bool:
    return isinstance(e, _HARMLESS) or (isinstance(e, FlagsChanged) and not e.wrote)


class _Memory:
    """The tensors of one session, by name of the buffer. Used again only after ``done``, once this is gone."""

    def __init__(self, device: Device, index: int, initial: Mapping[str, torch.Tensor]) -> None:
        """``initial``: what they are copied from."""
        self.tensors: dict[str, torch.Tensor] = {}
        #: Recorded after whatever was queued last that uses them.
        self.done: Any = None
        if device.has_streams:
            self.done = device.event()
            device.prepare_retire(index)
            weakref.finalize(self, _retire, device, self.tensors, initial, self.done).atexit = False


def _retire(
    device: Device, tensors: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor], done: Any
) -> None:
    # Also what a copy that is still queued reads: the engine may go with its last session.
    device.retire([done], [*tensors.values(), *initial.values()])


@_sync.atomics("_memory", "_why_broken")
class Session:
    """State of its own over the weights of an engine. Made by :meth:`Engine.session`; called as an engine is.

    State is what the model's buffers hold that its calls write into. It begins as it was when the engine was compiled.
    Sessions have nothing in common that is written: any number of them may be called at once, and each call uses the
    same graphs, bound to its session's tensors.

    Threads: any may call it, one at a time; a second one at the same moment gets
    :class:`~anabranch.errors.SessionBusy`, and what the first does is not disturbed. Streams: whatever a session does
    is queued on the calling thread's current stream of the device, after all that it did before, on whatever streams.
    The host does not wait. Inside a CUDA graph capture of the caller's a call works and is not ordered with what is
    outside of it: each replay goes on from the state that it finds, and who replays orders that.
    """

    def __init__(
        self,
        engine: Engine,
        initial: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor] | None = None,
        begins: bool = True,
    ) -> None:
        """``initial``: the engine's own of each buffer that is known to be written by now; others follow when a call
        needs them. ``state``: to go on from, instead. ``begins``: the tensors are made at once."""
        self._engine, self._initial = engine, initial
        self._device: Device = engine._device
        self._index = engine._index
        self._busy = _sync.lock("session")
        #: None once it is closed.
        self._memory: _Memory | None = _Memory(self._device, self._index, initial)
        self._why_broken = ""
        #: Of counters among the state: how far they have got; None where that is not known.
        self._counts: dict[str, int | None] = dict(engine._initial_counts)
        #: Whether the call under way may have written into the state.
        self._is_writing = False
        self._began(self._memory)
        if begins:
            self._alone(lambda: self._ordered(lambda memory: self._tensors(memory, list(initial))))
        if state is not None:
            self.load(state)

    @_activity.call
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on these inputs and on the session's state, and return what it returns.

        As a call of the engine; tensors that are returned are never the state itself, which the next call changes.
        Raises what the engine's call raises, and :class:`~anabranch.errors.SessionBusy`,
        :class:`~anabranch.errors.SessionBroken` after a call that failed in the middle,
        :class:`~anabranch.errors.SessionFull`, :class:`~anabranch.errors.SessionClosed`.
        """
        engine, kept = self._engine, list[Any]()

        def call() -> Any:
            self._usable()
            self._is_writing = False  # what fails before that, while a new signature is compiled say, does no harm
            try:
                return engine._call_for(self, args, kwargs, kept)
            except BaseException as e:
                if self._is_writing and not _is_harmless(e):
                    self._break(e)
                raise

        return self._alone(call)

    def run(self, specialization: Specialization, leaves: Sequence[Any]) -> Any:
        """A call, ordered with what the session did before. Only from within :meth:`__call__`."""
        memory, device = self._usable(), self._device
        names = specialization.unit.states
        rooms = specialization.rooms(leaves)
        self._check_room(rooms)
        if not device.has_streams:
            tensors = self._tensors(memory, names)
            self._bind(specialization, tensors, rooms)
            self._is_writing = True
            return self._counted(rooms, specialization.calls(leaves, tensors))
        stream = device.current_stream(self._index)
        if device.is_capturing(stream):
            missing = [name for name in names if name not in memory.tensors]
            if missing:
                raise NotCapturable(
                    f"this call is inside a CUDA graph capture, and the session has no state {missing[0]!r} yet. Call"
                    " session.reset() before the capture."
                )
            device.join_capture(stream, self._index, keep=memory)
            self._write_counts(dict.fromkeys(self._initial))  # replays count, too
            self._is_writing = True
            return specialization.calls(leaves, [memory.tensors[name] for name in names])
        stream.wait_event(memory.done)
        try:
            tensors = self._tensors(memory, names)
            self._bind(specialization, tensors, rooms)
            self._is_writing = True
            return self._counted(rooms, specialization.calls(leaves, tensors))
        finally:
            memory.done.record(stream)

    def _break(self, error: BaseException) -> None:
        self._why_broken = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def _began(self, memory: _Memory) -> None:
        """For a runtime whose calls are not in Python: there is a session to call."""

    def _bind(self, specialization: Specialization, state: Sequence[torch.Tensor], rooms: Sequence[Room]) -> None:
        """For such a runtime: calls of ``specialization`` use these of the session's tensors, and count so."""

    def _changed(self) -> None:
        """For such a runtime: something was queued here, or the session may be called, or may not."""

    # -- the state ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """A copy of the state: a tensor for each buffer that the model writes, by its name, on the current stream.

        ``torch.save`` takes it, and :meth:`load`.
        """
        return self._alone(lambda: self._ordered(self._copies))

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from ``state``, which :attr:`state` gave of a session of such an engine; a broken one is whole again.

        The host waits where a tensor is on another device. Raises
        :class:`~anabranch.errors.InputError` where names, shapes or dtypes are not those of the model's state.
        """

        def loading(memory: _Memory) -> None:
            if not isinstance(state, Mapping):
                raise InputError(
                    f"a {type(state).__name__} was given; expected a dict of tensors by name. Pass what session.state"
                    " gave."
                )
            own = self._own(memory)
            for name in sorted(own.keys() ^ state.keys()):
                what = "is missing" if name in own else "is none of the model's"
                raise InputError(f"state {name!r} {what}; expected {', '.join(map(repr, own)) or 'nothing'}")
            for name, x in own.items():
                y = state[name]
                if not isinstance(y, torch.Tensor):
                    raise InputError(f"state {name!r} is a {type(y).__name__}; expected a tensor")
                if y.shape != x.shape or y.dtype != x.dtype:
                    raise InputError(
                        f"state {name!r} is {y.dtype} of shape {tuple(y.shape)}; expected {x.dtype} of shape"
                        f" {tuple(x.shape)}"
                    )
            for name, x in own.items():
                x.copy_(state[name])
            self._write_counts({name: _count_in(state[name]) for name in self._engine._initial_counts})

        self._mend(loading)

    def reset(self) -> None:
        """Begin again: the state is what it was at first; a broken session is whole again."""

        def resetting(memory: _Memory) -> None:
            for name, x in self._own(memory).items():
                x.copy_(self._initial[name])
            self._write_counts(dict(self._engine._initial_counts))

        self._mend(resetting)

    def clone(self) -> Session:
        """Another session, which goes on from where this one is."""
        made = type(self)(self._engine, self._initial, begins=False)

        def copying(memory: _Memory) -> None:
            assert made._memory is not None
            made._memory.tensors.update(self._copies(memory))
            made._write_counts(self._read_counts())
            if self._device.has_streams:
                made._memory.done.record(self._device.current_stream(self._index))
            made._changed()

        self._alone(lambda: self._ordered(copying))
        return made

    def close(self) -> None:
        """Give the state's memory back, once what is queued is done; later calls raise. May be repeated."""
        self._memory = None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # A copy would have the same tensors, and know nothing of what the other one does with them.
        raise InputError(
            f"{self!r} was to be copied or pickled, and its state can be in one place only. Use session.clone(), or"
            " save session.state."
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        memory = self._memory
        if memory is None:
            return f"<session of {self._engine!r}, closed>"
        nbytes = sum(x.nbytes for x in list(memory.tensors.values()))
        return f"<session of {self._engine!r}, {nbytes} bytes of state>"

    # -- counters -----------------------------------------------------------------------------------------------

    def _check_room(self, rooms: Sequence[Room]) -> None:
        counts = self._read_counts()
        for room in rooms:
            count = counts.get(room.name)
            if count is not None and room.limit is not None and count > room.limit:
                raise SessionFull(
                    f"{self!r} is full: its state {room.name!r} is {count}, and with inputs like these the model stays"
                    f" within its state up to {room.limit}. Call session.reset(), or load() a state with room, or"
                    " compile a model with more of it."
                )

    def _counted(self, rooms: Sequence[Room], results: _Result) -> _Result:
        """A call was queued that counts so."""
        counts = self._read_counts()
        for room in rooms:
            count = counts.get(room.name)
            counts[room.name] = None if count is None or room.step is None else count + room.step
        self._write_counts(counts)
        return results

    def _read_counts(self) -> dict[str, int | None]:
        return dict(self._counts)

    def _write_counts(self, counts: Mapping[str, int | None]) -> None:
        self._counts = dict(counts)

    # -- order --------------------------------------------------------------------------------------------------

    def _alone(self, work: Callable[[], _Result]) -> _Result:
        """``work()``, unless another thread, or this one further up, is at work with the session."""
        taken: list[bool] = []
        try:
            # One call, as far as a signal can tell: it comes before the lock is taken, or when the list says so.
            taken.extend(map(self._busy.acquire, _AT_ONCE))
            if not taken[0]:
                raise SessionBusy(
                    f"{self!r} is in use by another call at this moment; its calls follow one another. Use a session"
                    " for each thread, or a lock around the calls."
                )
            return work()
        finally:
            if taken and taken[0]:
                self._changed()
                self._busy.release()

    def _usable(self) -> _Memory:
        if self._memory is None:
            raise SessionClosed(f"{self!r} cannot be used any more; make another one with engine.session()")
        if self._why_broken:
            raise SessionBroken(
                f"an earlier call of {self!r} failed, and its state may be half of one call's and half of another's"
                f" ({self._why_broken}). Call session.reset(), or session.load() with a state that you saved."
            )
        return self._memory

    def _mend(self, write: Callable[[_Memory], None]) -> None:
        """Write the whole state anew."""

        def mending() -> None:
            why, self._why_broken = self._why_broken, ""
            try:
                self._ordered(write)
            except BaseException as e:
                self._why_broken = why if isinstance(e, _HARMLESS) else f"{type(e).__name__} in the middle of a write"
                raise

        self._alone(mending)

    def _ordered(self, work: Callable[[_Memory], _Result]) -> _Result:
        """``work`` on the state, on the current stream, after what the session did before and ahead of what follows."""
        self._engine._check_usable()
        memory, device = self._usable(), self._device
        with neutral(device, self._index), torch.no_grad():
            if not device.has_streams:
                return work(memory)
            stream = device.current_stream(self._index)
            if device.is_capturing(stream):
                raise NotCapturable(
                    "the state of a session is looked at or changed inside a CUDA graph capture, where it cannot be"
                    " ordered with the session's calls. Do that outside of the capture."
                )
            stream.wait_event(memory.done)
            try:
                return work(memory)
            finally:
                memory.done.record(stream)

    def _tensors(self, memory: _Memory, names: Iterable[str]) -> list[torch.Tensor]:
        """The session's own tensors of these buffers; new ones begin as the engine has them."""
        own, counts = memory.tensors, self._engine._initial_counts
        for name in names:
            if name not in own:
                own[name] = self._initial[name].clone()
                self._write_counts({**self._read_counts(), name: counts.get(name)})
        return [own[name] for name in names]

    def _own(self, memory: _Memory) -> dict[str, torch.Tensor]:
        """The session's own tensors of all buffers that are known to be written by now."""
        names = list(self._initial)  # another thread may be compiling, and find more
        return dict(zip(names, self._tensors(memory, names), strict=True))

    def _copies(self, memory: _Memory) -> dict[str, torch.Tensor]:
        copies = {name: x.clone() for name, x in self._own(memory).items()}
        for name, count in self._read_counts().items():
            if count is not None and name in copies:
                _counted[copies[name]] = count, copies[name]._version
        return copies


def _count_in(x: torch.Tensor) -> int | None:
    """What a counter holds, if that is known without a wait for a device."""
    if x.device.type == "cpu":
        return int(x)
    count, version = _counted.get(x, (None, 0))
    return count if x._version == version else None


def refuse_without_session(engine: Engine, state: Sequence[State]) -> NoReturn:
    """For a call of an engine whose model keeps state."""
    names = ", ".join(repr(s.name) for s in state[:3]) + (f" and {len(state) - 3} more" if len(state) > 3 else "")
    hint = next((f" {s.hint}" for s in state if s.hint), "")
    raise NeedsSession(
        f"{engine!r} was called itself, and its model keeps state ({names}), which is a session's: make one with"
        f" session = engine.session(), and call session(...).{hint}"
    )
