"""One real call of a model before it is traced, and what it tells.

Caches that are filled at the first call (``functools.cache``, global tables, attributes) then hold real tensors, not
the stand-ins that tracing computes with. And it shows what a trace cannot: state of Python's that the model reads or
changes in each call.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import os
import random
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from anabranch.export._hooks import HOOKS, OF_MODULES, hooks_of
from anabranch.export._indices import has_mask, is_indexing
from anabranch.export._isolation import Withheld
from anabranch.export._random import draws
from anabranch.export._snapshot import Fresh

_aten = torch.ops.aten
_TORCH = str(Path(torch.__file__).parent)
_CONTEXTLIB = contextlib.__file__
#: Of PyTorch's files, those that call a model's code.
_CALLS_MODELS = (f"{_TORCH}/nn/", f"{_TORCH}/utils/checkpoint.py")
#: Where Dynamo begins to compile, as for `torch.cond`. Under a mode it fails, and then traces the same code no more, in
#: no export either.
_COMPILES = (f"{_TORCH}/_dynamo/eval_frame.py", "compile_wrapper")
#: What reads a clock: functions of ``time``, and methods of the classes of ``datetime``.
_CLOCKS = frozenset(
    (
        *(time.time, time.perf_counter, time.monotonic, time.process_time, time.thread_time),
        *(time.time_ns, time.perf_counter_ns, time.monotonic_ns, time.process_time_ns, time.thread_time_ns),
        *(time.localtime, time.gmtime, time.ctime),
    )
)
_NOW = frozenset(("now", "utcnow", "today"))
#: How often a call may look at the value of a tensor. One that loops until a value is reached might never end.
_MOST_LOOKS = 1000
#: Methods of PyTorch's generators that change what is drawn next, other than by drawing.
_SETS_STATE = frozenset(("manual_seed", "seed", "set_state", "set_offset", "graphsafe_set_state"))
#: Functions of PyTorch's that set those of several devices, one after another.
_SEEDS_ALL = frozenset((torch.random.__file__, name) for name in ("manual_seed", "seed"))
_NUMPY = "NumPy's"
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_CONTAINERS = (list, dict, set, collections.deque)
_ATOMIC = (bool, int, float, complex, str, bytes, type(None))


class _StopTrial(Exception):
    """The call cannot go on without doing harm, or for too long."""


@dataclass
class Trial:
    """What one real call showed."""

    #: Whether it came to its end.
    finished: bool
    #: What it took from Python's or NumPy's generators, or from the clock, with the model's lines.
    draws: list[str] = field(default_factory=list)
    #: Attributes and global variables that it changed.
    changes: list[str] = field(default_factory=list)
    #: Where it was about to set the state of one of PyTorch's generators: the model's line.
    seeds: str = ""
    #: Tensors of the model that it would have written.
    written: list[torch.Tensor] = field(default_factory=list)


def needs_trial(module: torch.nn.Module) -> bool:
    """Whether a model has any code but PyTorch's own layers.

    Not in a thread that is being profiled: the call is watched by a profile function, and a thread has one.
    """
    if sys.getprofile() is not None:
        return False
    for part in module.modules():
        kind = type(part)
        if not kind.__module__.startswith("torch.") or "forward" in part.__dict__:
            return True
    return any(True for _ in hooks_of(module))


def try_out(call: Callable[[], Any], traced: Fresh) -> Trial:
    """Make one call of a model, which ``call`` does on made-up values.

    No weight is written, and no random number is drawn of PyTorch's generators, which other threads draw from as well.
    What the call raises is left for the trace to find out. On a GPU nothing is read or written at an index, which for
    made-up values may be none, and the call ends where it depends on data. It ends where one of those generators would
    be seeded, too.
    """
    before = state_of(traced, containers=True)
    used: dict[str, None] = {}
    seeds: list[str] = []
    finished = False
    harmless = _Harmless(traced)
    try:
        with torch.no_grad(), _watch_python(used, seeds), harmless, harmless.withheld:
            call()
        finished = True
    except Exception:
        pass
    after = state_of(traced, containers=True)
    changed = changed_between(before, after)
    changed += [name for name in after if name not in before and not name.startswith(("self.", _NUMPY))]
    drawn = [f"draws from {name}" for name in changed if name.startswith(_NUMPY)]
    changes = [f"changes {name}" for name in changed if not name.startswith(_NUMPY)]
    return Trial(finished, [*used, *drawn], changes, "".join(seeds[:1]), harmless.written())


def rehearse(call: Callable[[], Any], traced: Fresh) -> Trial:
    """Make one call of a model on values that it may be called with: what would it write of what it holds?

    Nothing of it is written. The random generators, and what is in the globals of its code, are used as in any call.
    Not finished: it raised, or it does what is not possible while it is watched.
    """
    if sys.getprofile() is not None:
        return Trial(False)

    def profile(frame: types.FrameType, event: str, function: Any) -> None:
        if event == "call" and (frame.f_code.co_filename, frame.f_code.co_name) == _COMPILES:
            raise _StopTrial("compiles")

    harmless, finished = _Harmless(traced, made_up=False), False
    sys.setprofile(profile)
    try:
        with torch.no_grad(), harmless, harmless.withheld:
            call()
        finished = True
    except Exception:
        pass
    finally:
        sys.setprofile(None)
    return Trial(finished, written=harmless.written())


class _Harmless(TorchDispatchMode):
    def __init__(self, traced: Fresh, *, made_up: bool = True) -> None:
        """``made_up``: the values are. What depends on them then may go wrong."""
        super().__init__()
        plain = [t for t in traced.sources.values() if t.layout is torch.strided and type(t) in _PLAIN]
        #: Identities of the memory that the user's model shares.
        self._storages = {t.untyped_storage()._cdata for t in plain}
        self.withheld = Withheld(self._is_weight)
        self._made_up = made_up
        self._written: dict[int, torch.Tensor] = {}
        self._looks = 0

    def written(self) -> list[torch.Tensor]:
        """What would have been written, of the model's."""
        return [*self._written.values(), *self.withheld.written()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            self._looks += 1
            if self._looks > _MOST_LOOKS:
                raise _StopTrial("looks at values again and again")
        weights = [x for x in written(func, args, kwargs) if self._is_weight(x)]
        if weights:
            self._written.update((id(x), x) for x in weights)
            return self._unwritten(func, args, kwargs, weights)
        if not self._made_up:
            return func(*args, **kwargs)
        if draws(func, args, kwargs):
            return _zeros(func, args, kwargs)
        if isinstance(func, torch._ops.OpOverload) and any(_has_streams(x) for x in pytree.tree_leaves((args, kwargs))):
            masked = has_mask(func, args)
            if is_indexing(func) and not masked:
                return _zeros(func, args, kwargs)
            if masked or torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
                raise _StopTrial("depends on data")
        return func(*args, **kwargs)

    def _unwritten(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], weights: Sequence[Any]) -> Any:
        """What an operator hands back that would write into these weights, and does not."""
        returns = func._schema.returns
        if all(r.alias_info is not None for r in returns):
            results = list(written(func, args, kwargs))
            return None if not returns else results[0] if len(returns) == 1 else tuple(results)
        ids = {id(x) for x in weights}
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda x: x.clone() if id(x) in ids else x, (tuple(args), dict(kwargs))
        )
        return func(*args, **kwargs)

    def _is_weight(self, x: Any) -> bool:
        return (
            isinstance(x, torch.Tensor) and x.layout is torch.strided and x.untyped_storage()._cdata in self._storages
        )


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """What an operator writes into."""
    name = func.name()
    # These do not say that they update running statistics.
    norm = ("batch_norm" in name or "instance_norm" in name) and "no_training" not in name
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        info = argument.alias_info
        if (info is not None and info.is_write) or (
            norm and argument.name.startswith("running_") and _trains(func, args)
        ):
            yield from value if isinstance(value, list | tuple) else (value,)


def _trains(func: Any, args: Sequence[Any]) -> bool:
    positions = [i for i, a in enumerate(func._schema.arguments) if a.name in ("training", "use_input_stats")]
    return not positions or len(args) <= positions[0] or bool(args[positions[0]])


def _has_streams(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type not in ("cpu", "meta")


def _zeros(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator would give, with zeros for the numbers."""
    returns = func._schema.returns
    if any(r.alias_info is not None for r in returns):
        results = [x for x in written(func, args, kwargs) if isinstance(x, torch.Tensor)]
        for x in results:
            x.zero_()
        return results[0] if len(returns) == 1 else tuple(results)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (tuple(args), dict(kwargs)))
    with mode:
        made = func(*args, **kwargs)
    return pytree.tree_map_only(
        torch.Tensor,
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).zero_(),
        made,
    )


# -- state of Python's ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _watch_python(used: dict[str, None], seeds: list[str]) -> Iterator[None]:
    """Note in ``used`` each draw of ``random`` and each look at the clock that the model's own code makes.

    In ``seeds``, where the state of one of PyTorch's generators is about to be set: that ends the call before.
    """
    before = sys.getprofile()

    def seeding(frame: types.FrameType) -> NoReturn:
        seeds.append(_caller_of_torch(frame))
        raise _StopTrial("seeds a generator")

    def profile(frame: types.FrameType, event: str, function: Any) -> None:
        called = (frame.f_code.co_filename, frame.f_code.co_name) if event == "call" else None
        if called == _COMPILES:
            raise _StopTrial("compiles")
        if called in _SEEDS_ALL:
            seeding(frame)
        if event != "c_call":
            return
        owner = getattr(function, "__self__", None)
        if isinstance(owner, torch.Generator) and function.__name__ in _SETS_STATE:
            seeding(frame)
        is_builtin = isinstance(function, types.BuiltinFunctionType)
        if isinstance(owner, random.Random):
            what = "draws from random"
        elif is_builtin and (function in _CLOCKS or (_is_date(owner) and function.__name__ in _NOW)):
            what = "reads the clock"
        elif is_builtin and function is os.urandom:
            what = "draws from os.urandom"
        else:
            return
        line = _line_of_model(frame)
        if line:
            used[f"{what} ({line})"] = None

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def _is_date(owner: Any) -> bool:
    return isinstance(owner, type) and issubclass(owner, datetime.date)


def _caller_of_torch(frame: types.FrameType) -> str:
    """The line that ``frame`` works for, of whoever called PyTorch."""
    caller: types.FrameType | None = frame
    while caller is not None and caller.f_code.co_filename.startswith((_TORCH, _CONTEXTLIB)):
        caller = caller.f_back
    return f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}" if caller is not None else "unknown line"


def _line_of_model(frame: types.FrameType) -> str:
    """The line that ``frame`` works for, if that is the model's; nothing if PyTorch works for itself."""
    line = ""
    caller: types.FrameType | None = frame
    while caller is not None:
        name = caller.f_code.co_filename
        if name.startswith(_TORCH):
            return line if name.startswith(_CALLS_MODELS) else ""
        if not line and name != random.__file__:
            line = f"{Path(name).name}:{caller.f_lineno}"
        caller = caller.f_back
    return line


def state_of(traced: Fresh, containers: bool = False) -> dict[str, Any]:
    """By name what a call might change: attributes, numbers in the globals of the model's code, NumPy's generators.

    ``containers``: how much those in the globals hold, too. Other threads may change that.
    """
    found: dict[str, Any] = {}
    spaces: dict[str, Any] = {}
    for name, part in traced.module.named_modules():
        for key, value in list(part.__dict__.items()):
            if key not in OF_MODULES and key not in HOOKS:
                found[f"self.{name}.{key}" if name else f"self.{key}"] = _summary(value, 0)
        for kind in type(part).__mro__:
            if not kind.__module__.startswith(("torch.", "builtins", "typing")):
                spaces[kind.__qualname__] = vars(kind)
        where = type(part).__module__
        if not where.startswith("torch.") and where in sys.modules:
            spaces[where] = vars(sys.modules[where])
    for where, space in spaces.items():
        for key, value in list(space.items()):
            if key.startswith("__"):
                continue
            if isinstance(value, int | float):
                found[f"{where}.{key}"] = value
            elif containers and isinstance(value, _CONTAINERS):
                found[f"{where}.{key}"] = len(value)
            elif containers and type(value).__module__ == "itertools":
                found[f"{where}.{key}"] = repr(value)
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        for i, generator in enumerate([numpy.mtrand._rand, *traced.generators]):
            bits = getattr(generator, "bit_generator", None) or generator._bit_generator
            found[f"{_NUMPY}.random" if not i else f"{_NUMPY} {type(generator).__name__}"] = repr(bits.state)
    return found


def changed_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what differs in two states of :func:`state_of`."""
    return [name for name in after if name in before and not _same(before[name], after[name])]


def _summary(value: Any, depth: int) -> Any:
    if isinstance(value, _ATOMIC):
        return value
    if depth > 3 or isinstance(value, torch.Tensor | torch.nn.Module | type | types.FunctionType | types.ModuleType):
        return None
    if isinstance(value, Mapping):
        items: Iterable[Any] = list(value.items())[:100]
        return len(value), [(_summary(k, depth + 1), _summary(v, depth + 1)) for k, v in items]
    if isinstance(value, list | tuple | set | frozenset):
        return len(value), [_summary(v, depth + 1) for v in list(value)[:100]]
    if type(value).__module__ == "itertools":
        return repr(value)
    space = getattr(value, "__dict__", None)
    if isinstance(space, dict):
        return [(k, _summary(v, depth + 1)) for k, v in list(space.items())[:100]]
    return None


def _same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)  # to which NaN is NaN
